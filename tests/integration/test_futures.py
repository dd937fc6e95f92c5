"""Futures of real tasks: what they know, how they are cancelled and killed, what errors they carry."""

from __future__ import annotations

import gc
import io
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle
import pytest

from agentpool import (
    AgentFuture,
    AgentPool,
    QueueFullError,
    RemoteTaskError,
    ResultUnpicklingError,
    TaskKilledError,
    TaskPicklingError,
    TaskTimeoutError,
    WorkerCrashedError,
)

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
IsAlive = Callable[[int], bool]
MakePool = Callable[..., AgentPool]
LONG = 30.0
MB = 1024 * 1024


@pytest.fixture
def pool(make_pool: MakePool) -> AgentPool:
    return make_pool(max_workers=2)


@pytest.fixture
def single(make_pool: MakePool) -> AgentPool:
    """One worker: what is submitted second is queued."""
    return make_pool(max_workers=1, kill_grace=0.3)


@pytest.fixture
def note(tmp_path: Path) -> Path:
    """Where a task says that it began."""
    return tmp_path / "began"


def wait_for_release(note: Path) -> str:
    note.with_suffix(".tmp").write_text(str(os.getpid()))
    note.with_suffix(".tmp").rename(note)
    while not note.with_name("release").exists():
        time.sleep(0.005)
    return "released"


def release(note: Path) -> None:
    note.with_name("release").touch()


def fail(message: str) -> NoReturn:
    raise ValueError(message)  # this line is shown to the caller


# --- what a future knows ---


