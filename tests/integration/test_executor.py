"""AgentPool as a `concurrent.futures.Executor`, with real processes: submit, map, shutdown, contexts, asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import itertools
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, CancelledError, as_completed, wait
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle
import pytest

from agentpool import AgentPool, PoolClosedError, SettingsError, TaskKilledError, WorkerCrashedError

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
#: Seconds that a result may take: far more than it does.
LONG = 30.0


@pytest.fixture
def pool(make_pool: Callable[..., AgentPool]) -> AgentPool:
    return make_pool(max_workers=2)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


class Gate:
    """Tasks wait at it until the test opens it; each says first that it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def pass_(self, value: object = None) -> object:
        """In a task."""
        (self.path / f"{value}.began").write_text(str(os.getpid()))
        while not (self.path / "open").exists():
            time.sleep(0.005)
        return value

    def began(self, value: object = None) -> bool:
        return (self.path / f"{value}.began").exists()

    def open(self) -> None:
        (self.path / "open").touch()


def pid_of(future: concurrent.futures.Future[Any]) -> int:
    pid = future.worker_pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def square(number: int) -> int:
    return number * number


def fail(message: str) -> NoReturn:
    raise ValueError(message)


# --- submit: what can be called ---


def test_runs_in_another_process_with_all_arguments(pool: AgentPool) -> None:
    def show(*args: object, **kwargs: object) -> tuple[object, ...]:
        return args, kwargs, os.getpid()

    future = pool.submit(show, 1, "two", fn=3, self=4, timeout=5, key=6, retry=7)
    args, kwargs, pid = future.result(LONG)
    assert (args, kwargs) == ((1, "two"), {"fn": 3, "self": 4, "timeout": 5, "key": 6, "retry": 7})
    assert pid != os.getpid()
    assert pid == future.worker_pid


class Counter:
    step = 2

    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, count: int) -> int:
        return self.start + count * self.step

    def ahead(self, count: int) -> int:
        return self(count)

    @classmethod
    def steps(cls) -> int:
        return cls.step

    @staticmethod
    def nothing() -> int:
        return 0


def closure(base: int) -> Callable[[int], int]:
    def add(number: int) -> int:
        return base + number

    return add


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (lambda x: x + 1, (1,), 2),
        (closure(10), (5,), 15),
        (square, (3,), 9),
        (abs, (-3,), 3),
        ("abc".upper, (), "ABC"),
        (operator.attrgetter("real"), (5,), 5),
        (os.path.join, ("a", "b"), "a/b"),
        (functools.partial(square, 4), (), 16),
        (functools.partial(closure(1), 2), (), 3),
        (Counter(1), (3,), 7),
        (Counter(1).ahead, (2,), 5),
        (Counter.steps, (), 2),
        (Counter.nothing, (), 0),
        (int, ("12",), 12),
    ],
    ids=["lambda", "closure", "function", "builtin", "method of a builtin", "C object", "of a module", "partial",
         "partial of a closure", "callable", "method", "classmethod", "staticmethod", "type"],
)
def test_kinds_of_callables(pool: AgentPool, fn: Callable[..., Any], args: tuple[Any, ...], expected: Any) -> None:
    assert pool.submit(fn, *args).result(LONG) == expected


def test_classes_of_the_caller_come_back_as_themselves(pool: AgentPool) -> None:
    found = pool.submit(Counter, 5).result(LONG)
    assert type(found) is Counter
    assert found.start == 5


def test_functions_of_a_module_are_sent_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker imports it from where this process would."""
    source = "count = 0\ndef up():\n    global count\n    count += 1\n    return count\n"
    (tmp_path / "module_of_a_test.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import module_of_a_test  # type: ignore[import-not-found]

    with AgentPool(max_workers=1) as later:
        counts = [later.submit(module_of_a_test.up).result(LONG) for _ in range(3)]
    assert counts == [1, 2, 3], "its module's variables live on in the worker"
    assert module_of_a_test.count == 0
    del sys.modules["module_of_a_test"]


def test_a_function_that_was_replaced_in_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that was submitted runs, not the one that has its name by now."""
    (tmp_path / "module_replaced.py").write_text("def answer():\n    return 'as imported'\n")
    monkeypatch.syspath_prepend(tmp_path)
    import module_replaced  # type: ignore[import-not-found]

    original = module_replaced.answer
    with AgentPool(max_workers=1) as later:
        assert later.submit(original).result(LONG) == "as imported"
        module_replaced.answer = lambda: "replaced"
        assert later.submit(original).result(LONG) == "as imported"
        assert later.submit(module_replaced.answer).result(LONG) == "replaced"
    del sys.modules["module_replaced"]


