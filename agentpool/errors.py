"""Every exception that agentpool raises: one tree, and each also what a concurrent.futures user already catches.

Messages name the cause and the cure. All of them survive pickling with their attributes, because pools nest.
Imports nothing of agentpool.
"""

from __future__ import annotations

import pickle
import queue
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, CancelledError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

__all__ = [
    "AgentPoolError",
    "CircuitOpenError",
    "ForkedPoolError",
    "InitializerError",
    "InternalError",
    "MemoryLimitError",
    "MemoryReservationError",
    "PlanError",
    "PoolClosedError",
    "QuarantinedError",
    "QueueFullError",
    "QueueTimeoutError",
    "RemoteTaskError",
    "ResultPicklingError",
    "ResultUnpicklingError",
    "SessionLostError",
    "SettingsError",
    "TaskKilledError",
    "TaskPicklingError",
    "TaskTimeoutError",
    "TaskUnpicklingError",
    "UnknownWorkerError",
    "WorkerCrashedError",
    "WorkerKilledError",
]


def _rebuild(cls: type[AgentPoolError], args: tuple[object, ...], state: Mapping[str, object]) -> AgentPoolError:
    error = cls(*map(str, args))  # not cls.__new__: MemoryError's refuses to make a subclass
    error.__dict__.update(state)
    return error


class AgentPoolError(Exception):
    """Root of the tree. Keyword arguments become attributes, which `pickle` keeps."""

    def __init__(self, message: str = "", **details: object) -> None:
        super().__init__(message)
        self.__dict__.update(details)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class SettingsError(AgentPoolError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class PlanError(AgentPoolError, ValueError):
    """A plan of agents that cannot be carried out: a cycle, an unknown dependency, two agents of one name, and such."""


class PoolClosedError(AgentPoolError, RuntimeError):
    """The pool was shut down, or is draining; it accepts no further tasks."""


class ForkedPoolError(PoolClosedError):
    """This is a forked copy of the process that made the pool: the copy cannot reach the workers."""


class SessionLostError(AgentPoolError, BrokenExecutor):
    """The worker of a session was lost or recycled before the session was closed, and with it what its tasks had left.

    Attributes: `key`, the session's; `reason`: "crashed", "killed" (by `kill_worker`), "memory", "idle" (its
    `idle_timeout`), "stopped" (a task of it passed its timeout or hard memory limit, or was killed), or "recycled";
    `exit_code` (negative: the signal) and `worker_pid`, where there are any.
    """

    key: str | None = None
    reason: str = ""
    exit_code: int | None = None
    worker_pid: int | None = None


class UnknownWorkerError(AgentPoolError, LookupError):
    """The pool never had a worker of that id."""


class QueueFullError(AgentPoolError, queue.Full):
    """`max_pending` tasks are queued, and the caller must not or does not want to wait for room."""


class QueueTimeoutError(AgentPoolError, TimeoutError):
    """A task waited longer than its `queue_timeout` and was never started."""


class TaskTimeoutError(AgentPoolError, TimeoutError):
    """A task ran longer than its timeout; its worker was stopped.

    Attributes: `timeout_seconds`; `stack`, what the worker's threads were doing, or an empty string.
    """

    timeout_seconds: float = 0.0
    stack: str = ""


class TaskKilledError(AgentPoolError, CancelledError):
    """A running task was stopped by `future.kill()`, `pool.kill_workers()` or an emergency shutdown."""


class WorkerCrashedError(AgentPoolError, BrokenProcessPool):
    """The worker died while it ran the task. Other tasks are not affected.

    Attributes: `exit_code` (negative: the signal), `peak_rss_bytes`, `stderr_tail`, `worker_pid`.
    """

    exit_code: int | None = None
    peak_rss_bytes: int = 0
    stderr_tail: str = ""
    worker_pid: int | None = None


class WorkerKilledError(WorkerCrashedError):
    """An operator killed the worker while it ran the task (`pool.kill_worker`)."""


class QuarantinedError(WorkerCrashedError):
    """The task killed so many workers that it is not run again, whatever its retry policy says."""


class MemoryLimitError(AgentPoolError, MemoryError):
    """The task's process tree passed its hard memory limit and was stopped.

    Attributes: `limit_bytes`, `peak_rss_bytes`, `samples` (the last readings, oldest first, as (seconds, bytes)),
    `is_pool_wide` (True: all workers together passed `critical_memory_mb`, and this was the biggest).
    """

    limit_bytes: int = 0
    peak_rss_bytes: int = 0
    samples: tuple[tuple[float, int], ...] = ()
    is_pool_wide: bool = False


class MemoryReservationError(AgentPoolError, MemoryError):
    """The task's `expected_memory_mb` is more than this host or container will ever have to give.

    Attributes: `expected_bytes`, `givable_bytes`.
    """

    expected_bytes: int = 0
    givable_bytes: int = 0


class CircuitOpenError(AgentPoolError, BrokenExecutor):
    """The breaker forbids to start a worker, the pool has none, and the task waited its `queue_timeout`."""


class InitializerError(AgentPoolError, BrokenProcessPool):
    """The initializer raised; the pool is broken, as in the standard library. `__cause__` has its traceback."""


class TaskPicklingError(AgentPoolError, pickle.PicklingError):
    """The function or an argument cannot be sent to a worker. The message has the path to what cannot be pickled."""


class TaskUnpicklingError(AgentPoolError, BrokenProcessPool):
    """The function or an argument arrived in the worker but could not be rebuilt there."""


class ResultPicklingError(AgentPoolError, pickle.PicklingError):
    """The task returned, but its result cannot be sent back."""


class ResultUnpicklingError(AgentPoolError, BrokenProcessPool):
    """The task returned and its result was sent back, but it could not be rebuilt in this process."""


class RemoteTaskError(AgentPoolError):
    """Stands for an exception of the task that cannot be pickled or rebuilt here.

    Attributes: `type_name`, the original's qualified class name; `traceback_text`, its remote traceback.
    """

    type_name: str = ""
    traceback_text: str = ""


class InternalError(AgentPoolError, BrokenExecutor):
    """A defect of agentpool itself. `story` has the core's recent history: please report it."""

    story: str = ""