def test_a_future_through_its_life(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    running = single.options(name="the first").submit(wait_for_release, note)
    queued = single.submit(abs, -5)
    wait_until(note.exists, "it did not begin")
    wait_until(running.running, "it never said that it runs")
    assert isinstance(running, AgentFuture)
    assert isinstance(running, Future)
    assert (running.done(), running.cancelled(), running.attempts) == (False, False, 1)
    assert running.worker_pid == int(note.read_text())
    assert (queued.running(), queued.done(), queued.attempts, queued.worker_pid) == (False, False, 0, None)
    assert (running.name, queued.name) == ("the first", None)
    with pytest.raises(TimeoutError):
        queued.result(0)
    with pytest.raises(TimeoutError):
        queued.exception(0.01)
    release(note)
    assert running.result(LONG) == "released"
    assert queued.result(LONG) == 5
    assert queued.exception(0) is None
    assert (running.running(), running.done(), running.cancelled()) == (False, True, False)
    assert (queued.attempts, queued.worker_pid) == (1, running.worker_pid)


def test_repr(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    running, queued, other = single.submit(wait_for_release, note), single.submit(abs, -5), single.submit(abs, -6)
    wait_until(note.exists, "it did not begin")
    wait_until(running.running, "it never said that it runs")
    words = [re.sub(r"0x[0-9a-f]+", "0x", repr(future)) for future in (running, queued)]
    assert words == ["<AgentFuture at 0x task 1 running>", "<AgentFuture at 0x task 2 queued>"]
    other.cancel()
    assert repr(other).endswith("task 3 cancelled>")
    release(note)
    queued.result(LONG)
    assert repr(queued).endswith("task 2 done>")
    bad = single.submit(fail, "x")
    bad.exception(LONG)
    assert repr(bad).endswith("task 4 failed>")
    assert repr(single.submit(abs, threading.Lock())).endswith(" failed>")


def test_snapshots(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    running = single.options(name="slow one").submit(wait_for_release, note)
    queued = single.submit(fail, "oh no")
    wait_until(note.exists, "it did not begin")
    wait_until(lambda: running.snapshot().rss_bytes, "its memory was never read")
    now = running.snapshot()
    assert (now.state, now.name, now.kind, now.attempts, now.last_error) == ("running", "slow one", None, 1, None)
    assert now.worker_pid == int(note.read_text())
    assert MB < now.rss_bytes < 1024 * MB
    assert 0 < now.elapsed_seconds < LONG
    waiting = queued.snapshot()
    assert (waiting.state, waiting.attempts, waiting.elapsed_seconds, waiting.worker_pid) == ("queued", 0, 0.0, None)
    assert waiting.task_id != now.task_id
    release(note)
    queued.exception(LONG)
    assert running.snapshot().state == "done"
    assert running.snapshot().peak_rss_bytes >= now.rss_bytes
    over = queued.snapshot()
    assert (over.state, over.attempts) == ("failed", 1)
    assert over.last_error == "ValueError: oh no"
    assert over == queued.snapshot(), "a task that is over changes no more"


def test_snapshot_of_what_never_was_a_task(pool: AgentPool) -> None:
    snapshot = pool.submit(abs, threading.Lock()).snapshot()
    assert (snapshot.state, snapshot.attempts, snapshot.worker_pid) == ("failed", 0, None)
    assert "lock" in (snapshot.last_error or "")


def test_snapshot_while_waiting_to_retry(pool: AgentPool, wait_until: WaitUntil) -> None:
    import tenacity

    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_fixed(3600))
    future = pool.options(retry=policy).submit(fail, "flaky")
    wait_until(lambda: future.snapshot().state == "waiting_to_retry", "it does not wait")
    snapshot = future.snapshot()
    assert (snapshot.attempts, snapshot.last_error) == (1, "ValueError: flaky")
    assert not future.running()
    assert not future.done()
    assert repr(future).endswith("waiting_to_retry>")
    assert future.cancel()
    assert future.snapshot().state == "cancelled"


def test_attempts_of_a_task_that_is_run_again(pool: AgentPool, note: Path) -> None:
    def crash_twice() -> int:
        with note.open("a") as file:
            file.write("x")
        if note.stat().st_size < 3:
            os._exit(7)
        return os.getpid()

    future = pool.options(retry=3).submit(crash_twice)
    pid = future.result(LONG)
    assert future.attempts == 3
    assert future.worker_pid == pid
    assert pool.get_pool_stats()["counters"]["retried"] == 2


def test_peak_memory(pool: AgentPool) -> None:
    def grow(size: int) -> int:
        return len(bytearray(size).replace(b"\0", b"x"))

    small, large = pool.submit(grow, MB), pool.submit(grow, 80 * MB)
    assert large.result(LONG) == 80 * MB
    small.result(LONG)
    assert large.peak_rss_bytes > 100 * MB
    assert small.peak_rss_bytes < 80 * MB


# --- results ---


def test_all_readers_get_one_object(pool: AgentPool) -> None:
    future = pool.submit(lambda: [object(), {}])
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(future.result(LONG))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    found.append(future.result(0))
    assert len(found) == 6
    assert len(set(map(id, found))) == 1


class Rebuilt:
    """Calls `action` where it is unpickled."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def __reduce__(self) -> tuple[Any, ...]:
        return self.action, ()


def exit_in_the_parent() -> NoReturn:
    raise SystemExit("from a result")


@pytest.mark.parametrize("action", [exit_in_the_parent, lambda: fail("cannot be rebuilt")], ids=["SystemExit", "error"])
def test_a_result_that_cannot_be_rebuilt(pool: AgentPool, action: Callable[[], Any]) -> None:
    future = pool.submit(Rebuilt, action)
    errors = []
    for read in (future.result, future.exception, future.result):
        try:
            errors.append(read(LONG))
        except ResultUnpicklingError as error:
            errors.append(error)
    assert len({id(error) for error in errors}) == 1
    (error, *_) = errors
    assert isinstance(error, BrokenProcessPool)
    assert type(error.__cause__).__name__ in str(error)
    assert future.done()
    assert future.snapshot().state == "failed"
    assert pool.submit(abs, -1).result(LONG) == 1


def kept_by(future: Future[Any]) -> list[bytes | bytearray | memoryview]:
    """All bytes that a future keeps in memory by what is its own."""
    found, seen, waiting = [], set(), list(vars(future).values())
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type) or type(thing).__name__ == "Manager":
            continue
        seen.add(id(thing))
        if isinstance(thing, (bytes, bytearray, memoryview)):
            found.append(thing)
        elif type(thing).__module__.startswith("agentpool") or isinstance(thing, (dict, list, tuple)):
            # (gc.get_referents() sees nothing in an instance's dict from Python 3.13 on)
            waiting += thing.values() if isinstance(thing, dict) else gc.get_referents(thing)
            waiting += getattr(thing, "__dict__", {}).values()
    return found


def test_a_result_is_kept_once(pool: AgentPool, wait_until: WaitUntil) -> None:
    """Once it was rebuilt, the bytes that it came as are gone."""
    future = pool.submit(bytes, 20 * MB)
    wait_until(future.done, "no result", LONG)
    assert sum(map(len, kept_by(future))) > 20 * MB
    value = future.result(LONG)
    assert [kept for kept in kept_by(future) if len(kept) > MB] == [value]


def test_arguments_are_let_go(pool: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    """When a task is over, its future does not keep its call in memory."""
    future = pool.submit(lambda data: wait_for_release(note), b"x" * 5 * MB)
    wait_until(note.exists, "it did not begin")
    assert sum(map(len, kept_by(future))) > 5 * MB
    release(note)
    assert future.result(LONG) == "released"
    assert sum(map(len, kept_by(future))) < MB


def test_a_dropped_future_is_freed(pool: AgentPool, wait_until: WaitUntil) -> None:
    future = pool.submit(abs, -1)
    future.result(LONG)
    reference = weakref.ref(future)
    del future
    wait_until(lambda: gc.collect() >= 0 and reference() is None, "somebody keeps the future")


# --- errors of the task ---


class CustomError(Exception):
    def __init__(self, *args: object, code: int = 0) -> None:
        super().__init__(*args)
        self.code = code


def raise_custom() -> NoReturn:
    error = CustomError("first", 2, code=42)
    error.add_note("a note of the task")
    raise error


def test_type_arguments_attributes_and_notes_arrive(pool: AgentPool) -> None:
    with pytest.raises(CustomError) as caught:
        pool.submit(raise_custom).result(LONG)
    assert type(caught.value) is CustomError
    assert caught.value.args == ("first", 2)
    assert caught.value.code == 42
    assert caught.value.__notes__ == ["a note of the task"]


def test_the_remote_traceback_is_shown(pool: AgentPool) -> None:
    error = pool.submit(fail, "from far away").exception(LONG)
    assert error is not None
    shown = "".join(traceback.format_exception(error))
    assert "this line is shown to the caller" in shown
    assert "in fail" in shown
    assert "ValueError: from far away" in shown
    assert "agentpool_worker" not in shown, "frames of the worker help nobody"
    log = io.StringIO()
    try:
        raise error
    except ValueError:
        traceback.print_exc(file=log)
    assert "this line is shown to the caller" in log.getvalue()


def test_cause_of_the_cause_is_shown(pool: AgentPool) -> None:
    def chain() -> NoReturn:
        try:
            fail("the root")
        except ValueError as error:
            raise KeyError("the outcome") from error

    error = pool.submit(chain).exception(LONG)
    assert type(error) is KeyError
    shown = "".join(traceback.format_exception(error))
    assert "ValueError: the root" in shown
    assert shown.index("the root") < shown.index("the outcome")


def test_exception_groups(pool: AgentPool) -> None:
    def group() -> NoReturn:
        raise ExceptionGroup("several", [ValueError(1), OSError(2, "two")])

    with pytest.raises(ExceptionGroup, match="several") as caught:
        pool.submit(group).result(LONG)
    assert [type(error) for error in caught.value.exceptions] == [ValueError, FileNotFoundError]


@pytest.mark.parametrize(
    "error",
    [OSError(2, "No such file", "name.txt"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), KeyError("k"),
     subprocess.CalledProcessError(3, ["cmd"], b"out"), StopIteration(5), SystemExit(3), KeyboardInterrupt(),
     GeneratorExit(), RecursionError("deep"), MemoryError(), AssertionError(), TimeoutError("own"),
     CancelledError("own"), BaseException("bare")],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_as_they_are(pool: AgentPool, error: BaseException) -> None:
    def raise_it() -> NoReturn:
        raise error

    found = pool.submit(raise_it).exception(LONG)
    assert type(found) is type(error)
    assert found.args == error.args
    assert str(found) == str(error)
    assert pool.submit(abs, -1).result(LONG) == 1


class NeedsTwo(Exception):
    """Its constructor cannot be replayed: it is given more than it passes on."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path}:{line} is wrong")


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class ExitsWhenRebuilt(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return exit_in_the_parent, ()


class ReplacedByText(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("I was an exception",)


@pytest.mark.parametrize(
    ("cls", "args", "message"),
    [
        (NeedsTwo, ("a.py", 3), "a.py:3 is wrong"),
        (UnpicklableError, (), "holds a lock"),
        (ExitsWhenRebuilt, ("x",), "x"),
        (ReplacedByText, ("y",), "y"),
    ],
)
def test_an_exception_that_cannot_be_sent(
    pool: AgentPool, cls: type[Exception], args: tuple[Any, ...], message: str
) -> None:
    def raise_it() -> NoReturn:
        raise cls(*args)

    future = pool.submit(raise_it)
    with pytest.raises(RemoteTaskError) as caught:
        future.result(LONG)
    error = caught.value
    assert error.type_name.endswith(cls.__qualname__)
    assert message in str(error)
    assert "__reduce__" in str(error), "the cure"
    assert "raise_it" in error.traceback_text
    assert "raise_it" in "".join(traceback.format_exception(error))
    assert pickle.loads(pickle.dumps(error)).type_name == error.type_name
    assert pool.submit(abs, -1).result(LONG) == 1


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_exception_without_words(pool: AgentPool) -> None:
    def raise_it() -> NoReturn:
        raise Mute

    assert type(pool.submit(raise_it).exception(LONG)) is Mute
    assert pool.submit(abs, -1).result(LONG) == 1


def test_each_future_has_an_instance_of_its_own(make_pool: MakePool) -> None:
    """One instance raised by many would gather everybody's tracebacks (cpython gh-101267)."""
    pool = make_pool(1, initializer=fail, initargs=("never ready",))
    errors = [future.exception(LONG) for future in [pool.submit(abs, 1) for _ in range(3)]]
    assert len({id(error) for error in errors}) == 3
    assert {type(error) for error in errors} == {type(errors[0])}


def test_errors_of_nested_pickling(pool: AgentPool) -> None:
    future = pool.submit(abs, {"deep": [threading.Lock()]})
    assert future.done()
    with pytest.raises(TaskPicklingError, match=r"args\[0\]\['deep'\]\[0\] \(a _thread.lock\)"):
        future.result()
    assert (future.attempts, future.worker_pid, future.cancel(), future.kill()) == (0, None, False, False)


# --- cancel ---


def test_cancel_a_queued_task(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    running, queued = single.submit(wait_for_release, note), single.submit(wait_for_release, note.with_name("2"))
    wait_until(note.exists, "it did not begin")
    told: list[AgentFuture[Any]] = []
    queued.add_done_callback(told.append)  # type: ignore[arg-type]
    assert queued.cancel()
    assert told == [queued]
    assert queued.cancel(), "it still is"
    assert (queued.cancelled(), queued.done(), queued.running(), queued.attempts) == (True, True, False, 0)
    assert wait([queued], LONG).done == {queued}
    assert list(as_completed([queued], LONG)) == [queued]
    for read in (queued.result, queued.exception):
        with pytest.raises(CancelledError):
            read(0)
    release(note)
    assert running.result(LONG) == "released"
    single.shutdown()
    assert not note.with_name("2").exists(), "it ran all the same"
    assert single.get_pool_stats()["counters"]["cancelled"] == 1


def test_a_waiting_thread_is_told_of_a_cancellation(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    single.submit(wait_for_release, note)
    queued = single.submit(abs, -1)
    outcome: list[str] = []
    entered = threading.Event()

    def read() -> None:
        entered.set()
        try:
            queued.result(LONG)
        except CancelledError:
            outcome.append("cancelled")

    thread = threading.Thread(target=read)
    thread.start()
    entered.wait(LONG)
    assert queued.cancel()
    thread.join(LONG)
    assert outcome == ["cancelled"]


def test_cancel_of_a_running_or_finished_task_is_refused(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    future = single.submit(wait_for_release, note)
    wait_until(note.exists, "it did not begin")
    assert not future.cancel()
    assert not future.cancelled()
    release(note)
    assert future.result(LONG) == "released"
    assert not future.cancel()
    assert not future.cancelled()


def test_many_threads_cancel_the_same_futures(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    single.submit(wait_for_release, note)
    wait_until(note.exists, "it did not begin")
    futures = [single.submit(abs, -n) for n in range(200)]
    told: list[object] = []
    for future in futures:
        future.add_done_callback(told.append)
    start = threading.Barrier(4)

    def cancel() -> None:
        start.wait()
        for future in futures:
            future.cancel()

    threads = [threading.Thread(target=cancel) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert all(future.cancelled() for future in futures)
    assert len(told) == 200, "each callback is called once"
    assert single.get_pool_stats()["counters"]["cancelled"] == 200


# --- kill ---


def test_kill_a_queued_task(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    running, queued = single.submit(wait_for_release, note), single.submit(abs, -1)
    wait_until(note.exists, "it did not begin")
    assert queued.kill()
    with pytest.raises(CancelledError):
        queued.result(0)
    assert queued.cancelled()
    release(note)
    assert running.result(LONG) == "released"


def test_kill_a_running_task_lets_it_clean_up(pool: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    def work() -> None:
        try:
            wait_for_release(note)
        except Exception:
            note.with_name("swallowed").touch()
        finally:
            note.with_name("cleaned up").touch()

    other, future = pool.submit(wait_for_release, note.with_name("other")), pool.submit(work)
    wait_until(lambda: note.exists() and note.with_name("other").exists(), "they did not begin")
    assert future.kill()
    with pytest.raises(TaskKilledError, match=r"future\.kill\(\) was called") as caught:
        future.result(LONG)
    assert isinstance(caught.value, CancelledError)
    assert note.with_name("cleaned up").exists()
    assert not note.with_name("swallowed").exists(), "except Exception must not see it"
    assert (future.cancelled(), future.done(), future.running(), future.attempts) == (False, True, False, 1)
    assert not future.kill(), "it is over"
    release(note)
    assert other.result(LONG) == "released", "another task was touched"
    assert pool.submit(abs, -1).result(LONG) == 1


def test_kill_of_a_coroutine_lets_it_clean_up(pool: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    async def work() -> None:
        import asyncio

        threading.Thread(target=say_once_it_sleeps).start()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            say("cancelled")
            raise
        finally:
            say("cleaned up")

    def say_once_it_sleeps() -> None:
        """In the middle of a step of the coroutine it would be stopped by something else than CancelledError."""
        main = threading.main_thread().ident
        assert main is not None
        while sys._current_frames()[main].f_code.co_name != "select":
            time.sleep(0.001)
        say("began")

    def say(word: str) -> None:
        note.with_name(word).touch()

    future = pool.submit(work)
    wait_until(note.exists, "it did not begin")
    assert future.kill()
    assert isinstance(future.exception(LONG), TaskKilledError)
    assert note.with_name("cancelled").exists()
    assert note.with_name("cleaned up").exists()


def hold_on_to_life(note: Path) -> NoReturn:
    note.write_text(str(os.getpid()))
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            continue


def hold_the_gil(note: Path) -> None:
    note.write_text(str(os.getpid()))
    re.match(r"(a+)+$", "a" * 64 + "b")  # for longer than anybody will wait, in C


def block_signals(note: Path) -> None:
    import signal

    signal.pthread_sigmask(signal.SIG_SETMASK, set(signal.Signals))
    note.write_text(str(os.getpid()))
    while True:
        time.sleep(3600)


def stop_itself(note: Path) -> None:
    import signal

    note.write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("task", [hold_on_to_life, hold_the_gil, block_signals, stop_itself])
def test_kill_what_does_not_cooperate(
    single: AgentPool, note: Path, wait_until: WaitUntil, is_alive: IsAlive, task: Callable[[Path], None]
) -> None:
    future = single.submit(task, note)
    wait_until(lambda: note.exists() and note.read_text(), "it did not begin")
    pid = int(note.read_text())
    assert future.kill()
    with pytest.raises(TaskKilledError):
        future.result(LONG)
    wait_until(lambda: not is_alive(pid), "its worker lives on")
    assert single.submit(abs, -1).result(LONG) == 1
    assert single.get_pool_stats()["counters"]["crashed"] == 0


def test_kill_takes_the_whole_tree(single: AgentPool, note: Path, wait_until: WaitUntil, is_alive: IsAlive) -> None:
    def start_others() -> None:
        program = f"import os, time; open({str(note)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(3600)"
        subprocess.Popen([sys.executable, "-c", program])
        subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        hold_on_to_life(note.with_name("worker"))

    future = single.submit(start_others)
    wait_until(lambda: note.exists() and len(note.read_text().split()) == 2, "they did not start")
    pids = [int(pid) for pid in note.read_text().split()]
    assert all(map(is_alive, pids))
    assert future.kill()
    assert isinstance(future.exception(LONG), TaskKilledError)
    wait_until(lambda: not any(map(is_alive, pids)), "descendants of the task live on")


def test_kill_from_a_thread_that_others_wait_with(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    future = single.submit(hold_on_to_life, note)
    wait_until(note.exists, "it did not begin")
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(future.kill())) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert isinstance(future.exception(LONG), TaskKilledError)
    for thread in threads:
        thread.join(LONG)
    assert True in answers
    assert single.submit(abs, -1).result(LONG) == 1


def test_kill_is_final_whatever_the_retry_policy(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    future = single.options(retry=3).submit(hold_on_to_life, note)
    wait_until(note.exists, "it did not begin")
    future.kill()
    assert isinstance(future.exception(LONG), TaskKilledError)
    assert future.attempts == 1


def test_kill_between_two_attempts(single: AgentPool, wait_until: WaitUntil) -> None:
    import tenacity

    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_fixed(3600))
    future = single.options(retry=policy).submit(fail, "flaky")
    wait_until(lambda: future.snapshot().state == "waiting_to_retry", "it does not wait")
    assert future.kill()
    assert future.cancelled()


def test_a_timeout_and_a_kill_of_one_task(make_pool: MakePool, note: Path, wait_until: WaitUntil) -> None:
    """The kill comes while the timeout is already stopping it: one outcome, and it is final."""
    pool = make_pool(1, kill_grace=1.0)
    for count in range(1, 11):
        future = pool.options(timeout=0.05, retry=3).submit(hold_on_to_life, note)
        wait_until(lambda count=count: pool.get_pool_stats()["counters"]["timed_out"] == count, "no timeout")
        if future.kill():
            assert isinstance(future.exception(LONG), TaskKilledError)
            return
        # On a busy machine its worker did not acknowledge in time, and was killed before anybody could ask for it.
        assert isinstance(future.exception(LONG), TaskTimeoutError)
    pytest.fail("ten were stopped before the kill came")


# --- callbacks ---


def test_callbacks_in_order_with_the_future(pool: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    future = pool.submit(wait_for_release, note)
    calls: list[tuple[int, object]] = []
    for number in range(3):
        future.add_done_callback(lambda done, number=number: calls.append((number, done)))  # type: ignore[misc]
    release(note)
    assert future.result(LONG) == "released"
    wait_until(lambda: len(calls) == 3, "a callback was forgotten")
    assert calls == [(0, future), (1, future), (2, future)]
    future.add_done_callback(lambda done: calls.append((3, done)))
    assert calls[3] == (3, future), "it is called at once when the future is done"


@pytest.mark.parametrize(
    "error", [ValueError("mine"), SystemExit(3), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
def test_an_error_in_a_callback_is_logged_and_ends_nothing(
    pool: AgentPool, note: Path, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def bad(_: object) -> NoReturn:
        raise error

    future = pool.submit(wait_for_release, note)
    called: list[object] = []
    future.add_done_callback(bad)
    future.add_done_callback(called.append)
    with caplog.at_level(logging.ERROR):
        release(note)
        assert future.result(LONG) == "released"
        wait_until(lambda: called, "the other callback was not called")
        wait_until(lambda: any(record.exc_info for record in caplog.records), "it was not logged")
    assert pool.submit(abs, -1).result(LONG) == 1, "the pool is broken"


def test_system_exit_in_a_listener(pool: AgentPool, wait_until: WaitUntil) -> None:
    """Listeners of the breaker run in the same thread as callbacks."""
    seen: list[str] = []

    def bad(old: str, new: str, reason: str) -> NoReturn:
        raise SystemExit(3)

    pool.breaker.add_listener(bad)
    pool.breaker.add_listener(lambda old, new, reason: seen.append(new))
    assert pool.submit(abs, -1).result(LONG) == 1
    pool.breaker.force_open("a test")
    pool.breaker.reset()
    wait_until(lambda: seen == ["forced_open", "closed"], "the other listener was not called")
    assert pool.submit(abs, -1).result(LONG) == 1


def test_a_future_that_somebody_else_settled(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    """What is not allowed by the documentation of Future must not cost others their pool."""
    future = single.submit(wait_for_release, note)
    wait_until(note.exists, "it did not begin")
    future.set_result("from outside")
    release(note)
    assert single.submit(abs, -1).result(LONG) == 1
    assert future.result(0) == "from outside"


def test_submit_in_a_callback(pool: AgentPool, wait_until: WaitUntil) -> None:
    results: list[int] = []

    def again(future: Future[int]) -> None:
        value = future.result(0)
        results.append(value)
        if value < 50:
            pool.submit(abs, -value - 1).add_done_callback(again)

    pool.submit(abs, 0).add_done_callback(again)
    wait_until(lambda: len(results) == 51, "the chain broke", LONG)
    assert results == list(range(51))


def test_cancel_and_kill_in_a_callback(single: AgentPool, note: Path, wait_until: WaitUntil) -> None:
    first = single.submit(wait_for_release, note)
    second = single.submit(hold_on_to_life, note.with_name("second"))
    third = single.submit(abs, -1)
    answers: list[bool] = []
    first.add_done_callback(lambda _: answers.append(third.cancel()))
    first.add_done_callback(lambda _: answers.append(second.kill()))
    wait_until(note.exists, "it did not begin")
    release(note)
    with pytest.raises(CancelledError):
        second.result(LONG)
    assert third.cancelled()
    assert answers == [True, True]


def test_a_full_queue_in_a_callback_raises(make_pool: MakePool, note: Path, wait_until: WaitUntil) -> None:
    """The manager thread must not wait for room that only it can make."""
    pool = make_pool(max_workers=1, max_pending=1)
    first = pool.submit(wait_for_release, note)
    wait_until(note.exists, "it did not begin")
    outcomes: list[object] = []

    def submit_more(_: object) -> None:
        for _attempt in range(4):
            try:
                outcomes.append(pool.submit(wait_for_release, note))
            except QueueFullError as error:
                outcomes.append(error)

    first.add_done_callback(submit_more)
    queued = pool.submit(wait_for_release, note)
    release(note)
    assert queued.result(LONG) == "released"
    wait_until(lambda: len(outcomes) == 4, "the callback hangs")
    assert any(isinstance(outcome, QueueFullError) for outcome in outcomes)
    for outcome in outcomes:
        if isinstance(outcome, Future):
            assert outcome.result(LONG) == "released"


def test_attributes_of_a_crashed_worker(pool: AgentPool) -> None:
    def crash() -> NoReturn:
        print("last words", file=sys.stderr)
        os._exit(9)

    future = pool.submit(crash)
    with pytest.raises(BrokenProcessPool) as caught:
        future.result(LONG)
    error = caught.value
    assert isinstance(error, WorkerCrashedError)
    assert (error.exit_code, error.worker_pid) == (9, future.worker_pid)
    assert error.stderr_tail == "last words\n"
    assert f"pid {future.worker_pid}" in str(error)
    assert "exited with code 9" in str(error)
    assert "last words" in str(error)
    assert "retry=3" in str(error), "the cure"
    assert error.peak_rss_bytes >= 0
    assert future.attempts == 1
    again = pickle.loads(pickle.dumps(error))
    assert (again.exit_code, again.stderr_tail, str(again)) == (9, error.stderr_tail, str(error))
