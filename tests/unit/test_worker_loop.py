"""The worker's loop, driven without a process: a link that is a list, a page that is a bytearray.

Calls run in this process, so tasks are functions of this module and leave what they saw in `SEEN`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from agentpool_worker import context, main, protocol
from agentpool_worker.main import PipeLink, Worker
from agentpool_worker.protocol import OUTBOX, OUTBOX_DATA, OUTBOX_HEADER, PAGE_SIZE, Frame, FrameReader, encode

SEEN: dict[str, Any] = {}


class FakeLink:
    """Hands out prepared bytes, one chunk per read, and keeps what is written, one entry per write."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = list(chunks)
        self.writes: list[bytes] = []
        self.on_read: Callable[[], None] = lambda: None
        self.streams_from = None

    def read_calls(self, reader: FrameReader) -> int:
        self.on_read()
        if not self.chunks:
            return 0
        chunk = self.chunks.pop(0)
        reader.feed(chunk)
        return len(chunk)

    def write(self, parts: list[bytes | memoryview]) -> None:
        self.writes.append(b"".join(bytes(part) for part in parts))

    @property
    def frames(self) -> list[Frame]:
        return decode(b"".join(self.writes))


class Clock:
    """Stands for the `time` module in the worker."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def decode(data: bytes) -> list[Frame]:
    reader = FrameReader()
    reader.feed(data)
    frames = list(reader.frames())
    assert reader.is_between_frames, "half a frame"
    return frames


def call(task_id: int, function: Callable[..., Any], *args: Any, slot: int | None = None, **kwargs: Any) -> bytes:
    payload, buffers = protocol.dumps((function, args, kwargs))
    return b"".join(encode(protocol.CALL, task_id, payload, buffers, x=task_id if slot is None else slot))


def init(function: Callable[..., Any] | None = None, *args: Any) -> bytes:
    return b"".join(encode(protocol.INIT, 0, *protocol.dumps((function, args))))


def value(frame: Frame) -> Any:
    assert frame.kind == protocol.VALUE, error(frame)
    return protocol.loads(frame.payload, buffers=frame.buffers)


def error(frame: Frame) -> tuple[Any, ...]:
    """(exception or None, class name, message, traceback, why not pickled, where)"""
    pickled, *texts = protocol.loads(frame.payload, buffers=frame.buffers)
    return (None if pickled is None else protocol.loads(pickled), *texts)


def outbox(page: bytearray) -> tuple[int, list[Frame]]:
    generation, length = OUTBOX_HEADER.unpack_from(page, OUTBOX)
    return generation, decode(bytes(page[OUTBOX_DATA : OUTBOX_DATA + length]))


class Run:
    """A worker that has served everything."""

    def __init__(self, *chunks: bytes, prepare: Callable[[Run], None] = lambda run: None) -> None:
        self.link = FakeLink(*chunks)
        self.page = bytearray(PAGE_SIZE)
        self.worker = Worker(7, self.link, self.page)
        SEEN["run"] = self
        prepare(self)
        self.worker.run()

    @property
    def frames(self) -> list[Frame]:
        return self.link.frames


@pytest.fixture(autouse=True)
def _nothing_seen() -> Iterator[None]:
    SEEN.clear()
    yield
    SEEN.clear()
    context._leave()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(main, "time", clock)
    SEEN["clock"] = clock
    return clock


# --- tasks ---


def note(what: object) -> object:
    SEEN.setdefault("notes", []).append(what)
    return what


def raise_(error: BaseException) -> NoReturn:
    raise error


def fail(message: str) -> NoReturn:
    raise ValueError(message)  # the line that the traceback must show


def take(seconds: float) -> float:
    SEEN["clock"].now += seconds
    return seconds


def see_page() -> None:
    run = SEEN["run"]
    SEEN["outbox"] = outbox(run.page)
    SEEN["written"] = list(run.link.writes)


# --- calls ---


def test_calls_run_in_order_and_answer() -> None:
    run = Run(init(), call(1, pow, 2, 5), call(2, sorted, [3, 1, 2], reverse=True) + call(3, note, "x"))
    ready, *frames = run.frames
    assert (ready.kind, ready.task_id) == (protocol.READY, os.getpid())
    assert ready.x > 1000, "its RSS, in KiB"
    assert [(frame.kind, frame.task_id) for frame in frames] == [(protocol.VALUE, n) for n in (1, 2, 3)]
    assert [value(frame) for frame in frames] == [32, [3, 2, 1], "x"]


def test_calls_in_pieces() -> None:
    data = init() + call(1, note, "a" * 100) + call(2, note, "b")
    run = Run(*(data[i : i + 7] for i in range(0, len(data), 7)))
    assert SEEN["notes"] == ["a" * 100, "b"]
    assert [value(frame) for frame in run.frames[1:]] == ["a" * 100, "b"]


def test_run_time_in_microseconds(clock: Clock) -> None:
    run = Run(call(1, take, 1.5), call(2, take, 1e9))
    assert [frame.x for frame in run.frames] == [1_500_000, 0xFFFFFFFF]  # 71 minutes is the most it can say


def test_memory_is_reported_but_not_for_each_of_many_short_calls(clock: Clock) -> None:
    run = Run(call(1, take, 0.01), call(2, take, 0), call(3, take, 0.01))
    measured = [frame.y for frame in run.frames]
    assert measured[0] > 1000
    assert measured[1] == 0, "measured twice within a millisecond"
    assert measured[2] > 1000


def test_peak_is_reported_where_the_task_raised_it() -> None:
    size = 150 * 1024 * 1024
    run = Run(call(1, pow, 1, 1), call(2, allocate, size))
    assert run.frames[1].z * 1024 > size
    assert run.frames[0].z * 1024 < run.frames[1].z * 1024


def allocate(size: int) -> int:
    # More than this process ever had: pytest itself may have been bigger before.
    import resource

    size += resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    data = bytearray(size)
    data[::4096] = b"x" * len(data[::4096])
    return len(data)


def test_a_coroutine_is_run_to_its_end() -> None:
    async def double(number: int) -> int:
        import asyncio

        await asyncio.sleep(0)
        return 2 * number

    run = Run(call(1, double, 21))
    assert value(run.frames[0]) == 42


def test_out_of_band_buffers_both_ways() -> None:
    data = bytearray(os.urandom(300_000))
    run = Run(call(1, echo_buffer, Buffer(data)))
    (frame,) = run.frames
    assert len(frame.buffers) == 1
    assert value(frame).data == data


class Buffer:
    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, version: Any) -> tuple[Any, ...]:
        import pickle

        return Buffer, (pickle.PickleBuffer(self.data),)


def echo_buffer(buffer: Buffer) -> Buffer:
    return buffer


# --- errors ---


def test_an_error_is_described() -> None:
    run = Run(call(1, fail, "nothing works"), call(2, note, "next"))
    frame, following = run.frames
    assert frame.kind == protocol.ERROR
    found, name, message, trace, why, where = error(frame)
    assert type(found) is ValueError
    assert found.args == ("nothing works",)
    assert (name, message, why, where) == ("builtins.ValueError", "nothing works", "", "")
    assert "the line that the traceback must show" in trace
    assert "agentpool_worker" not in trace, "the worker's own frames are no help to anybody"
    assert value(following) == "next"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), BaseException("bare")])
def test_no_exception_ends_the_loop(failure: BaseException) -> None:
    run = Run(call(1, raise_, failure), call(2, note, "next"))
    frame, following = run.frames
    assert frame.kind == protocol.ERROR
    assert type(error(frame)[0]) is type(failure)
    assert error(frame)[0].args == failure.args
    assert value(following) == "next"


class Unrebuildable:
    def __reduce__(self) -> tuple[Any, ...]:
        return fail, ("cannot be rebuilt here",)


def test_a_call_that_cannot_be_rebuilt() -> None:
    run = Run(call(1, note, Unrebuildable()), call(2, note, "next"))
    frame, following = run.frames
    assert frame.kind == protocol.CALL_FAILED
    assert error(frame)[1:3] == ("builtins.ValueError", "cannot be rebuilt here")
    assert SEEN["notes"] == ["next"]
    assert value(following) == "next"


def test_a_call_that_is_no_pickle() -> None:
    run = Run(b"".join(encode(protocol.CALL, 1, b"no pickle")), call(2, note, "next"))
    assert [frame.kind for frame in run.frames] == [protocol.CALL_FAILED, protocol.VALUE]


class Holder:
    def __init__(self) -> None:
        self.inner = {"key": [1, threading.Lock()]}


def test_a_result_that_cannot_be_pickled_is_named() -> None:
    run = Run(call(1, Holder), call(2, note, "next"))
    frame, following = run.frames
    assert frame.kind == protocol.RESULT_FAILED
    found, name, message, _, _, where = error(frame)
    assert where == "result.inner['key'][1] (a _thread.lock)"
    assert name == "builtins.TypeError"
    assert "lock" in message
    assert isinstance(found, TypeError)
    assert value(following) == "next"


class ExitsWhilePickled:
    def __reduce__(self) -> NoReturn:
        raise SystemExit(5)


def test_system_exit_while_a_result_is_pickled() -> None:
    run = Run(call(1, ExitsWhilePickled), call(2, note, "next"))
    assert [frame.kind for frame in run.frames] == [protocol.RESULT_FAILED, protocol.VALUE]
    assert type(error(run.frames[0])[0]) is SystemExit


class NeedsTwo(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


def raise_needs_two() -> NoReturn:
    raise NeedsTwo(3, "three")


def test_an_exception_whose_constructor_cannot_be_replayed() -> None:
    run = Run(call(1, raise_needs_two))
    found, name, message, trace, why, _ = error(run.frames[0])
    assert found is None
    assert name.endswith("NeedsTwo")
    assert message == "3: three"
    assert "TypeError" in why
    assert "raise_needs_two" in trace


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("I have no words")


def raise_mute() -> NoReturn:
    raise Mute


def test_an_exception_without_words() -> None:
    run = Run(call(1, raise_mute), call(2, note, "next"))
    frame, following = run.frames
    assert frame.kind == protocol.ERROR
    found, name, message, *_ = error(frame)
    assert type(found) is Mute
    assert name.endswith("Mute")
    assert "cannot be made" in message
    assert value(following) == "next"


class Fatal(Exception):
    def __str__(self) -> str:
        raise SystemExit("even my words are deadly")


def raise_fatal() -> NoReturn:
    raise Fatal


def test_an_exception_whose_words_exit() -> None:
    """Whatever a user's __str__ raises, the worker has an answer."""
    run = Run(call(1, raise_fatal), call(2, note, "next"))
    assert [frame.kind for frame in run.frames] == [protocol.ERROR, protocol.VALUE]


