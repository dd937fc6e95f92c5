"""The wire format between the parent and its workers, and between the parent and its keeper: what both sides import.

A frame is a header of 36 bytes, a table of buffer sizes, a pickle, and the buffers that the pickle left out of band
(pickle protocol 5). Several frames may travel in one write. Only bytes from a pipe that this parent made for a worker
that it started are ever unpickled. Standard library and cloudpickle; any thread may call it, one per reader.
"""

from __future__ import annotations

import _pickle as pickle  # `pickle` would import 2 ms more, for what is not used here
import mmap
import os
import sys
from collections import namedtuple
from struct import Struct
from struct import error as StructError
from types import CoroutineType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Final, NamedTuple, Protocol, TypeAlias

    #: A pickle, or the parts of a large one.
    Payload: TypeAlias = bytes | memoryview | tuple[bytes, ...]

MAGIC: Final = 0xA6E7
#: magic, kind, flags, buffers, task id, bytes after the header, x, y, z
HEADER: Final = Struct("<HBBIQQIII")
_HEADER_SIZE: Final = HEADER.size
_SIZE: Final = Struct("<Q")

#: A frame that claims to be longer than this is no frame (1 TiB: more than any machine of today can hold).
MAX_FRAME: Final = 1 << 40
MAX_BUFFERS: Final = 1 << 20
#: Frames above this are read straight into memory of their own.
LARGE: Final = 256 * 1024
#: Buffers below this are cheaper inside the pickle.
OUT_OF_BAND: Final = 64 * 1024
#: At a time. A pipe holds no more unless it was enlarged; what is larger comes from mmap each time, at 10 us.
_READ: Final = 64 * 1024
_LARGE_PIPE: Final = 1024 * 1024
_HUGE: Final = 4 * 1024 * 1024
_MOST_SPARE: Final = 4 * 1024 * 1024

# Parent to worker, on the pipe of calls. INIT comes first where there is an initializer. x of CALL: its slot.
CALL: Final = 1
INIT: Final = 2
COLLECT: Final = 3
# Parent to worker, on the control pipe. Flag 1 of STOP: note the stack first. TRIM: memory of results that the parent
# is done with goes back to the system.
STOP: Final = 8
TRIM: Final = 9
# Worker to parent. Flag 1 of READY: an initializer ran. x, y, z of VALUE and of the errors: run time in microseconds,
# RSS and peak RSS in KiB (0: not read).
READY: Final = 16
VALUE: Final = 17
ERROR: Final = 18
CALL_FAILED: Final = 19
RESULT_FAILED: Final = 20
SKIPPED: Final = 21
COLLECTED: Final = 22
STOPPING: Final = 23
INIT_FAILED: Final = 24
AGENT_SET_UP: Final = 25
# Events of a running task. x: how many; y: how many of this attempt were dropped so far.
EVENTS: Final = 26
# The parent is to read what the task writes: the descriptors came on the control socket, as one message.
OUTPUT: Final = 27

#: Flag of CALL and VALUE: the pickle and its buffers lie in a block of the arena. The frame has its place and sizes.
SHARED: Final = 0x80
_PLACE: Final = Struct("<QI")  # offset, number of the block

_KINDS: Final = frozenset({CALL, INIT, COLLECT, STOP, TRIM, *range(READY, OUTPUT + 1)})

# The page: memory shared by the parent and one worker. A byte per slot says that a call began or is revoked; the
# outbox holds results that are not yet written to the pipe, so that a worker that dies takes none with it; behind it,
# the interpreter's fault reports are written.
SLOTS: Final = 2048
BEGAN: Final = 0
REVOKED: Final = SLOTS
OUTBOX: Final = 2 * SLOTS
OUTBOX_HEADER: Final = Struct("<II")  # generation, length
#: Bytes that the worker has begun to write to the pipe of results: whatever comes beyond them is not from it.
ANNOUNCED: Final = OUTBOX + OUTBOX_HEADER.size
#: A byte for each block of the arena that the worker has of the parent: 1 until it is done with it; and for each of its
#: own blocks, until the parent is done with it.
LENT: Final = ANNOUNCED + 8
LENT_BLOCKS: Final = 8
KEPT: Final = LENT + LENT_BLOCKS
KEPT_BLOCKS: Final = 4
OUTBOX_DATA: Final = KEPT + 8
PAGE_SIZE: Final = 64 * 1024
REPORT: Final = PAGE_SIZE


