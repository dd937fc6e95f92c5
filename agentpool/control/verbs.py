"""What may be asked of a pool over its control socket. Each verb reads, or tells the pool something; none waits.

Used by the control thread alone. The pool is held weakly: a socket keeps no pool alive. What an order means is decided
in the core; here its arguments are looked at, as they come from outside.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

from agentpool.config import MB
from agentpool.control.following import Logs, Watch
from agentpool.control.server import Following
from agentpool.control.wire import PROTOCOL, ControlError
from agentpool.core.transitions import TaskState
from agentpool.errors import AgentPoolError, TaskKilledError

if TYPE_CHECKING:
    from agentpool.core.records import TaskRecord
    from agentpool.pool import AgentPool

__all__ = ["PoolOperator"]

_LONGEST_TEXT: Final = 1000
_MOST_TASKS: Final = 10_000
#: A snapshot that is not older than this is shared by all who watch.
_FRESH_SECONDS: Final = 0.1


class _Arguments:
    """What a request brought along. Each is taken once; what is left over was misspelt."""

    def __init__(self, verb: str, given: Mapping[str, Any]) -> None:
        self._verb = verb
        self._given = dict(given)

    def _wrong(self, name: str, wanted: str, value: object) -> ControlError:
        return ControlError(f"{self._verb}: {name} must be {wanted}, got {value!r:.80}", "bad-argument")

    def text(self, name: str, default: str) -> str:
        value = self._given.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
            raise self._wrong(name, f"a text of at most {_LONGEST_TEXT} characters", value)
        return value

    def whole(self, name: str, *, least: int = 0, most: int = 10**9) -> int | None:
        value = self._given.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}", value)
        return value

    def needed(self, name: str, *, least: int = 0) -> int:
        value = self.whole(name, least=least)
        if value is None:
            raise ControlError(f"{self._verb} needs {name}", "bad-argument")
        return value

    def seconds(self, name: str, *, least: float, most: float) -> float | None:
        value = self._given.pop(name, None)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            raise self._wrong(name, f"a number of seconds from {least:g} to {most:g}", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._given.pop(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def nothing_else(self) -> None:
        if self._given:
            raise ControlError(f"{self._verb} knows no {', '.join(sorted(map(repr, self._given)))}", "bad-argument")


class PoolOperator:
    """See the module."""

    def __init__(self, pool: weakref.ref[AgentPool], pool_id: str) -> None:
        self._reference = pool
        self._id = pool_id
        self._started_at = time.time()
        self._snapshot: tuple[float, dict[str, Any]] = (-1.0, {})
        self._verbs: dict[str, Callable[[AgentPool, _Arguments], Any]] = {
            "breaker": self._breaker,
            "drain": self._drain,
            "health": self._health,
            "hello": lambda pool, arguments: self.hello(),
            "kill": self._kill,
            "logs": self._logs,
            "pause": self._pause,
            "recycle": self._recycle,
            "resize": self._resize,
            "resume": self._resume,
            "shutdown": self._shutdown,
            "stats": self._stats,
            "status": self._status,
            "tasks": self._tasks,
            "watch": self._watch,
            "workers": self._workers,
        }

    def hello(self) -> dict[str, Any]:
        """Who this is."""
        pool = self._reference()
        return {
            "agentpool": sys.modules["agentpool"].__version__,  # above this floor, and always loaded
            "protocol": PROTOCOL,
            "pool": {
                "id": self._id,
                "name": None if pool is None else pool.name,
                "pid": os.getpid(),
                "user": os.geteuid(),
                "command": [str(word)[:200] for word in sys.argv[:20]],
                "cwd": _cwd(),
                "python": ".".join(map(str, sys.version_info[:3])),
                "started_at": None if pool is None else time.time() - (time.monotonic() - pool.created_at),
            },
            "verbs": sorted([*self._verbs, "unfollow"]),
        }

    def ask(self, verb: str, arguments: Mapping[str, Any]) -> tuple[Any, Following | None]:
        """See `server.Operator`."""
        found = self._verbs.get(verb)
        if found is None:
            raise ControlError(f"there is no verb {verb!r:.80}; known are {', '.join(sorted(self._verbs))}",
                               "unknown-verb")
        pool = self._reference()
        if pool is None:
            raise ControlError("the pool was closed", "closed")
        taken = _Arguments(verb, arguments)
        try:
            answer = found(pool, taken)
        except AgentPoolError as error:
            if isinstance(error, ControlError):
                raise
            raise ControlError(str(error), _code(error)) from error
        return answer if isinstance(answer, tuple) else (answer, None)

    # -- looking -------------------------------------------------------------------------------------------------

    def _status(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        """Who it is and how it stands: what a person wants to see."""
        arguments.nothing_else()
        return {"pool": self.hello()["pool"], "stats": pool.get_pool_stats(), "breaker": self._breaker_state(pool)}

    def _stats(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        arguments.nothing_else()
        return pool.get_pool_stats()

    def _workers(self, pool: AgentPool, arguments: _Arguments) -> list[dict[str, Any]]:
        arguments.nothing_else()
        workers: list[dict[str, Any]] = pool.get_pool_stats()["workers"]
        return workers

    def _tasks(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        most = arguments.whole("limit", least=1, most=_MOST_TASKS) or 100
        arguments.nothing_else()
        manager = pool._manager
        with manager.lock:
            now = time.monotonic()
            running = [worker.running for worker in manager.core.workers.values() if worker.running is not None]
            known = {task.id for task in running}
            others = (task for task in chain(manager.open_tasks(), list(manager.inbox)) if task.id not in known)
            shown = [_task(task, now) for task in (*running[:most], *islice(others, max(0, most - len(running))))]
            total = manager.core.unresolved + manager.left
        return {"tasks": shown, "total": total}

    def _health(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        from agentpool.monitor import ResourceMonitor

        arguments.nothing_else()
        # Without the search for other agents, which whoever asks can do on the same host.
        return ResourceMonitor([pool], agent_names=()).get_health_report()

    # -- orders --------------------------------------------------------------------------------------------------

    def _recycle(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        worker = arguments.whole("worker", least=1)
        arguments.nothing_else()
        return {"recycled": pool.recycle(worker)}

    def _kill(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        worker = arguments.needed("worker", least=1)
        reason = arguments.text("reason", "killed by hand")
        arguments.nothing_else()
        return {"killed": pool.kill_worker(worker, reason)}

    def _drain(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        arguments.nothing_else()
        return {"unfinished": len(pool._manager.drain())}

    def _pause(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        arguments.nothing_else()
        pool.pause()
        return {"paused": True}

    def _resume(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        arguments.nothing_else()
        pool.resume()
        return {"paused": False}

    def _resize(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        workers = arguments.whole("workers", least=1)
        at_once = arguments.whole("concurrent", least=1)
        arguments.nothing_else()
        pool.resize(workers, max_concurrent=at_once)
        settings = pool._manager.core.settings
        return {"max_workers": settings.max_workers, "max_concurrent": settings.concurrency}

    def _breaker(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        action = arguments.text("action", "show")
        seconds = arguments.seconds("ttl", least=0.1, most=366 * 86400.0)
        reason = arguments.text("reason", "forced open by hand")
        arguments.nothing_else()
        if action not in ("show", "open", "close", "reset"):
            raise ControlError(f"breaker: action must be show, open, close or reset, got {action!r:.80}",
                               "bad-argument")
        if action == "open":
            pool.breaker.force_open(reason, seconds)
        elif action == "close":
            if seconds is None:
                raise ControlError("breaker close needs ttl, the seconds for which it stays closed whatever fails; to "
                                   "close it and have it judge as always, use reset", "bad-argument")
            pool.breaker.hold_closed(seconds)
        elif action == "reset":
            pool.breaker.reset()
        return self._breaker_state(pool)

    def _breaker_state(self, pool: AgentPool) -> dict[str, Any]:
        breaker = pool.breaker
        return breaker.as_dict() | {"is_held_closed": breaker.is_held_closed, "seconds_left": breaker.seconds_left}

    def _shutdown(self, pool: AgentPool, arguments: _Arguments) -> dict[str, Any]:
        reason = arguments.text("reason", "no reason given")
        is_graceful = arguments.flag("graceful")
        arguments.nothing_else()
        if is_graceful:
            unfinished = pool._manager.core.unresolved + pool._manager.left
            pool.shutdown(wait=False)
            return {"unfinished": unfinished}
        words = f"emergency shutdown: {reason}"
        workers, cancelled, stopped = pool._manager.stop_all(TaskKilledError(words), words, wait=False)
        return {"workers_stopped": workers, "tasks_cancelled": cancelled, "tasks_stopped": stopped}

    # -- following -----------------------------------------------------------------------------------------------

    def _watch(self, pool: AgentPool, arguments: _Arguments) -> tuple[dict[str, Any], Following]:
        interval = arguments.seconds("interval", least=_FRESH_SECONDS, most=3600.0) or 1.0
        arguments.nothing_else()
        return {"interval": interval}, Watch(self._take_snapshot, interval)

    def _take_snapshot(self, now: float) -> dict[str, Any] | None:
        pool = self._reference()
        if pool is None:
            return None
        taken_at, snapshot = self._snapshot
        if now - taken_at >= _FRESH_SECONDS or pool.closed:
            snapshot = {"time": time.time(), "stats": pool.get_pool_stats(), "breaker": self._breaker_state(pool)}
            self._snapshot = (now, snapshot)
        return snapshot

    def _logs(self, pool: AgentPool, arguments: _Arguments) -> tuple[dict[str, Any], Following]:
        worker = arguments.whole("worker", least=1)
        is_followed = arguments.flag("follow")
        arguments.nothing_else()
        manager = pool._manager
        known = {*manager.channels(), *manager.ended_workers([] if worker is None else [worker])}
        if worker is not None and worker not in known:
            present = ", ".join(map(str, sorted(known))) or "none at present"
            raise ControlError(f"there is no worker {worker}; those whose output is kept are: {present}",
                               "no-such-worker")
        return {"workers": sorted(known)}, Logs(manager, worker, is_followed=is_followed)


def _code(error: AgentPoolError) -> str:
    names = {"PoolClosedError": "closed", "UnknownWorkerError": "no-such-worker", "SettingsError": "bad-argument"}
    return next((names[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in names), "failed")


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _task(task: TaskRecord, now: float) -> dict[str, Any]:
    is_running = task.state in (TaskState.RUNNING, TaskState.STOPPING)
    spec = task.spec
    return {
        "id": task.id,
        "name": spec.name,
        "state": task.state.name.lower(),
        "seconds": round(now - (task.started_at if is_running else task.queued_at), 3),
        "attempts": task.attempts,
        "worker": None if task.worker is None else task.worker.id,
        "priority": spec.priority,
        "key": spec.key,
        "kind": spec.kind,
        "timeout": spec.timeout,
        "peak_memory_mb": round(task.peak_rss_bytes / MB, 1),
    }
