"""The names that the old scripts used, as they used them, in an interpreter of their own: they share one pool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: What each script may use. `when` waits for something, as a script that shows a dashboard would.
PROLOGUE = """
import json, os, sys, time
from pathlib import Path
import agentpool
from agentpool import (
    ResourceCircuitBreaker, get_agent_pool, get_circuit_breaker, get_resource_monitor,
    orchestrate_with_memory_management,
)

folder = Path(sys.argv[1])

def when(condition, patience=20):
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)

def hold(name):
    (folder / name).touch()
    while not (folder / "gate").exists():
        time.sleep(0.005)
    return os.getpid()

def show(value):
    print(json.dumps(value, allow_nan=False), flush=True)

def stop(error_of):
    try:
        return type(error_of()).__name__
    except BaseException as error:
        return type(error).__name__
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a script; returns what it showed."""

    def run(code: str, *, arguments: tuple[str, ...] = (), silent: bool = True) -> list[Any]:
        done = subprocess.run([sys.executable, "-W", "error", "-c", PROLOGUE + code, str(tmp_path), *arguments],
                              capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "120"})
        assert done.returncode == 0, done.stderr
        if silent:
            assert done.stderr == ""
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_one_pool_breaker_and_monitor_for_the_process(script: Callable[..., list[Any]]) -> None:
    [same, closed, anew, name, bound] = script("""
pool = get_agent_pool()
show([pool is get_agent_pool(), get_circuit_breaker().get_state() == ResourceCircuitBreaker().get_state() == "closed",
      get_resource_monitor() is get_resource_monitor(), pool.submit(os.getpid).result(20) != os.getpid()])
pool.shutdown()
show([pool.closed, get_circuit_breaker() is not pool.breaker])
other = get_agent_pool()
show([other is not pool, other.closed, other.submit(os.getpid).result(20) > 0])
show(other.name)
show(other.settings.max_pending)
""")
    assert same == [True, True, True, True]
    assert closed == [True, True]
    assert anew == [True, False, True]
    assert name == "shared"
    assert bound == 1000


def test_the_old_classes_are_found_where_they_are_now(script: Callable[..., list[Any]]) -> None:
    [names] = script("""
import agentpool.breaker, agentpool.monitor, agentpool.orchestrator, agentpool.pool
show([agentpool.breaker.ResourceCircuitBreaker is ResourceCircuitBreaker,
      agentpool.monitor.get_resource_monitor is get_resource_monitor,
      agentpool.pool.get_agent_pool is get_agent_pool, agentpool.pool.get_circuit_breaker is get_circuit_breaker,
      agentpool.orchestrator.orchestrate_with_memory_management is orchestrate_with_memory_management])
""")
    assert names == [True] * 5


def test_pool_stats(script: Callable[..., list[Any]], tmp_path: Path) -> None:
    [fresh, busy, idle] = script("""
pool = get_agent_pool()
show(pool.get_pool_stats())
tasks = [pool.options(name=f"task-{n}").submit(hold, str(n)) for n in range(3)]
when(lambda: (folder / "0").exists() and (folder / "1").exists())
show(pool.get_pool_stats())
(folder / "gate").touch()
[task.result(20) for task in tasks]
when(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 2)
show(pool.get_pool_stats())
""")
    keys = {"name", "status", "reasons", "total_agents", "max_pool_size", "max_concurrent", "agents_by_status",
            "queue_length", "running", "waiting_to_retry", "memory_mb", "thresholds", "counters", "workers",
            "circuit_breaker"}
    for stats in (fresh, busy, idle):
        assert keys <= stats.keys()
        assert (stats["name"], stats["max_pool_size"], stats["max_concurrent"]) == ("shared", 4, 2)
        assert stats["circuit_breaker"] == {"state": "closed", "failure_count": 0, "reason": ""}
        thresholds = stats["thresholds"]
        assert (thresholds["memory_limit_mb"], thresholds["alert_memory_mb"], thresholds["critical_memory_mb"],
                thresholds["cpu_threshold_percent"], thresholds["idle_timeout"]) == (100, 500, 800, 80, 300)
        assert stats["counters"].keys() >= {
            "submitted", "completed", "failed", "cancelled", "retried", "timed_out", "crashed", "memory_killed",
            "spawned", "start_failures", "recycled"}
    assert (fresh["total_agents"], fresh["agents_by_status"], fresh["workers"]) == (0, {"busy": 0, "idle": 0}, [])
    assert (busy["total_agents"], busy["agents_by_status"]) == (2, {"busy": 2, "idle": 0})
    assert (busy["queue_length"], busy["running"], busy["waiting_to_retry"]) == (1, 2, 0)
    assert {worker["task"] for worker in busy["workers"]} == {"task-0", "task-1"}
    for worker in busy["workers"]:
        assert worker.keys() >= {"id", "pid", "status", "memory_mb", "tasks_done", "task", "age_seconds"}
        assert worker["status"] == "busy"
        assert worker["memory_mb"] > 1
    assert busy["memory_mb"] == pytest.approx(sum(worker["memory_mb"] for worker in busy["workers"]), abs=0.2)
    assert (idle["agents_by_status"], idle["running"]) == ({"busy": 0, "idle": 2}, 0)
    assert (idle["counters"]["submitted"], idle["counters"]["completed"], idle["counters"]["spawned"]) == (3, 3, 2)
    assert sum(worker["tasks_done"] for worker in idle["workers"]) == 3


def test_the_health_report_has_the_shape_of_old(script: Callable[..., list[Any]]) -> None:
    [report] = script("""
