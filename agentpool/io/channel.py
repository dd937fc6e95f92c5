"""One worker's pipes and its page of shared memory: framing, buffering, never blocking.

Two one-way pipes carry calls and results, a pair of sockets the wish to stop and, the other way, descriptors, one pipe
the worker's standard error. The page tells what began, takes back what did not, and holds what a dying worker could
not send. It knows nothing of the core: frames go in and out. Writing is done by whichever thread holds the pool's lock,
reading by the manager thread alone.
"""

from __future__ import annotations

import mmap
import os
import socket
import stat
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from typing import Final

from agentpool.io.arena import Arena, Held
from agentpool_worker import protocol
from agentpool_worker.arena import BLOCK, WARM_SECONDS, Inlet, first_result
from agentpool_worker.protocol import (
    BEGAN,
    KEPT,
    KEPT_BLOCKS,
    LENT,
    LENT_BLOCKS,
    OUTBOX,
    OUTBOX_DATA,
    OUTBOX_HEADER,
    PAGE_SIZE,
    REPORT,
    REVOKED,
    SLOTS,
    Frame,
    FrameReader,
    encode,
)

__all__ = ["Channel"]

#: What is kept of a worker's standard error, in bytes.
STDERR_TAIL: Final = 4096
#: What is kept of it for those who ask what a worker writes, from the end.
STDERR_KEPT: Final = 64 * 1024
#: Read from one worker in one turn, in bytes, so that one flood does not starve the others.
_TURN: Final = 4 * 1024 * 1024
#: A read that brings less than a pipe holds has emptied it.
_PIPE_FULL: Final = 64 * 1024
_MAX_REPORT: Final = 256 * 1024
#: Parts of one write; the kernel takes 1,024.
_MOST_PARTS: Final = 512


