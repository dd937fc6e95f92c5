"""Tasks that run or wait too long, and what stopping a task means for it, its worker and the others."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool import AgentFuture, AgentPool, QueueTimeoutError, TaskKilledError, TaskTimeoutError, WorkerCrashedError
from agentpool_worker import context

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
IsAlive = Callable[[int], bool]


def timeout_error(future: AgentFuture[Any]) -> TaskTimeoutError:
    with pytest.raises(TaskTimeoutError) as info:
        future.result(30)
    assert isinstance(info.value, TimeoutError)
    return info.value


def await_file(path: Path, wait_until: WaitUntil) -> str:
    wait_until(lambda: path.exists() and path.read_text(), f"{path.name} was not written")
    return path.read_text()


# what runs in the workers


def write(path: Path, text: object) -> None:
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)


def hold(here: Path, gate: Path) -> int:
    write(here, os.getpid())
    while not gate.exists():
        time.sleep(0.005)
    return os.getpid()


def sleep_inside_a_named_function() -> None:
    time.sleep(60)


def sleep_through_a_pipe() -> None:
    """Blocks in a read, which a signal handler that raises breaks off."""
    os.read(os.pipe()[0], 1)


def compute_for_ever() -> None:
    """C code that holds the interpreter's lock, and looks at no signal for ages: no thread of the worker runs."""
    number = 3 ** 4_000_000
    pow(number, number, number + 2)


def ignore_every_wish(here: Path) -> None:
    write(here, os.getpid())
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def clean_up(here: Path, cleaned: Path) -> None:
    try:
        hold(here, here / "never")
    except Exception as error:  # what it is stopped with must not be taken for an error of the work
        write(cleaned, f"swallowed {error!r}")
    except BaseException as error:
        write(cleaned, type(error).__name__)
        raise
    finally:
        write(cleaned.with_name("finally"), context.current().is_cancelled)


def leave_a_process(here: Path) -> None:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    write(here, helper.pid)
    helper.wait()


def return_in_spite(here: Path, gate: Path) -> str:
    try:
        hold(here, gate)
    except context.TaskCancelled:
        return "done anyway"
    return "never asked"


def wait_in_thread(here: Path, seen: Path) -> None:
    """A thread that polls learns of the wish as well."""
    task = context.current()

    def poll() -> None:
        while not task.is_cancelled:
            time.sleep(0.005)
        write(seen, "cancelled")

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        hold(here, here / "never")
    finally:
        thread.join()


async def wait_in_a_coroutine(here: Path, cleaned: Path) -> None:
    import asyncio

    write(here, os.getpid())
    try:
        await asyncio.sleep(60)
    finally:
        write(cleaned, "cleaned")


def wake_up_slowly() -> None:
    time.sleep(60)


class SlowToRebuild:
    def __reduce__(self) -> tuple[Any, ...]:
        return wake_up_slowly, ()


class SlowToSend:
    def __reduce__(self) -> tuple[Any, ...]:
        time.sleep(60)
        return int, ()


def return_what_is_slow_to_send() -> object:
    return SlowToSend()


# timeout


