"""Where what the processes of one user share is kept: the user's runtime directory, private to the user.

Any thread may call it. Reads no environment: `/run/user/UID` where the system made one, else `/tmp/agentpool-UID`.
"""

from __future__ import annotations

import os
import stat

from agentpool.errors import SettingsError

__all__ = ["default_runtime_directory", "private_directory"]


def default_runtime_directory() -> str:
    """The directory of this user's pools, which may not exist yet."""
    uid = os.geteuid()
    systems = f"/run/user/{uid}"
    if os.path.isdir(systems) and os.access(systems, os.W_OK | os.X_OK):
        return f"{systems}/agentpool"
    return f"/tmp/agentpool-{uid}"


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
