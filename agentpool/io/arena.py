"""The parent's side of the arena: blocks for large calls, and what becomes of the blocks of large results.

See `agentpool_worker.arena` for what an arena is. `Arena.hold` may be called by any thread, and takes no lock of the
pool's: a large call is copied by who submits it. Everything else is for the manager thread.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from agentpool_worker.arena import (
    BLOCK,
    CALL_BLOCKS,
    SHARED_FROM,
    WARM_SECONDS,
    copy_in,
    give_back,
    map_shared,
    parts_of,
)
from agentpool_worker.protocol import is_viewed

if TYPE_CHECKING:
    from agentpool.io.channel import Channel
    from agentpool_worker.protocol import Payload

__all__ = ["Arena", "Held"]

#: So many results of workers that are gone may lie in the arena, as each takes a descriptor.
_MOST_REMAINS: Final = 64


def _file_in_memory() -> int:
    try:
        return os.memfd_create("agentpool-arena", os.MFD_CLOEXEC) if hasattr(os, "memfd_create") else -1
    except OSError:  # no descriptor is to be had
        return -1


class _Block:
    """A block for calls. `loans`: channels that it went to, with their numbers for it."""

    __slots__ = ("loans", "memory", "offset", "used_at")

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self.memory = memory
        self.offset = offset
        self.loans: list[tuple[Channel, int]] = []
        self.used_at = 0.0

    def is_free(self) -> bool:
        """Neither a task that is not settled nor a worker has it."""
        if is_viewed(self.memory):
            return False
        self.loans = [loan for loan in self.loans if loan[0].has_lent(loan[1])]
        return not self.loans


class Held:
    """A call that lies in a block, for as long as somebody holds this. Stands for its payload and its buffers."""

    __slots__ = ("_block", "_view", "sizes")

    def __init__(self, block: _Block, view: memoryview, sizes: Sequence[int]) -> None:
        self._block = block
        self._view = view
        self.sizes = sizes

    @property
    def offset(self) -> int:
        """Where in the arena it begins."""
        return self._block.offset

    def lend(self, channel: Channel, number: int) -> None:
        """A worker gets it, as its block of this number."""
        self._block.loans.append((channel, number))

    def parts(self) -> Iterator[memoryview]:
        """The payload and the buffers, for a worker that has no room for one more block."""
        position = 0
        for size in self.sizes:
            yield self._view[position : position + size]
            position += size


class Arena:
    """The arena of one pool."""

    def __init__(self, most_blocks: int) -> None:
        """`most_blocks`: so many calls lie in it at once; the others travel through pipes."""
        #: -1: there is none, and everything travels through pipes
        self.descriptor = _file_in_memory()
        self._most_blocks = min(most_blocks, CALL_BLOCKS)
        self._blocks: list[_Block] = []
        #: guards the choice of a block
        self._lock = threading.Lock()
        #: results of workers that are gone, which somebody still has, by where they lie
        self._remains: dict[int, mmap.mmap] = {}
        #: memory is to be given back when it was not used for a while
        self.is_warm = False

    def hold(self, payload: Payload, buffers: Sequence[memoryview]) -> Held | None:
        """Copy a large call into a block. None: it is not large enough, or there is no block for it."""
        parts, sizes = parts_of(payload, buffers)
        length = sum(sizes)
        if not SHARED_FROM <= length <= BLOCK or self.descriptor < 0:
            return None
        try:
            with self._lock:
                block, view = self._take(length)
        except (OSError, ValueError):  # a limit on file sizes or mappings: the pipe will do
            return None
        if block is None or view is None:
            return None
        copy_in(block.memory, parts)
        return Held(block, view, sizes)

    def _take(self, length: int) -> tuple[_Block | None, memoryview | None]:
        free = [block for block in self._blocks if block.is_free()]
        block = next((block for block in free if len(block.memory) >= length), None)
        if block is None and free:
            block = free[0]
            block.memory = map_shared(self.descriptor, block.offset, length)
        elif block is None and len(self._blocks) < self._most_blocks:
            taken = {block.offset for block in self._blocks}
            offset = next(index * BLOCK for index in range(CALL_BLOCKS) if index * BLOCK not in taken)
            block = _Block(map_shared(self.descriptor, offset, length), offset)
            self._blocks.append(block)
        if block is None:
            return None, None
        self.is_warm = True
        block.used_at = time.monotonic()
        return block, memoryview(block.memory)[:length]

    @property
    def takes_results(self) -> bool:
        """May a new worker put its results here?"""
        return len(self._remains) < _MOST_REMAINS

    def inherit(self, windows: dict[int, mmap.mmap]) -> None:
        """The results of a worker that is gone, by where they lie: their memory goes when nobody looks at it."""
        self._remains.update(windows)
        self.is_warm = True
        self._trim_remains()

    def trim(self) -> None:
        """Return to the system what was not used of late, and what was left of workers that are gone."""
        with self._lock:
            now = time.monotonic()
            for block in list(self._blocks):
                if now - block.used_at > WARM_SECONDS and block.is_free():
                    self._blocks.remove(block)
                    give_back(block.memory)
        self._trim_remains()
        self.is_warm = bool(self._blocks or self._remains)

    def _trim_remains(self) -> None:
        for offset, window in list(self._remains.items()):
            if not is_viewed(window):
                del self._remains[offset]
                give_back(map_shared(self.descriptor, offset, len(window)))
                window.close()

    def keep(self) -> None:
        """Before a fork: the child may look at what is looked at now for ever."""
        self._remains.clear()

    def close(self) -> None:
        """Give back everything but the results that somebody still has: those go when they are dropped."""
        for block in self._blocks:
            if not is_viewed(block.memory):
                give_back(block.memory)
        self._trim_remains()
        self.abandon()

    def abandon(self) -> None:
        """In a forked copy of the parent: let go of it, change nothing. May be called twice."""
        self._blocks.clear()
        self._remains.clear()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
