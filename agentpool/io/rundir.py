"""Where the pools of one user meet to share a budget: a directory that is private to the user.

Any thread may call it. Reads no environment: all processes of a user must find the same one, whatever session, job or
service they belong to, and it must outlive each of them. So it is not $XDG_RUNTIME_DIR, which goes with the last login.
"""

from __future__ import annotations

import os
import stat

from agentpool.errors import SettingsError

__all__ = ["default_runtime_directory", "private_directory"]


def default_runtime_directory() -> str:
    """The directory of this user's pools, which may not exist yet."""
    return f"/tmp/agentpool-{os.geteuid()}"


def private_directory(path: str) -> str:
    """Make `path` (and the directories above it) where it is missing, for this user alone, and return it.

    Raises SettingsError for one that belongs to somebody else, that others may enter, or that cannot be made.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise SettingsError(f"the runtime directory {path} cannot be made: {error.strerror}; name another") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise SettingsError(f"the runtime directory {path} is not a directory of this user: remove it, or name another")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise SettingsError(
            f"the runtime directory {path} is open to other users (mode {stat.S_IMODE(found.st_mode):o}): "
            f"chmod 700 {path}, or name another"
        )
    return path