pool = get_agent_pool()
pool.submit(os.getpid).result(20)
tasks = [pool.submit(hold, "one"), pool.submit(hold, "two")]
when(lambda: (folder / "one").exists() and (folder / "two").exists())
tasks.append(pool.submit(hold, "three"))
show(get_resource_monitor().get_health_report())
(folder / "gate").touch()
[task.result(20) for task in tasks]
""")
    memory = report["memory_stats"]
    assert memory["process_memory_mb"] > 5
    assert memory["system_memory_available_mb"] > 5
    assert (memory["active_agents"], memory["registered_agents"]) == (2, 2)
    assert {"state": "closed", "failure_count": 0}.items() <= report["circuit_breaker"].items()
    pool = report["agent_pool"]
    assert (pool["total_agents"], pool["max_pool_size"]) == (2, 4)
    assert pool["agents_by_status"] == {"busy": 2, "idle": 0}
    # and what is new
    assert pool["queue_length"] == 1
    assert pool["counters"]["completed"] == 1
    assert memory["pool_memory_mb"] == pool["memory_mb"] > 2
    assert pool["thresholds"]["critical_memory_mb"] == 800
    assert report["cpu"].keys() >= {"percent", "count"}
    assert report["foreign_agents"].keys() >= {"count", "memory_mb"}
    assert report["pools"][0]["name"] == "shared"


def test_the_breaker_by_hand(script: Callable[..., list[Any]]) -> None:
    [states, stats, health, done] = script("""
breaker = ResourceCircuitBreaker()
breaker.force_open()
task = get_agent_pool().submit(os.getpid)
show([breaker.get_state(), get_circuit_breaker().get_state(), breaker.failure_count, breaker.reason])
show(get_agent_pool().get_pool_stats())
show(get_resource_monitor().get_health_report()["circuit_breaker"])
get_circuit_breaker().reset()
show([task.result(20) > 0, breaker.get_state()])
""", silent=False)
    assert states == ["forced_open", "forced_open", 0, "forced open by hand"]
    assert (stats["total_agents"], stats["queue_length"], stats["status"]) == (0, 1, "degraded")
    assert health == {"state": "forced_open", "failure_count": 0, "reason": "forced open by hand"}
    assert done == [True, "closed"]


def test_emergency_shutdown(script: Callable[..., list[Any]]) -> None:
    [answer, outcomes, gone, again, health] = script("""
import agentpool
pool, other = get_agent_pool(), agentpool.AgentPool(1, name="other")
tasks = [pool.submit(hold, str(n)) for n in range(4)] + [other.submit(hold, "other")]
when(lambda: all((folder / name).exists() for name in ("0", "1", "other")))
workers = [w["pid"] for each in (pool, other) for w in each.get_pool_stats()["workers"]]
show(get_resource_monitor().emergency_shutdown("the disk is on fire"))
show([stop(lambda: task.exception(5)) for task in tasks])
show([pool.closed, other.closed, [pid for pid in workers if os.path.exists(f"/proc/{pid}")]])
try:
    pool.submit(os.getpid)
except RuntimeError as error:
    show([str(error), get_agent_pool() is not pool, get_agent_pool().submit(os.getpid).result(20) > 0])
show(get_resource_monitor().get_health_report()["agent_pool"]["total_agents"])
""", silent=False)
    assert answer["reason"] == "the disk is on fire"
    assert (answer["pools_stopped"], answer["workers_stopped"], answer["tasks_stopped"], answer["tasks_cancelled"]) == (
        2, 3, 3, 2)
    assert {pool["name"] for pool in answer["pools"]} == {"shared", "other"}
    assert answer["errors"] == []
    assert outcomes == ["TaskKilledError"] * 2 + ["CancelledError"] * 2 + ["TaskKilledError"]
    assert gone == [True, True, []]
    assert again[0] == "cannot schedule new futures after shutdown: emergency shutdown: the disk is on fire"
    assert again[1:] == [True, True]
    assert health == 1


def test_orchestrate(script: Callable[..., list[Any]], tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "adder.py").write_text("def add(a: int, b: int) -> int:\n    return a + b\n")
    [result] = script("""
report = orchestrate_with_memory_management("Review this code", path=sys.argv[2])
show([report.ok, [agent.name for agent in report.agents], "circuit_breaker" in report.to_dict()["health"]])
""", arguments=(str(code),), silent=False)
    assert result == [True, ["security-analyst", "performance-auditor", "test-generator"], True]


@pytest.mark.parametrize("argv", [["-m", "agentpool.monitor"], ["-m", "agentpool", "health"]])
def test_the_report_from_the_command_line(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-W", "error", *argv], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["memory_stats"]["system_memory_available_mb"] > 5
    assert report["circuit_breaker"]["state"] == "closed"
    assert report["agent_pool"]["total_agents"] == 0


def test_a_script_that_leaves_the_shared_pool_open_ends_when_its_work_is_done(
    script: Callable[..., list[Any]], tmp_path: Path
) -> None:
    [started] = script("""
tasks = [get_agent_pool().submit((folder / f"done-{n}").touch) for n in range(20)]
show(len(tasks))
""")
    assert started == 20
    assert len(list(tmp_path.glob("done-*"))) == 20
