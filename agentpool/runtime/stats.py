"""A pool's state as plain data, for reports. Any thread may ask; the lock is held while the records are read."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

from agentpool.config import MB
from agentpool.core.records import TaskRecord, WorkerRecord
from agentpool.core.transitions import WorkerState
from agentpool.io.rundir import default_runtime_directory

if TYPE_CHECKING:
    from agentpool.runtime.manager import Manager

__all__ = ["pool_stats"]

#: So many of the tasks that wait are told one by one.
SHOWN_TASKS: Final = 20

_STATUS = {
    WorkerState.STARTING: "starting",
    WorkerState.IDLE: "idle",
    WorkerState.BUSY: "busy",
    WorkerState.CHECKING: "idle",
    WorkerState.RETIRING: "recycling",
    WorkerState.KILLED: "recycling",
}


def pool_stats(manager: Manager) -> dict[str, Any]:
    """See `AgentPool.get_pool_stats`."""
    with manager.lock:
        now = time.monotonic()
        core = manager.core
        workers = [_worker_stats(worker, now) for worker in core.workers.values()]
        breaker = core.breaker
        reasons = list(core.governor.reasons.values())
        if breaker.reason and breaker.reason not in reasons:
            reasons.append(breaker.reason)
        if core.broken is not None:
            reasons.insert(0, str(core.broken))
        by_status = {"busy": 0, "idle": 0}
        for worker in workers:
            by_status[worker["status"]] = by_status.get(worker["status"], 0) + 1
        return {
            "name": manager.name,
            "status": _status(manager, bool(reasons)),
            "reasons": reasons,
            "total_agents": core.live - core.leaving,
            "max_pool_size": core.settings.max_workers,
            "max_concurrent": core.settings.concurrency,
            "is_paused": core.is_paused,
            "is_draining": core.is_draining,
            "agents_by_status": by_status,
            "queue_length": core.queue_length + manager.left,
            "running": core.active,
            "waiting_to_retry": len(core.waiting),
            "memory_mb": round(core.pool_bytes / MB, 1),
            "uptime_seconds": round(now - manager.started_at, 1),
            "host_budget": _host_budget(manager),
            "thresholds": _thresholds(manager),
            "counters": asdict(core.counters) | {"submitted": core.counters.submitted + manager.left},
            "workers": workers,
            "running_tasks": [_task_stats(worker.running, now) for worker in core.workers.values()
                              if worker.running is not None],
            "queued_tasks": [_task_stats(task, now) for task in _next_tasks(manager)],
            "circuit_breaker": {
                "state": breaker.state.label,
                "failure_count": breaker.failure_count(now),
                "reason": breaker.reason,
            },
        }


def _status(manager: Manager, has_reasons: bool) -> str:
    if manager.core.broken is not None:
        return "broken"
    if manager.core.is_closing:
        return "closed"
    if has_reasons:
        return "degraded"
    return "paused" if manager.core.is_paused else "draining" if manager.core.is_draining else "ok"


def _next_tasks(manager: Manager) -> list[TaskRecord]:
    """The first of those that wait, in the order in which they will begin."""
    core = manager.core
    return list(islice(chain(core.isolated, core.queue, manager.inbox), SHOWN_TASKS))


def _task_stats(task: TaskRecord, now: float) -> dict[str, Any]:
    worker = task.worker
    return {
        "id": task.id,
        "name": task.spec.name,
        "kind": task.spec.kind,
        "priority": task.spec.priority,
        "attempts": task.attempts,
        "worker_id": None if worker is None else worker.id,
        "is_stopping": task.stop is not None,
        "seconds": round(now - (task.queued_at or now if worker is None else task.started_at), 3),
        "peak_memory_mb": round(task.peak_rss_bytes / MB, 1),
    }


def _worker_stats(worker: WorkerRecord, now: float) -> dict[str, Any]:
    task = worker.running
    return {
        "id": worker.id,
        "pid": worker.pid,
        "status": _STATUS[worker.state],
        "state": worker.state.name.lower(),
        "memory_mb": round(worker.rss_bytes / MB, 1),
        "processes": worker.processes,
        "tasks_done": worker.tasks_done,
        "task": None if task is None else task.spec.name or f"task {task.id}",
        "task_id": None if task is None else task.id,
        "task_seconds": None if task is None else round(now - task.started_at, 3),
        "idle_seconds": round(now - worker.idle_since, 1) if worker.state is WorkerState.IDLE else 0.0,
        "age_seconds": round(now - worker.spawned_at, 1),
        "leaves_because": worker.reason or worker.retire_reason or "",
        "memory_limit_mb": None if worker.limit_bytes is None else round(worker.limit_bytes / MB, 1),
        "cpu_seconds": round(worker.cpu_seconds, 2),
        "session": None if worker.session is None else worker.session.key or f"session {worker.session.id}",
        "agent_kinds": sorted(worker.warm_kinds),
    }


def _host_budget(manager: Manager) -> dict[str, Any] | None:
    """This pool's share of the budget of all pools of the user; None: it has none."""
    budget = manager.core.settings.budget
    share = manager.core.share
    if budget is None or share is None:
        return None
    return {
        "agents": budget.agents,
        "memory_mb": budget.memory_mb,
        "directory": budget.directory or f"{default_runtime_directory()}/budget",
        "slots": len(share.held),
        "waits_for": "" if share.ticket is None else share.waits_for or "a slot",
    }


def _thresholds(manager: Manager) -> dict[str, Any]:
    settings = manager.core.settings
    host = manager.core.governor.host
    alert, critical = settings.alert_bytes, settings.critical_bytes
    floor = settings.min_available_mb
    if floor is None and host is not None:
        floor = manager.core.governor.floor_bytes(host) / MB
    return {
        "memory_limit_mb": settings.memory_limit_mb,
        "memory_growth_mb": settings.memory_growth_mb,
        "hard_memory_limit_mb": settings.hard_memory_limit_mb,
        "alert_memory_mb": None if alert is None else alert / MB,
        "critical_memory_mb": None if critical is None else critical / MB,
        "min_available_mb": None if floor is None else round(floor, 1),
        "cpu_threshold_percent": settings.cpu_threshold_percent,
        "pressure_threshold": settings.pressure_threshold,
        "idle_timeout": settings.idle_timeout,
        "max_pending": settings.max_pending,
    }
