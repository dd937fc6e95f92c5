"""The wire format: frames survive every way of cutting them, and what is no frame is refused.

`FrameReader` is fed byte strings and real descriptors; nothing here starts a process.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentpool_worker import protocol
from agentpool_worker.protocol import HEADER, Frame, FrameReader, ProtocolError, encode

LARGE = protocol.LARGE
Plain = tuple[int, int, int, int, int, int, bytes, tuple[bytes, ...]]

KINDS = sorted(protocol._KINDS)
U32 = st.integers(0, 0xFFFFFFFF)
FRAMES = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, protocol.SHARED - 1),
    st.integers(0, 2**64 - 1),
    U32,
    U32,
    U32,
    st.binary(max_size=60),
    st.lists(st.binary(max_size=30), max_size=4).map(tuple),
)


def wire(frame: Plain) -> bytes:
    """The bytes of a frame, as a pipe carries them."""
    kind, flags, task_id, x, y, z, payload, buffers = frame
    views = [memoryview(buffer) for buffer in buffers]
    return b"".join(encode(kind, task_id, payload, views, flags=flags, x=x, y=y, z=z))


def plain(frame: Frame) -> Plain:
    """A frame that was read, in a form that can be compared."""
    kind, flags, task_id, x, y, z, payload, buffers = frame
    return kind, flags, task_id, x, y, z, bytes(payload), tuple(bytes(buffer) for buffer in buffers)


def pieces(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return (data[start:end] for start, end in itertools.pairwise(edges))


def read_all(parts: Iterator[bytes]) -> tuple[list[Plain], FrameReader]:
    reader = FrameReader()
    found = []
    for part in parts:
        reader.feed(part)
        found += [plain(frame) for frame in reader.frames()]
    return found, reader


# --- cutting ---


@pytest.mark.parametrize("buffers", [(), (b"first", b"", b"third")])
def test_frame_cut_at_every_byte(buffers: tuple[bytes, ...]) -> None:
    frame: Plain = (protocol.CALL, 3, 2**63 + 7, 1, 2, 0xFFFFFFFF, b"a payload", buffers)
    data = wire(frame)
    for cut in range(len(data) + 1):
        reader = FrameReader()
        reader.feed(data[:cut])
        early = list(reader.frames())
        assert bool(early) == (cut == len(data)), cut
        assert reader.is_between_frames == (cut in (0, len(data))), cut
        reader.feed(data[cut:])
        assert [plain(found) for found in (*early, *reader.frames())] == [frame], cut
        assert reader.is_between_frames


def test_frames_that_arrive_byte_by_byte() -> None:
    frames: list[Plain] = [
        (protocol.VALUE, 0, 1, 0, 0, 0, b"", ()),
        (protocol.ERROR, 0, 2, 0, 0, 0, b"x" * 50, (b"y" * 20,)),
        (protocol.STOP, 1, 3, 0, 0, 0, b"", (b"", b"")),
    ]
    data = b"".join(map(wire, frames))
    found, reader = read_all(data[i : i + 1] for i in range(len(data)))
    assert found == frames
    assert reader.is_between_frames


@given(st.data(), st.lists(FRAMES, max_size=6))
def test_any_frames_cut_anywhere(data: st.DataObject, frames: list[Plain]) -> None:
    stream = b"".join(map(wire, frames))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    found, reader = read_all(pieces(stream, cuts))
    assert found == frames
    assert reader.is_between_frames


@given(
    size=st.sampled_from([LARGE - 1, LARGE, LARGE + 1, 2 * LARGE + 13]),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    buffer_sizes=st.lists(st.sampled_from([0, 1, LARGE // 2]), max_size=3),
    company=FRAMES,
)
@example(size=LARGE + 1, cuts=[], buffer_sizes=[], company=(protocol.VALUE, 0, 1, 0, 0, 0, b"", ()))
def test_large_frames_among_small_ones(
    size: int, cuts: list[float], buffer_sizes: list[int], company: Plain
) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    large: Plain = (protocol.VALUE, 0, 9, 0, 0, 0, payload[:size], tuple(payload[:count] for count in buffer_sizes))
    stream = wire(company) + wire(large) + wire(company) + wire(large)
    found, reader = read_all(pieces(stream, [int(cut * len(stream)) for cut in cuts]))
    assert found == [company, large, company, large]
    assert reader.is_between_frames


def test_large_frame_is_pending_until_its_last_byte() -> None:
    data = wire((protocol.VALUE, 0, 1, 0, 0, 0, b"z" * (LARGE + 100), ()))
    reader = FrameReader()
    reader.feed(data[:-1])
    assert list(reader.frames()) == []
    assert not reader.is_between_frames
    assert list(reader.frames()) == []
    reader.feed(data[-1:] + data[:10])
    assert [len(frame.payload) for frame in reader.frames()] == [LARGE + 100]
    assert not reader.is_between_frames  # ten bytes of the next one


def test_frames_stay_valid_when_more_is_read() -> None:
    first: Plain = (protocol.VALUE, 0, 1, 0, 0, 0, b"first", (b"buffer one",))
    second: Plain = (protocol.VALUE, 0, 2, 0, 0, 0, b"other", (b"buffer two",))
    reader = FrameReader()
    reader.feed(wire(first))
    (kept,) = reader.frames()
    reader.feed(wire(second) * 50)
    assert [plain(frame) for frame in reader.frames()] == [second] * 50
    assert plain(kept) == first


# --- descriptors ---


def test_reads_from_a_pipe_whatever_it_yields() -> None:
    frames: list[Plain] = [
        (protocol.VALUE, 0, number, 0, 0, 0, bytes([number]) * size, ())
        for number, size in enumerate([0, 1, 65536, 65537, LARGE, LARGE + 1, 3_000_000, 5])
    ]
    read_end, write_end = os.pipe()

    def write() -> None:
        with os.fdopen(write_end, "wb", buffering=0) as file:
            view = memoryview(b"".join(map(wire, frames)))
            while view:
                view = view[file.write(view) or 0 :]

    writer = threading.Thread(target=write)
    writer.start()
    reader = FrameReader()
    found = []
    try:
        while reader.read_from(read_end):
            found += [plain(frame) for frame in reader.frames()]
    finally:
        os.close(read_end)
        writer.join()
    assert found == frames
    assert reader.is_between_frames


def test_nothing_to_read_and_end_of_file() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    reader = FrameReader()
    try:
        with pytest.raises(BlockingIOError):
            reader.read_from(read_end)
        data = wire((protocol.VALUE, 0, 1, 0, 0, 0, b"p" * (LARGE + 1), ()))
        os.write(write_end, data[:1000])
        assert reader.read_from(read_end) == 1000
        assert list(reader.frames()) == []
        with pytest.raises(BlockingIOError):  # now it reads straight into the large frame's memory
            reader.read_from(read_end)
        os.write(write_end, data[1000:1500])
        assert reader.read_from(read_end) == 500
        os.close(write_end)
        write_end = -1
        assert reader.read_from(read_end) == 0
        assert list(reader.frames()) == []
        assert not reader.is_between_frames  # the writer died in the middle of a frame
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


def test_a_large_frame_takes_no_more_than_itself_from_the_descriptor() -> None:
    large: Plain = (protocol.VALUE, 0, 1, 0, 0, 0, b"l" * (LARGE + 1), ())
    small: Plain = (protocol.VALUE, 0, 2, 0, 0, 0, b"s", ())
    with open(os.memfd_create("frames"), "w+b", buffering=0) as file:
        file.write(wire(large) + wire(small) + wire(large))
        file.seek(0)
        reader = FrameReader()
        found = []
        while reader.read_from(file.fileno()):
            found += [plain(frame) for frame in reader.frames()]
    assert found == [large, small, large]


# --- what is no frame ---


def header(**changes: int) -> bytes:
    fields = {"magic": protocol.MAGIC, "kind": protocol.VALUE, "flags": 0, "buffers": 0, "task_id": 1, "length": 0,
              "x": 0, "y": 0, "z": 0}
    return HEADER.pack(*(fields | changes).values())


@pytest.mark.parametrize(
    "data",
    [
        header(magic=0),
        header(kind=0),
        header(kind=200),
        header(length=protocol.MAX_FRAME + 1),
        header(length=2**64 - 1),
        header(buffers=protocol.MAX_BUFFERS + 1, length=100),
        b"print() of somebody who found the descriptor\n",
        b"\0" * HEADER.size,
    ],
    ids=["magic", "kind 0", "kind 200", "a tebibyte", "16 exbibytes", "too many buffers", "text", "zeros"],
)
def test_garbage_is_refused(data: bytes) -> None:
    reader = FrameReader()
    reader.feed(data)
    with pytest.raises(ProtocolError):
        list(reader.frames())


def test_garbage_behind_a_frame_does_not_spoil_it() -> None:
    good: Plain = (protocol.VALUE, 0, 1, 0, 0, 0, b"good", ())
    reader = FrameReader()
    reader.feed(wire(good) + b"?" * HEADER.size)
    assert [plain(frame) for frame in reader.frames()] == [good]
    with pytest.raises(ProtocolError, match="not a frame: magic 0x3f3f"):
        reader.frames()


def test_buffers_longer_than_their_frame_are_refused() -> None:
    table = (1000).to_bytes(8, "little")
    reader = FrameReader()
    reader.feed(header(buffers=1, length=len(table) + 4) + table + b"four")
    with pytest.raises(ProtocolError, match="longer than the frame"):
        list(reader.frames())


def test_a_table_of_buffers_longer_than_its_frame_is_refused() -> None:
    """A frame of four bytes that claims to have five buffers: the table itself has no room."""
    reader = FrameReader()
    reader.feed(header(buffers=5, length=4) + b"four")
    with pytest.raises(ProtocolError):
        list(reader.frames())


@given(st.binary(max_size=200))
def test_whatever_comes_is_frames_or_a_protocol_error(data: bytes) -> None:
    reader = FrameReader()
    reader.feed(data)
    try:
        for frame in reader.frames():
            assert frame.kind in protocol._KINDS
    except ProtocolError:
        return


@given(
    kind=st.sampled_from(KINDS),
    buffers=st.integers(0, 6),
    claimed=st.integers(0, 80),
    body=st.binary(max_size=80),
)
def test_a_lying_header_is_a_protocol_error_or_waits_for_more(
    kind: int, buffers: int, claimed: int, body: bytes
) -> None:
    reader = FrameReader()
    reader.feed(header(kind=kind, buffers=buffers, length=claimed) + body)
    try:
        for frame in reader.frames():
            assert len(frame.payload) + sum(map(len, frame.buffers)) <= claimed
    except ProtocolError:
        return


# --- serializing ---


class Exposed:
    """Gives its bytes away out of band, as an array does."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    def __reduce_ex__(self, version: Any) -> tuple[Any, ...]:
        return Exposed, (pickle.PickleBuffer(self.data),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Exposed) and bytes(self.data) == bytes(other.data)

    __hash__ = None  # type: ignore[assignment]


