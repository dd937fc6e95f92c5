"""agentpool: runs agents, each in its own pooled process, and keeps the machine alive while they misbehave.

    with AgentPool() as pool:
        future = pool.submit(task, argument)
        print(future.result())

The public names are these, and nothing else. What is rarely needed or heavy is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentpool.errors import (
    AgentPoolError,
    CircuitOpenError,
    ForkedPoolError,
    InitializerError,
    InternalError,
    MemoryLimitError,
    MemoryReservationError,
    PlanError,
    PoolClosedError,
    QuarantinedError,
    QueueFullError,
    QueueTimeoutError,
    RemoteTaskError,
    ResultPicklingError,
    ResultUnpicklingError,
    SessionLostError,
    SettingsError,
    TaskKilledError,
    TaskPicklingError,
    TaskTimeoutError,
    TaskUnpicklingError,
    UnknownWorkerError,
    WorkerCrashedError,
    WorkerKilledError,
)

if TYPE_CHECKING:
    from agentpool.agents.registry import AgentKind, AgentRegistry, agent
    from agentpool.breaker import ResourceCircuitBreaker
    from agentpool.config import BreakerSettings, HostBudget, PoolSettings
    from agentpool.core.retry import Escalate, RetryPolicy
    from agentpool.futures import AgentFuture, TaskSnapshot
    from agentpool.monitor import ResourceMonitor, get_resource_monitor
    from agentpool.orchestrator import orchestrate_with_memory_management
    from agentpool.pool import AgentPool, PoolView, get_agent_pool, get_circuit_breaker
    from agentpool.sessions import Session
    from agentpool_worker.agents.base import Agent

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "AgentFuture",
    "AgentKind",
    "AgentPool",
    "AgentPoolError",
    "AgentRegistry",
    "BreakerSettings",
    "CircuitOpenError",
    "Escalate",
    "ForkedPoolError",
    "HostBudget",
    "InitializerError",
    "InternalError",
    "MemoryLimitError",
    "MemoryReservationError",
    "PlanError",
    "PoolClosedError",
    "PoolSettings",
    "PoolView",
    "QuarantinedError",
    "QueueFullError",
    "QueueTimeoutError",
    "RemoteTaskError",
    "ResourceCircuitBreaker",
    "ResourceMonitor",
    "ResultPicklingError",
    "ResultUnpicklingError",
    "RetryPolicy",
    "Session",
    "SessionLostError",
    "SettingsError",
    "TaskKilledError",
    "TaskPicklingError",
    "TaskSnapshot",
    "TaskTimeoutError",
    "TaskUnpicklingError",
    "UnknownWorkerError",
    "WorkerCrashedError",
    "WorkerKilledError",
    "__version__",
    "agent",
    "get_agent_pool",
    "get_circuit_breaker",
    "get_resource_monitor",
    "orchestrate_with_memory_management",
]

_LAZY = {
    "Agent": "agentpool_worker.agents.base",
    "AgentFuture": "agentpool.futures",
    "AgentKind": "agentpool.agents.registry",
    "AgentPool": "agentpool.pool",
    "AgentRegistry": "agentpool.agents.registry",
    "BreakerSettings": "agentpool.config",
    "Escalate": "agentpool.core.retry",
    "HostBudget": "agentpool.config",
    "PoolSettings": "agentpool.config",
    "PoolView": "agentpool.pool",
    "ResourceCircuitBreaker": "agentpool.breaker",
    "ResourceMonitor": "agentpool.monitor",
    "RetryPolicy": "agentpool.core.retry",
    "Session": "agentpool.sessions",
    "TaskSnapshot": "agentpool.futures",
    "agent": "agentpool.agents.registry",
    "get_agent_pool": "agentpool.pool",
    "get_circuit_breaker": "agentpool.pool",
    "get_resource_monitor": "agentpool.monitor",
    "orchestrate_with_memory_management": "agentpool.orchestrator",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'agentpool' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
