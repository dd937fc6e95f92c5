"""The health report, the emergency shutdown, and the agents on this host that no pool of ours owns.

It looks and reports; what is done about memory is decided in each pool's core. It starts no pool, process or thread,
and may be called from any thread. `python -m agentpool.monitor` prints the report of a fresh process as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import psutil

from agentpool.config import LONG_QUEUE, MB, PoolSettings
from agentpool.core.governance import DEFAULT_MIN_AVAILABLE
from agentpool.errors import AgentPoolError
from agentpool.io.sampler import HostReading, HostSampler

__all__ = ["DEFAULT_AGENT_NAMES", "ResourceMonitor", "find_foreign_agents", "get_resource_monitor", "match_agent"]

logger = logging.getLogger("agentpool.monitor")

#: Command-line programs that are agents: `agent_names` of a `ResourceMonitor` unless others are given.
DEFAULT_AGENT_NAMES: Final = frozenset({
    "aider", "amp", "claude", "codex", "copilot", "crush", "cursor-agent", "gemini", "goose", "llm", "opencode", "qwen",
})
#: npm packages whose scripts are agents, as the interpreter's command line shows them: .../node_modules/PACKAGE/...
_PACKAGES: Final = {
    "@anthropic-ai/claude-code": "claude",
    "@charmland/crush": "crush",
    "@github/copilot": "copilot",
    "@google/gemini-cli": "gemini",
    "@openai/codex": "codex",
    "@qwen-code/qwen-code": "qwen",
    "@sourcegraph/amp": "amp",
    "opencode-ai": "opencode",
}
#: Programs that run a script: name; one-letter options with a value, with code instead of a script, with a module.
_INTERPRETERS: Final = (
    (re.compile(r"(python|pypy)[0-9.]*"), "WX", "c", "m"),
    (re.compile(r"(a|ba|da|k|z)?sh"), "oO", "c", ""),
    (re.compile(r"node(js)?|bun|deno|tsx"), "rC", "ep", ""),
)
_LONG_OPTIONS_WITH_VALUE: Final = frozenset({"--require", "--import", "--loader", "--conditions", "--rcfile"})
_LONG_OPTIONS_WITH_CODE: Final = frozenset({"--eval", "--print"})
_LARGEST_LISTED: Final = 20
#: A CPU share is measured over this long where the previous report is too fresh or too old to count from.
_CPU_WINDOW_SECONDS: Final = 0.1
_CPU_WINDOW_MAX_SECONDS: Final = 10.0

_BREAKER_SEVERITY: Final = ("closed", "half_open", "open", "forced_open")
_STATUS_SEVERITY: Final = ("ok", "draining", "paused", "degraded", "broken")
#: Limits on pool memory: several pools together may use the sum. All other thresholds are not additive.
_ADDITIVE_THRESHOLDS: Final = ("alert_memory_mb", "critical_memory_mb")
_TOTALS: Final = ("total_agents", "max_pool_size", "max_concurrent", "queue_length", "running", "waiting_to_retry")
_COUNTERS: Final = ("submitted", "completed", "failed", "cancelled", "retried", "timed_out", "crashed", "memory_killed",
                    "tools_stopped", "given_back", "spawned", "start_failures")
_STOPPED: Final = ("workers_stopped", "tasks_cancelled", "tasks_stopped")


class MonitoredPool(Protocol):
    """What the monitor needs of a pool; `AgentPool` has it."""

    @property
    def name(self) -> str: ...

    def get_pool_stats(self) -> Mapping[str, Any]: ...

    def emergency_stop(self, reason: str) -> Mapping[str, Any]: ...


class ResourceMonitor:
    """Reports on the pools of this process and on the host they share.

    pools: the pools to report on; None: all pools of this process that are not closed, found anew for each call.
    agent_names: programs that count as agents when no pool owns them; an empty collection switches the search off.
        May be replaced later: `get_resource_monitor().agent_names = {...}`.
    """

    def __init__(self, pools: Iterable[MonitoredPool] | None = None, *,
                 agent_names: Collection[str] = DEFAULT_AGENT_NAMES) -> None:
        self._given_pools = None if pools is None else tuple(pools)
        self.agent_names = agent_names
        self._host_lock = threading.Lock()  # guards _sampler, which keeps the previous CPU times, and _sampled_at
        self._sampler = HostSampler()
        self._sampled_at: float | None = None

    @property
    def agent_names(self) -> frozenset[str]:
        """Names of programs that count as agents."""
        return self._agent_names

    @agent_names.setter
    def agent_names(self, names: Collection[str]) -> None:
        if isinstance(names, str):
            raise TypeError(f"agent_names must be a collection of names, not the string {names!r}")
        self._agent_names = frozenset(names)

    def get_health_report(self) -> dict[str, Any]:
        """What is going on now, as a dict that `json.dumps` takes. MB are 1024 x 1024 bytes, times seconds.

        `memory_stats`: `process_memory_mb` (RSS of this process), `pool_memory_mb` (all workers' trees),
        `system_memory_total_mb` and `system_memory_available_mb` (host or container, the tighter; `limit_source` says
        which), `pressure_some_avg10` (percent, or null), `active_agents` (busy), `registered_agents` (live workers).
        `cpu`: the host's `percent` over the last `window_seconds`, `count`, `load_average`.
        `circuit_breaker`: `state`, `failure_count`, `reason`: of several pools the worst.
        `agent_pool`: all pools summed, `pools`: each as its `get_pool_stats()` has it.
        `foreign_agents`: agents on this host that no pool of this process owns; see `find_foreign_agents`.
        `status`: "ok", "draining", "paused", "degraded", "broken", or "closed" where all pools are; `reasons`: why.

        Takes 0.1 s longer when the previous report of this monitor is more than 10 s old or there is none: a share of
        CPU needs two readings. A pool that cannot report is listed as broken, with its error as the reason.
        """
        host, window_seconds = self._read_host()
        pools = [_pool_stats(pool) for pool in self._pools()]
        foreign = find_foreign_agents(self._agent_names,
                                      {worker["pid"] for pool in pools for worker in pool.get("workers", ())})
        summed = _sum_pools(pools)
        status, reasons = _judge(pools, summed, host, foreign)
        by_status = summed["agents_by_status"]
        return {
            "status": status,
            "reasons": reasons,
            "memory_stats": {
                "process_memory_mb": _mb(psutil.Process().memory_info().rss),
                "system_memory_available_mb": _mb(host.available_bytes),
                "system_memory_total_mb": _mb(host.total_bytes),
                "limit_source": host.limit_source,
                "pressure_some_avg10": host.pressure_some_avg10,
                "pool_memory_mb": summed["memory_mb"],
                "active_agents": by_status["busy"],
                "registered_agents": summed["total_agents"],
            },
            "cpu": {
                "percent": round(host.cpu_percent, 1),
                "window_seconds": round(window_seconds, 3),
                "count": os.cpu_count() or 1,
                "load_average": [round(load, 2) for load in os.getloadavg()],
            },
            "circuit_breaker": _worst_breaker(pools),
            "agent_pool": summed,
            "pools": pools,
            "foreign_agents": foreign,
        }

    def emergency_shutdown(self, reason: str = "no reason given") -> dict[str, Any]:
        """Stops all pools at once: what is queued is cancelled, workers are killed, the pools are closed.

        Answers what was done: `reason`; `pools_stopped`, `workers_stopped`, `tasks_cancelled`, `tasks_stopped`;
        `pools`, the same for each by `name`; `errors`, the pools (`name`, `error`) that could not be stopped, which
        is also logged. One pool's failure does not keep the others running.
        """
        stopped: list[dict[str, Any]] = []
        errors: list[dict[str, str]] = []
        for pool in self._pools():
            try:
                stopped.append({"name": pool.name, **pool.emergency_stop(reason)})
            except Exception as error:
                logger.exception("emergency shutdown: pool %s could not be stopped", pool.name)
                errors.append({"name": pool.name, "error": f"{type(error).__name__}: {error}"})
        done = {key: sum(pool[key] for pool in stopped) for key in _STOPPED}
        logger.warning("emergency shutdown (%s): %d pools and %s", reason, len(stopped), done)
        return {"reason": reason, "pools_stopped": len(stopped), **done, "pools": stopped, "errors": errors}

    def _pools(self) -> Sequence[MonitoredPool]:
        if self._given_pools is not None:
            return self._given_pools
        # Late: this module is imported by processes that never have a pool.
        from agentpool.runtime.lifecycle import live_pools

        return live_pools()

    def _read_host(self) -> tuple[HostReading, float]:
        """A reading, and how many seconds its CPU share covers."""
        with self._host_lock:
            age = None if self._sampled_at is None else time.monotonic() - self._sampled_at
            if age is None or not _CPU_WINDOW_SECONDS <= age <= _CPU_WINDOW_MAX_SECONDS:
                self._sampler.read()
                self._sampled_at = time.monotonic()
                time.sleep(_CPU_WINDOW_SECONDS)  # the span that is measured; nothing is waited for
            since = self._sampled_at or 0.0
            reading = self._sampler.read()
            self._sampled_at = time.monotonic()
            return reading, self._sampled_at - since


_lock = threading.Lock()  # guards _monitor
_monitor: ResourceMonitor | None = None


def get_resource_monitor() -> ResourceMonitor:
    """The monitor of this process, made on first use. It reports on all pools of this process."""
    global _monitor
    with _lock:
        if _monitor is None:
            _monitor = ResourceMonitor()
        return _monitor


def _forget_after_fork() -> None:
    # Another thread may have held a lock when the process was forked; in the copy nobody would ever release it.
    global _lock, _monitor
    _lock, _monitor = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_after_fork)


def _pool_stats(pool: MonitoredPool) -> dict[str, Any]:
    try:
        return dict(pool.get_pool_stats())
    except AgentPoolError as error:
        return {"name": pool.name, "status": "broken", "reasons": [f"{type(error).__name__}: {error}"]}


def _sum_pools(pools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One pool's figures as they are, several pools' summed, zeros where there is none."""
    by_status, counters, recycled = Counter(busy=0, idle=0), Counter(dict.fromkeys(_COUNTERS, 0)), Counter[str]()
    for pool in pools:
        by_status.update(pool.get("agents_by_status", {}))
        given = dict(pool.get("counters", {}))
        recycled.update(given.pop("recycled", {}))
        counters.update(given)
    summed: dict[str, Any] = {key: sum(pool.get(key, 0) for pool in pools) for key in _TOTALS}
    return {
        **summed,
        "agents_by_status": dict(by_status),
        "memory_mb": round(sum((pool.get("memory_mb", 0.0) for pool in pools), start=0.0), 1),
        "queue_is_long": summed["queue_length"] > LONG_QUEUE,
        "thresholds": _common_thresholds([pool["thresholds"] for pool in pools if "thresholds" in pool]),
        "counters": {**counters, "recycled": dict(recycled)},
    }


def _common_thresholds(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Thresholds of all pools: summed where that has a meaning, else null where the pools differ."""
    common: dict[str, Any] = {}
    for name in dict.fromkeys(name for thresholds in each for name in thresholds):
        values = [thresholds.get(name) for thresholds in each]
        if name in _ADDITIVE_THRESHOLDS and None not in values:
            common[name] = sum(values)
        else:
            common[name] = values[0] if values.count(values[0]) == len(values) else None
    return common


def _worst_breaker(pools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    breakers = [pool["circuit_breaker"] for pool in pools if "circuit_breaker" in pool]
    worst: dict[str, Any] = max(breakers, key=lambda each: _BREAKER_SEVERITY.index(each["state"]), default={})
    failures = sum(breaker["failure_count"] for breaker in breakers)
    return {"state": "closed", "reason": "", **worst, "failure_count": failures}


def _judge(pools: Sequence[Mapping[str, Any]], summed: Mapping[str, Any], host: HostReading,
           foreign: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The report's status, and why."""
    reasons = [f"pool {pool['name']}: {reason}" if len(pools) > 1 else str(reason)
               for pool in pools for reason in pool.get("reasons", ())]
    own = _host_reasons(pools, host, foreign)
    if summed["queue_is_long"]:
        own.append(f"{summed['queue_length']} tasks are queued, more than {LONG_QUEUE}")
    statuses = [pool["status"] for pool in pools]
    if statuses and all(status == "closed" for status in statuses):
        return "closed", reasons + own
    worst = max((_STATUS_SEVERITY.index(status) for status in statuses if status != "closed"), default=0)
    return _STATUS_SEVERITY[max(worst, _STATUS_SEVERITY.index("degraded") if own else 0)], reasons + own


def _host_reasons(pools: Sequence[Mapping[str, Any]], host: HostReading, foreign: Mapping[str, Any]) -> list[str]:
    """What is wrong with the host at this moment, by the strictest of the pools' thresholds or the defaults."""
    defaults = PoolSettings()

    def limits(name: str) -> list[float]:
        each = (pool.get("thresholds", {}).get(name) for pool in pools)
        return [float(value) for value in each if value is not None]

    reasons = []
    needed = max(limits("min_available_mb"), default=host.total_bytes * DEFAULT_MIN_AVAILABLE / MB)
    if host.available_bytes < needed * MB:
        reason = f"{host.limit_source} has {host.available_bytes / MB:.0f} MB available, needs {needed:.0f}"
        others = f"; {foreign['count']} other agents hold {foreign['memory_mb']:.0f} MB" if foreign["count"] else ""
        reasons.append(reason + others)
    pressure_limit = min(limits("pressure_threshold"), default=defaults.pressure_threshold)
    if host.pressure_some_avg10 is not None and host.pressure_some_avg10 > pressure_limit:
        reasons.append(f"memory pressure is {host.pressure_some_avg10:.0f} %, above {pressure_limit:.0f} %")
    # A share over a tenth of a second says little by itself: the last minute's load must agree.
    cpu_limit = min(limits("cpu_threshold_percent"), default=defaults.cpu_threshold_percent)
    load = 100.0 * os.getloadavg()[0] / (os.cpu_count() or 1)
    if host.cpu_percent > cpu_limit and load > cpu_limit:
        reasons.append(f"host CPU is at {host.cpu_percent:.0f} %, above {cpu_limit:.0f} %")
    return reasons


def _mb(size_bytes: int) -> float:
    return round(size_bytes / MB, 1)


def find_foreign_agents(names: Collection[str], owned: Collection[int] = ()) -> dict[str, Any]:
    """Agent-like processes of this host, without this one, and without those that are, or descend from, the `owned`.

    `count`, `memory_mb` (RSS summed), `by_name`: the same for each name, `processes`: the 20 largest, each with `pid`,
    `name`, `memory_mb`, `age_seconds`. See `match_agent` for what counts. Processes that end during the search, or of
    which the system shows us nothing, are left out. 30 us for each process of the host; nothing where `names` is empty.
    """
    found: list[dict[str, Any]] = []
    by_name: dict[str, dict[str, Any]] = {}
    # Not psutil.process_iter(): it keeps its objects, and with them the start times of process ids long reused.
    for pid in psutil.pids() if names else ():
        if pid == os.getpid():
            continue
        try:
            process = psutil.Process(pid)
            name = match_agent(process.cmdline(), names)
            if name and not any(relative.pid in owned for relative in (process, *process.parents())):
                found.append(_entry(process, name))
        except psutil.Error:
            continue
    found.sort(key=lambda entry: entry["memory_mb"], reverse=True)
    for entry in found:
        group = by_name.setdefault(entry["name"], {"count": 0, "memory_mb": 0.0})
        group["count"] += 1
        group["memory_mb"] = round(group["memory_mb"] + entry["memory_mb"], 1)
    return {
        "count": len(found),
        "memory_mb": round(sum((entry["memory_mb"] for entry in found), start=0.0), 1),
        "by_name": by_name,
        "processes": found[:_LARGEST_LISTED],
    }


def _entry(process: psutil.Process, name: str) -> dict[str, Any]:
    age_seconds = round(max(0.0, time.time() - process.create_time()), 1)
    return {"pid": process.pid, "name": name, "memory_mb": _mb(process.memory_info().rss), "age_seconds": age_seconds}


def match_agent(argv: Sequence[str], names: Collection[str]) -> str | None:
    """The name of the agent that this command line runs; None: it runs none.

    The program's basename counts; for an interpreter (Python, node, bun, deno, a shell) that of its script or module,
    or a known npm package that the script belongs to. A name that is only part of a path, or an argument, does not.
    """
    if not argv:  # kernel threads and zombies have no command line
        return None
    program = os.path.basename(argv[0])
    if program in names:
        return program
    script = _script(program, argv) or ""
    name = os.path.basename(script).removesuffix(".__main__")
    if name in names:
        return name
    return next((agent for package, agent in _PACKAGES.items()
                 if agent in names and f"/node_modules/{package}/" in script), None)


def _script(program: str, argv: Sequence[str]) -> str | None:
    """The script or module that an interpreter was told to run; None: code, input, or no interpreter."""
    known = next((known for known in _INTERPRETERS if known[0].fullmatch(program)), None)
    if known is None:
        return None
    _, valued, code, module = known
    rest = iter(argv[1:])
    for argument in rest:
        if argument == "--":
            return next(rest, None)
        if not argument.startswith("-"):
            if argument != "run" or program not in ("bun", "deno"):
                return argument
        elif argument.startswith("--"):
            if argument.partition("=")[0] in _LONG_OPTIONS_WITH_CODE:
                return None
            if argument in _LONG_OPTIONS_WITH_VALUE:
                next(rest, None)
        elif option := re.match(f"-[^{code}{module}{valued}]*([{code}{module}{valued}])(.*)", argument):  # -Im aider
            if option[1] in code:
                return None
            value = option[2] or next(rest, None)
            if option[1] in module:
                return value
    return None


def main() -> int:
    """Prints the health report of this process, in which there is no pool, as indented JSON."""
    print(json.dumps(get_resource_monitor().get_health_report(), indent=2, allow_nan=False))
    return 0


if __name__ == "__main__":
    # Run as a script, this module exists twice; the one that others import has the monitor of the process.
    from agentpool import monitor

    raise SystemExit(monitor.main())