def through_the_wire(value: object) -> tuple[object, Frame]:
    payload, buffers = protocol.dumps(value)
    reader = FrameReader()
    reader.feed(b"".join(encode(protocol.CALL, 1, payload, buffers)))
    (frame,) = reader.frames()
    return protocol.loads(frame.payload, buffers=frame.buffers), frame


def test_large_buffers_travel_out_of_band() -> None:
    large = bytearray(os.urandom(protocol.OUT_OF_BAND))
    small = bytearray(os.urandom(protocol.OUT_OF_BAND - 1))
    value = [Exposed(large), Exposed(small), Exposed(large)]
    found, frame = through_the_wire(value)
    assert found == value
    assert [len(buffer) for buffer in frame.buffers] == [len(large), len(large)]
    assert len(small) < len(frame.payload) < len(small) + 1000


def test_buffers_are_not_copied_into_the_pickle() -> None:
    data = bytearray(1_000_000)
    payload, buffers = protocol.dumps([Exposed(data)])
    assert len(payload) < 2000
    (buffer,) = buffers
    data[0] = 7
    assert buffer[0] == 7, "the buffer is a copy"


def test_what_is_not_contiguous_stays_in_band() -> None:
    class Strided:
        def __reduce_ex__(self, version: Any) -> tuple[Any, ...]:
            return bytes, (pickle.PickleBuffer(memoryview(bytes(400_000))[::2].toreadonly()),)

    # Pickle itself refuses what is not contiguous in band: an error for the caller, not a crash of ours.
    with pytest.raises(pickle.PicklingError):
        protocol.dumps(Strided())


