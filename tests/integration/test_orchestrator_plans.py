"""Plans of agents that depend on each other, through real pools: order, failures, budgets, what is left."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agentpool import AgentPool, PlanError, PoolClosedError
from agentpool.agents import AgentKind
from agentpool.futures import TaskSnapshot
from agentpool.orchestrator import (
    OrchestrationReport,
    Plan,
    PlannedAgent,
    orchestrate_with_memory_management,
    partial_report,
    run_plan,
)
from agentpool_worker.agents.base import Agent

MB = 1024 * 1024
Wait = Callable[..., None]
IsAlive = Callable[[int], bool]


class Note(Agent):
    """Says when it ran and what it was asked and given."""

    def run(self, prompt: str, **kwargs: Any) -> dict[str, Any]:
        began = time.monotonic()
        if (gate := kwargs.get("gate")) is not None:  # together with the others that wait for this many files
            folder, count = gate
            Path(folder, f"{os.getpid()}-{began}").touch()
            while len(list(Path(folder).iterdir())) < count:
                time.sleep(0.005)
        return {"prompt": prompt, "given": kwargs, "pid": os.getpid(), "began": began, "ended": time.monotonic()}


class Fails(Agent):
    def run(self, prompt: str, **kwargs: Any) -> None:
        raise ValueError("it does not work")


class Crashes(Agent):
    def run(self, prompt: str, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Waits(Agent):
    """Says that it runs, then waits for good."""

    def run(self, prompt: str, *, mark: str, **kwargs: Any) -> None:
        Path(mark).write_text(str(os.getpid()))
        while True:
            threading.Event().wait(60)


class Holds(Agent):
    """Takes so much memory, says so, and gives it back when told."""

    def run(self, prompt: str, *, mb: int, mark: str, gate: str, **kwargs: Any) -> int:
        block = bytearray(mb * MB)
        Path(mark).write_text(str(os.getpid()))
        while not Path(gate).exists():
            time.sleep(0.005)
        return len(block)


class Billed(Agent):
    def run(self, prompt: str, **kwargs: Any) -> dict[str, Any]:
        return {"summary": "done", "usage": {"input_tokens": 100, "output_tokens": 7}, "total_cost_usd": 0.25}


@pytest.fixture
def pool() -> Iterator[AgentPool]:
    with AgentPool(max_workers=4, kill_grace=0.2) as pool:
        yield pool


def run(pool: AgentPool, *agents: PlannedAgent, **given: Any) -> OrchestrationReport:
    return run_plan(Plan("the prompt", agents=agents, **given), pool)


def states(report: OrchestrationReport) -> dict[str, str]:
    return {agent.name: agent.state for agent in report.agents}


# -- order and results -----------------------------------------------------------------------------------------------


def test_a_diamond_runs_in_order_and_its_middle_together(pool: AgentPool, tmp_path: Path) -> None:
    gate = {"gate": (str(tmp_path), 2)}  # neither ends before both have begun
    report = run(
        pool,
        PlannedAgent(Note, "end", after=["left", "right"], results_as="found"),
        PlannedAgent(Note, "left", after=["top"], kwargs=gate),
        PlannedAgent(Note, "right", after=["top"], kwargs=gate),
        PlannedAgent(Note, "top"),
    )
    assert report.ok
    assert report.ending == "completed"
    top, left, right, end = (report.results[name] for name in ("top", "left", "right", "end"))
    assert top["ended"] <= min(left["began"], right["began"])
    assert max(left["ended"], right["ended"]) <= end["began"]
    assert max(left["began"], right["began"]) < min(left["ended"], right["ended"])
    assert left["pid"] != right["pid"]
    assert end["given"]["found"] == {"left": left, "right": right}
    for agent in report.agents:
        assert (agent.attempts, len(agent.tries), agent.error, agent.reason) == (1, 1, None, None)
        assert 0 < agent.elapsed_seconds <= agent.wall_seconds <= report.wall_seconds
        assert agent.queue_seconds <= agent.wall_seconds


def test_the_throttle_is_the_pools(tmp_path: Path) -> None:
    with AgentPool(max_workers=2) as pool:
        report = run(pool, *(PlannedAgent(Note, f"agent-{number}") for number in range(6)))
        assert report.ok
        spans = [(result["began"], result["ended"]) for result in report.results.values()]
        at_once = [sum(began <= moment < ended for began, ended in spans) for moment, _ in spans]
        assert max(at_once) <= 2
        assert pool.get_pool_stats()["counters"]["spawned"] <= 2


class Says(Agent):
    def run(self, prompt: str, **kwargs: Any) -> str:
        return f"I was asked: {prompt}"


def test_results_in_prompts(pool: AgentPool) -> None:
    def by_hand(results: Mapping[str, Any]) -> str:
        return " + ".join(sorted(results))

    report = run(
        pool,
        PlannedAgent(Says, "one", prompt="first {results} {braces}"),
        PlannedAgent(Says, "two", prompt="{results[one]}!", after="one"),
        PlannedAgent(Fails, "no", policy="optional"),
        PlannedAgent(Says, "all", prompt='{"json": 1} {results}', after=["one", "no"]),
        PlannedAgent(Says, "hand", prompt=by_hand, after=["two", "one", "no"]),
    )
    assert report.ok
    results = report.results
    assert results["one"] == "I was asked: first {results} {braces}"  # it has no dependencies
    assert results["two"] == "I was asked: I was asked: first {results} {braces}!"  # and no second replacement
    assert results["all"] == (
        'I was asked: {"json": 1} one:\nI was asked: first {results} {braces}\n\n'
        "no:\n(no has no result: ValueError: it does not work)"
    )
    assert results["hand"] == "I was asked: one + two"


def test_a_prompt_that_cannot_be_made_is_its_agents_failure(pool: AgentPool) -> None:
    report = run(
        pool,
        PlannedAgent(Note, "a"),
        PlannedAgent(Note, "raises", prompt=lambda results: results["nobody"], after=["a"]),
        PlannedAgent(Note, "number", prompt=lambda results: 3, after=["a"]),  # type: ignore[arg-type,return-value]
        PlannedAgent(Note, "b"),
    )
    assert states(report) == {"a": "succeeded", "raises": "failed", "number": "failed", "b": "succeeded"}
    raised, number = report.agents[1:3]
    assert raised.error == "KeyError: 'nobody'"
    assert "lambda" in (raised.error_details or "")
    assert "returned no string but 3" in (number.error or "")
    assert raised.attempts == 0


def test_path_and_out_go_to_those_who_take_them(pool: AgentPool, tmp_path: Path) -> None:
    class TakesPath(Agent):
        def run(self, prompt: str, *, path: str) -> str:
            return path

    class TakesNothing(Agent):
        def run(self, prompt: str) -> str:
            return prompt

    report = run(
        pool,
        PlannedAgent(TakesPath, "path"),
        PlannedAgent(TakesPath, "own", kwargs={"path": "mine"}),
        PlannedAgent(TakesNothing, "nothing"),
        PlannedAgent(Note, "all"),
        PlannedAgent("command", "shell", prompt="echo hello"),
        path=str(tmp_path),
    )
    assert report.ok, report
    assert report.results["path"] == str(tmp_path)
    assert report.results["own"] == "mine"
    assert report.results["all"]["given"] == {"path": str(tmp_path), "out": None}
    assert report.results["shell"]["stdout"] == b"hello\n"


def test_nothing_runs_of_a_plan_with_a_wrong_kind(pool: AgentPool) -> None:
    for kind, error in (("nobody", LookupError), (dict, TypeError)):
        with pytest.raises(error):
            run(pool, PlannedAgent(Note, "a"), PlannedAgent(Note, "b", after=["a"], fallback=[kind]))
    assert pool.get_pool_stats()["counters"]["submitted"] == 0


def test_a_cycle_never_gets_as_far_as_a_pool() -> None:
    with pytest.raises(PlanError, match=r"a -> b -> a|b -> a -> b"):
        orchestrate_with_memory_management(
            "x", agents=[PlannedAgent(Note, "a", after=["b"]), PlannedAgent(Note, "b", after=["a"])]
        )


def test_planned_agents_in_the_one_call(pool: AgentPool, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("import os\n\ndef run(name):\n    return os.system(name)\n")
    report = orchestrate_with_memory_management(
        "Look at this", path=tmp_path, pool=pool,
        agents=["security-analyst", PlannedAgent(Note, "next", prompt="{results}", after=["security-analyst"])],
    )  # fmt: skip
    assert report.ok, report
    assert report.results["next"]["prompt"].startswith("security-analyst:\n")
    assert "B605" in report.results["next"]["prompt"]


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_required_failure_skips_what_needs_it_and_fails_the_plan(pool: AgentPool) -> None:
    report = run(
        pool,
        PlannedAgent(Fails, "a"),
        PlannedAgent(Note, "b", after=["a"]),
        PlannedAgent(Note, "c", after=["b"]),
        PlannedAgent(Note, "d"),
        PlannedAgent(Note, "e", after=["d"]),
    )
    assert not report.ok
    assert states(report) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "succeeded", "e": "succeeded"}
    assert report.ending == "completed"
    b, c = report.agents[1:3]
    assert (b.reason, b.error, b.attempts) == ("it needs a, which failed", "skipped: it needs a, which failed", 0)
    assert c.reason == "it needs b, which was skipped"
    text = report.to_text()
    assert "\na: FAILED (1 attempt" in text
    assert "\nb: skipped\n  skipped: it needs a, which failed" in text


def test_an_optional_failure_costs_nobody_anything(pool: AgentPool) -> None:
    report = run(
        pool,
        PlannedAgent(Crashes, "a", policy="optional"),
        PlannedAgent(Note, "b", after=["a"], results_as="found"),
    )
    assert report.ok
    assert states(report) == {"a": "failed", "b": "succeeded"}
    assert "WorkerCrashedError" in (report.agents[0].error or "")
    assert report.results["b"]["given"] == {"found": {}}
    assert "a: failed (optional)" in report.to_text()


def test_fallbacks_take_over_one_after_the_other(pool: AgentPool) -> None:
    report = run(
        pool,
        PlannedAgent(Fails, "a", fallback=[Crashes, Note, Billed]),
        PlannedAgent(Note, "b", after=["a"], prompt="{results[a]}"),
        PlannedAgent(Fails, "c", fallback=[Crashes]),
    )
    a, b, c = report.agents
    assert (a.state, b.state, c.state) == ("succeeded", "succeeded", "failed")
    assert a.kind.endswith(":Note")
    assert [each.kind.rpartition(":")[2] for each in a.tries] == ["Fails", "Crashes", "Note"]
    assert [each.error is None for each in a.tries] == [False, False, True]
    assert a.attempts == 3
    assert a.error is None
    assert c.error is not None
    assert c.error.startswith("WorkerCrashedError")
    assert "failed, so" in report.to_text()


def test_a_plan_that_stops_on_failure(pool: AgentPool, tmp_path: Path, wait_until: Wait, is_alive: IsAlive) -> None:
    mark = tmp_path / "mark"

    class FailsThen(Agent):
        def run(self, prompt: str, *, mark: str) -> None:
            while not (Path(mark).exists() and Path(mark).read_text()):
                time.sleep(0.005)
            raise ValueError("now")

    report = run(
        pool,
        PlannedAgent(Waits, "long", kwargs={"mark": str(mark)}),
        PlannedAgent(FailsThen, "short", kwargs={"mark": str(mark)}),
        PlannedAgent(Note, "later", after=["long"]),
        stops_on_failure=True,
    )
    assert states(report) == {"long": "stopped", "short": "failed", "later": "skipped"}
    assert report.ending == "failure"
    assert report.agents[0].error == "stopped: the required agent short failed"
    wait_until(lambda: not is_alive(int(mark.read_text())), "its worker was not retired")


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_the_budget_of_time_stops_what_runs_and_keeps_what_there_is(
    pool: AgentPool, tmp_path: Path, wait_until: Wait, is_alive: IsAlive
) -> None:
    mark = tmp_path / "mark"
    began = time.monotonic()
    report = run(
        pool,
        PlannedAgent(Note, "quick"),
        PlannedAgent(Waits, "long", kwargs={"mark": str(mark)}, after=["quick"], fallback=[Note]),
        PlannedAgent(Note, "later", after=["long"]),
        budget_seconds=6,
    )
    assert 6 <= time.monotonic() - began < 40
    assert states(report) == {"quick": "succeeded", "long": "stopped", "later": "skipped"}
    assert (report.ending, report.ending_reason) == ("budget_spent", "the budget of 6 s is spent")
    assert not report.ok
    assert report.results["quick"]["prompt"] == "the prompt"
    long = report.agents[1]
    assert long.error == "stopped: the budget of 6 s is spent"
    assert (long.attempts, len(long.tries)) == (1, 1)  # no fallback
    wait_until(lambda: not is_alive(int(mark.read_text())), "its worker was not retired")
    assert "Ended early: the budget of 6 s is spent" in report.to_text()
    assert pool.submit(os.getpid).result(20)  # the pool goes on


def test_the_budget_of_time_counts_while_the_pool_has_no_room(tmp_path: Path, wait_until: Wait) -> None:
    mark = tmp_path / "mark"
    with AgentPool(max_workers=1, max_pending=1, kill_grace=0.1) as pool:
        other = pool.submit_agent(Waits, "somebody else's", mark=str(mark))
        wait_until(mark.exists, "it did not start")
        queued = pool.submit(os.getpid)
        report = run(pool, PlannedAgent(Note, "a"), PlannedAgent(Note, "b", after=["a"]), budget_seconds=0.5)
        assert states(report) == {"a": "skipped", "b": "skipped"}
        assert report.ending == "budget_spent"
        other.kill()
        assert queued.result(20)


def test_memory_is_reserved_before_it_is_taken(pool: AgentPool, tmp_path: Path, wait_until: Wait) -> None:
    """Four agents that could run at once run two at a time, as the budget has room for two."""
    marks = [tmp_path / f"mark-{number}" for number in range(4)]
    gate = tmp_path / "gate"
    seen: list[int] = []

    def on_update(snapshots: list[TaskSnapshot]) -> None:
        seen.append(sum(snapshot.state == "running" for snapshot in snapshots))
        if sum(mark.exists() for mark in marks) >= 2 and len(seen) > 10:
            gate.touch()

    agents = [
        PlannedAgent(Holds, mark.name, kwargs={"mb": 20, "mark": str(mark), "gate": str(gate)}, expected_memory_mb=150)
        for mark in marks
    ]
    report = run_plan(Plan("x", agents=tuple(agents), budget_mb=400), pool, on_update=on_update)
    assert report.ok, report
    assert max(seen) == 2
    assert 20 * MB < report.peak_rss_bytes < 400 * MB


def test_the_limits_of_a_kind_give_way_to_a_tighter_budget(pool: AgentPool, tmp_path: Path) -> None:
    generous = AgentKind(name="generous", agent=Holds, memory_limit_mb=500, hard_memory_limit_mb=900)
    tight = AgentKind(name="tight", agent=Holds, hard_memory_limit_mb=120)
    gate = tmp_path / "never"
    report = run(
        pool,
        *(PlannedAgent(kind, kwargs={"mb": 400, "mark": str(tmp_path / kind.name), "gate": str(gate)},
                       after=after, policy="optional")
          for kind, after in ((generous, ()), (tight, ("generous",)))),
        budget_mb=250,
    )
    errors = [agent.error or "" for agent in report.agents]
    assert all(error.startswith("MemoryLimitError") for error in errors), errors
    assert "250 MB" in errors[0]
    assert "120 MB" in errors[1]


def test_an_agent_above_the_budget_is_stopped_and_its_fallback_is_tried(pool: AgentPool, tmp_path: Path) -> None:
    gate = tmp_path / "never"
    report = run(
        pool,
        PlannedAgent(Holds, "large", kwargs={"mb": 400, "mark": str(tmp_path / "mark"), "gate": str(gate)},
                     fallback=[Says]),
        budget_mb=200,
    )
    [large] = report.agents
    assert large.ok
    assert "MemoryLimitError" in (large.tries[0].error or "")
    assert large.tries[0].peak_rss_bytes > 200 * MB


def test_agents_that_together_are_above_the_budget_lose_the_worst(
    pool: AgentPool, tmp_path: Path, wait_until: Wait
) -> None:
    """Each alone is within it. The one that holds far more than was expected of it is stopped; the other goes on."""
    modest, greedy, gate = tmp_path / "modest", tmp_path / "greedy", tmp_path / "gate"

    def on_update(snapshots: list[TaskSnapshot]) -> None:
        if snapshots[1].state == "failed":
            gate.touch()

    def holds(mark: Path, mb: int, expected: float) -> PlannedAgent:
        return PlannedAgent(Holds, mark.name, kwargs={"mb": mb, "mark": str(mark), "gate": str(gate)},
                            expected_memory_mb=expected)

    report = run_plan(Plan("x", agents=(holds(modest, 150, 180), holds(greedy, 150, 40)), budget_mb=250), pool,
                      on_update=on_update)
    assert states(report) == {"modest": "succeeded", "greedy": "failed"}
    error = report.agents[1].error or ""
    assert error.startswith("stopped: the agents together held")
    assert "more than the budget of 250 MB" in error
    assert report.ending == "completed"


def test_what_could_never_fit_is_refused(pool: AgentPool) -> None:
    with pytest.raises(PlanError, match=r"'a' is expected to hold 500 MB, more than the whole budget of 300 MB"):
        run(pool, PlannedAgent(Note, "a", expected_memory_mb=500), budget_mb=300)
    # What nothing is known of is never too much.
    assert run(pool, PlannedAgent(Note, "a"), budget_mb=60).ok


# -- the end before the end ------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_a_partial_report(tmp_path: Path, wait_until: Wait, is_alive: IsAlive) -> None:
    mark = tmp_path / "mark"

    def interrupt() -> None:
        wait_until(lambda: mark.exists() and mark.read_text(), "it did not start")
        os.kill(os.getpid(), signal.SIGINT)

    with AgentPool(kill_grace=0.1) as pool:
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt) as caught:
            run(
                pool,
                PlannedAgent(Note, "quick"),
                PlannedAgent(Waits, "long", after=["quick"], kwargs={"mark": str(mark)}),
                PlannedAgent(Note, "later", after=["long"]),
            )
        interrupter.join()
        report = partial_report(caught.value)
        assert report is not None
        assert states(report) == {"quick": "succeeded", "long": "stopped", "later": "skipped"}
        assert (report.ending, report.ending_reason) == ("interrupted", "it was interrupted")
        assert report.results["quick"]["prompt"] == "the prompt"
        assert report.agents[1].attempts == 1
        json.dumps(report.to_dict(), allow_nan=False)
        wait_until(lambda: not is_alive(int(mark.read_text())), "the agent was not stopped")
    assert partial_report(KeyboardInterrupt()) is None


def test_an_error_of_the_watcher_has_the_report_too(tmp_path: Path, wait_until: Wait, is_alive: IsAlive) -> None:
    mark = tmp_path / "mark"

    def fail(snapshots: list[TaskSnapshot]) -> None:
        if snapshots[0].state == "done" and mark.exists() and mark.read_text():
            raise OSError("the terminal is gone")

    with AgentPool(kill_grace=0.1) as pool:
        with pytest.raises(OSError, match="the terminal is gone") as caught:
            run_plan(
                Plan("x", agents=(PlannedAgent(Note, "a"), PlannedAgent(Waits, "b", kwargs={"mark": str(mark)}))),
                pool, on_update=fail,
            )  # fmt: skip
        report = partial_report(caught.value)
        assert report is not None
        assert states(report) == {"a": "succeeded", "b": "stopped"}
        assert report.agents[1].error == "stopped: OSError: the terminal is gone was raised"
        wait_until(lambda: not is_alive(int(mark.read_text())), "the agent was not stopped")


def test_a_pool_that_is_stopped_leaves_a_partial_report(tmp_path: Path, wait_until: Wait) -> None:
    mark = tmp_path / "mark"

    def stop(pool: AgentPool) -> None:
        wait_until(lambda: mark.exists() and mark.read_text(), "it did not start")
        pool.emergency_stop("the disk is on fire")

    with AgentPool() as pool:
        stopper = threading.Thread(target=stop, args=(pool,))
        stopper.start()
        report = run(
            pool,
            PlannedAgent(Note, "quick"),
            PlannedAgent(Waits, "long", after=["quick"], kwargs={"mark": str(mark)}, policy="optional"),
            PlannedAgent(Note, "later", after=["long"]),
            PlannedAgent(Note, "last", after=["later"]),
        )
        stopper.join()
    assert states(report) == {"quick": "succeeded", "long": "failed", "later": "stopped", "last": "skipped"}
    assert report.ending == "pool_lost"
    assert "the disk is on fire" in (report.ending_reason or "")
    assert "the disk is on fire" in (report.agents[1].error or "")
    with pytest.raises(PoolClosedError):
        run(pool, PlannedAgent(Note, "a"))


def test_a_pool_that_breaks_fails_its_agents(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("no licence")

    with AgentPool(max_workers=1, initializer=broken) as pool:
        report = run(pool, PlannedAgent(Note, "a"), PlannedAgent(Note, "b", after=["a"]), PlannedAgent(Note, "c"))
    assert states(report) == {"a": "failed", "b": "skipped", "c": "failed"}
    assert "InitializerError" in (report.agents[0].error or "")


# -- the report ------------------------------------------------------------------------------------------------------


def test_what_it_cost(pool: AgentPool) -> None:
    report = run(pool, PlannedAgent(Billed, "a"), PlannedAgent(Billed, "b"), PlannedAgent(Note, "c"))
    assert report.usage == {"input_tokens": 200, "output_tokens": 14}
    assert report.cost_usd == 0.5
    a, _, c = report.agents
    assert (a.usage, a.cost_usd) == ({"input_tokens": 100, "output_tokens": 7}, 0.25)
    assert (c.usage, c.cost_usd) == (None, None)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["cost_usd"] == 0.5
    assert data["agents"][0]["usage"]["input_tokens"] == 100
    assert data["agents"][0]["tries"][0]["attempts"] == 1


def test_updates_name_those_that_wait_and_those_that_are_skipped(pool: AgentPool) -> None:
    seen: list[list[str]] = []
    run_plan(
        Plan("x", agents=(PlannedAgent(Fails, "a"), PlannedAgent(Note, "b", after=["a"]), PlannedAgent(Note, "c"))),
        pool,
        on_update=lambda snapshots: seen.append([f"{each.name} {each.state}" for each in snapshots]),
    )
    assert seen[0][1] == "b waiting"
    assert seen[-1] == ["a failed", "b skipped", "c done"]