def announced(page: Any) -> memoryview:
    """ANNOUNCED of a page, as element 0. It is written in one piece, where `struct` would clear it first."""
    return memoryview(page)[ANNOUNCED:LENT].cast("Q")


class ProtocolError(Exception):
    """The bytes are no frame: the other side is broken, or somebody wrote into its descriptors."""


if TYPE_CHECKING:

    class Inlet(Protocol):
        """What opens blocks of the arena."""

        def open(self, offset: int, number: int, length: int) -> memoryview:
            """The contents of a block that came with a frame. Raises ProtocolError."""

    class Frame(NamedTuple):
        """One message. `payload` (bytes or a view) and `buffers` stay valid; that of a large call may be a `Stream`."""

        kind: int
        flags: int
        task_id: int
        x: int
        y: int
        z: int
        payload: Any
        buffers: Sequence[memoryview]

else:
    Frame = namedtuple("Frame", "kind flags task_id x y z payload buffers")


#: Frame(...) without its __new__, which takes twice as long.
_new: Final[Callable[..., Frame]] = tuple.__new__


def encode(
    kind: int,
    task_id: int = 0,
    payload: Payload = b"",
    buffers: Sequence[memoryview] = (),
    *,
    flags: int = 0,
    x: int = 0,
    y: int = 0,
    z: int = 0,
) -> list[bytes | memoryview]:
    """The frame as parts to write one after the other."""
    if not buffers and type(payload) is bytes and len(payload) <= OUT_OF_BAND:
        return [HEADER.pack(MAGIC, kind, flags, 0, task_id, len(payload), x, y, z) + payload]
    parts = payload if type(payload) is tuple else (payload,)
    sizes = [buffer.nbytes for buffer in buffers]
    length = sum(map(len, parts)) + sum(sizes) + _SIZE.size * len(sizes)
    head = HEADER.pack(MAGIC, kind, flags, len(sizes), task_id, length, x, y, z)
    return [head + b"".join(map(_SIZE.pack, sizes)), *parts, *buffers]


_EVENT: Final = Struct("<I")


def event_size(event: bytes) -> int:
    """The bytes that an event takes in its frame."""
    return _EVENT.size + len(event)


def encode_events(task_id: int, events: Sequence[bytes], dropped: int) -> bytes:
    """The frame of pickled events: each behind its length, so that one which cannot be rebuilt costs no other."""
    body = b"".join([part for event in events for part in (_EVENT.pack(len(event)), event)])
    dropped = min(dropped, 0xFFFFFFFF)
    return HEADER.pack(MAGIC, EVENTS, 0, 0, task_id, len(body), len(events), dropped, 0) + body


def split_events(frame: Frame) -> list[bytes]:
    """The pickled events of their frame. Raises ProtocolError."""
    events: list[bytes] = []
    payload, position = frame.payload, 0
    try:
        for _ in range(frame.x):
            (length,) = _EVENT.unpack_from(payload, position)
            position += _EVENT.size
            events.append(bytes(payload[position : position + length]))
            position += length
    except StructError as error:
        raise ProtocolError(f"a frame of {frame.x} events is too short for them: {error}") from None
    if position != len(payload):
        raise ProtocolError(f"{frame.x} events of {position} bytes came in a frame of {len(payload)}")
    return events


def encode_shared(
    kind: int, task_id: int, place: tuple[int, int], sizes: Sequence[int], *, x: int = 0, y: int = 0, z: int = 0
) -> bytes:
    """The frame of a pickle and buffers of these sizes, the pickle's first, that lie in a block of the arena."""
    body = _PLACE.pack(*place) + b"".join(map(_SIZE.pack, sizes))
    return HEADER.pack(MAGIC, kind, SHARED, len(sizes), task_id, len(body), x, y, z) + body


def enlarge_pipe(descriptor: int) -> None:
    """Have a pipe hold 1 MiB, for what is large: twice as fast as the usual 64 KiB.

    Asked for only then: the kernel allows each user so many pages of pipes, and without them gives the usual ones.
    """
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _LARGE_PIPE)
        except OSError:
            return