@pytest.mark.parametrize("value", [b"x" * 300_000, bytearray(b"y" * 300_000)], ids=["bytes", "bytearray"])
def test_plain_bytes_survive(value: object) -> None:
    found, _ = through_the_wire((value, {"again": value}))
    assert found == (value, {"again": value})


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5) | st.tuples(inner),
    max_leaves=20,
)


@given(JSON_LIKE)
def test_any_data_comes_back(value: object) -> None:
    found, _ = through_the_wire(value)
    assert found == value
    assert type(found) is type(value)


def test_simple_values_do_without_cloudpickle() -> None:
    program = (
        "import sys\n"
        "from agentpool_worker import protocol\n"
        "protocol.dumps((1, 'two', [3.0, None], {'four': b'5'}))\n"
        "assert 'cloudpickle' not in sys.modules\n"
        "protocol.dumps(lambda: 1)\n"
        "assert 'cloudpickle' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class IntSubclass(int):
    pass


@pytest.mark.parametrize(
    ("value", "is_simple"),
    [
        (1, True),
        (None, True),
        ((1, [2, {"three": 4.0}]), True),
        ([[[[1]]]], False),
        (list(range(17)), False),
        ({1: 2}, False),
        ({1}, False),
        (IntSubclass(3), False),
        (len, False),
        (int, False),
    ],
)
def test_is_simple_trusts_only_what_plain_pickle_cannot_get_wrong(value: object, is_simple: bool) -> None:
    assert protocol.is_simple(value) == is_simple


def test_run_chunk_calls_in_order() -> None:
    assert protocol.run_chunk(pow, [(2, 3, 2), (3, 2, 5)]) == [8, 9, 32]


def test_run_chunk_runs_coroutines_to_their_end() -> None:
    async def half(number: int) -> float:
        return number / 2

    assert protocol.run_chunk(lambda n: half(n) if n % 2 else n, [(1, 2, 3)]) == [0.5, 2, 1.5]


def load_call(payload: bytes, loader: protocol.CallLoader | None = None) -> tuple[Any, Any, Any]:
    return (loader or protocol.CallLoader()).load(payload, ())


def test_a_call_by_name_has_the_function_and_its_arguments() -> None:
    front = protocol.reference(itertools.pairwise)
    for view in (bytes, memoryview):
        assert load_call(view(protocol.call_by_name(front, (), {}))) == (itertools.pairwise, (), {})
        payload = view(protocol.call_by_name(front, ("x" * 300, 1), {"k": None}))
        assert load_call(payload) == (itertools.pairwise, ("x" * 300, 1), {"k": None})


def test_a_function_that_was_replaced_in_its_module_is_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = protocol.CallLoader()
    payload = protocol.call_by_name(protocol.reference(protocol.finish), (1,), {})
    assert load_call(payload, loader)[0] is protocol.finish
    monkeypatch.setattr(protocol, "finish", abs)
    assert load_call(payload, loader)[0] is abs


def test_a_method_is_looked_up_each_time() -> None:
    payload = protocol.call_by_name(protocol.reference(pathlib.Path.exists), (), {})
    loader = protocol.CallLoader()
    assert [load_call(payload, loader)[0] for _ in range(2)] == [pathlib.Path.exists] * 2


def test_only_so_many_names_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_MOST_NAMES", 2)
    loader = protocol.CallLoader()
    for function in (os.fspath, os.getpid, os.getcwd, os.fspath):
        assert load_call(protocol.call_by_name(protocol.reference(function), (), {}), loader)[0] is function
    assert len(loader._places) <= 2


def large_frame(fill: bytes, task_id: int) -> bytes:
    return wire((protocol.VALUE, 0, task_id, 0, 0, 0, fill * (LARGE + 1), ()))


def test_memory_of_a_large_frame_is_used_again_only_when_nobody_looks_at_it() -> None:
    reader = FrameReader()

    def read(data: bytes) -> Frame:
        reader.feed(data[:100])
        assert reader.frames() == []
        reader.feed(data[100:])
        (frame,) = reader.frames()
        return frame

    first = read(large_frame(b"a", 1))
    spare = reader._spare
    second = read(large_frame(b"b", 2))
    assert bytes(first.payload) == b"a" * (LARGE + 1)
    assert bytes(second.payload) == b"b" * (LARGE + 1)
    assert reader._spare is not spare
    spare = reader._spare
    del second
    third = read(large_frame(b"c", 3))
    assert reader._spare is spare
    assert bytes(third.payload) == b"c" * (LARGE + 1)


def test_what_was_frozen_does_not_change() -> None:
    for size in (100, LARGE + 100):
        data = bytearray(b"x" * size)
        frozen = protocol.frozen(memoryview(data))
        data[:] = b"y" * size
        assert bytes(frozen) == b"x" * size
    constant = memoryview(b"constant")
    assert protocol.frozen(constant) is constant


# --- large calls, while they arrive ---


class Streaming:
    """A reader that hands out large calls as streams, and a pipe that a thread fills."""

    def __init__(self, data: bytes) -> None:
        self.read_end, self._write_end = os.pipe()
        self.reader = FrameReader(self.read_end)
        self._thread = threading.Thread(target=self._fill, args=(memoryview(data),))
        self._thread.start()

    def _fill(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._write_end, view) :]
        os.close(self._write_end)

    def frames(self) -> Iterator[Frame]:
        while self.reader.read_from(self.read_end):
            yield from self.reader.frames()

    def close(self) -> None:
        os.close(self.read_end)
        self._thread.join()