def test_cause_and_context_are_in_the_traceback() -> None:
    def chained() -> NoReturn:
        try:
            fail("first")
        except ValueError as first:
            raise KeyError("second") from first

    run = Run(call(1, chained))
    found, _, _, trace, *_ = error(run.frames[0])
    assert type(found) is KeyError
    assert "ValueError: first" in trace
    assert "direct cause" in trace


def test_deep_recursion() -> None:
    def down(depth: int) -> int:
        return down(depth + 1)

    run = Run(call(1, down, 0), call(2, note, "next"))
    assert type(error(run.frames[0])[0]) is RecursionError
    assert value(run.frames[1]) == "next"


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def test_a_deeply_nested_result() -> None:
    run = Run(call(1, nested, 100_000), call(2, note, "next"))
    frame, following = run.frames
    assert frame.kind == protocol.RESULT_FAILED
    assert "nested too deeply" in error(frame)[5] or "recursion" in error(frame)[2]
    assert value(following) == "next"


def test_a_result_nested_just_too_deeply_is_not_described_by_a_thousand_steps() -> None:
    failed = 0
    for depth in (1500, 3000, 6000, 12_000, 24_000):  # how deep pickle goes differs between interpreters
        (frame,) = Run(call(1, nested, depth)).frames
        if frame.kind == protocol.RESULT_FAILED:
            failed += 1
            assert len(error(frame)[5]) < 200
    assert failed