def _split(header: tuple[int, ...], view: memoryview, inlet: Inlet | None) -> Frame:
    _, kind, flags, count, task_id, _, x, y, z = header
    start = _PLACE.size if flags & SHARED else 0
    position = start + count * _SIZE.size
    if position > len(view):
        raise ProtocolError("the table of buffers of a frame is longer than the frame")
    sizes = [_SIZE.unpack_from(view, start + index * _SIZE.size)[0] for index in range(count)]
    if flags & SHARED:
        if inlet is None:
            raise ProtocolError("a frame lies in an arena that this side does not have")
        offset, number = _PLACE.unpack_from(view)
        view, position = inlet.open(offset, number, sum(sizes)), 0
    else:
        sizes.insert(0, len(view) - position - sum(sizes))
        if sizes[0] < 0:
            raise ProtocolError("the buffers of a frame are longer than the frame")
    parts = []
    for size in sizes:
        parts.append(view[position : position + size])
        position += size
    return Frame(kind, flags, task_id, x, y, z, parts[0], parts[1:])


def frozen(buffer: memoryview) -> memoryview:
    """A buffer of bytes that nobody changes any more: this one, or a copy."""
    if buffer.readonly:
        return buffer
    if buffer.nbytes < LARGE:
        return memoryview(bytes(buffer))
    copy = memoryview(_fresh_memory(buffer.nbytes))
    copy[:] = buffer
    return copy


def is_viewed(memory: mmap.mmap) -> bool:
    """Does anybody have a view of it?"""
    try:
        memory.resize(-1)  # refused in any case: first of all where somebody has a view
    except BufferError:
        return True
    except ValueError:
        return False
    raise AssertionError("a mapping was resized to less than nothing")


def _fresh_memory(length: int) -> mmap.mmap:
    """Memory that is taken as it is filled: a frame that only claims to be large costs nothing. Raises MemoryError."""
    try:
        body = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{length} bytes cannot be had: {error}") from error
    if length >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            body.madvise(mmap.MADV_HUGEPAGE)  # a page fault for 2 MiB at a time: twice as fast to fill
        except OSError:  # a kernel without them
            return body
    return body


class Stream:
    """A large call while it arrives, as a file to unpickle from: a large object is read into the memory where it stays.

    Blocks until the bytes are there, and reads none beyond the frame. Must not be interrupted by an exception.
    """

    __slots__ = ("_descriptor", "_head", "_left")

    def __init__(self, descriptor: int, head: bytes, length: int) -> None:
        self._descriptor = descriptor
        self._head = memoryview(head)
        #: bytes of the frame that are still in the pipe
        self._left = length - len(head)

    def readinto(self, target: bytearray | memoryview) -> int:
        """Fill `target`. Raises ProtocolError where the frame has no more."""
        view = memoryview(target).cast("B")
        filled = min(len(view), len(self._head))
        view[:filled] = self._head[:filled]
        self._head = self._head[filled:]
        if len(view) - filled > self._left:
            raise ProtocolError("a call is longer than its frame")
        while filled < len(view):
            count = os.readv(self._descriptor, [view[filled:]])
            if not count:
                raise ProtocolError("the pipe of calls ended within a call")
            filled += count
            self._left -= count
        return filled

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = bytearray(size)
        self.readinto(data)
        return bytes(data)

    def readline(self) -> bytes:
        """Asked for by no pickle of protocol 5."""
        raise ProtocolError("a call is no pickle of protocol 5")

    def drain(self) -> None:
        """Read what is left of the frame, so that the next one can be read."""
        self._head = self._head[:0]
        while self._left:
            self.read(min(self._left, _READ))