def test_a_coroutine_function_is_run_to_its_end(pool: AgentPool) -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0.01)
        return 2 * number

    assert [future.result(LONG) for future in [pool.submit(double, n) for n in range(4)]] == [0, 2, 4, 6]


def test_standard_error_classes_of_arguments() -> None:
    with AgentPool() as pool, pytest.raises(TypeError):
        pool.submit()  # type: ignore[call-arg]


# --- map ---


def test_map_keeps_order_and_stops_at_the_shortest(pool: AgentPool) -> None:
    assert list(pool.map(pow, range(5), itertools.count(1))) == [0, 1, 8, 81, 1024]
    assert list(pool.map(pow, [2, 3], [3, 2], [5, 5])) == [3, 4]
    assert list(pool.map(abs, [])) == []
    assert list(pool.map(abs)) == []


def test_map_is_eager(pool: AgentPool, gate: Gate, wait_until: WaitUntil) -> None:
    """As the standard one: the input is read, and the work begins, before anybody asks for a result."""
    read: list[int] = []
    results = pool.map(gate.pass_, (read.append(n) or n for n in range(4)))
    assert read == [0, 1, 2, 3]
    wait_until(lambda: gate.began(0) and gate.began(1), "nothing began")
    gate.open()
    assert list(results) == [0, 1, 2, 3]


def test_map_in_chunks_travels_as_tasks(pool: AgentPool) -> None:
    before = pool.get_pool_stats()["counters"]["submitted"]
    assert list(pool.map(square, range(10), chunksize=4)) == [n * n for n in range(10)]
    assert pool.get_pool_stats()["counters"]["submitted"] - before == 3
    assert list(pool.map(pow, range(3), [2, 2, 2], chunksize=100)) == [0, 1, 4]