def large_call(task_id: int, *args: Any) -> bytes:
    payload, buffers = protocol.dumps((len, args, {}))
    return b"".join(bytes(part) for part in encode(protocol.CALL, task_id, payload, buffers, x=3))


def small_call(task_id: int) -> bytes:
    return wire((protocol.CALL, 0, task_id, 0, 0, 0, b"small", ()))


def test_a_large_call_is_unpickled_while_it_arrives_and_the_next_frame_is_whole() -> None:
    big = os.urandom(3 * LARGE)
    text = "ä" * LARGE
    streaming = Streaming(large_call(1, big, [text, big[:5]]) + small_call(2) + large_call(3, big))
    seen = []
    for frame in streaming.frames():
        if isinstance(frame.payload, protocol.Stream):
            function, args, kwargs = protocol.CallLoader().load(frame.payload, ())
            frame.payload.drain()
            seen.append((frame.task_id, function, args, kwargs))
        else:
            seen.append((frame.task_id, bytes(frame.payload)))
    streaming.close()
    assert seen == [(1, len, (big, [text, big[:5]]), {}), (2, b"small"), (3, len, (big,), {})]


def test_a_large_call_that_nobody_wants_is_drained() -> None:
    streaming = Streaming(large_call(1, os.urandom(2 * LARGE)) + small_call(2))
    frames = []
    for frame in streaming.frames():
        if isinstance(frame.payload, protocol.Stream):
            frame.payload.drain()
        frames.append(frame.task_id)
    streaming.close()
    assert frames == [1, 2]


