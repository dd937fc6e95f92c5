"""What operators order of a running pool: resize, pause, resume, drain, recycle, kill a worker."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool import AgentPool, PoolClosedError, SettingsError, UnknownWorkerError, WorkerKilledError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]


def hold(gate: str) -> int:
    """Runs until somebody makes that file; a file beside it says that it has begun."""
    Path(gate + ".begun").touch()
    while not os.path.exists(gate):
        time.sleep(0.005)
    return os.getpid()


def workers(pool: AgentPool, **wanted: Any) -> list[dict[str, Any]]:
    found = pool.get_pool_stats()["workers"]
    return [worker for worker in found if all(worker[name] == value for name, value in wanted.items())]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


class TestResize:
    def test_growing_starts_what_waits(self, make_pool: MakePool, gate: Path, wait_until: WaitUntil) -> None:
        pool = make_pool(1)
        futures = [pool.submit(hold, str(gate)) for _ in range(4)]
        wait_until(lambda: pool.get_pool_stats()["running"] == 1, "one runs")
        pool.resize(4)
        wait_until(lambda: pool.get_pool_stats()["running"] == 4, "four run")
        gate.touch()
        assert len({future.result(30) for future in futures}) == 4
        assert (pool.settings.max_workers, pool.settings.concurrency) == (4, 4)

    def test_shrinking_stops_no_task(self, make_pool: MakePool, gate: Path, wait_until: WaitUntil,
                                     is_alive: Callable[[int], bool]) -> None:
        pool = make_pool(4)
        futures = [pool.submit(hold, str(gate)) for _ in range(3)]
        wait_until(lambda: pool.get_pool_stats()["running"] == 3, "three run")
        pids = [worker["pid"] for worker in workers(pool)]
        pool.resize(max_workers=1)
        more = pool.submit(os.getpid)
        assert pool.get_pool_stats()["running"] == 3
        gate.touch()
        assert {future.result(30) for future in futures} == set(pids)
        assert more.result(30) in pids
        wait_until(lambda: sum(map(is_alive, pids)) == 1, "only one is left")
        assert pool.get_pool_stats()["counters"]["recycled"] == {"resize": 2}

    def test_what_cannot_be_is_refused_and_changes_nothing(self, make_pool: MakePool) -> None:
        pool = make_pool(2)
        with pytest.raises(SettingsError, match=r"max_concurrent \(5\) is above max_workers \(2\)"):
            pool.resize(max_concurrent=5)
        with pytest.raises(SettingsError, match="max_workers must be greater than 0"):
            pool.resize(0)
        assert pool.submit(abs, -1).result(30) == 1

    def test_before_the_first_task(self, make_pool: MakePool) -> None:
        pool = make_pool(1)
        pool.resize(2, 2)
        assert pool.submit(abs, -1).result(30) == 1


class TestPause:
    def test_tasks_wait_and_running_ones_go_on(self, make_pool: MakePool, gate: Path, wait_until: WaitUntil) -> None:
        pool = make_pool(2)
        running = pool.submit(hold, str(gate))
        wait_until(running.running, "it runs")
        pool.pause()
        pool.pause()
        waiting = [pool.submit(abs, -i) for i in range(50)]
        assert pool.get_pool_stats()["status"] == "paused"
        gate.touch()
        running.result(30)
        wait_until(lambda: pool.get_pool_stats()["running"] == 0, "it ended")
        assert not any(future.done() or future.running() for future in waiting)
        assert pool.get_pool_stats()["queue_length"] == 50
        assert waiting[7].cancel()
        pool.resume()
        pool.resume()
        del waiting[7]
        assert [future.result(30) for future in waiting] == [i for i in range(50) if i != 7]

    def test_a_pool_that_was_never_used(self, make_pool: MakePool) -> None:
        pool = make_pool(2)
        pool.pause()
        waiting = pool.submit(abs, -1)
        assert not wait([waiting], 0.2).done
        pool.resume()
        assert waiting.result(30) == 1

    def test_leaving_the_with_block_finishes_what_was_accepted(self) -> None:
        with AgentPool(2) as pool:
            pool.pause()
            waiting = [pool.submit(abs, -i) for i in range(5)]
        assert [future.result(0) for future in waiting] == list(range(5))

    def test_a_paused_pool_that_nobody_holds_any_more_finishes_too(self) -> None:
        pool = AgentPool(2)
        pool.pause()
        waiting = pool.submit(abs, -1)
        del pool
        assert waiting.result(30) == 1


class TestDrain:
    def test_it_waits_for_all_and_refuses_new_ones(self, make_pool: MakePool, gate: Path) -> None:
        pool = make_pool(1)
        futures = [pool.submit(hold, str(gate)), *(pool.submit(abs, -i) for i in range(20))]
        assert not pool.drain(timeout=0.05)
        with pytest.raises(PoolClosedError, match=r"draining: .* until pool\.resume\(\)"):
            pool.submit(abs, -1)
        assert pool.get_pool_stats()["status"] == "draining"
        gate.touch()
        assert pool.drain(timeout=30)
        assert all(future.done() for future in futures)
        pool.resume()
        assert pool.submit(abs, -1).result(30) == 1

    def test_who_waits_for_room_is_refused(self, make_pool: MakePool, gate: Path, wait_until: WaitUntil) -> None:
        pool = make_pool(1, max_pending=1)
        running = pool.submit(hold, str(gate))
        wait_until(running.running, "it runs")
        pool.submit(abs, 1)
        errors: list[BaseException] = []

        def submit() -> None:
            try:
                pool.submit(abs, 2)
            except PoolClosedError as error:
                errors.append(error)

        thread = threading.Thread(target=submit)
        thread.start()
        wait_until(lambda: pool._manager.core._is_room_wanted, "it waits for room")
        assert not pool.drain(0)
        thread.join(30)
        assert len(errors) == 1
        gate.touch()

    def test_in_a_callback_it_does_not_wait(self, make_pool: MakePool, gate: Path) -> None:
        pool = make_pool(2)
        slow = pool.submit(hold, str(gate))
        said: list[bool] = []
        pool.submit(abs, 1).add_done_callback(lambda _: said.append(pool.drain()))
        while not said:
            time.sleep(0.005)
        gate.touch()
        assert slow.result(30)
        assert said == [False]

    def test_after_the_end_there_is_nothing_to_wait_for(self, make_pool: MakePool) -> None:
        pool = make_pool(1)
        pool.submit(abs, 1)
        pool.shutdown()
        assert pool.drain()


class TestRecycle:
    def test_all_are_replaced_and_no_work_is_lost(self, make_pool: MakePool, gate: Path,
                                                  wait_until: WaitUntil) -> None:
        pool = make_pool(3)
        futures = [pool.submit(hold, str(gate)) for _ in range(6)]
        wait_until(lambda: pool.get_pool_stats()["running"] == 3, "three run")
        before = {worker["pid"] for worker in workers(pool)}
        assert pool.recycle() == 3
        assert pool.recycle() == 0
        assert {worker["leaves_because"] for worker in workers(pool)} == {"by hand"}
        gate.touch()
        pids = [future.result(30) for future in futures]
        assert set(pids[:3]) == before
        assert before.isdisjoint(pids[3:])
        assert pool.get_pool_stats()["counters"]["recycled"]["by hand"] == 3

    def test_one(self, make_pool: MakePool, wait_until: WaitUntil) -> None:
        pool = make_pool(1)
        first = pool.submit(os.getpid).result(30)
        (worker,) = workers(pool, pid=first)
        assert pool.recycle(worker["id"]) == 1
        assert pool.submit(os.getpid).result(30) != first
        wait_until(lambda: not workers(pool, pid=first), "it is gone")
        assert pool.recycle(worker["id"]) == 0
        with pytest.raises(UnknownWorkerError, match="this pool never had a worker 99; its workers are: 2"):
            pool.recycle(99)


class TestKillWorker:
    def test_the_tree_dies_and_the_task_says_who_did_it(self, make_pool: MakePool, tmp_path: Path,
                                                        wait_until: WaitUntil, is_alive: Callable[[int], bool]) -> None:
        note = tmp_path / "child"

        def with_a_child(note: Path) -> None:
            import subprocess

            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            note.with_suffix(".new").write_text(str(child.pid))
            note.with_suffix(".new").rename(note)
            child.wait()

        pool = make_pool(2)
        future = pool.submit(with_a_child, note)
        other = pool.submit(time.sleep, 0.2)
        wait_until(note.exists, "the child was started")
        child = int(note.read_text())
        (worker,) = [w for w in workers(pool) if w["task_id"] == 1]
        assert worker["pid"] == future.worker_pid
        assert pool.kill_worker(worker["id"], "it looks hung")
        with pytest.raises(WorkerKilledError, match=rf"\(pool\.kill_worker\({worker['id']}\): it looks hung\)"):
            future.result(30)
        wait_until(lambda: not is_alive(child), "its child is dead too")
        assert other.result(30) is None
        assert not pool.kill_worker(worker["id"])
        counters = pool.get_pool_stats()["counters"]
        assert (counters["workers_killed"], counters["crashed"]) == (1, 0)

    def test_a_task_that_may_run_twice_does(
        self, make_pool: MakePool, gate: Path, wait_until: WaitUntil, is_alive: Callable[[int], bool]
    ) -> None:
        pool = make_pool(1)
        future = pool.options(retry=2).submit(hold, str(gate))
        wait_until(gate.with_name("gate.begun").exists, "it runs")
        (worker,) = workers(pool)
        pool.kill_worker(worker["id"])
        wait_until(lambda: not is_alive(worker["pid"]), "it was not killed")
        gate.touch()
        assert future.result(30) != worker["pid"]
        assert future.attempts == 2


def test_any_thread_any_time(make_pool: MakePool) -> None:
    """Orders from several threads while tasks run: each task is settled once, and the pool works afterwards."""
    pool = make_pool(3)
    stop = threading.Event()
    unexpected: list[BaseException] = []

    def operate(number: int) -> None:
        try:
            while not stop.is_set():
                pool.resize(1 + number)
                pool.pause()
                pool.recycle()
                pool.resume()
                pool.get_pool_stats()
        except BaseException as error:
            unexpected.append(error)

    threads = [threading.Thread(target=operate, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    futures = [pool.submit(abs, -i) for i in range(500)]
    values = [future.result(60) for future in futures]
    stop.set()
    for thread in threads:
        thread.join(30)
    assert values == list(range(500))
    assert not unexpected
    pool.resume()
    assert pool.submit(abs, -7).result(30) == 7


def test_a_closed_pool_says_so(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.submit(abs, 1).result(30)
    pool.shutdown()
    for order in (pool.pause, pool.resume, pool.recycle, lambda: pool.resize(3), lambda: pool.kill_worker(1)):
        with pytest.raises(PoolClosedError, match="is closed and its workers are gone"):
            order()


def test_a_pool_that_shuts_down_can_be_hurried(make_pool: MakePool, gate: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(1)
    stuck = pool.submit(hold, str(gate.with_name("never")))
    futures = [pool.submit(hold, str(gate)) for _ in range(2)]
    wait_until(gate.with_name("never.begun").exists, "it runs")
    pool.shutdown(wait=False)
    with pytest.raises(PoolClosedError, match="can be neither paused nor resumed"):
        pool.pause()
    pool.resize(2)
    assert pool.kill_worker(workers(pool)[0]["id"])
    gate.touch()
    assert all(future.result(30) for future in futures)
    with pytest.raises(WorkerKilledError):
        stuck.result(30)


def test_what_operators_see(make_pool: MakePool, gate: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(2, max_concurrent=1)
    held = pool.options(name="held", priority=3).submit(hold, str(gate))
    wait_until(held.running, "it runs")
    queued = [pool.options(name=f"queued {i}").submit(abs, i) for i in range(30)]
    stats = pool.get_pool_stats()
    (worker,) = stats["workers"]
    assert (worker["state"], worker["task"], worker["task_id"]) == ("busy", "held", 1)
    assert worker["pid"] == held.worker_pid
    assert worker["task_seconds"] >= 0
    assert worker["memory_limit_mb"] == 100
    (task,) = stats["running_tasks"]
    assert (task["id"], task["name"], task["priority"], task["worker_id"]) == (1, "held", 3, worker["id"])
    assert [task["name"] for task in stats["queued_tasks"]] == [f"queued {i}" for i in range(20)]
    assert stats["queue_length"] == 30
    gate.touch()
    wait(queued, 30)
    wait_until(lambda: workers(pool, state="idle"), "it is idle")
    assert workers(pool)[0]["task_id"] is None