# --- began, revoked ---


def began_slots() -> tuple[int, ...]:
    return tuple(SEEN["run"].page[protocol.BEGAN + slot] for slot in (4, 5, 6))


def test_the_page_says_what_began() -> None:
    run = Run(*(call(slot, began_slots, slot=slot) for slot in (4, 5, 6)))
    assert [value(frame) for frame in run.frames] == [(1, 0, 0), (1, 1, 0), (1, 1, 1)]


def test_a_revoked_call_is_passed_over() -> None:
    def revoke(run: Run) -> None:
        run.page[protocol.REVOKED + 12] = 1

    run = Run(
        call(1, note, "first", slot=11) + call(2, note, "second", slot=12) + call(3, note, "third", slot=13),
        prepare=revoke,
    )
    assert SEEN["notes"] == ["first", "third"]
    assert [(frame.kind, frame.task_id) for frame in run.frames] == [
        (protocol.VALUE, 1), (protocol.SKIPPED, 2), (protocol.VALUE, 3),
    ]
    assert run.frames[1].x == 12, "the slot tells this dispatch of the task from a later one"
    assert run.page[protocol.BEGAN + 12] == 0


def revoke_slot(slot: int) -> None:
    SEEN["run"].page[protocol.REVOKED + slot] = 1


def test_a_call_revoked_while_the_one_before_it_runs() -> None:
    run = Run(call(1, revoke_slot, 1, slot=0) + call(2, note, "never", slot=1) + call(3, note, "x", slot=2))
    assert [frame.kind for frame in run.frames] == [protocol.VALUE, protocol.SKIPPED, protocol.VALUE]
    assert SEEN["notes"] == ["x"]