def test_a_stream_gives_no_byte_of_the_next_frame() -> None:
    streaming = Streaming(wire((protocol.CALL, 0, 1, 0, 0, 0, bytes(LARGE + 1), ())) + small_call(2))
    stream = next(streaming.frames()).payload
    assert stream.read(LARGE) == bytes(LARGE)
    with pytest.raises(ProtocolError, match="longer than its frame"):
        stream.read(2)
    with pytest.raises(ProtocolError, match="no pickle of protocol 5"):
        stream.readline()
    stream.drain()
    assert [frame.task_id for frame in streaming.frames()] == [2]
    streaming.close()


def test_a_call_whose_sender_is_gone_is_an_error() -> None:
    streaming = Streaming(large_call(1, os.urandom(2 * LARGE))[:-10])
    stream = next(streaming.frames()).payload
    with pytest.raises(ProtocolError, match="ended within a call"):
        protocol.CallLoader().load(stream, ())
    streaming.close()


def test_only_calls_without_buffers_are_streams() -> None:
    value = wire((protocol.VALUE, 0, 1, 0, 0, 0, bytes(LARGE + 1), ()))
    buffered = wire((protocol.CALL, 0, 2, 0, 0, 0, b"", (bytes(LARGE + 1),)))
    streaming = Streaming(value + buffered)
    assert [type(frame.payload) for frame in streaming.frames()] == [memoryview, memoryview]
    streaming.close()


def test_a_long_list_of_plain_results_needs_no_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cloudpickle", raising=False)
    for values in ([None] * 100, [1, "a", b"b", 2.5, True] * 20):
        payload, buffers = protocol.dumps(values)
        assert (pickle.loads(payload), tuple(buffers)) == (values, ())
    assert "cloudpickle" not in sys.modules
    assert not protocol.is_flat([1, [2]])
    assert not protocol.is_flat([IntSubclass(3)])
