"""Where the sockets of this user's pools are, and that nobody else gets at them.

A folder is $XDG_RUNTIME_DIR/agentpool, or /tmp/agentpool-UID where there is no such directory: a pool uses the first
that it can, whoever looks for pools looks into all of them. It belongs to the user and is closed to all others (0700),
or it is not used. This is the one place outside of the command line that looks at the environment, as that variable is
how a session says where its sockets belong: docs/decisions/0046. Any thread; the standard library only.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

__all__ = ["NOTICE", "candidates", "connect", "listen", "open_folder", "remove_stale", "socket_names"]

#: PID-SERIAL-RANDOM.sock; with a leading dot while it is being made
_NAME: Final = re.compile(r"(\d{1,10})-(\d{1,10})-[0-9a-f]{8}\.sock")
_BEING_MADE: Final = re.compile(r"\.\d{1,10}-\d{1,10}-[0-9a-f]{8}\.sock")
#: Instead of ".sock": what a pool tells without being asked (`notice`).
NOTICE: Final = ".breaker"
#: A socket that is being made is finished after microseconds; its maker may be stopped meanwhile.
_MAKING_SECONDS: Final = 60.0
#: Clients that wait to be accepted. They wait while the pool's process is busy or stopped.
_BACKLOG: Final = 256
#: Names that a pool looks at as it starts, at most: somebody's ten thousand dead pools must not delay it.
_LOOKED_AT: Final = 200


def candidates() -> list[str]:
    """Folders in which this user's pools may have sockets, the preferred one first. They need not exist."""
    user = os.geteuid()
    found = []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        found.append(os.path.join(runtime, "agentpool"))
    found += [f"/run/user/{user}/agentpool", f"/tmp/agentpool-{user}"]
    return list(dict.fromkeys(found))


def usable() -> list[str]:
    """Folders for a new socket, in order of preference. What a session did not name is not taken: it ends before us."""
    user = os.geteuid()
    return [path for path in candidates() if path != f"/run/user/{user}/agentpool" or path == _named()]


def _named() -> str:
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR", ""), "agentpool")


def open_folder(path: str, *, create: bool = False) -> int:
    """A descriptor of the folder. Raises OSError: it is not there, not a directory, or open to others."""
    if create:
        with suppress(FileExistsError):  # somebody made it: looked at below
            os.mkdir(path, 0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    user = os.geteuid()
    # Root looks at other users' pools; a pool of root's keeps its socket where only root can write.
    if found.st_uid != user and (create or user != 0):
        problem = f"it belongs to user {found.st_uid}, not to user {user}"
    elif found.st_mode & 0o077:
        problem = f"other users may enter it (mode {stat.S_IMODE(found.st_mode):o}): chmod 700 it, if it is yours"
    else:
        return descriptor
    os.close(descriptor)
    raise PermissionError(errno.EPERM, f"the folder is not private: {problem}", path)


def _at(folder: int, name: str) -> str:
    """A path to the name that is short, however long the folder's is: a socket's address has room for 107 bytes."""
    return f"/proc/self/fd/{folder}/{name}" if os.path.isdir("/proc/self/fd") else name


def listen(path: str, serial: int) -> tuple[socket.socket, str]:
    """A socket that listens in that folder, which is made where it is not there, and its path. Raises OSError.

    It gets its name when it listens already, so whoever finds a name that refuses connections has found a dead one.
    """
    folder = open_folder(path, create=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name = f"{os.getpid()}-{serial}-{os.urandom(4).hex()}.sock"
        making = f".{name}"
        listener.setblocking(False)
        listener.bind(_at(folder, making))
        try:
            os.chmod(making, 0o600, dir_fd=folder)
            listener.listen(_BACKLOG)
            os.rename(making, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(making, dir_fd=folder)
            raise
        _remove_dead(folder)
        return listener, os.path.join(path, name)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(folder)


def _remove_dead(folder: int) -> None:
    """What dead pools left. One whose process lives is not even connected to, as that would wake it."""
    for name in _names(folder)[:_LOOKED_AT]:
        found = _NAME.fullmatch(name)
        if found is not None and not _is_running(int(found[1])):
            remove_stale(folder, name)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _names(folder: int) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def socket_names(folder: int) -> Iterator[str]:
    """The names of sockets in it, oldest process first; removes what was left half made."""
    names = []
    for name in _names(folder):
        if found := _NAME.fullmatch(name):
            names.append((int(found[1]), int(found[2]), name))
        elif _BEING_MADE.fullmatch(name):
            remove_stale(folder, name)
    for _, _, name in sorted(names):
        yield name


def connect(folder: int, name: str, seconds: float) -> socket.socket:
    """Connected to that socket. Raises OSError; ConnectionRefusedError means that nobody listens, nor ever will."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(seconds)
        connection.connect(_at(folder, name))
        return connection
    except BaseException:
        connection.close()
        raise


def remove_stale(folder: int, name: str) -> bool:
    """Remove the socket of a dead pool. A live one accepts a connection, in whatever container it lives; it stays.

    Names are never used twice, so the one that is removed is the one that refused.
    """
    try:
        if name.startswith("."):
            age_seconds = time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime
            if age_seconds < _MAKING_SECONDS:
                return False
        connect(folder, name, 0.0).close()
    except ConnectionRefusedError:
        try:
            with suppress(FileNotFoundError):
                os.unlink(name.removesuffix(".sock") + NOTICE, dir_fd=folder)
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:  # somebody else was quicker
            return False
        return True
    except OSError:
        return False
    return False