def test_a_slot_that_is_used_again() -> None:
    """The parent clears both bytes with each call that it sends."""
    run = Run(call(1, revoke_slot, 9, slot=9), call(2, note, "skipped", slot=9))
    assert [frame.kind for frame in run.frames] == [protocol.VALUE, protocol.SKIPPED]


# --- the outbox ---


def test_results_of_short_calls_travel_together(clock: Clock) -> None:
    run = Run(b"".join(call(n, take, 0.00001) for n in range(1, 11)))
    assert len(run.link.writes) == 1
    assert [frame.task_id for frame in run.frames] == list(range(1, 11))


def test_a_held_result_can_be_found_in_the_page(clock: Clock) -> None:
    Run(call(1, note, "first") + call(2, note, "second") + call(3, see_page) + call(4, note, "last"))
    generation, held = SEEN["outbox"]
    assert generation == 0
    assert [value(frame) for frame in held] == ["first", "second"]
    assert SEEN["written"] == []


def test_generations_tell_what_was_sent(clock: Clock) -> None:
    run = Run(call(1, note, "first"), call(2, see_page), call(3, note, "x") + call(4, see_page))
    generation, held = SEEN["outbox"]
    assert generation == 2
    assert [frame.task_id for frame in held] == [3]
    assert [frame.task_id for frame in decode(b"".join(SEEN["written"]))] == [1, 2]
    assert outbox(run.page) == (3, [])


def test_the_generation_wraps() -> None:
    def last(run: Run) -> None:
        run.worker._generation = 0xFFFFFFFF

    run = Run(call(1, note, "a"), prepare=last)
    assert value(run.frames[0]) == "a"
    assert outbox(run.page) == (0, [])


def test_nothing_is_held_for_long(clock: Clock) -> None:
    """The third result finds the first one older than HOLD_SECONDS, and takes all along."""
    hold = main.HOLD_SECONDS
    run = Run(b"".join(call(n, take, 0.6 * hold) for n in range(1, 6)))
    assert [len(decode(data)) for data in run.link.writes] == [3, 2]


def test_nothing_is_held_while_the_worker_waits_for_calls() -> None:
    def check(run: Run) -> None:
        run.link.on_read = lambda: SEEN.setdefault("at reads", []).append(outbox(run.page)[1])

    Run(init(), call(1, note, "a"), call(2, note, "b") + call(3, note, "c"), prepare=check)
    assert SEEN["at reads"] == [[], [], [], []]


def test_a_call_cut_in_two_does_not_hold_back_the_result_before_it() -> None:
    second = call(2, note, "b")
    seen: list[list[int]] = []

    def check(run: Run) -> None:
        run.link.on_read = lambda: seen.append([frame.task_id for frame in run.frames])

    Run(call(1, note, "a") + second[:20], second[20:], prepare=check)
    assert seen == [[], [1], [1, 2]]


