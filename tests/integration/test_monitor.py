"""The health report and the emergency shutdown, with real processes and real pools."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import psutil
import pytest

import agentpool
from agentpool import AgentPool, get_agent_pool, get_resource_monitor
from agentpool.config import LONG_QUEUE
from agentpool.errors import PoolClosedError, TaskKilledError
from agentpool.monitor import DEFAULT_AGENT_NAMES, ResourceMonitor, find_foreign_agents, match_agent

WaitUntil = Callable[..., None]
#: An agent that says that it is ready, takes 30 MiB, and ends when its standard input does.
AGENT = "import sys\ndata = bytearray(30 * 1024 * 1024)\nprint('ready', flush=True)\nsys.stdin.read()\n"
SAMPLE = {
    "memory_stats": {"process_memory_mb", "system_memory_available_mb", "active_agents", "registered_agents"},
    "circuit_breaker": {"state", "failure_count"},
    "agent_pool": {"total_agents", "max_pool_size", "agents_by_status"},
}


@contextlib.contextmanager
def started(argv: Sequence[str | Path], executable: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that printed a line to say that it is ready; it is gone when the block is left."""
    process = subprocess.Popen(argv, executable=executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """Writes an executable Python script that stands for an agent, at a path below `tmp_path`."""

    def write(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{AGENT}")
        path.chmod(0o755)
        return path

    return write


def foreign_pids(report: Mapping[str, Any]) -> dict[int, str]:
    return {entry["pid"]: entry["name"] for entry in report["processes"]}


# the report


def assert_has_shape_of_the_sample(report: Mapping[str, Any]) -> None:
    for part, keys in SAMPLE.items():
        assert keys <= report[part].keys(), part
    assert {"busy", "idle"} <= report["agent_pool"]["agents_by_status"].keys()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_without_pools_it_reports_the_host_and_zeros() -> None:
    report = ResourceMonitor(pools=[]).get_health_report()
    assert_has_shape_of_the_sample(report)
    memory = report["memory_stats"]
    assert 5 < memory["process_memory_mb"] < 5000
    assert 0 < memory["system_memory_available_mb"] <= memory["system_memory_total_mb"]
    assert (memory["active_agents"], memory["registered_agents"], memory["pool_memory_mb"]) == (0, 0, 0.0)
    assert report["circuit_breaker"] == {"state": "closed", "failure_count": 0, "reason": ""}
    pool = report["agent_pool"]
    assert (pool["total_agents"], pool["max_pool_size"], pool["queue_length"]) == (0, 0, 0)
    assert pool["agents_by_status"] == {"busy": 0, "idle": 0}
    assert pool["queue_is_long"] is False
    assert pool["counters"]["submitted"] == 0
    assert pool["counters"]["recycled"] == {}
    assert report["pools"] == []
    assert report["status"] in ("ok", "degraded")
    assert bool(report["reasons"]) == (report["status"] == "degraded")


def test_cpu_is_measured_over_a_span_of_the_present() -> None:
    monitor = ResourceMonitor(pools=[], agent_names=())
    burn_until = time.monotonic() + 0.5
    burner = threading.Thread(target=lambda: [None for _ in iter(lambda: time.monotonic() < burn_until, False)])
    burner.start()
    cpu = monitor.get_health_report()["cpu"]
    burner.join()
    assert 0.1 <= cpu["window_seconds"] < 5
    assert cpu["count"] == os.cpu_count()
    assert 0 < cpu["percent"] <= 100, "this process was busy all the time"
    again = monitor.get_health_report()["cpu"]
    assert again["window_seconds"] >= 0.1


def test_run_as_a_module_it_prints_the_report_and_starts_nothing() -> None:
    code = """
import os, runpy, sys
from agentpool.io.sampler import descendants
sys.argv = ["agentpool.monitor"]
try:
    runpy.run_module("agentpool.monitor", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop
import threading
print(descendants(os.getpid()), threading.active_count(), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    assert_has_shape_of_the_sample(report)
    assert report["pools"] == []
    assert result.stdout.startswith('{\n  "status"'), "indented"
    assert result.stderr == "[] 1\n"


def test_run_with_dash_m_it_warns_of_nothing() -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-m", "agentpool.monitor"],
                            capture_output=True, text=True, check=True)
    assert_has_shape_of_the_sample(json.loads(result.stdout))
    assert result.stderr == ""


def test_there_is_one_monitor_per_process() -> None:
    monitor = get_resource_monitor()
    assert get_resource_monitor() is monitor
    assert isinstance(monitor, agentpool.ResourceMonitor)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if get_resource_monitor() is not monitor else 1)
    assert os.waitpid(pid, 0)[1] == 0, "a forked copy has its own, with locks that nobody holds"


# real pools


def test_a_pool_at_work_is_reported_live(tmp_path: Path, wait_until: WaitUntil) -> None:
    gate = tmp_path / "gate"

    def work() -> int:
        while not gate.exists():
            time.sleep(0.01)
        return os.getpid()

    with AgentPool(max_workers=4, max_concurrent=1) as pool:
        monitor = ResourceMonitor(pools=[pool])
        futures = [pool.submit(work) for _ in range(3)]
        wait_until(futures[0].running, "the first task did not start")
        # A worker is counted busy as the task is handed to it; its memory is known from its first sample on.
        wait_until(lambda: monitor.get_health_report()["memory_stats"]["pool_memory_mb"] > 1, "no memory was reported")
        report = monitor.get_health_report()
        assert_has_shape_of_the_sample(report)
        assert report["memory_stats"]["active_agents"] == 1
        assert report["memory_stats"]["registered_agents"] == report["agent_pool"]["total_agents"] >= 1
        assert report["agent_pool"]["max_pool_size"] == 4
        assert report["agent_pool"]["queue_length"] == 2
        assert report["agent_pool"]["counters"]["submitted"] == 3
        assert report["agent_pool"]["thresholds"]["memory_limit_mb"] == 100
        assert [entry["name"] for entry in report["pools"]] == [pool.name]
        gate.touch()
        assert not wait(futures, timeout=30).not_done
        wait_until(lambda: monitor.get_health_report()["memory_stats"]["active_agents"] == 0, "the worker stays busy")
        assert monitor.get_health_report()["agent_pool"]["counters"]["completed"] == 3


def test_pools_of_this_process_are_found_and_summed() -> None:
    with AgentPool(max_workers=2) as first, AgentPool(max_workers=3) as second:
        assert first.submit(os.getpid).result(timeout=30) != second.submit(os.getpid).result(timeout=30)
        report = get_resource_monitor().get_health_report()
        assert [entry["name"] for entry in report["pools"]] == [first.name, second.name]
        assert report["agent_pool"]["max_pool_size"] == 5
        assert report["agent_pool"]["counters"]["completed"] == 2
        assert report["agent_pool"]["thresholds"]["alert_memory_mb"] == 250 + 375
    assert get_resource_monitor().get_health_report()["pools"] == [], "closed pools are not reported"


def test_an_open_breaker_shows_with_its_reason() -> None:
    with AgentPool(max_workers=1) as quiet, AgentPool(max_workers=1) as pool:
        monitor = ResourceMonitor(pools=[quiet, pool])
        assert monitor.get_health_report()["circuit_breaker"]["state"] == "closed"
        pool.breaker.force_open("tried by a test")
        report = monitor.get_health_report()
        assert report["circuit_breaker"]["state"] == "forced_open"
        assert "tried by a test" in report["circuit_breaker"]["reason"]
        assert report["status"] == "degraded"
        assert any("tried by a test" in reason and pool.name in reason for reason in report["reasons"])
        pool.breaker.reset()


def test_emergency_shutdown_stops_every_pool(wait_until: WaitUntil, is_alive: Callable[[int], bool]) -> None:
    first, second = AgentPool(max_workers=1), AgentPool(max_workers=2)
    try:
        busy = first.submit(time.sleep, 600)
        queued = first.submit(os.getpid)
        second.submit(os.getpid).result(timeout=30)
        wait_until(busy.running, "the task did not start")
        wait_until(lambda: len(first.get_pool_stats()["workers"]) == 1, "the worker is not listed")
        pids = [worker["pid"] for pool in (first, second) for worker in pool.get_pool_stats()["workers"]]
        done = ResourceMonitor(pools=[first, second]).emergency_shutdown("a test wants it")
        assert done["reason"] == "a test wants it"
        assert done["pools_stopped"] == 2
        assert done["workers_stopped"] == len(pids) >= 2
        assert done["tasks_cancelled"] == 1
        assert done["errors"] == []
        assert [entry["name"] for entry in done["pools"]] == [first.name, second.name]
        assert not wait([busy, queued], timeout=30).not_done
        assert queued.cancelled()
        with pytest.raises(TaskKilledError):
            busy.result()
        wait_until(lambda: not any(is_alive(pid) for pid in pids), "workers outlived the emergency shutdown")
        with pytest.raises(PoolClosedError):
            first.submit(os.getpid)
        assert json.loads(json.dumps(done)) == done
    finally:
        first.shutdown()
        second.shutdown()


def test_emergency_shutdown_reaches_the_pool_of_the_process_which_is_made_anew() -> None:
    pool = get_agent_pool()
    pool.submit(os.getpid).result(timeout=30)
    done = get_resource_monitor().emergency_shutdown("over")
    assert pool.name in [entry["name"] for entry in done["pools"]]
    assert pool.closed
    assert get_resource_monitor().emergency_shutdown("again")["pools_stopped"] == 0
    with get_agent_pool() as anew:
        assert anew is not pool
        assert anew.submit(int, "7").result(timeout=30) == 7


# agents that are nobody's


@pytest.mark.parametrize("name", ["claude", "codex"])
def test_a_script_of_that_name_is_seen_until_it_ends(script: Callable[[str], Path], name: str) -> None:
    monitor = ResourceMonitor(pools=[])
    with started([script(name)]) as process:
        found = monitor.get_health_report()["foreign_agents"]
        assert foreign_pids(found)[process.pid] == name
        entry = next(entry for entry in found["processes"] if entry["pid"] == process.pid)
        assert 30 < entry["memory_mb"] < 300
        assert 0 <= entry["age_seconds"] < 100
        assert found["count"] >= 1
        assert found["memory_mb"] >= entry["memory_mb"]
        assert found["by_name"][name]["count"] >= 1
        assert found["by_name"][name]["memory_mb"] >= entry["memory_mb"]
    assert process.pid not in foreign_pids(monitor.get_health_report()["foreign_agents"])


def test_shell_scripts_and_programs_that_call_themselves_so_are_seen(tmp_path: Path) -> None:
    shell = tmp_path / "gemini"
    shell.write_text("#!/bin/sh\necho ready\nread line\n")
    shell.chmod(0o755)
    with started([shell]) as by_script, started(["/opt/bin/aider", "-c", AGENT], sys.executable) as by_title:
        found = foreign_pids(find_foreign_agents(DEFAULT_AGENT_NAMES))
        assert found[by_script.pid] == "gemini"
        assert found[by_title.pid] == "aider"


def test_a_name_in_a_folder_or_an_argument_does_not_count(script: Callable[[str], Path]) -> None:
    with started([script("claude/review.py"), "codex", "--model=gemini"]) as process:
        assert process.pid not in foreign_pids(find_foreign_agents(DEFAULT_AGENT_NAMES))


def test_names_can_be_chosen(script: Callable[[str], Path]) -> None:
    name = f"my-agent-{os.getpid()}"
    monitor = ResourceMonitor(pools=[], agent_names=[name])
    with started([script("claude")]) as claude, started([script(name)]) as mine:
        assert foreign_pids(monitor.get_health_report()["foreign_agents"]) == {mine.pid: name}
        monitor.agent_names = {"claude"}
        found = foreign_pids(monitor.get_health_report()["foreign_agents"])
        assert claude.pid in found
        assert mine.pid not in found
        monitor.agent_names = ()
        assert monitor.get_health_report()["foreign_agents"]["count"] == 0
    with pytest.raises(TypeError, match="collection of names"):
        monitor.agent_names = "claude"


def test_the_largest_twenty_are_listed_and_all_are_counted() -> None:
    name = f"agent-{os.getpid()}"
    wait_a_line = [name, "-c", "echo ready; read line"]
    with contextlib.ExitStack() as stack:
        small = [stack.enter_context(started(wait_a_line, "/bin/sh")) for _ in range(21)]
        large = stack.enter_context(started([name, "-c", AGENT], sys.executable))
        found = find_foreign_agents({name})
        assert found["count"] == found["by_name"][name]["count"] == 22
        assert len(found["processes"]) == 20
        assert found["processes"][0]["pid"] == large.pid
        sizes = [entry["memory_mb"] for entry in found["processes"]]
        assert sizes == sorted(sizes, reverse=True)
        assert {entry["pid"] for entry in found["processes"][1:]} < {process.pid for process in small}


def test_an_agent_that_a_pool_started_is_not_foreign(script: Callable[[str], Path], wait_until: WaitUntil) -> None:
    path = script("claude")

    def run_until_killed() -> None:
        with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as agent:
            agent.wait()

    with AgentPool(max_workers=1) as pool, started([path]) as foreign:
        future = pool.submit(run_until_killed)

        def pid_of_owned() -> int | None:
            workers = [worker["pid"] for worker in pool.get_pool_stats()["workers"] if worker["pid"]]
            below = [child for worker in workers for child in psutil.Process(worker).children(recursive=True)]
            return next((child.pid for child in below if match_agent(child.cmdline(), {"claude"})), None)

        wait_until(lambda: pid_of_owned() is not None, "the pool's agent did not start")
        owned = pid_of_owned()
        assert owned is not None
        found = foreign_pids(ResourceMonitor(pools=[pool]).get_health_report()["foreign_agents"])
        assert foreign.pid in found
        assert owned not in found
        # To a monitor that is not told of this pool, its agent is somebody else's.
        assert owned in foreign_pids(ResourceMonitor(pools=[]).get_health_report()["foreign_agents"])
        os.kill(owned, signal.SIGTERM)
        future.result(timeout=30)


@pytest.mark.parametrize(("argv", "expected"), [
    (["claude"], "claude"),
    (["/home/u/.local/bin/claude", "--resume"], "claude"),
    (["/usr/lib/node_modules/@openai/codex/vendor/x86_64/codex/codex", "exec"], "codex"),
    (["node", "/usr/local/bin/codex", "--full-auto"], "codex"),
    (["/usr/bin/node", "--no-warnings=DEP0040", "/usr/lib/node_modules/@google/gemini-cli/dist/index.js"], "gemini"),
    (["node", "--import", "tsx", "-r", "dotenv/config", "/x/node_modules/@anthropic-ai/claude-code/cli.js"], "claude"),
    (["node", "--", "/usr/bin/copilot"], "copilot"),
    (["bun", "run", "/root/.bun/install/global/node_modules/opencode-ai/bin/opencode"], "opencode"),
    (["/usr/bin/python3.12", "/usr/bin/aider", "a.py"], "aider"),
    (["python", "-m", "aider", "a.py"], "aider"),
    (["python3", "-X", "dev", "-Im", "llm.__main__"], "llm"),
    (["python3", "-Wignore", "-u", "/venv/bin/llm"], "llm"),
    (["pypy3", "-maider"], "aider"),
    (["/bin/bash", "-e", "/usr/local/bin/cursor-agent"], "cursor-agent"),
    (["bash", "-eo", "pipefail", "/usr/local/bin/goose"], "goose"),
    ([], None),
    ([""], None),
    (["python3"], None),
    (["python3", "-"], None),
    (["python3", "-c", "claude"], None),
    (["python3", "-m"], None),
    (["bash", "-lc", "claude -p hello"], None),
    (["node", "-e", "codex"], None),
    (["node", "--eval=1", "codex"], None),
    (["node", "/home/claude/server.js"], None),
    (["node", "/usr/lib/node_modules/@openai/codex-tools/x.js"], None),
    (["node", "/x/@openai/codex/x.js"], None),
    (["vim", "claude"], None),
    (["/opt/claude/helper"], None),
    (["claude-helper"], None),
    (["git", "log", "--author", "codex"], None),
    (["python3", "/srv/app.py", "/usr/bin/claude"], None),
    (["python3", "-m", "pytest", "claude"], None),
])
def test_match_agent(argv: list[str], expected: str | None) -> None:
    assert match_agent(argv, DEFAULT_AGENT_NAMES) == expected


def test_a_package_counts_only_when_its_agent_is_asked_for() -> None:
    argv = ["node", "/x/node_modules/@openai/codex/bin/codex.js"]
    assert match_agent(argv, {"codex"}) == "codex"
    assert match_agent(argv, {"claude"}) is None


# sums and verdicts, on recorded answers of pools


class Recorded:
    """A pool's recorded answers: for states that a real pool is not brought into quickly."""

    def __init__(self, name: str, stats: Mapping[str, Any] | Exception | None = None,
                 stop: Exception | None = None) -> None:
        self.name = name
        self._stats = stats
        self._stop = stop

    def get_pool_stats(self) -> dict[str, Any]:
        if isinstance(self._stats, Exception):
            raise self._stats
        return recorded(self.name) | dict(self._stats or {})

    def emergency_stop(self, reason: str) -> dict[str, Any]:
        if self._stop is not None:
            raise self._stop
        return {"workers_stopped": 2, "tasks_cancelled": 3, "tasks_stopped": 1}


def recorded(name: str) -> dict[str, Any]:
    return {
        "name": name, "status": "ok", "reasons": [], "total_agents": 2, "max_pool_size": 4, "max_concurrent": 2,
        "agents_by_status": {"busy": 1, "idle": 1}, "queue_length": 5, "running": 1, "waiting_to_retry": 1,
        "memory_mb": 40.5,
        "thresholds": {"memory_limit_mb": 100.0, "alert_memory_mb": 500.0, "critical_memory_mb": 800.0,
                       "min_available_mb": 0.0, "cpu_threshold_percent": 100.0, "pressure_threshold": 100.0},
        "counters": {"submitted": 9, "completed": 3, "recycled": {"memory": 1}}, "workers": [],
        "circuit_breaker": {"state": "closed", "failure_count": 1, "reason": ""},
    }


def report_on(*pools: Recorded) -> dict[str, Any]:
    report = ResourceMonitor(pools=pools, agent_names=()).get_health_report()
    assert_has_shape_of_the_sample(report)
    return report


def test_one_pools_figures_are_the_reports() -> None:
    report = report_on(Recorded("one"))
    expected = recorded("one")
    for key in ("total_agents", "max_pool_size", "agents_by_status", "queue_length", "memory_mb", "thresholds"):
        assert report["agent_pool"][key] == expected[key]
    assert (report["status"], report["reasons"]) == ("ok", [])
    assert report["memory_stats"]["active_agents"] == 1
    assert report["memory_stats"]["registered_agents"] == 2
    assert report["memory_stats"]["pool_memory_mb"] == 40.5


def test_several_pools_are_summed() -> None:
    other = {"agents_by_status": {"busy": 2, "idle": 0, "starting": 1},
             "counters": {"submitted": 1, "recycled": {"idle": 2}},
             "thresholds": {"memory_limit_mb": 50.0, "alert_memory_mb": 100.0, "critical_memory_mb": None}}
    pool = report_on(Recorded("a"), Recorded("b", other))["agent_pool"]
    assert (pool["total_agents"], pool["queue_length"], pool["memory_mb"]) == (4, 10, 81.0)
    assert pool["agents_by_status"] == {"busy": 3, "idle": 1, "starting": 1}
    assert pool["counters"]["submitted"] == 10
    assert pool["counters"]["recycled"] == {"memory": 1, "idle": 2}
    assert pool["thresholds"]["alert_memory_mb"] == 600.0
    assert pool["thresholds"]["critical_memory_mb"] is None, "one of them has none"
    assert pool["thresholds"]["memory_limit_mb"] is None, "they differ"


def test_the_worst_breaker_and_status_count() -> None:
    breakers = [{"state": state, "failure_count": 2, "reason": f"why {state}"}
                for state in ("half_open", "open", "closed")]
    pools = [Recorded(breaker["state"], {"circuit_breaker": breaker, "status": status, "reasons": [f"why {status}"]})
             for breaker, status in zip(breakers, ("ok", "degraded", "closed"), strict=True)]
    report = report_on(*pools)
    assert report["circuit_breaker"] == {"state": "open", "failure_count": 6, "reason": "why open"}
    assert report["status"] == "degraded"
    assert "pool open: why degraded" in report["reasons"]
    assert report_on(*pools, Recorded("x", {"status": "broken"}))["status"] == "broken"
    assert report_on(pools[2])["status"] == "closed"


def test_a_long_queue_shows() -> None:
    at_the_bound = report_on(Recorded("a", {"queue_length": LONG_QUEUE}))
    assert (at_the_bound["status"], at_the_bound["agent_pool"]["queue_is_long"]) == ("ok", False)
    above = report_on(Recorded("a", {"queue_length": LONG_QUEUE + 1}))
    assert (above["status"], above["agent_pool"]["queue_is_long"]) == ("degraded", True)
    assert above["reasons"] == ["10001 tasks are queued, more than 10000"]


def test_too_little_memory_shows_at_once_and_names_who_else_holds_some(script: Callable[[str], Path]) -> None:
    greedy = Recorded("a", {"thresholds": recorded("a")["thresholds"] | {"min_available_mb": 10**9}})
    with started([script("claude")]):
        report = ResourceMonitor(pools=[greedy], agent_names={"claude"}).get_health_report()
    assert report["status"] == "degraded"
    assert "MB available, needs 1000000000; " in report["reasons"][0]
    assert " other agents hold " in report["reasons"][0]


def test_a_pool_that_cannot_report_is_listed_as_broken() -> None:
    report = report_on(Recorded("a"), Recorded("b", PoolClosedError("gone")))
    assert report["status"] == "broken"
    assert report["reasons"] == ["pool b: PoolClosedError: gone"]
    assert report["agent_pool"]["total_agents"] == 2
    assert [pool["status"] for pool in report["pools"]] == ["ok", "broken"]


def test_emergency_shutdown_goes_on_after_a_failure_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    pools = [Recorded("a"), Recorded("b", stop=OSError("no such luck")), Recorded("c")]
    done = ResourceMonitor(pools=pools).emergency_shutdown("test")
    assert (done["pools_stopped"], done["workers_stopped"]) == (2, 4)
    assert (done["tasks_cancelled"], done["tasks_stopped"]) == (6, 2)
    assert done["errors"] == [{"name": "b", "error": "OSError: no such luck"}]
    assert "pool b could not be stopped" in caplog.text
    assert "no such luck" in caplog.text
