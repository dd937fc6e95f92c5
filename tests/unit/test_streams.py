"""What a future keeps of its task's events: bounds, readers that fall behind, the end; and the records themselves."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from agentpool import events
from agentpool.streams import EventBuffer, EventStream
from agentpool_worker import protocol
from agentpool_worker.protocol import Frame, FrameReader, ProtocolError

WaitUntil = Callable[..., None]


def said(number: int, kind: str = "progress") -> bytes:
    return pickle.dumps((100.0 + number, kind, (number, None, "")))


def frame_of(data: bytes) -> Frame:
    reader = FrameReader()
    reader.feed(data)
    (frame,) = reader.frames()
    return frame


async def somebody_waits(buffer: EventBuffer) -> None:
    while not buffer._wakers:  # noqa: ASYNC110  what is waited for is the other side's waiting
        await asyncio.sleep(0)


class TestTheFrame:
    def test_events_come_back_one_by_one(self) -> None:
        frame = frame_of(protocol.encode_events(7, [b"one", b"", b"three"], 5))
        assert (frame.kind, frame.task_id, frame.x, frame.y) == (protocol.EVENTS, 7, 3, 5)
        assert protocol.split_events(frame) == [b"one", b"", b"three"]

    def test_none_but_a_number_of_dropped_ones(self) -> None:
        frame = frame_of(protocol.encode_events(7, [], 1 << 40))
        assert (protocol.split_events(frame), frame.y) == ([], 0xFFFFFFFF)

    def test_its_size_is_known_before(self) -> None:
        parts = [b"x" * 10, b"y"]
        size = protocol.HEADER.size + sum(map(protocol.event_size, parts))
        assert len(protocol.encode_events(1, parts, 0)) == size

    @pytest.mark.parametrize(("count", "payload"), [
        (2, b"\x03\0\0\0abc"),  # the second is not there
        (1, b"\xff\0\0\0abc"),  # longer than the frame
        (0, b"\x03\0\0\0abc"),  # there is more than it says
        (1, b"\x03\0"),
    ])
    def test_one_that_is_malformed_is_refused(self, count: int, payload: bytes) -> None:
        with pytest.raises(ProtocolError, match="frame of"):
            protocol.split_events(Frame(protocol.EVENTS, 0, 1, count, 0, 0, payload, ()))


class TestTheBuffer:
    def test_it_keeps_the_newest_and_counts_the_others(self) -> None:
        buffer = EventBuffer(most=3)
        buffer.put(1, [b"%d" % number for number in range(5)], 0)
        assert buffer.dropped == buffer.dropped_altogether == 2
        assert buffer.read(0) == buffer.read(2) == (2, 1, b"2")
        assert buffer.read(4) == (4, 1, b"4")
        assert buffer.read(5) is None

    def test_it_is_bounded_in_bytes_too_and_keeps_at_least_one(self) -> None:
        buffer = EventBuffer(most=100, most_bytes=10)
        buffer.put(1, [b"12345", b"12345", b"x"], 0)
        assert (buffer.read(0), buffer.dropped) == ((1, 1, b"12345"), 1)
        buffer.put(1, [b"longer than all that is allowed"], 0)
        assert (buffer.read(0), buffer.dropped) == ((3, 1, b"longer than all that is allowed"), 3)

    def test_what_workers_dropped_is_counted_once_per_attempt(self) -> None:
        buffer = EventBuffer()
        buffer.put(1, [], 4)
        buffer.put(1, [], 6)
        buffer.put(2, [], 1)
        buffer.put(2, [b"x"], 0)
        assert (buffer.dropped, buffer.dropped_altogether) == (0, 7)

    def test_a_reader_that_looks_while_events_come_and_go_sees_them_in_order(self) -> None:
        buffer, seen = EventBuffer(most=4), []
        end = 30_000

        def read() -> None:
            position = 0
            while position < end:
                item = buffer.read(position)
                if item is not None:
                    seen.append(item[0])
                    position = item[0] + 1

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(end):
            buffer.put(1, [b"%d" % number], 0)
        reader.join()
        assert seen == sorted(set(seen))
        assert seen[-1] == end - 1

    def test_who_waits_is_told_once(self) -> None:
        buffer, told = EventBuffer(), []

        def tell() -> None:
            told.append(1)

        buffer.wake_by(tell)
        buffer.wake()
        buffer.wake()
        buffer.wake_by(tell)
        buffer.forget(tell)
        buffer.forget(tell)
        buffer.wake()
        assert told == [1]


class TestReading:
    def test_a_loop_ends_with_the_task_and_may_begin_again(self) -> None:
        future: Future[Any] = Future()
        buffer = EventBuffer()
        buffer.put(1, [said(0)], 0)
        buffer.put(2, [said(1)], 0)
        future.set_result(None)
        for _ in range(2):
            found = list(EventStream(future, buffer))
            assert [(type(event), event.attempt, event.time) for event in found] == [
                (events.Progress, 1, 100.0), (events.Progress, 2, 101.0)
            ]

    def test_a_loop_waits_for_more(self) -> None:
        future: Future[Any] = Future()
        buffer, seen = EventBuffer(), []
        first = threading.Event()

        def read() -> None:
            for event in EventStream(future, buffer):
                seen.append(event)
                first.set()

        reader = threading.Thread(target=read)
        reader.start()
        buffer.put(1, [said(0)], 0)
        buffer.wake()
        assert first.wait(30)
        assert reader.is_alive()
        buffer.put(1, [said(1)], 0)
        future.set_result(None)
        buffer.wake()
        reader.join(30)
        assert not reader.is_alive()
        assert [event.time for event in seen] == [100.0, 101.0]

    def test_an_asynchronous_loop_lets_others_run(self) -> None:
        future: Future[Any] = Future()
        buffer = EventBuffer()

        async def read() -> list[float]:
            return [event.time async for event in EventStream(future, buffer)]

        async def main() -> list[float]:
            reader = asyncio.create_task(read())
            for number in range(3):
                await somebody_waits(buffer)
                buffer.put(1, [said(number)], 0)
                buffer.wake()
            await somebody_waits(buffer)
            future.set_result(None)
            buffer.wake()
            return await reader

        assert asyncio.run(main()) == [100.0, 101.0, 102.0]

    def test_a_wait_that_was_given_up_leaves_nothing(self) -> None:
        future: Future[Any] = Future()
        buffer = EventBuffer()

        async def main() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(EventStream(future, buffer)), 0.01)

        asyncio.run(main())
        assert not buffer._wakers
        buffer.wake()

    def test_a_loop_of_asyncio_that_was_closed_is_no_concern(self) -> None:
        future: Future[Any] = Future()
        buffer = EventBuffer()
        loop = asyncio.new_event_loop()
        reader = loop.create_task(anext(EventStream(future, buffer)))
        while not buffer._wakers:
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        buffer.put(1, [said(0)], 0)
        buffer.wake()
        reader._log_destroy_pending = False  # type: ignore[attr-defined]


class Touchy:
    """Can be pickled, and not rebuilt."""

    def __init__(self, fault: type[BaseException]) -> None:
        self.fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        return _fail, (self.fault,)


def _fail(fault: type[BaseException]) -> None:
    raise fault("cannot be rebuilt")


class TestTheRecords:
    @pytest.mark.parametrize("fault", [ValueError, SystemExit, MemoryError])
    def test_what_cannot_be_rebuilt_is_an_event_that_says_so(self, fault: type[BaseException]) -> None:
        event = events.decode(pickle.dumps((1.0, "custom", (Touchy(fault),))), 3)
        assert isinstance(event, events.Unreadable)
        assert (event.attempt, event.error) == (3, f"{fault.__name__}: cannot be rebuilt")

    @pytest.mark.parametrize("payload", [b"", b"no pickle", pickle.dumps(7), pickle.dumps((1.0, "unheard of", ()))])
    def test_nor_does_anything_else_raise(self, payload: bytes) -> None:
        assert isinstance(events.decode(payload, 1), events.Unreadable)

    def test_ctrl_c_is_the_readers(self) -> None:
        with pytest.raises(KeyboardInterrupt):
            events.decode(pickle.dumps((1.0, "custom", (Touchy(KeyboardInterrupt),))), 1)

    def test_as_plain_data(self) -> None:
        event = events.ToolUse(time=1.5, attempt=1, name="bash", input={"command": "ls"})
        assert event.as_dict() == {
            "kind": "tool_use", "time": 1.5, "attempt": 1, "name": "bash", "input": {"command": "ls"}, "id": ""
        }

    @pytest.mark.parametrize(("done", "total", "fraction"), [
        (1, 4, 0.25), (9, 4, 1.0), (-1, 4, 0.0), (1, None, None), (0, 0, None)
    ])
    def test_the_fraction_of_progress(self, done: float, total: float | None, fraction: float | None) -> None:
        assert events.Progress(time=0.0, attempt=1, done=done, total=total).fraction == fraction

    def test_a_line_of_a_log_is_a_record_again(self, caplog: pytest.LogCaptureFixture) -> None:
        event = events.Log(time=12.25, attempt=1, level=logging.WARNING, message="50 % lost", logger="agent.x",
                           traceback="Traceback ...", thread="loader")
        record = event.record()
        logging.getLogger(record.name).handle(record)
        assert event.level_name == "WARNING"
        assert [(kept.name, kept.levelno, kept.getMessage(), kept.created, kept.msecs, kept.threadName)
                for kept in caplog.records] == [
            ("agent.x", 30, "50 % lost\nTraceback ...", 12.25, 250.0, "loader")
        ]