def test_map_raises_the_error_of_a_call_in_its_place(pool: AgentPool) -> None:
    results = pool.map(lambda n: 10 // n, [5, 2, 0, 1])
    assert (next(results), next(results)) == (2, 5)
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_map_cancels_what_is_left_after_an_error(pool: AgentPool, gate: Gate) -> None:
    def fail_or_wait(number: int) -> object:
        return gate.pass_(number) if number else fail("the first")

    results = pool.map(fail_or_wait, range(20))
    with pytest.raises(ValueError, match="the first"):
        next(results)
    gate.open()
    pool.shutdown()
    assert pool.get_pool_stats()["counters"]["cancelled"] >= 15
    assert not gate.began(19)


def test_map_with_a_timeout(pool: AgentPool, gate: Gate, wait_until: WaitUntil) -> None:
    started = time.monotonic()
    results = pool.map(lambda n: n if n < 2 else gate.pass_(n), range(12), timeout=0.3)
    wait_until(lambda: pool.get_pool_stats()["counters"]["completed"] == 2, "the first two are not done", LONG)
    assert (next(results), next(results)) == (0, 1), "what is done is had, whatever the time is"
    with pytest.raises(TimeoutError):
        next(results)
    assert 0.3 <= time.monotonic() - started < LONG
    assert pool.get_pool_stats()["counters"]["cancelled"] >= 6
    gate.open()


def test_map_that_is_abandoned_cancels_what_is_left(pool: AgentPool, gate: Gate) -> None:
    results = pool.map(lambda n: n if n < 2 else gate.pass_(n), range(30))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    gate.open()
    pool.shutdown()
    assert not gate.began(29)


def test_map_with_buffersize_reads_its_input_lazily(pool: AgentPool) -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    results = pool.map(square, numbers(), buffersize=4)
    assert read == [0, 1, 2, 3]
    for count in range(10):
        assert next(results) == count * count
        assert len(read) <= count + 1 + 4
    results.close()  # type: ignore[attr-defined]
    assert len(read) < 20


def test_map_with_buffersize_and_chunks(pool: AgentPool) -> None:
    read: list[int] = []
    results = pool.map(square, (read.append(n) or n for n in range(100)), buffersize=2, chunksize=5)
    assert len(read) == 10
    assert list(results) == [n * n for n in range(100)]
    assert len(read) == 100
    assert list(pool.map(square, range(3), buffersize=100)) == [0, 1, 4]


def test_map_error_in_the_input(pool: AgentPool) -> None:
    def broken() -> Iterator[int]:
        yield 1
        fail("the input is broken")

    with pytest.raises(ValueError, match="the input is broken"):
        pool.map(square, broken())
    lazy = pool.map(square, broken(), buffersize=1)
    with pytest.raises(ValueError, match="the input is broken"):
        list(lazy)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"chunksize": 0}, ValueError, "chunksize must be >= 1"),
        ({"chunksize": -1}, ValueError, "chunksize must be >= 1"),
        ({"buffersize": 0}, ValueError, "buffersize must be None or > 0"),
        ({"buffersize": "2"}, TypeError, "buffersize must be an integer or None"),
        ({"buffersize": True}, TypeError, "buffersize must be an integer or None"),
    ],
)
def test_map_refuses(pool: AgentPool, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pool.map(square, [1], **options)
    assert pool.get_pool_stats()["counters"]["submitted"] == 0


def test_map_keeps_no_result_that_was_taken(pool: AgentPool) -> None:
    """What the consumer dropped is gone while the iteration goes on."""
    sizes = []
    for found in pool.map(make_big, range(6)):
        sizes.append(len(found))
        del found
        assert [thing for thing in gc.get_objects() if type(thing) is Marked] == []
    assert sizes == [100_000 + number for number in range(6)]


class Marked(list):  # type: ignore[type-arg]
    pass


def make_big(number: int) -> Marked:
    return Marked(range(100_000 + number))


# --- wait, as_completed ---


def test_wait_for_the_first(pool: AgentPool, gate: Gate) -> None:
    slow, quick = pool.submit(gate.pass_, "slow"), pool.submit(abs, -1)
    done, not_done = wait([slow, quick], LONG, return_when=FIRST_COMPLETED)
    assert (done, not_done) == ({quick}, {slow})
    gate.open()
    assert wait([slow, quick], LONG).not_done == set()


def test_wait_for_the_first_exception(pool: AgentPool, gate: Gate) -> None:
    slow, bad = pool.submit(gate.pass_, "slow"), pool.submit(fail, "x")
    done, not_done = wait([slow, bad], LONG, return_when=FIRST_EXCEPTION)
    assert (done, not_done) == ({bad}, {slow})
    gate.open()


def test_as_completed_in_the_order_of_completion(pool: AgentPool, gate: Gate) -> None:
    slow = pool.submit(gate.pass_, "slow")
    quick = [pool.submit(square, n) for n in range(5)]
    order = []
    for future in as_completed([slow, *quick], LONG):
        order.append(future.result())
        if len(order) == 5:
            gate.open()
    assert sorted(order[:5]) == [0, 1, 4, 9, 16]  # type: ignore[type-var]
    assert order[5] == "slow"


def test_as_completed_with_a_timeout(pool: AgentPool, gate: Gate) -> None:
    with pytest.raises(TimeoutError):
        list(as_completed([pool.submit(gate.pass_)], 0.05))
    gate.open()


def test_futures_of_several_executors_together(pool: AgentPool) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        futures = [pool.submit(square, 3), threads.submit(square, 4)]
        assert {future.result() for future in as_completed(futures, LONG)} == {9, 16}


# --- shutdown ---


def test_shutdown_waits_for_what_was_accepted(
    make_pool: Callable[..., AgentPool], is_alive: Callable[[int], bool]
) -> None:
    pool = make_pool(max_workers=2)
    futures = [pool.submit(square, n) for n in range(50)]
    pool.shutdown()
    assert all(future.done() for future in futures)
    assert [future.result(0) for future in futures] == [n * n for n in range(50)]
    assert not any(is_alive(pid_of(future)) for future in futures)
    assert pool.closed
    assert pool.get_pool_stats()["status"] == "closed"
    assert pool.get_pool_stats()["workers"] == []


def test_shutdown_twice_and_of_an_unused_pool() -> None:
    pool = AgentPool()
    pool.shutdown()
    pool.shutdown(wait=False)
    pool.shutdown(cancel_futures=True)
    assert pool.closed
    with AgentPool() as used:
        assert used.submit(abs, -1).result(LONG) == 1
        used.shutdown()
        used.shutdown()
    assert used.closed


def test_shutdown_without_waiting(make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=2)
    futures = [pool.submit(gate.pass_, n) for n in range(4)]
    pool.shutdown(wait=False)
    assert not any(future.done() for future in futures)
    with pytest.raises(PoolClosedError):
        pool.submit(abs, 1)
    gate.open()
    assert [future.result(LONG) for future in futures] == [0, 1, 2, 3]
    pool.shutdown()  # waits, though the first one did not
    assert not [thread for thread in threading.enumerate() if pool.name in thread.name]


def test_shutdown_cancels_what_is_queued(
    make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil
) -> None:
    pool = make_pool(max_workers=2)
    running = [pool.submit(gate.pass_, n) for n in range(2)]
    queued = [pool.submit(gate.pass_, n) for n in range(2, 8)]
    wait_until(lambda: gate.began(0) and gate.began(1), "nothing began")
    told: list[object] = []
    for future in queued:
        future.add_done_callback(lambda future: told.append(future.cancelled()))
    pool.shutdown(wait=False, cancel_futures=True)
    assert wait(queued, LONG).not_done == set(), "a cancelled future must tell those who wait (cpython gh-109934)"
    assert all(future.cancelled() for future in queued)
    assert told == [True] * 6
    gate.open()
    assert [future.result(LONG) for future in running] == [0, 1]
    pool.shutdown()
    assert not any(gate.began(n) for n in range(2, 8))


def test_cancel_futures_after_a_shutdown_that_does_not_wait(
    make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil
) -> None:
    pool = make_pool(max_workers=1)
    running = pool.submit(gate.pass_, "running")
    queued = [pool.submit(abs, -n) for n in range(5)]
    wait_until(lambda: gate.began("running"), "nothing began")
    pool.shutdown(wait=False)
    assert not any(future.done() for future in queued)
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in queued)
    gate.open()
    assert running.result(LONG) == "running"