def test_a_full_outbox_is_written(clock: Clock) -> None:
    size = (PAGE_SIZE - OUTBOX_DATA) // 3
    run = Run(b"".join(call(n, bytes, size) for n in range(1, 8)))
    assert [frame.task_id for frame in run.frames] == list(range(1, 8))
    assert all(len(value(frame)) == size for frame in run.frames)
    assert outbox(run.page)[1] == []
    assert 1 < len(run.link.writes) < 7 * 2


def test_a_result_that_does_not_fit_goes_out_at_once_and_in_order(clock: Clock) -> None:
    run = Run(call(1, note, "a") + call(2, bytes, PAGE_SIZE) + call(3, see_page))
    assert [frame.task_id for frame in decode(b"".join(SEEN["written"]))] == [1, 2]
    assert [frame.task_id for frame in run.frames] == [1, 2, 3]


# --- INIT and COLLECT ---


def test_the_initializer_runs_before_the_first_call() -> None:
    run = Run(init(note, "set up") + call(1, note, "called"))
    assert SEEN["notes"] == ["set up", "called"]
    assert [frame.kind for frame in run.frames] == [protocol.READY, protocol.VALUE]


@pytest.mark.parametrize("failure", [ValueError("no set-up today"), SystemExit(1), KeyboardInterrupt()])
def test_an_initializer_that_raises_ends_the_worker(failure: BaseException) -> None:
    run = Run(init(raise_, failure), call(1, note, "never"))
    (frame,) = run.frames
    assert frame.kind == protocol.INIT_FAILED
    found, name, _, trace, *_ = error(frame)
    assert type(found) is type(failure)
    assert name == f"builtins.{type(failure).__name__}"
    assert "raise_" in trace
    assert "notes" not in SEEN


def test_an_initializer_that_cannot_be_rebuilt() -> None:
    run = Run(init(note, Unrebuildable()))
    assert [frame.kind for frame in run.frames] == [protocol.INIT_FAILED]
    assert error(run.frames[0])[2] == "cannot be rebuilt here"


class Cycle:
    def __init__(self) -> None:
        self.me = self


def make_cycle() -> None:
    cycle = Cycle()
    SEEN["cycle"] = weakref.ref(cycle)


def is_cycle_alive() -> bool:
    return SEEN["cycle"]() is not None


def test_collect_collects_garbage() -> None:
    collect = b"".join(encode(protocol.COLLECT))
    gc.disable()
    try:
        run = Run(call(1, make_cycle), call(2, is_cycle_alive) + collect + call(3, is_cycle_alive))
    finally:
        gc.enable()
    frames = {frame.task_id: frame for frame in run.frames if frame.kind == protocol.VALUE}
    assert (value(frames[2]), value(frames[3])) == (True, False)
    (collected,) = (frame for frame in run.frames if frame.kind == protocol.COLLECTED)
    assert collected.x > 1000


def test_a_finished_call_keeps_nothing_alive() -> None:
    """Argument and result are gone when the worker waits for the next call."""
    seen: list[bool] = []

    def check(run: Run) -> None:
        run.link.on_read = lambda: seen.append("tracked" in SEEN and SEEN["tracked"]() is not None)

    Run(call(1, tracked, Tracked()), call(2, note, "x"), prepare=check)
    assert seen == [False, False, False]


class Tracked:
    pass


def tracked(argument: Tracked) -> Tracked:
    SEEN["tracked"] = weakref.ref(argument)
    return argument


# --- stopping ---


def test_context_inside_and_outside_of_a_task() -> None:
    def who() -> tuple[int, int, bool]:
        current = context.current()
        return current.task_id, current.worker_id, current.is_cancelled

    run = Run(call(41, who), call(42, who))
    assert [value(frame) for frame in run.frames] == [(41, 7, False), (42, 7, False)]
    with pytest.raises(RuntimeError, match="task of an AgentPool"):
        context.current()


def stop(task_id: int, *, signal_too: bool = False) -> bool:
    """As the control thread would, while this task runs."""
    worker = SEEN["run"].worker
    worker.request_stop(task_id)
    if signal_too:
        worker.on_stop_signal(signal.SIGINT, None)
    return context.current().is_cancelled