class FrameReader:
    """Puts frames together from what a descriptor yields, however it is cut.

    `streams_from`: that descriptor, where large calls are to be handed out as a `Stream`, before they are there; each
    must be drained before the next read. `inlet` opens the blocks of frames that lie in the arena.
    """

    __slots__ = ("_body", "_filled", "_header", "_pending", "_spare", "_streams_from", "inlet")

    def __init__(self, streams_from: int | None = None, inlet: Inlet | None = None) -> None:
        self.inlet = inlet
        self._streams_from = streams_from
        self._pending = b""
        # A large frame in the making: its header, its body, and how much of that is there.
        self._header: tuple[int, ...] | None = None
        self._body: memoryview | None = None
        self._filled = 0
        #: what the last one was read into, to be used again where nobody has a view of it any more
        self._spare: mmap.mmap | None = None

    @property
    def is_between_frames(self) -> bool:
        """False: a frame has begun and is not whole."""
        return self._header is None and not self._pending

    def read_from(self, descriptor: int) -> int:
        """One read; returns the number of bytes, 0 at end of file. Raises BlockingIOError where there is nothing."""
        if self._body is not None:
            count = os.readv(descriptor, [self._body[self._filled :]])
            self._filled += count
            return count
        data = os.read(descriptor, _READ)
        self._pending += data
        return len(data)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes that came some other way."""
        if self._body is not None:
            taken = bytes(data[: len(self._body) - self._filled])
            self._body[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            data = data[len(taken) :]
        self._pending += bytes(data)

    def _memory(self, length: int) -> memoryview:
        spare = self._spare  # it is mapped already, which takes as long as to fill it
        if spare is None or len(spare) < length or is_viewed(spare):
            try:
                spare = _fresh_memory(length)
            except MemoryError as error:
                raise ProtocolError(f"no memory for a frame: {error}") from error
            self._spare = spare if length <= _MOST_SPARE else None
        return memoryview(spare)[:length]

    def frames(self) -> list[Frame]:
        """The frames that are whole. Raises ProtocolError."""
        found: list[Frame] = []
        if self._header is not None and self._body is not None:
            if self._filled < len(self._body):
                return found
            found.append(_split(self._header, self._body, self.inlet))
            self._header = self._body = None
        pending = self._pending
        position, end = 0, len(pending)
        while end - position >= _HEADER_SIZE:
            header = HEADER.unpack_from(pending, position)
            magic, kind, flags, count, task_id, length, x, y, z = header
            if magic != MAGIC or kind not in _KINDS or length > MAX_FRAME or count > MAX_BUFFERS:
                if found:
                    break  # those are whole; the next call raises
                raise ProtocolError(f"not a frame: magic {magic:#x}, kind {kind}, {count} buffers, {length} bytes")
            start = position + _HEADER_SIZE
            stop = start + length
            if stop > end:
                if length > LARGE and kind == CALL and not count and self._streams_from is not None:
                    stream = Stream(self._streams_from, pending[start:end], length)
                    found.append(_new(Frame, (kind, flags, task_id, x, y, z, stream, ())))
                    position = end
                elif length > LARGE:
                    self._body = self._memory(length)
                    self._header, self._filled = header, end - start
                    self._body[: end - start] = pending[start:end]
                    position = end
                break
            position = stop
            if count:
                found.append(_split(header, memoryview(bytearray(pending[start:stop])), self.inlet))
            else:
                found.append(_new(Frame, (kind, flags, task_id, x, y, z, pending[start:stop], ())))
        self._pending = pending[position:]
        return found


# -- serializing -----------------------------------------------------------------------------------------------------

_SIMPLE: Final = frozenset({int, float, bool, type(None), complex})
_TEXT: Final = frozenset({str, bytes})
_FLAT: Final = _SIMPLE | _TEXT


def is_simple(value: object, depth: int = 3) -> bool:
    """Is this of builtin types all the way down (and small), so that plain pickle cannot get it wrong?

    Plain pickle refers to classes and functions of `__main__` by name, which a worker does not have; cloudpickle sends
    them by value, at 2 us a call.
    """
    kind = type(value)
    if kind in _SIMPLE:
        return True
    if kind in _TEXT:
        return len(value) <= OUT_OF_BAND  # type: ignore[arg-type]
    if depth and kind in (tuple, list) and len(value) <= 16:  # type: ignore[arg-type]
        for item in value:  # type: ignore[attr-defined]  # noqa: SIM110  a generator would take thrice as long
            if type(item) not in _SIMPLE and not is_simple(item, depth - 1):
                return False
        return True
    if depth and kind is dict and len(value) <= 16:  # type: ignore[arg-type]
        return all(type(key) is str and is_simple(item, depth - 1) for key, item in value.items())  # type: ignore[attr-defined]
    return False


def is_flat(values: Sequence[Any]) -> bool:
    """Are all of these simple, none of them a container? Quick for many."""
    return _FLAT.issuperset(map(type, values))


class _Parts(list[bytes]):
    """What a pickler writes, as it comes: a large bytes object is itself a part, and is copied nowhere."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self.append(data if type(data) is bytes else bytes(data))
        return len(data)


