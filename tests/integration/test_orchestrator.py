"""Orchestration through a real pool: the stock agents, agents that fail, and interruption."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity

import agentpool
from agentpool import AgentPool, PoolClosedError
from agentpool.futures import TaskSnapshot
from agentpool.orchestrator import REVIEWERS, orchestrate_with_memory_management, plan, run_plan
from agentpool_worker.agents.base import Agent

TENACITY = Path(tenacity.__file__).parent


class Fine(Agent):
    def run(self, prompt: str, *, path: str, out: str | None = None) -> dict[str, Any]:
        return {"summary": f"{prompt}: {os.path.basename(path)}", "pid": os.getpid()}


class Raises(Agent):
    def run(self, prompt: str, *, path: str, out: str | None = None) -> None:
        raise ValueError("this agent found\nnothing to say")


class Crashes(Agent):
    idempotent = True

    def run(self, prompt: str, *, path: str, out: str | None = None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class NeedsMore(Agent):
    def run(self, prompt: str, *, model: str) -> None:
        """Has a keyword that the plan does not give it."""


class Waits(Agent):
    """Says that it runs, then waits for good, unmoved by requests."""

    def run(self, prompt: str, *, path: str, out: str | None = None) -> None:
        Path(path, f"{os.getpid()}.pid").touch()
        while True:
            threading.Event().wait(60)


@pytest.fixture
def pool() -> Iterator[AgentPool]:
    with AgentPool() as pool:
        yield pool


def test_the_stock_agents_on_code_we_did_not_write(pool: AgentPool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = orchestrate_with_memory_management("Review this code", path=TENACITY, out=out, pool=pool)
    assert report.ok
    assert [agent.name for agent in report.agents] == list(REVIEWERS)
    for agent in report.agents:
        assert agent.attempts == 1
        assert agent.error is None
        assert 0 < agent.elapsed_seconds <= report.wall_seconds
        assert agent.result["agent"] == agent.name
        assert f"{agent.name}: ok (1 attempt" in report.to_text()
        assert agent.result["summary"] in report.to_text()
    assert list(out.glob("test_ghost_*.py"))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["ok"] is True
    assert data["health"]["circuit_breaker"]["state"] == "closed"
    assert data["health"]["agent_pool"]["counters"]["completed"] == 3


def test_an_instance_is_kept_for_the_next_task_of_its_kind(pool: AgentPool) -> None:
    first, second = (
        orchestrate_with_memory_management("x", path=TENACITY, agents=[Fine], pool=pool) for _ in range(2)
    )
    assert first.agents[0].result["pid"] == second.agents[0].result["pid"]


def test_default_path_and_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        report = agentpool.orchestrate_with_memory_management("x", agents=[Fine])
        assert report.path == str(tmp_path)
        assert report.agents[0].result["summary"] == f"x: {tmp_path.name}"
        assert report.health["agent_pool"]["counters"]["completed"] == 1
    finally:
        agentpool.get_agent_pool().shutdown()


def test_an_agent_that_fails_costs_the_others_nothing(pool: AgentPool, tmp_path: Path) -> None:
    report = orchestrate_with_memory_management(
        "x", path=tmp_path, agents=[Raises, Crashes, Fine, NeedsMore, "security-analyst"], pool=pool
    )
    raised, crashed, fine, wrong, security = report.agents
    assert not report.ok
    assert [agent.ok for agent in report.agents] == [False, False, True, False, True]
    assert raised.error == "ValueError: this agent found\nnothing to say"
    assert raised.attempts == 1
    assert "in run" in (raised.error_details or "")  # the remote traceback
    assert crashed.error is not None
    assert crashed.error.startswith(("WorkerCrashedError", "QuarantinedError"))
    assert crashed.attempts == 3  # it declares itself idempotent
    assert fine.result["summary"].startswith("x: ")
    assert wrong.error is not None
    assert wrong.error.startswith("TypeError")
    assert security.result["files"] == 0
    text = report.to_text()
    assert "2 of 5 agents succeeded" in text
    assert "Raises: FAILED (1 attempt" in text
    assert "\n  ValueError: this agent found\n  nothing to say\n" in text
    json.dumps(report.to_dict(), allow_nan=False)


def test_an_agent_that_cannot_be_sent_is_an_outcome(pool: AgentPool, tmp_path: Path) -> None:
    lock = threading.Lock()

    class Unpicklable(Fine):
        held = lock

    report = orchestrate_with_memory_management("x", path=tmp_path, agents=[Unpicklable, Fine], pool=pool)
    assert [agent.ok for agent in report.agents] == [False, True]
    assert "TaskPicklingError" in (report.agents[0].error or "")
    assert report.agents[0].attempts == 0


def test_a_bounded_queue_is_waited_for(tmp_path: Path) -> None:
    kinds = [type(f"Fine{number}", (Fine,), {}) for number in range(4)]
    with AgentPool(max_workers=1, max_pending=1) as pool:
        report = orchestrate_with_memory_management("x", path=tmp_path, agents=kinds, pool=pool)
    assert report.ok
    assert len(report.agents) == 4


def test_a_closed_pool_raises(tmp_path: Path) -> None:
    with AgentPool() as pool:
        pass
    with pytest.raises(PoolClosedError):
        orchestrate_with_memory_management("x", path=tmp_path, agents=[Fine], pool=pool)


def test_updates_come_in_this_thread_and_tell_the_whole_story(pool: AgentPool, tmp_path: Path) -> None:
    seen: list[list[TaskSnapshot]] = []
    threads: set[threading.Thread] = set()

    def on_update(snapshots: list[TaskSnapshot]) -> None:
        seen.append(snapshots)
        threads.add(threading.current_thread())

    todo = plan("x", path=TENACITY, agents=[*REVIEWERS, Raises])
    run_plan(todo, pool, on_update=on_update)
    assert threads == {threading.current_thread()}
    names = [agent.name for agent in todo.agents]
    assert all([snapshot.name for snapshot in snapshots] == names for snapshots in seen)
    assert [snapshot.state for snapshot in seen[-1]] == ["done", "done", "done", "failed"]
    states = [[snapshot.state for snapshot in snapshots] for snapshots in seen]
    assert any("running" in moment for moment in states)
    # Two tasks run at once by default, so the third was seen waiting.
    assert any("queued" in moment for moment in states)
    order = ["queued", "running", "waiting_to_retry", "done", "failed"]
    for position in range(len(names)):
        ranks = [order.index(moment[position]) for moment in states]
        assert ranks == sorted(ranks)


def running_pids(directory: Path) -> list[int]:
    return [int(path.stem) for path in directory.glob("*.pid")]


@pytest.mark.parametrize("with_updates", [False, True])
def test_ctrl_c_stops_what_runs_and_cancels_the_rest(
    with_updates: bool,
    tmp_path: Path,
    wait_until: Callable[..., None],
    is_alive: Callable[[int], bool],
) -> None:
    first, second, third = (type(name, (Waits,), {}) for name in ("First", "Second", "Third"))

    def interrupt_once_two_run() -> None:
        wait_until(lambda: len(running_pids(tmp_path)) == 2, "two agents did not start")
        os.kill(os.getpid(), signal.SIGINT)

    with AgentPool(kill_grace=0.1) as pool:
        interrupter = threading.Thread(target=interrupt_once_two_run)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            run_plan(
                plan("x", path=tmp_path, agents=[first, second, third]),
                pool,
                on_update=(lambda snapshots: None) if with_updates else None,
            )
        interrupter.join()
        pids = running_pids(tmp_path)
        wait_until(lambda: not any(map(is_alive, pids)), "the agents' workers were not killed")
        wait_until(lambda: pool.get_pool_stats()["counters"]["cancelled"] == 1, "the third was not cancelled")
        # The pool itself goes on.
        assert orchestrate_with_memory_management("x", path=tmp_path, agents=[Fine], pool=pool).ok
    assert len(running_pids(tmp_path)) == 2


def test_an_update_that_fails_stops_everything_too(
    tmp_path: Path, wait_until: Callable[..., None], is_alive: Callable[[int], bool]
) -> None:
    def fail(snapshots: list[TaskSnapshot]) -> None:
        if running_pids(tmp_path):
            raise OSError("the terminal is gone")

    with AgentPool(kill_grace=0.1) as pool:
        with pytest.raises(OSError, match="terminal is gone"):
            run_plan(plan("x", path=tmp_path, agents=[Waits]), pool, on_update=fail)
        pids = running_pids(tmp_path)
        wait_until(lambda: not any(map(is_alive, pids)), "the agent's worker was not killed")
