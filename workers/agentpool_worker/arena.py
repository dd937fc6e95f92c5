"""Large calls and results in memory that parent and workers share: copied once by who sends, and by nobody who reads.

The arena is one file in memory per pool, without a name: it is gone when the last process that has it is. It is sparse,
and cut into blocks. Blocks at its beginning hold calls and are written by the parent; each worker has blocks of its
own further on, for results. A byte per block and worker in the worker's page says that the reader still has it; the
writer takes no block again before the reader gave it back.

Readers map a block privately: what a task does to its arguments, or the parent to a result, nobody else sees. Writers
keep their blocks mapped, as warm memory is ten times as fast to fill as fresh memory. Not for two threads at once.
"""

from __future__ import annotations

import mmap
import os
import threading
from time import monotonic

from agentpool_worker.protocol import KEPT, KEPT_BLOCKS, LENT, SHARED, VALUE, ProtocolError, is_viewed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, Final

    from agentpool_worker.protocol import Frame, Payload

#: Calls and results below this go through the pipe. Measured with echoes of 64 KiB to 64 MiB.
SHARED_FROM: Final = 128 * 1024
#: What one block can hold. The file is sparse: only what is written takes memory.
BLOCK: Final = 1 << 30
CALL_BLOCKS: Final = 1024
#: A block that was not used for this long, in seconds, gives its memory back.
WARM_SECONDS: Final = 1.0
_FIRST_RESULT: Final = CALL_BLOCKS * BLOCK
#: Copied in one go: other threads may have the interpreter in between.
_STEP: Final = 1024 * 1024
_MADV_POPULATE_READ: Final = 22


def first_result(worker_id: int) -> int:
    """Where the blocks of this worker begin."""
    return _FIRST_RESULT + worker_id * KEPT_BLOCKS * BLOCK


def map_shared(descriptor: int, offset: int, length: int) -> mmap.mmap:
    """A block to write to. Raises OSError and ValueError."""
    if os.fstat(descriptor).st_size < offset + BLOCK:
        os.ftruncate(descriptor, max(offset + BLOCK, 2 * _FIRST_RESULT))
    return mmap.mmap(descriptor, _in_pages(length), mmap.MAP_SHARED, offset=offset)


def give_back(memory: mmap.mmap) -> None:
    """Return the memory of a block that `map_shared` mapped to the system."""
    memory.madvise(mmap.MADV_REMOVE)
    memory.close()


def parts_of(payload: Payload, buffers: Sequence[memoryview]) -> tuple[list[bytes | memoryview], list[int]]:
    """What is to lie in a block, one after the other, and the sizes of the pickle and its buffers."""
    pickled = payload if type(payload) is tuple else (payload,)
    return [*pickled, *buffers], [sum(map(len, pickled)), *(buffer.nbytes for buffer in buffers)]


def copy_in(memory: mmap.mmap, parts: Any) -> int:
    """Write the parts one after the other; returns how many bytes they are."""
    position = 0
    with memoryview(memory) as target:
        for part in parts:
            with memoryview(part) as view, view.cast("B") as source:
                for start in range(0, len(source), _STEP):
                    step = source[start : start + _STEP]
                    target[position : position + len(step)] = step
                    position += len(step)
    return position


def _in_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


class Inlet:
    """The reader's side: what it has of the blocks that the other side wrote.

    `states`: where in the page the bytes of these blocks are. `first`, `last`: where they may lie in the arena.
    """

    def __init__(self, descriptor: int, page: Any, states: int, first: int, last: int) -> None:
        self._descriptor = descriptor
        self._page = page
        self._states = states
        self._first = first
        self._last = last
        #: offset -> the block as it was mapped for the last frame that lay there
        self._windows: dict[int, mmap.mmap] = {}
        #: number of the block -> its window
        self._held: dict[int, mmap.mmap] = {}

    def __bool__(self) -> bool:
        """Is anything held?"""
        return bool(self._held)

    @property
    def size(self) -> int:
        """Bytes of all blocks that were seen and not forgotten since."""
        return sum(map(len, self._windows.values()))

    def open(self, offset: int, number: int, length: int, *, is_read_now: bool = False) -> memoryview:
        """The contents of a block that came with a frame. Raises ProtocolError."""
        if not (self._first <= offset <= self._last - BLOCK and offset % BLOCK == 0 and 0 < length <= BLOCK):
            raise ProtocolError(f"{length} bytes at {offset} of the arena are no block that this could be in")
        window = self._windows.get(offset)
        if window is None or len(window) < length or is_viewed(window):
            try:
                window = mmap.mmap(self._descriptor, _in_pages(length), mmap.MAP_PRIVATE, offset=offset)
            except (OSError, ValueError) as error:
                raise ProtocolError(f"a block of the arena cannot be mapped: {error}") from error
            self._windows[offset] = window
        self._held[number] = window
        if is_read_now:
            try:
                window.madvise(_MADV_POPULATE_READ, 0, length)  # a page fault for each 64 KiB would take longer
            except OSError:  # Linux before 5.14: then by page faults
                return memoryview(window)[:length]
        return memoryview(window)[:length]

    def release(self) -> None:
        """Give back what nobody looks at any more."""
        for number, window in list(self._held.items()):
            if not is_viewed(window):
                window.madvise(mmap.MADV_DONTNEED)  # what was written to it is private, and must not be seen again
                del self._held[number]
                self._page[self._states + number] = 0

    def keep(self) -> None:
        """Before a fork: what is held now may be looked at by the child for ever, and is never given back."""
        for number in self._held:
            self._page[self._states + number] = 0xFF
        self._held.clear()
        self._windows.clear()

    def forget(self) -> dict[int, mmap.mmap]:
        """Let go of all windows, and return them, by where they lie."""
        windows, self._windows, self._held = self._windows, {}, {}
        return windows


