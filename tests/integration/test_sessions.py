"""Sessions with real processes: kept state, order, isolation, and each way to lose one."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import cloudpickle
import pytest

from agentpool import (
    Agent,
    AgentKind,
    AgentPool,
    PoolClosedError,
    SessionLostError,
    SettingsError,
    TaskTimeoutError,
    WorkerCrashedError,
)

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]


def remember(word: str) -> tuple[int, list[str]]:
    """Adds a word to what this worker knows; its process, and all that it knows."""
    import json as somewhere_that_stays

    words = somewhere_that_stays.__dict__.setdefault("_words_of_a_test", [])
    words.append(word)
    return os.getpid(), list(words)


def hold(gate: str) -> int:
    """Runs until somebody makes that file."""
    while not os.path.exists(gate):
        time.sleep(0.005)
    return os.getpid()


def take(megabytes: int) -> None:
    import json as somewhere_that_stays

    somewhere_that_stays.__dict__["_kept_by_a_test"] = b"x" * (megabytes * 1024 * 1024)
    time.sleep(0.1)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def test_state_is_kept_in_order_and_nobody_else_sees_it(make_pool: MakePool, wait_until: WaitUntil,
                                                        is_alive: Callable[[int], bool]) -> None:
    pool = make_pool(3)
    with pool.session("one") as one, pool.session("two") as two:
        futures = [(one.submit(remember, f"a{i}"), two.submit(remember, f"b{i}")) for i in range(20)]
        plain = [pool.submit(remember, "plain") for _ in range(20)]
        ones, twos = zip(*((a.result(30), b.result(30)) for a, b in futures), strict=True)
        assert one.worker_pid == ones[0][0]
        assert [w["session"] for w in pool.get_pool_stats()["workers"] if w["pid"] == one.worker_pid] == ["one"]
    assert len({pid for pid, _ in ones}) == len({pid for pid, _ in twos}) == 1
    assert ones[-1][1] == [f"a{i}" for i in range(20)]
    assert twos[-1][1] == [f"b{i}" for i in range(20)]
    for future in plain:
        pid, words = future.result(30)
        assert set(words) == {"plain"}
        assert pid not in (ones[0][0], twos[0][0])
    wait_until(lambda: not is_alive(ones[0][0]) and not is_alive(twos[0][0]), "their workers are retired")
    with pytest.raises(PoolClosedError, match="after the session was closed"):
        one.submit(abs, 1)


def test_an_agent_keeps_its_instance(make_pool: MakePool) -> None:
    from agentpool import Agent

    class Counting(Agent):
        name = "counting"

        def setup(self) -> None:
            self.heard: list[str] = []

        def run(self, prompt: str) -> list[str]:
            self.heard.append(prompt)
            return list(self.heard)

    pool = make_pool(2)
    with pool.session() as session:
        heard = [session.submit_agent(Counting, word) for word in "abc"]
        assert heard[-1].result(30) == ["a", "b", "c"]
        assert list(session.map(abs, range(-3, 0))) == [3, 2, 1]


def test_the_open_session_of_a_key_is_found_again(make_pool: MakePool) -> None:
    pool = make_pool(2)
    first = pool.session("user-7")
    first.submit(remember, "hello").result(30)
    again = pool.options(timeout=30).session("user-7")
    assert again is first
    assert again.submit(remember, "again").result(30)[1] == ["hello", "again"]
    first.close()
    fresh = pool.session("user-7")
    assert fresh is not first
    assert fresh.submit(remember, "new").result(30)[1] == ["new"]
    fresh.close()


def test_a_session_keeps_its_pool_and_the_pool_does_not_keep_itself(wait_until: WaitUntil) -> None:
    session = AgentPool(1, cpu_threshold_percent=100).options(timeout=60).session("user-7")
    gc.collect()
    pid, _ = session.submit(remember, "hello").result(30)
    manager = session._manager
    del session
    wait_until(lambda: manager.is_finished, "nobody holds the pool, and it goes on")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_open_session_of_a_key_goes_on_where_nobody_held_it(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.session("user-7").submit(remember, "hello").result(30)
    assert pool.session("user-7").submit(remember, "again").result(30)[1] == ["hello", "again"]
    pool.session("user-7").close()
    assert pool.session("user-7").submit(remember, "new").result(30)[1] == ["new"]


def test_options_of_its_view_go_before_those_of_an_agents_kind(make_pool: MakePool, gate: Path) -> None:
    class Holding(Agent):
        def run(self, prompt: str, *args: object, **kwargs: object) -> int:
            return hold(prompt)

    kind = AgentKind(name="holding", agent=Holding, timeout=60)
    session = make_pool(1).options(timeout=0.2).session()
    with pytest.raises(TaskTimeoutError):
        session.submit_agent(kind, str(gate)).result(30)


def test_more_sessions_than_workers_take_turns(make_pool: MakePool) -> None:
    pool = make_pool(2)
    sessions = [pool.session() for _ in range(6)]
    futures = [session.submit(remember, str(number)) for number, session in enumerate(sessions)]
    for number, session in enumerate(sessions):
        assert futures[number].result(60)[1] == [str(number)]
        session.close()


def test_a_crash_is_named_and_the_next_session_works(make_pool: MakePool, gate: Path) -> None:
    pool = make_pool(2)
    session = pool.session("k")
    pid, _ = session.submit(remember, "a").result(30)
    fatal = session.submit(os.kill, pid, signal.SIGSEGV)
    waiting = [session.submit(remember, "b") for _ in range(3)]
    for future in (fatal, *waiting):
        with pytest.raises(SessionLostError, match=r"session \d+ \(k\) is lost: .* was killed by SIGSEGV") as caught:
            future.result(30)
        assert (caught.value.reason, caught.value.exit_code, caught.value.key) == ("crashed", -signal.SIGSEGV, "k")
        assert caught.value.worker_pid == pid
    assert isinstance(fatal.exception().__cause__, WorkerCrashedError)
    with pytest.raises(SessionLostError):
        session.submit(abs, 1)
    assert isinstance(session.lost, SessionLostError)
    assert session.closed
    assert pool.session("k").submit(remember, "c").result(30)[1] == ["c"]


def test_it_is_lost_idle_recycled_killed_or_stopped(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(4, critical_memory_mb=4000)
    lost = {}
    idle = pool.session("idle", idle_timeout=0.2)
    idle.submit(abs, 1).result(30)
    memory = pool.session("memory")
    memory.submit(take, 150).result(30)
    killed = pool.session("killed")
    killed.submit(abs, 1).result(30)
    pool.kill_worker(next(w["id"] for w in pool.get_pool_stats()["workers"] if w["session"] == "killed"), "by hand")
    stopped = pool.options(timeout=0.2).session("stopped")
    late, after = stopped.submit(time.sleep, 600), stopped.submit(abs, 1)
    with pytest.raises(TaskTimeoutError):
        late.result(30)
    with pytest.raises(SessionLostError, match=r"task that was stopped|was stopped"):
        after.result(30)
    for session in (idle, memory, killed, stopped):
        wait_until(lambda session=session: session.lost is not None, f"{session} is lost")
        lost[session.key] = session.lost.reason
        with pytest.raises(SessionLostError):
            session.submit(abs, 1)
    assert lost == {"idle": "idle", "memory": "memory", "killed": "killed", "stopped": "stopped"}


def test_its_worker_outlives_what_recycles_others(make_pool: MakePool) -> None:
    pool = make_pool(1, max_tasks_per_child=2, idle_timeout=0.05)
    with pool.session() as session:
        pids = set()
        for _ in range(5):
            pids.add(session.submit(os.getpid).result(30))
            assert pool.recycle() == 0
            assert not wait([session.submit(time.sleep, 0.1)], 30).not_done
    assert len(pids) == 1


def test_a_shutdown_finishes_what_waits_in_sessions(gate: Path) -> None:
    with AgentPool(1) as pool:
        first, second = pool.session(), pool.session()
        first.submit(abs, 1).result(30)
        waiting = [second.submit(remember, word) for word in "ab"]
    assert waiting[-1].result(0)[1] == ["a", "b"]
    first.close()
    with pytest.raises(PoolClosedError):
        second.submit(abs, 1)


def test_closing_with_cancel_futures(make_pool: MakePool, gate: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(2)
    session = pool.session()
    running, waiting = session.submit(hold, str(gate)), session.submit(abs, 1)
    wait_until(running.running, "it runs")
    session.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    gate.touch()
    assert running.result(30)
    wait_until(lambda: not pool._manager.core.sessions, "it is over")


@pytest.mark.parametrize(("about", "message"), [
    ({"key": ""}, "key must be a string that is not empty"),
    ({"key": 7}, "key must be a string"),
    ({"idle_timeout": 0}, "idle_timeout must be greater than 0"),
])
def test_what_cannot_be(make_pool: MakePool, about: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_pool(1).session(**about)  # type: ignore[arg-type]