def test_a_task_that_is_asked_to_stop() -> None:
    run = Run(call(1, stop, 1, signal_too=True), call(2, note, "next"))
    stopping, frame, following = run.frames
    assert (stopping.kind, stopping.task_id) == (protocol.STOPPING, 1)
    assert frame.kind == protocol.ERROR
    assert type(error(frame)[0]) is context.TaskCancelled
    assert value(following) == "next"


def test_code_that_only_looks_sees_the_wish() -> None:
    run = Run(call(1, stop, 1), call(2, stop, 99))
    values = {frame.task_id: value(frame) for frame in run.frames if frame.kind == protocol.VALUE}
    assert values[1] is True


def test_a_wish_for_an_earlier_task_does_not_touch_the_next() -> None:
    def is_cancelled() -> bool:
        return context.current().is_cancelled

    run = Run(call(1, stop, 1), call(2, is_cancelled), call(3, signal_now))
    values = {frame.task_id: value(frame) for frame in run.frames if frame.kind == protocol.VALUE}
    assert values == {1: True, 2: False, 3: "went on"}


def signal_now() -> str:
    SEEN["run"].worker.on_stop_signal(signal.SIGINT, None)
    return "went on"


def test_a_wish_that_comes_before_the_task() -> None:
    run = Run(call(1, note, "x"), call(2, note, "never"), prepare=lambda run: run.worker.request_stop(2))
    kinds = [(frame.kind, frame.task_id) for frame in run.frames]
    assert kinds == [(protocol.STOPPING, 2), (protocol.VALUE, 1), (protocol.ERROR, 2)]
    assert type(error(run.frames[2])[0]) is context.TaskCancelled
    assert SEEN["notes"] == ["x"]


def stay() -> str:
    worker = SEEN["run"].worker
    worker.request_stop(1)
    try:
        worker.on_stop_signal(signal.SIGINT, None)
    except BaseException as first:
        SEEN["first"] = type(first)
    worker.on_stop_signal(signal.SIGINT, None)
    return "not moved"


def test_it_is_raised_once_only() -> None:
    run = Run(call(1, stay))
    assert SEEN["first"] is context.TaskCancelled
    assert value(run.frames[-1]) == "not moved"


def test_a_signal_between_tasks_is_nothing() -> None:
    def check(run: Run) -> None:
        run.worker.request_stop(1)
        run.link.on_read = lambda: run.worker.on_stop_signal(signal.SIGINT, None)

    run = Run(call(2, note, "x"), prepare=check)
    assert value(run.frames[-1]) == "x"


# --- standard streams ---


class Stream(io.StringIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


def test_streams_are_flushed_where_it_matters(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error, and after a task that took its time: a crash later on must not take the words with it."""
    out = Stream()
    monkeypatch.setattr(sys, "stdout", out)
    Run(call(1, raise_, ValueError("x")))
    assert out.flushes == 1
    Run(call(1, take, 0.5))
    assert out.flushes == 2


@pytest.mark.parametrize("stream", [None, "closed"])
def test_closed_streams_are_the_tasks_own_affair(monkeypatch: pytest.MonkeyPatch, stream: str | None) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", None if stream is None else closed)
    run = Run(call(1, raise_, ValueError("x")), call(2, note, "next"))
    assert [frame.kind for frame in run.frames] == [protocol.ERROR, protocol.VALUE]


# --- the real link ---


def test_frames_of_two_threads_never_interleave() -> None:
    read_end, write_end = os.pipe()
    link = PipeLink(-1, write_end, bytearray(PAGE_SIZE))
    size = 300_000  # several times what a pipe holds

    def write(number: int) -> None:
        for _ in range(20):
            link.write(encode(protocol.VALUE, number, bytes([number]) * size, [memoryview(bytes([number]) * 1000)]))

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    frames: list[Frame] = []
    reader = FrameReader()
    with contextlib.closing(os.fdopen(read_end, "rb", buffering=0)) as file:
        while len(frames) < 60:
            assert reader.read_from(file.fileno())
            frames += reader.frames()
    for thread in threads:
        thread.join()
    os.close(write_end)
    assert sorted(frame.task_id for frame in frames) == sorted([1, 2, 3] * 20)
    assert all(bytes(frame.payload) == bytes([frame.task_id]) * size for frame in frames)