def test_shutdown_from_several_threads(make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=1)
    future = pool.submit(gate.pass_, "x")
    wait_until(lambda: gate.began("x"), "it did not begin")
    done_when_back: list[bool] = []

    def end() -> None:
        pool.shutdown()
        done_when_back.append(future.done())

    threads = [threading.Thread(target=end) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: pool.closed, "nobody shut it down")
    gate.open()
    for thread in threads:
        thread.join(LONG)
    assert done_when_back == [True] * 4


def test_shutdown_in_a_callback(make_pool: Callable[..., AgentPool]) -> None:
    """It cannot wait for the thread that it runs in; it must not hang either."""
    pool = make_pool(max_workers=1)
    back = threading.Event()

    def end(_: object) -> None:
        pool.shutdown()
        back.set()

    future, second = pool.submit(abs, -1), pool.submit(abs, -2)
    future.add_done_callback(end)
    assert back.wait(LONG)
    assert second.result(LONG) == 2
    pool.shutdown()


def test_submit_after_shutdown(make_pool: Callable[..., AgentPool]) -> None:
    pool = make_pool()
    view = pool.options(priority=1)
    pool.shutdown()
    for submit in (pool.submit, view.submit, pool.map, view.map):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown") as caught:
            submit(abs, [1])  # type: ignore[operator]
        assert isinstance(caught.value, PoolClosedError)
    with pytest.raises(PoolClosedError):
        pool.submit(print, threading.Lock())  # though it could not be pickled either
    with pytest.raises(PoolClosedError):
        pool.submit_agent("command", "true")


def test_a_waiting_submit_is_told_of_the_shutdown(
    make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil
) -> None:
    pool = make_pool(max_workers=1, max_pending=1)
    running, queued = pool.submit(gate.pass_, "x"), None
    wait_until(lambda: gate.began("x"), "it did not begin")
    queued = pool.submit(abs, -1)
    raised: list[BaseException] = []
    entered = threading.Event()

    def submit() -> None:
        entered.set()
        try:
            pool.submit(abs, -2)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    entered.wait(LONG)
    pool.shutdown(wait=False)
    thread.join(LONG)
    assert [type(error) for error in raised] == [PoolClosedError]
    gate.open()
    assert (running.result(LONG), queued.result(LONG)) == ("x", 1)


# --- with ---


def test_with_block_waits(gate: Gate) -> None:
    with AgentPool(max_workers=2) as pool:
        futures = [pool.submit(gate.pass_, n) for n in range(3)]
        gate.open()
    assert [future.result(0) for future in futures] == [0, 1, 2]
    assert pool.closed