def _page_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("agentpool-page", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # never has a name where that can be had
        return os.dup(file.fileno())


def kept_since(kept: bytes, count: int, position: int) -> bytes:
    """Of the kept end of `count` bytes: what came after the first `position`."""
    return kept[max(0, len(kept) - max(0, count - position)) :]


class Channel:
    """The parent's end. `arena`: where large calls and results lie, for the worker of this id; None: nowhere."""

    def __init__(self, arena: Arena | None = None, worker_id: int = 0) -> None:
        self._arena = arena
        self._worker_id = worker_id
        self._is_closed = False
        self._inlet: Inlet | None = None
        self._opened_at = 0.0
        self._ours: list[Connection] = []
        self._theirs: list[Connection] = []
        self._report = -1
        try:
            calls_r, self._calls = Pipe(duplex=False)
            self._theirs.append(calls_r)
            self._ours.append(self._calls)
            self._results, results_w = Pipe(duplex=False)
            self._theirs.append(results_w)
            self._ours.append(self._results)
            control_r, self._control = Pipe()  # sockets: a worker may pass us descriptors
            self._theirs.append(control_r)
            self._ours.append(self._control)
            self._stderr, stderr_w = Pipe(duplex=False)
            self._theirs.append(stderr_w)
            self._ours.append(self._stderr)
            self._report = _page_file()
            os.ftruncate(self._report, REPORT)
            self._page = mmap.mmap(self._report, PAGE_SIZE)
            self._announced = protocol.announced(self._page)
            if arena is not None and not arena.takes_results:
                self._page[KEPT : KEPT + KEPT_BLOCKS] = b"\xff" * KEPT_BLOCKS
        except OSError:
            self.close()
            raise
        for end in self._ours:
            os.set_blocking(end.fileno(), False)
        #: -1 once no more calls go to the worker
        self.calls_fd = self._calls.fileno()
        self.results_fd = self._results.fileno()
        self.stderr_fd = self._stderr.fileno()
        self.stderr_tail = b""
        #: the last of its standard error, and how many bytes came in all; one value, as another thread looks at it
        self._stderr_kept = (b"", 0)
        self._reader = FrameReader(inlet=self)
        self._received = 0
        #: bytes, or views of bytes
        self._outgoing: deque[bytes | memoryview] = deque()
        self._is_large = False
        self._slots: dict[int, int] = {}
        self._next_slot = 0
        # Acquiring it is the memory barrier of revoke(); see Worker._began.
        self._barrier = threading.Lock()

    # -- handing over --------------------------------------------------------------------------------------------

    def worker_fds(self) -> list[int]:
        """The worker's ends, in the keeper's order: calls, results, control, standard error, page, arena."""
        arena = [] if self._arena is None or self._arena.descriptor < 0 else [self._arena.descriptor]
        return [*(end.fileno() for end in self._theirs), self._report, *arena]

    def handed_over(self) -> None:
        """The worker's ends are on their way: keep none, or no end of file would ever be seen."""
        for end in self._theirs:
            end.close()
        self._theirs.clear()

    # -- calls ---------------------------------------------------------------------------------------------------

    def queue_call(self, task_id: int, payload: protocol.Payload | Held, buffers: Sequence[memoryview]) -> None:
        """Have a call sent with the next `flush`: several travel in one write."""
        if self._inlet:
            self._inlet.release()
        slot = self._next_slot
        self._next_slot = (slot + 1) % SLOTS
        self._slots[task_id] = slot
        page = self._page
        page[BEGAN + slot] = 0
        page[REVOKED + slot] = 0
        if isinstance(payload, Held):
            for number in range(LENT_BLOCKS):
                if not page[LENT + number]:
                    page[LENT + number] = 1
                    payload.lend(self, number)
                    place = payload.offset, number
                    self._outgoing.append(protocol.encode_shared(protocol.CALL, task_id, place, payload.sizes, x=slot))
                    return
            payload, *buffers = payload.parts()
        if buffers or type(payload) is not bytes or len(payload) > protocol.OUT_OF_BAND:
            if not self._is_large:
                self._is_large = True
                protocol.enlarge_pipe(self.calls_fd)
            self._outgoing.extend(encode(protocol.CALL, task_id, payload, buffers, x=slot))
        else:
            self._outgoing.append(
                protocol.HEADER.pack(protocol.MAGIC, protocol.CALL, 0, 0, task_id, len(payload), slot, 0, 0) + payload
            )

    def send_init(self, payload: protocol.Payload, buffers: Sequence[memoryview]) -> bool:
        """Send the initializer; it goes before any call."""
        return self._send(encode(protocol.INIT, 0, payload, buffers))

    def send_collect(self) -> bool:
        """Have the worker collect its garbage."""
        return self._send(encode(protocol.COLLECT))

    def _send(self, parts: Sequence[bytes | memoryview]) -> bool:
        self._outgoing.extend(parts)
        return self.flush()

    def flush(self) -> bool:
        """Write what waits, as far as there is room. True: nothing waits any more; otherwise call it again."""
        outgoing = self._outgoing
        if self.calls_fd < 0:
            outgoing.clear()
        while outgoing:
            try:
                if len(outgoing) == 1:
                    written = os.write(self.calls_fd, outgoing[0])
                else:
                    written = os.writev(self.calls_fd, list(islice(outgoing, _MOST_PARTS)))
            except BlockingIOError:
                return False
            except BrokenPipeError:  # it is dead; its death will be observed
                outgoing.clear()
                break
            while outgoing and written >= len(outgoing[0]):
                written -= len(outgoing.popleft())
            if written:
                outgoing[0] = memoryview(outgoing[0])[written:]
        return True

    def end_calls(self) -> None:
        """Tell the worker that no more will come: it finishes and ends."""
        self.calls_fd = -1  # the number may be another channel's in a moment
        self._outgoing.clear()
        self._calls.close()

    def ask_to_stop(self, task_id: int, *, wants_stack: bool) -> None:
        """Ask the worker to stop a task, and to note first what its threads do."""
        self._tell(encode(protocol.STOP, task_id, flags=int(wants_stack))[0])

    def _tell(self, frame: bytes | memoryview) -> None:
        try:
            os.write(self._control.fileno(), frame)
        except (BlockingIOError, ConnectionError):  # it has not read 1,800 of them, or is dead: it will be killed
            return

    def take_descriptors(self, most: int) -> list[int]:
        """What the worker passed with one message, non-blocking. Raises ProtocolError: nothing, or no pipes."""
        with socket.socket(fileno=os.dup(self._control.fileno())) as control:
            try:
                _, taken, flags, _ = socket.recv_fds(control, 1, most, socket.MSG_CMSG_CLOEXEC)
            except OSError as error:
                raise protocol.ProtocolError(f"descriptors were announced, and none came: {error}") from error
        if flags & socket.MSG_CTRUNC or not all(stat.S_ISFIFO(os.fstat(descriptor).st_mode) for descriptor in taken):
            for descriptor in taken:
                os.close(descriptor)
            raise protocol.ProtocolError("other descriptors came than those of pipes")
        for descriptor in taken:
            os.set_blocking(descriptor, False)
        return list(taken)

    # -- the arena -----------------------------------------------------------------------------------------------

    def open(self, offset: int, number: int, length: int) -> memoryview:
        """The contents of the block that a result lies in. Raises ProtocolError."""
        if self._arena is None or self._arena.descriptor < 0:
            raise protocol.ProtocolError("a result lies in an arena that this pool does not have")
        if self._inlet is None:
            first = first_result(self._worker_id)
            self._inlet = Inlet(self._arena.descriptor, self._page, KEPT, first, first + KEPT_BLOCKS * BLOCK)
        self._opened_at = time.monotonic()
        self._arena.is_warm = True
        return self._inlet.open(offset, number, length)

    def has_lent(self, number: int) -> bool:
        """Does the worker still have the block of a call that it got under this number?"""
        return not self._is_closed and self._page[LENT + number] != 0

    @property
    def shared_bytes(self) -> int:
        """Memory of the worker that is not its own: results, and what was taken for them."""
        return 0 if self._inlet is None else self._inlet.size

    def trim(self) -> bool:
        """Have the worker give back the memory of results that nobody needs. False: not yet, some are looked at."""
        if self._inlet is None:
            return True
        self._inlet.release()
        if self._inlet or time.monotonic() - self._opened_at < WARM_SECONDS:
            return False
        self._inlet.forget()
        self._tell(encode(protocol.TRIM)[0])
        return True

    def keep_results(self) -> None:
        """Before a fork of the parent: the child may look at the results for ever."""
        if self._inlet is not None:
            self._inlet.keep()

    # -- the page ------------------------------------------------------------------------------------------------

    def began(self, task_id: int) -> bool:
        """Has the worker begun this call?"""
        slot = self._slots.get(task_id)
        return slot is not None and self._page[BEGAN + slot] == 1

    def revoke(self, task_id: int) -> bool:
        """Take a call back. True: the worker has not begun it, and will pass over it.

        False: it has begun, or the worker saw the revocation in the same instant and will say that it skipped it.
        """
        slot = self._slots.get(task_id)
        if slot is None:
            return False
        page = self._page
        page[REVOKED + slot] = 1
        with self._barrier:
            is_ours = page[BEGAN + slot] == 0
        if is_ours:
            del self._slots[task_id]
        return is_ours

    def is_current(self, task_id: int, slot: int) -> bool:
        """Is this the slot of the task's present call? A call that was taken back may have been sent again since."""
        return self._slots.get(task_id) == slot

    def finished(self, task_id: int) -> None:
        """The call is over: its slot is free."""
        self._slots.pop(task_id, None)

    def unsent_results(self) -> list[Frame]:
        """Results that the worker holds and has not written; what was seen before may be among them.

        For a worker that is dead, or busy with a call (then its outbox lies still: the generation tells).
        """
        before = OUTBOX_HEADER.unpack_from(self._page, OUTBOX)
        data = bytes(self._page[OUTBOX_DATA : min(OUTBOX_DATA + before[1], PAGE_SIZE)])
        if not data or OUTBOX_HEADER.unpack_from(self._page, OUTBOX) != before:
            return []
        reader = FrameReader(inlet=self)
        reader.feed(data)
        return list(reader.frames())

    def report(self) -> str:
        """What the interpreter's fault handler wrote: a crash report or a stack."""
        size = min(os.fstat(self._report).st_size - REPORT, _MAX_REPORT)
        return os.pread(self._report, size, REPORT).decode(errors="replace") if size > 0 else ""

    # -- results -------------------------------------------------------------------------------------------------

    def read_results(self, *, is_last: bool = False) -> tuple[list[Frame], bool]:
        """The whole frames that can be had now, and whether the end of file was reached. Raises ProtocolError.

        is_last: the worker is dead; read all that is there, however much. Otherwise one turn's worth.
        """
        frames: list[Frame] = []
        taken, is_ended = 0, False
        while is_last or taken < _TURN:
            try:
                count = self._reader.read_from(self.results_fd)
            except BlockingIOError:
                break
            if not count:
                is_ended = True
                break
            taken += count
            frames += self._reader.frames()
            if count < _PIPE_FULL and not is_last and self._reader.is_between_frames:
                break  # a short read: the pipe is empty, and another read would only tell so
        self._received += taken
        if self._received > self._announced[0]:
            raise protocol.ProtocolError("more bytes came than the worker wrote: its task has written into the pipe")
        return frames, is_ended

    def read_stderr(self) -> bytes:
        """What the worker wrote to its standard error since; the tail is kept. b"" where there is nothing."""
        try:
            data = os.read(self.stderr_fd, 65536)
        except BlockingIOError:
            return b""
        if data:
            self.keep_stderr(data)
        return data

    def keep_stderr(self, data: bytes) -> None:
        """The worker, or its task, wrote this to its standard error."""
        self.stderr_tail = (self.stderr_tail + data)[-STDERR_TAIL:]
        kept, count = self._stderr_kept
        self._stderr_kept = ((kept + data)[-STDERR_KEPT:], count + len(data))

    def stderr_since(self, position: int) -> tuple[bytes, int]:
        """What came after so many bytes, as far as it is kept, and how many came in all. Any thread."""
        kept, count = self._stderr_kept
        return kept_since(kept, count, position), count

    def close(self) -> None:
        """Give back all descriptors and the page. May be called twice."""
        for end in (*self._ours, *self._theirs):
            end.close()
        self._theirs.clear()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1
            self._is_closed = True
            if self._inlet is not None and self._arena is not None:
                self._arena.inherit(self._inlet.forget())
            page = getattr(self, "_page", None)
            if page is not None:
                self._announced.release()
                page.close()
