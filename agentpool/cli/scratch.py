"""The directory in which a run keeps the output of its jobs until it has been shown.

It is removed when the run ends. A run that was killed cannot do that; a later one does it: a directory is locked by
the run that made it, and the lock ends with its process. An empty directory without a lock may also be one that is
being made at this moment; after a minute it is not.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["scratch_directory"]

_PREFIX: Final = "agentpool-run-"
#: Seconds in which a directory that was made is locked, however busy the machine.
_MADE_WITHIN: Final = 60.0


@contextmanager
def scratch_directory() -> Iterator[str]:
    """A new directory, removed with all that is in it. Raises OSError where none can be made."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    path = tempfile.mkdtemp(prefix=_PREFIX)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # another user's, or just removed
            continue
        try:
            found = os.fstat(lock)
            if found.st_uid == os.getuid() and (os.listdir(lock) or time.time() - found.st_mtime > _MADE_WITHIN):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:  # its run goes on
            continue
        finally:
            os.close(lock)