def test_with_block_left_by_an_exception_waits_too() -> None:
    with pytest.raises(KeyError, match="of the block"), AgentPool(max_workers=2) as pool:
        futures = [pool.submit(square, n) for n in range(20)]
        raise KeyError("of the block")
    assert [future.result(0) for future in futures] == [n * n for n in range(20)]


@pytest.mark.parametrize("leave", [KeyboardInterrupt, SystemExit])
def test_with_block_that_is_interrupted_stops_everything(
    gate: Gate, wait_until: WaitUntil, is_alive: Callable[[int], bool], leave: type[BaseException]
) -> None:
    with pytest.raises(leave), AgentPool(max_workers=1) as pool:
        running, queued = pool.submit(gate.pass_, "x"), pool.submit(gate.pass_, "y")
        wait_until(lambda: gate.began("x"), "it did not begin")
        raise leave
    assert pool.closed
    with pytest.raises(TaskKilledError, match=leave.__name__):
        running.result(0)
    assert queued.cancelled()
    assert not is_alive(pid_of(running))
    with pytest.raises(PoolClosedError, match=f"interrupted by {leave.__name__}"):
        pool.submit(abs, 1)


def test_keyboard_interrupt_while_waiting_for_a_result(gate: Gate, wait_until: WaitUntil) -> None:
    """A real SIGINT to the process that waits: workers do not see it, and nothing is left."""

    def interrupt() -> None:
        wait_until(lambda: gate.began("x"), "it did not begin")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt), AgentPool(max_workers=1) as pool:
        future = pool.submit(gate.pass_, "x")
        thread.start()
        future.result(LONG)
    thread.join()
    assert isinstance(future.exception(0), TaskKilledError)


# --- the hard ways to stop ---


@pytest.mark.parametrize("method", ["kill_workers", "terminate_workers"])
def test_kill_workers(
    make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil, is_alive: Callable[[int], bool], method: str
) -> None:
    pool = make_pool(max_workers=2)
    running = [pool.submit(gate.pass_, n) for n in range(2)]
    queued = [pool.submit(gate.pass_, n) for n in range(2, 5)]
    wait_until(lambda: gate.began(0) and gate.began(1), "nothing began")
    getattr(pool, method)()
    for future in running:
        with pytest.raises(WorkerCrashedError, match="kill_workers"):
            future.result(0)
        assert not is_alive(pid_of(future))
    errors = [future.exception(0) for future in running]
    assert errors[0] is not errors[1], "an instance of its own for each"
    assert all(future.cancelled() for future in queued)
    assert wait(queued, LONG).not_done == set()
    with pytest.raises(PoolClosedError):
        pool.submit(abs, 1)
    getattr(pool, method)()


def test_emergency_stop_says_what_it_did(
    make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil
) -> None:
    pool = make_pool(max_workers=2)
    running = [pool.submit(gate.pass_, n) for n in range(2)]
    queued = [pool.submit(gate.pass_, n) for n in range(2, 5)]
    wait_until(lambda: gate.began(0) and gate.began(1), "nothing began")
    report = pool.emergency_stop("the machine is on fire")
    assert report == {"workers_stopped": 2, "tasks_cancelled": 3, "tasks_stopped": 2}
    for future in running:
        with pytest.raises(TaskKilledError, match="emergency shutdown: the machine is on fire"):
            future.result(0)
        with pytest.raises(CancelledError):  # what a concurrent.futures user catches
            future.result(0)
    assert all(future.cancelled() for future in queued)
    with pytest.raises(PoolClosedError, match="the machine is on fire"):
        pool.submit(abs, 1)
    assert pool.emergency_stop("again") == {"workers_stopped": 0, "tasks_cancelled": 0, "tasks_stopped": 0}


def test_kill_workers_of_an_unused_pool() -> None:
    pool = AgentPool()
    pool.kill_workers()
    assert pool.closed


def test_kill_workers_in_a_callback(make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=2)
    slow = pool.submit(gate.pass_, "slow")
    wait_until(lambda: gate.began("slow"), "it did not begin")
    pool.submit(abs, -1).add_done_callback(lambda _: pool.kill_workers())
    assert isinstance(slow.exception(LONG), WorkerCrashedError)


# --- asyncio ---


