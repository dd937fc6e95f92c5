"""What one task writes to its standard output and error: two pipes that the parent reads, bytes that become text.

Knows nothing of tasks and events. Called by the manager thread alone.
"""

from __future__ import annotations

import codecs
import os
from typing import Final

__all__ = ["TaskOutput"]

_READ: Final = 64 * 1024
#: Reads of one pipe at the end of the task, which empty it of what the task wrote: a process that it left may go on.
_LAST_READS: Final = 16

_NAMES: Final = ("stdout", "stderr")


class TaskOutput:
    """Two pipes, standard output and standard error, and a decoder each."""

    def __init__(self, descriptors: list[int]) -> None:
        #: those that are not at their end
        self.open = dict(zip(_NAMES, descriptors, strict=True))
        make = codecs.getincrementaldecoder("utf-8")
        self._decoders = {name: make(errors="replace") for name in _NAMES}

    def read(self, name: str) -> tuple[bytes, str]:
        """What can be had of one of them now, as bytes and as text. At its end it is left out of `open`: close it."""
        descriptor = self.open.get(name)
        if descriptor is None:
            return b"", ""
        try:
            data = os.read(descriptor, _READ)
        except BlockingIOError:
            return b"", ""
        if not data:
            del self.open[name]
        return data, self._decoders[name].decode(data, final=not data)

    def read_all(self, name: str) -> list[tuple[bytes, str]]:
        """All that is there now, within bounds."""
        found = []
        for _ in range(_LAST_READS):
            data, text = self.read(name)
            if data or text:
                found.append((data, text))
            if len(data) < _READ:
                break
        return found

    def rest(self, name: str) -> str:
        """What was read of a character whose other bytes will not come."""
        return self._decoders[name].decode(b"", final=True)

    def close(self) -> None:
        """Who still writes gets an error, or a SIGPIPE."""
        while self.open:
            os.close(self.open.popitem()[1])