class Outlet:
    """The worker's side of its results: its own blocks of the arena."""

    def __init__(self, descriptor: int, page: Any, worker_id: int) -> None:
        self._descriptor = descriptor
        self._page = page
        self._first = first_result(worker_id)
        #: guards what follows: `trim` is called by the control thread too
        self._lock = threading.Lock()
        self._blocks: dict[int, mmap.mmap] = {}
        self._used: dict[int, float] = {}

    @property
    def size(self) -> int:
        """Bytes of the blocks that this process has mapped: the pool's memory, not the task's."""
        return sum(map(len, self._blocks.values()))

    def put(self, parts: Iterable[bytes | memoryview], length: int) -> tuple[int, int] | None:
        """Write the parts into a block; returns its offset and number. None: there is none, or no memory."""
        with self._lock:
            for number in range(KEPT_BLOCKS):
                if not self._page[KEPT + number]:
                    break
            else:
                return None
            offset = self._first + number * BLOCK
            try:
                block = self._blocks.get(number)
                if block is None or len(block) < length:
                    block = self._blocks[number] = map_shared(self._descriptor, offset, length)
            except (OSError, ValueError):  # a limit on file sizes or mappings: the pipe will do
                return None
            self._page[KEPT + number] = 1
            self._used[number] = monotonic()
        copy_in(block, parts)
        return offset, number

    def trim(self) -> None:
        """Give back the memory of blocks that were not used of late."""
        with self._lock:
            for number, used in list(self._used.items()):
                if not self._page[KEPT + number] and monotonic() - used > WARM_SECONDS:
                    give_back(self._blocks.pop(number))
                    del self._used[number]


class SharedBlocks:
    """All that a worker has to do with the arena."""

    def __init__(self, worker_id: int, page: Any, descriptor: int) -> None:
        self._worker_id = worker_id
        self._page = page
        self._descriptor = descriptor
        self._inlet: Inlet | None = None
        self._outlet: Outlet | None = None
        #: something large came or went
        self.is_used = False
        #: KiB of this process's memory that hold results which the parent has, or had
        self.own_kib = 0

    def open(self, offset: int, number: int, length: int) -> memoryview:
        """The contents of a block that came with a call. Raises ProtocolError."""
        if self._inlet is None:
            self._inlet = Inlet(self._descriptor, self._page, LENT, 0, CALL_BLOCKS * BLOCK)
        self.is_used = True
        return self._inlet.open(offset, number, length, is_read_now=True)

    def put(
        self, kind: int, payload: Payload, buffers: Sequence[memoryview]
    ) -> tuple[tuple[int, int], list[int]] | None:
        """Write a large value into a block; returns its place, and the sizes of the pickle and its buffers."""
        parts, sizes = parts_of(payload, buffers)
        length = sum(sizes)
        if kind != VALUE or not SHARED_FROM <= length <= BLOCK or self._descriptor < 0:
            return None
        if self._outlet is None:
            self._outlet = Outlet(self._descriptor, self._page, self._worker_id)
        self.is_used = True
        place = self._outlet.put(parts, length)
        self.own_kib = self._outlet.size // 1024
        return None if place is None else (place, sizes)

    def release(self, frame: Frame | None = None) -> None:
        """Give back what no task looks at any more; `frame`: nor does who read it."""
        if frame is not None and frame.flags & SHARED:
            frame.payload.release()
            frame.buffers.clear()  # type: ignore[attr-defined]
        if self._inlet:
            self._inlet.release()
        self.trim()

    def trim(self) -> None:
        """Give back the memory of results that the parent is done with. Also for the control thread."""
        if self._outlet is not None:
            self._outlet.trim()
            self.own_kib = self._outlet.size // 1024

    def keep(self) -> None:
        """Before a fork: see `Inlet.keep`."""
        if self._inlet:
            self._inlet.keep()
