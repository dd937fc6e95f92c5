"""What the core may ask for. `agentpool.runtime.manager` performs all of it, in the order given.

The two hot actions are plain tuples, `(DISPATCH, worker, task)` and `(RESOLVE, task, is_value, payload)`: a tuple
costs 0.05 us, an instance 0.4 us, and each task needs both. The rest are frozen records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from agentpool.core.records import TaskRecord, WorkerRecord

__all__ = [
    "DISPATCH",
    "RESOLVE",
    "Action",
    "AskToStop",
    "BreakerChanged",
    "Close",
    "Collect",
    "Dispatch",
    "DumpStack",
    "Kill",
    "Resolve",
    "Retire",
    "Revoke",
    "RoomFreed",
    "SampleHost",
    "SampleWorker",
    "Spawn",
    "StopTool",
    "Warn",
]

#: write the call to the worker's pipe; performed by whichever thread holds the core's lock
DISPATCH: Final = 0
#: settle the task's future, outside the lock
RESOLVE: Final = 1

Dispatch: TypeAlias = tuple[Literal[0], WorkerRecord, TaskRecord]
Resolve: TypeAlias = tuple[Literal[1], TaskRecord, bool, object]


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process for this worker; answer `worker_spawned`, then `worker_ready`, or `worker_exited`."""

    worker: WorkerRecord


@dataclass(frozen=True, slots=True)
class Retire:
    """Tell an idle worker to end by itself."""

    worker: WorkerRecord
    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL the worker and its tree now; `worker_exited` follows when its death was observed."""

    worker: WorkerRecord
    reason: str


@dataclass(frozen=True, slots=True)
class AskToStop:
    """Ask the worker's running task to stop; first note its stack where `wants_stack`. Answer `stop_acknowledged`."""

    worker: WorkerRecord
    task: TaskRecord
    wants_stack: bool


@dataclass(frozen=True, slots=True)
class DumpStack:
    """Have the worker's signal handler write down what its threads do; it needs no reaction of the interpreter."""

    worker: WorkerRecord


@dataclass(frozen=True, slots=True)
class StopTool:
    """SIGKILL the biggest process that the worker's task started, and leave the worker."""

    worker: WorkerRecord


@dataclass(frozen=True, slots=True)
class Revoke:
    """Take back what this worker has not begun; answer `task_given_back` for each, last first."""

    worker: WorkerRecord


@dataclass(frozen=True, slots=True)
class Collect:
    """Have an idle worker collect its garbage; answer `worker_collected`."""

    worker: WorkerRecord


@dataclass(frozen=True, slots=True)
class SampleWorker:
    """Measure the worker's tree; answer `worker_sampled`."""

    worker: WorkerRecord


@dataclass(frozen=True, slots=True)
class SampleHost:
    """Measure the machine; answer `host_sampled`."""


@dataclass(frozen=True, slots=True)
class RoomFreed:
    """A `submit` that was refused for want of room is worth another try: there is room, or the pool is closed."""


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """Tell the breaker's listeners."""

    old: str
    new: str
    reason: str


@dataclass(frozen=True, slots=True)
class Warn:
    """Log a warning, and show it once to the user."""

    message: str


@dataclass(frozen=True, slots=True)
class Close:
    """The pool is shut down and all workers are gone: end the keeper and the manager."""


Action: TypeAlias = (
    Dispatch | Resolve | Spawn | Retire | Kill | AskToStop | DumpStack | StopTool | Revoke | Collect | SampleWorker
    | SampleHost | RoomFreed | BreakerChanged | Warn | Close
)