def dumps(value: object) -> tuple[Payload, Sequence[memoryview]]:
    """Serialize; returns the pickle and the buffers it left out. Raises what pickling raises."""
    # The second: a list of results, where the worker would have to import cloudpickle, for 10 ms, to no avail.
    if is_simple(value) or (type(value) is list and "cloudpickle" not in sys.modules and is_flat(value)):
        return pickle.dumps(value, 5), ()
    from agentpool_worker import byvalue

    buffers: list[memoryview] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < OUT_OF_BAND:
            return True
        buffers.append(raw)
        return False

    parts = _Parts()
    byvalue.Pickler(parts, buffer_callback=keep_in_band).dump(value)
    if sum(map(len, parts)) <= OUT_OF_BAND:
        return b"".join(parts), buffers
    return tuple(parts), buffers


loads: Final[Callable[..., Any]] = pickle.loads


# -- calls -----------------------------------------------------------------------------------------------------------
#
# A call is the pickle of (function, args, kwargs). Where the function can be referred to by its name, it is instead the
# pickle of that name, made once, behind a mark that no pickle begins with, and then the pickle of (args, kwargs), or
# nothing where there are none: neither side looks a name up again that it has looked up before.

_BY_NAME: Final = 0x52
_NAME_HEADER: Final = Struct("<BH")
_MOST_NAMES: Final = 4096


def reference(function: Callable[..., Any]) -> bytes:
    """What stands for an importable function at the front of its calls. Raises what pickling raises."""
    name = pickle.dumps(function, 5)
    return _NAME_HEADER.pack(_BY_NAME, len(name)) + name


def call_by_name(front: bytes, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """A call of the function with this reference; the arguments are simple."""
    return front + pickle.dumps((args, kwargs), 5) if args or kwargs else front


class CallLoader:
    """Rebuilds calls; remembers where the functions are that were called by name."""

    def __init__(self) -> None:
        #: reference -> (namespace, name), so that a function which was replaced there is the new one
        self._places: dict[bytes, tuple[dict[str, Any], str]] = {}

    def load(
        self, payload: bytes | memoryview | Stream, buffers: Sequence[memoryview]
    ) -> tuple[Callable[..., Any], Any, Any]:
        """Function, args and kwargs. Raises what unpickling raises."""
        if isinstance(payload, Stream):
            function, args, kwargs = pickle.Unpickler(payload).load()
            return function, args, kwargs
        if payload[0] != _BY_NAME:
            function, args, kwargs = loads(payload, buffers=buffers)
            return function, args, kwargs
        end = _NAME_HEADER.size + payload[1] + (payload[2] << 8)
        front = bytes(payload[:end])
        place = self._places.get(front)
        function = self._look_up(front) if place is None else place[0][place[1]]
        if end == len(payload):
            return function, (), {}
        args, kwargs = loads(memoryview(payload)[end:])
        return function, args, kwargs

    def _look_up(self, front: bytes) -> Callable[..., Any]:
        function: Callable[..., Any] = loads(memoryview(front)[_NAME_HEADER.size :])
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        name = getattr(function, "__qualname__", "")
        if module is not None and module.__dict__.get(name) is function:
            if len(self._places) >= _MOST_NAMES:
                self._places.clear()
            self._places[front] = (module.__dict__, name)
        return function


def run_chunk(function: Callable[..., Any], columns: Sequence[Sequence[Any]]) -> list[Any]:
    """Several calls of `map` as one task; `columns` are their first arguments, their second ones, and so on."""
    values = list(map(function, *columns))
    if CoroutineType in map(type, values):
        return [finish(value) for value in values]
    return values


def finish(value: Any) -> Any:
    """What a call returned; a coroutine is run to its end."""
    if type(value) is not CoroutineType:
        return value
    import asyncio

    return asyncio.run(value)


def run_agent(kind: str | type, prompt: str, kwargs: dict[str, Any]) -> Any:
    """One run of an agent, with the instance that this worker keeps of its kind."""
    from agentpool_worker.agents import base

    return base.run_agent(kind, prompt, kwargs)