def test_run_in_executor_and_wrap_future(pool: AgentPool) -> None:
    async def main() -> list[object]:
        loop = asyncio.get_running_loop()
        one = await loop.run_in_executor(pool, abs, -3)
        others = await asyncio.gather(*(asyncio.wrap_future(pool.submit(square, n)) for n in range(20)))
        return [one, *others]

    assert asyncio.run(main()) == [3, *(n * n for n in range(20))]


def test_an_error_arrives_in_the_loop(pool: AgentPool) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="in a worker"):
            await asyncio.wrap_future(pool.submit(fail, "in a worker"))
        with pytest.raises(WorkerCrashedError):
            await asyncio.get_running_loop().run_in_executor(pool, os._exit, 3)

    asyncio.run(main())


def test_async_with_lets_the_loop_go_on(gate: Gate) -> None:
    ticks = []

    async def main() -> object:
        async with AgentPool(max_workers=1) as pool:
            future = pool.submit(gate.pass_, "x")

            async def tick() -> None:
                while not gate.began("x"):  # noqa: ASYNC110  # another process makes it
                    await asyncio.sleep(0.005)
                for _ in range(10):
                    ticks.append(future.done())
                    await asyncio.sleep(0.005)
                gate.open()

            ticking = asyncio.create_task(tick())
        assert pool.closed
        await ticking
        return future.result(0)

    assert asyncio.run(main()) == "x"
    assert ticks == [False] * 10, "leaving the block held up the loop"


def test_a_cancelled_wait_cancels_what_is_queued_only(pool: AgentPool, gate: Gate, wait_until: WaitUntil) -> None:
    running = [pool.submit(gate.pass_, n) for n in range(2)]
    wait_until(lambda: gate.began(0) and gate.began(1), "nothing began")
    queued = pool.submit(gate.pass_, 2)

    async def main() -> None:
        for future in (running[0], queued):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(future), 0.05)

    asyncio.run(main())
    assert queued.cancelled()
    assert not running[0].cancelled()
    gate.open()
    assert [future.result(LONG) for future in running] == [0, 1]


def test_async_with_that_is_cancelled(gate: Gate, wait_until: WaitUntil) -> None:
    """What is queued is given up; what runs is waited for, and the loop goes on."""

    async def main() -> tuple[object, bool]:
        futures: list[concurrent.futures.Future[Any]] = []

        async def block() -> None:
            async with AgentPool(max_workers=1) as pool:
                futures.extend(pool.submit(gate.pass_, n) for n in range(2))
                await asyncio.sleep(LONG)

        task = asyncio.create_task(block())
        while not gate.began(0):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.sleep(0.05)
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        return futures[0].result(0), futures[1].cancelled()

    assert asyncio.run(main()) == (0, True)


# --- the constructor ---


@pytest.mark.parametrize(
    "context",
    [None, "fork", "forkserver", "spawn", *map(multiprocessing.get_context, ["fork", "forkserver", "spawn"])],
    ids=lambda context: context if isinstance(context, str) else f"context {getattr(context, '_name', None)}",
)
def test_start_methods(context: Any) -> None:
    """None of them forks this process, or imports its main module again."""
    import agentpool

    agentpool.left_by_a_test = True  # type: ignore[attr-defined]
    try:
        with AgentPool(2, context, len, ("initargs",)) as pool:
            results = list(pool.map(look_around, [0] * 4))
    finally:
        del agentpool.left_by_a_test  # type: ignore[attr-defined]
    for result in results:
        assert result["pid"] != os.getpid()
        assert not result["knows what this process set"]
        assert result["has the keeper"] == (context is None or "spawn" not in str(context).lower())


def look_around(_: object) -> dict[str, Any]:
    agentpool = sys.modules.get("agentpool")
    return {
        "pid": os.getpid(),
        "knows what this process set": hasattr(agentpool, "left_by_a_test"),
        "has the keeper": "agentpool_worker.keeper" in sys.modules,
    }


@pytest.mark.parametrize("context", ["thread", "", 5, object()], ids=["thread", "empty", "number", "object"])
def test_start_methods_that_are_none(context: Any) -> None:
    with pytest.raises((SettingsError, TypeError), match="mp_context must be fork, forkserver, spawn"):
        AgentPool(mp_context=context)