def test_a_task_that_runs_too_long_is_stopped_and_says_where_it_was(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(2, task_timeout=0.3)
    started = time.monotonic()
    task = pool.submit(sleep_inside_a_named_function)
    error = timeout_error(task)
    assert 0.3 <= time.monotonic() - started < 10
    assert error.timeout_seconds == 0.3
    assert "sleep_inside_a_named_function" in error.stack
    assert error.stack in "\n".join(error.__notes__)
    assert "ran longer than its timeout of 0.3 s" in str(error)
    assert (task.attempts, task.snapshot().state) == (1, "failed")
    assert pool.submit(os.getpid).result(30) != task.worker_pid, "who knows what it was in the middle of"
    wait_until(lambda: not is_alive(task.worker_pid or 0), "its worker stays")
    counters = pool.get_pool_stats()["counters"]
    assert (counters["timed_out"], counters["crashed"], counters["start_failures"]) == (1, 0, 0)


def test_a_view_has_a_timeout_of_its_own(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(2)
    patient = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    assert timeout_error(pool.options(timeout=0.1, name="hasty").submit(sleep_through_a_pipe)).timeout_seconds == 0.1
    assert patient.running()
    (tmp_path / "gate").touch()
    assert patient.result(30) == int(await_file(tmp_path / "here", wait_until))
    assert make_pool(1, task_timeout=0.1).options(timeout=30).submit(time.sleep, 0.3).result(30) is None


def test_time_in_the_queue_is_not_run_time(make_pool: MakePool) -> None:
    pool = make_pool(1, task_timeout=1)
    tasks = [pool.submit(time.sleep, 0.3) for _ in range(5)]
    assert [task.result(30) for task in tasks] == [None] * 5


def test_c_code_that_holds_the_interpreter_is_stopped_in_time_and_says_where_it_was(make_pool: MakePool) -> None:
    pool = make_pool(1, task_timeout=0.5)
    started = time.monotonic()
    task = pool.submit(compute_for_ever)
    error = timeout_error(task)
    assert time.monotonic() - started < 10
    assert "compute_for_ever" in error.stack
    assert pool.submit(os.getpid).result(30) != task.worker_pid


def test_fresh_interpreters_are_stopped_alike(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(2, "spawn", task_timeout=0.5)
    tasks = [pool.submit(clean_up, tmp_path / "here", tmp_path / "cleaned"), pool.submit(compute_for_ever)]
    assert "clean_up" in timeout_error(tasks[0]).stack
    assert (tmp_path / "cleaned").read_text() == "TaskCancelled"
    assert "compute_for_ever" in timeout_error(tasks[1]).stack


def test_the_time_to_rebuild_a_call_and_to_send_a_result_is_run_time(make_pool: MakePool) -> None:
    pool = make_pool(1, task_timeout=0.3)
    assert "wake_up_slowly" in timeout_error(pool.submit(id, SlowToRebuild())).stack
    assert "__reduce__" in timeout_error(pool.submit(return_what_is_slow_to_send)).stack
    assert pool.submit(os.getpid).result(30)


def test_a_stopped_worker_is_killed_in_time(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(1, task_timeout=0.5)
    task = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    worker = int(await_file(tmp_path / "here", wait_until))
    os.kill(worker, signal.SIGSTOP)
    started = time.monotonic()
    timeout_error(task)
    assert time.monotonic() - started < 10
    wait_until(lambda: not is_alive(worker), "a stopped process stays")
    assert pool.submit(os.getpid).result(30) != worker


def test_a_task_that_takes_no_notice_is_killed_after_the_grace(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(1, task_timeout=0.2, kill_grace=0.5)
    started = time.monotonic()
    task = pool.submit(ignore_every_wish, tmp_path / "here")
    error = timeout_error(task)
    assert 0.7 <= time.monotonic() - started < 10
    assert "ignore_every_wish" in error.stack
    wait_until(lambda: not is_alive(int((tmp_path / "here").read_text())), "its worker stays")
    assert pool.get_pool_stats()["counters"]["crashed"] == 0
    assert pool.submit(os.getpid).result(30)


def test_without_grace_it_is_killed_at_once(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, task_timeout=0.2, kill_grace=0)
    timeout_error(pool.submit(clean_up, tmp_path / "here", tmp_path / "cleaned"))
    assert pool.submit(os.getpid).result(30)


def test_what_a_stopped_task_had_started_ends_with_its_worker(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(1, task_timeout=0.5)
    task = pool.submit(leave_a_process, tmp_path / "here")
    helper = int(await_file(tmp_path / "here", wait_until))
    timeout_error(task)
    wait_until(lambda: not is_alive(helper), "a process of the task stays")


def test_a_stopped_task_cleans_up(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, task_timeout=0.3)
    task = pool.submit(clean_up, tmp_path / "here", tmp_path / "cleaned")
    timeout_error(task)
    assert (tmp_path / "cleaned").read_text() == "TaskCancelled"
    assert (tmp_path / "finally").read_text() == "True"


def test_a_stopped_coroutine_cleans_up(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, task_timeout=0.5)
    timeout_error(pool.submit(wait_in_a_coroutine, tmp_path / "here", tmp_path / "cleaned"))
    assert (tmp_path / "cleaned").read_text() == "cleaned"


def test_threads_of_a_stopped_task_can_see_it(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, task_timeout=0.3)
    timeout_error(pool.submit(wait_in_thread, tmp_path / "here", tmp_path / "seen"))
    assert (tmp_path / "seen").read_text() == "cancelled"


def test_a_task_that_returns_when_asked_to_stop_has_failed_all_the_same(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, task_timeout=0.2)
    timeout_error(pool.submit(return_in_spite, tmp_path / "here", tmp_path / "never"))


def test_many_timeouts_at_once_hit_only_those_whose_they_are(make_pool: MakePool) -> None:
    pool = make_pool(4)
    hasty = pool.options(timeout=0.2)
    tasks = [hasty.submit(time.sleep, 0 if number % 3 else 60) for number in range(24)]
    for number, task in enumerate(tasks):
        if number % 3:
            assert task.result(30) is None
        else:
            timeout_error(task)
    assert pool.get_pool_stats()["counters"]["timed_out"] == 8


def test_short_tasks_right_at_their_timeout_end_one_way_or_the_other(make_pool: MakePool) -> None:
    pool = make_pool(2, task_timeout=0.02)
    tasks = [pool.submit(time.sleep, 0.017 + number / 5000) for number in range(30)]
    errors = [task.exception(30) for task in tasks]
    assert {type(error) for error in errors} <= {type(None), TaskTimeoutError}
    assert pool.options(timeout=30).submit(os.getpid).result(30)
    counters = pool.get_pool_stats()["counters"]
    assert (counters["crashed"], counters["start_failures"]) == (0, 0)
    assert counters["completed"] + counters["failed"] == 31


# queue_timeout


def test_a_task_that_waits_too_long_is_not_started(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(1)
    first = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    await_file(tmp_path / "here", wait_until)
    started = time.monotonic()
    late = pool.options(queue_timeout=0.2, name="late").submit((tmp_path / "ran").touch)
    patient = pool.options(queue_timeout=60).submit(os.getpid)
    with pytest.raises(QueueTimeoutError, match=r"\(late\) waited longer than its queue_timeout of 0.2 s") as info:
        late.result(30)
    assert isinstance(info.value, TimeoutError)
    assert 0.2 <= time.monotonic() - started < 10
    assert (late.attempts, late.worker_pid) == (0, None)
    (tmp_path / "gate").touch()
    assert patient.result(30) == first.result(30)
    assert not (tmp_path / "ran").exists()


def test_the_queue_timeout_ends_where_the_task_begins(make_pool: MakePool) -> None:
    pool = make_pool(1, queue_timeout=5)
    assert pool.options(queue_timeout=0.4).submit(time.sleep, 0.8).result(30) is None


# kill and cancel


def test_kill_stops_a_running_task(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(1)
    task = pool.submit(clean_up, tmp_path / "here", tmp_path / "cleaned")
    waiting = pool.submit(os.getpid)
    await_file(tmp_path / "here", wait_until)
    assert not task.cancel(), "as in the standard library, a running task cannot be cancelled"
    assert task.running()
    assert task.kill()
    with pytest.raises(TaskKilledError, match=re.escape("future.kill() was called")) as info:
        task.result(30)
    assert isinstance(info.value, CancelledError)
    assert not task.kill(), "it is over"
    assert (tmp_path / "cleaned").read_text() == "TaskCancelled"
    assert waiting.result(30) != task.worker_pid


def test_kill_does_not_wait_for_a_task_that_takes_no_notice(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(1, kill_grace=0.3)
    task = pool.submit(ignore_every_wish, tmp_path / "here")
    await_file(tmp_path / "here", wait_until)
    assert task.kill()
    assert task.kill(), "twice does no harm"
    with pytest.raises(TaskKilledError):
        task.result(30)


def test_kill_withdraws_a_queued_task(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(1)
    first = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    await_file(tmp_path / "here", wait_until)
    queued = pool.submit((tmp_path / "ran").touch)
    assert queued.kill()
    assert queued.cancelled()
    (tmp_path / "gate").touch()
    first.result(30)
    pool.submit(os.getpid).result(30)
    assert not (tmp_path / "ran").exists()


def test_a_killed_task_is_never_retried(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(1, retry=3, kill_grace=0.2)
    task = pool.submit(ignore_every_wish, tmp_path / "here")
    await_file(tmp_path / "here", wait_until)
    task.kill()
    with pytest.raises(TaskKilledError):
        task.result(30)
    assert task.attempts == 1


def test_kill_workers_ends_running_tasks_and_cancels_the_others(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(1)
    task = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    worker = int(await_file(tmp_path / "here", wait_until))
    queued = pool.submit(os.getpid)
    pool.kill_workers()
    with pytest.raises(WorkerCrashedError, match=r"pool\.kill_workers\(\)"):
        task.result(30)
    assert queued.cancelled()
    assert not is_alive(worker)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        pool.submit(os.getpid)


def test_kill_workers_returns_when_all_that_tasks_had_started_is_gone(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(2)
    tasks = [pool.submit(leave_a_process, tmp_path / name) for name in ("one", "two")]
    helpers = [int(await_file(tmp_path / name, wait_until)) for name in ("one", "two")]
    stopped = pool.emergency_stop("enough")
    assert not any(map(is_alive, helpers))
    assert stopped == {"workers_stopped": 2, "tasks_cancelled": 0, "tasks_stopped": 2}
    for task in tasks:
        with pytest.raises(TaskKilledError, match="emergency shutdown: enough"):
            task.result(0)


def test_shutdown_stops_what_runs_too_long_while_it_waits(make_pool: MakePool) -> None:
    with make_pool(1, task_timeout=0.3) as pool:
        tasks = [pool.submit(time.sleep, 60), pool.submit(os.getpid)]
    timeout_error(tasks[0])
    assert tasks[1].result(0)