def test_initializer_in_each_worker(make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil) -> None:
    def prepare(first: str, second: int) -> None:
        os.environ["PREPARED"] = f"{first} {second} {os.getpid()}"

    def look() -> str:
        gate.pass_(os.getpid())
        return os.environ["PREPARED"]

    pool = make_pool(2, initializer=prepare, initargs=("as told", 5))
    futures = [pool.submit(look) for _ in range(2)]
    wait_until(lambda: len(list(gate.path.iterdir())) == 2, "two workers did not begin")
    gate.open()
    assert {future.result(LONG) for future in futures} == {f"as told 5 {pid_of(future)}" for future in futures}
    assert "PREPARED" not in os.environ


def test_locks_of_multiprocessing_are_refused_with_the_cure() -> None:
    lock = multiprocessing.get_context("spawn").Lock()
    with pytest.raises(pickle.PicklingError, match=r"args\[0\].*use those of a multiprocessing.Manager"):
        AgentPool(initializer=len, initargs=(lock,))
    with AgentPool(max_workers=1) as pool:
        error = pool.submit(len, lock).exception(LONG)
        assert isinstance(error, pickle.PicklingError)
        assert "multiprocessing.Manager" in str(error)


def test_manager_proxies_as_arguments(pool: AgentPool) -> None:
    with multiprocessing.get_context("spawn").Manager() as manager:
        shared = manager.list([1, 2])
        pool.submit(append, shared, 3).result(LONG)
        assert list(shared) == [1, 2, 3]


def append(shared: Any, item: object) -> None:
    shared.append(item)


def test_max_tasks_per_child(make_pool: Callable[..., AgentPool]) -> None:
    pool = make_pool(1, max_tasks_per_child=3)
    pids = [pool.submit(os.getpid).result(LONG) for _ in range(7)]
    assert [len(set(part)) for part in (pids[:3], pids[3:6], pids[6:])] == [1, 1, 1]
    assert len(set(pids)) == 3
    assert pool.get_pool_stats()["counters"]["recycled"]["max_tasks_per_child"] == 2


def test_preload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "preloaded_by_a_test.py").write_text("import os\npid = os.getpid()\n")
    monkeypatch.syspath_prepend(tmp_path)

    def where() -> tuple[int, int]:
        import preloaded_by_a_test  # type: ignore[import-not-found]

        return preloaded_by_a_test.pid, os.getppid()

    with AgentPool(2, preload=("preloaded_by_a_test",)) as pool:
        places = {future.result(LONG) for future in [pool.submit(where) for _ in range(4)]}
    assert all(imported_in == keeper for imported_in, keeper in places), "it was imported in the worker itself"


def test_parameters_in_the_order_of_the_standard_library() -> None:
    pool = AgentPool(3, multiprocessing.get_context("spawn"), abs, (1,), max_tasks_per_child=5)
    try:
        assert (pool.settings.max_workers, pool.settings.start_method) == (3, "spawn")
        assert pool.settings.max_tasks_per_child == 5
        assert pool.settings.concurrency == 3
    finally:
        pool.shutdown()


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": -1}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": "2"}, ValueError, "max_workers must be a whole number"),
        ({"initializer": 5}, TypeError, "initializer must be a callable"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be greater than 0"),
        ({"no_such_setting": 1}, (ValueError, TypeError), "no_such_setting"),
        ({"initializer": len, "initargs": (threading.Lock(),)}, pickle.PicklingError, r"args\[0\].*lock"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_constructor_refuses(kwargs: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        AgentPool(**kwargs)


def test_many_threads_submit(pool: AgentPool) -> None:
    results: list[list[int]] = []

    def work(base: int) -> None:
        results.append([pool.submit(square, base + n).result(LONG) for n in range(30)])

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert sorted(results) == [[(100 * n + i) ** 2 for i in range(30)] for n in range(8)]


def test_repr_says_how_it_stands(make_pool: Callable[..., AgentPool], gate: Gate, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=1, name="reporters")
    assert repr(pool) == "<AgentPool reporters open: 0 workers, 0 running, 0 queued>"
    futures = [pool.submit(gate.pass_, n) for n in range(3)]
    wait_until(lambda: gate.began(0), "it did not begin")
    assert repr(pool) == "<AgentPool reporters open: 1 workers, 1 running, 2 queued>"
    gate.open()
    assert [future.result(LONG) for future in futures] == [0, 1, 2]
    pool.shutdown()
    assert repr(pool) == "<AgentPool reporters closed: 0 workers, 0 running, 0 queued>"
