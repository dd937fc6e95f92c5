"""What the core may ask for. `agentpool.runtime.performing` performs all of it, in the order given.

The two hot actions are plain tuples, `(DISPATCH, worker, task)` and `(RESOLVE, task, is_value, payload)`: a tuple
costs 0.05 us, an instance 0.4 us, and each task needs both. The rest are records: written out, as making dataclasses of
them takes 4 ms of each program's start.
"""

from __future__ import annotations

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
    "GiveSlots",
    "Kill",
    "LeaveBudget",
    "LookAtBudget",
    "PublishShare",
    "Resolve",
    "Retire",
    "Revoke",
    "RoomFreed",
    "SampleHost",
    "SampleWorker",
    "Spawn",
    "StopTool",
    "TakeSlots",
    "Warn",
]

#: write the call to the worker's pipe; performed by whichever thread holds the core's lock
DISPATCH: Final = 0
#: settle the task's future, outside the lock
RESOLVE: Final = 1

Dispatch: TypeAlias = tuple[Literal[0], WorkerRecord, TaskRecord]
Resolve: TypeAlias = tuple[Literal[1], TaskRecord, bool, object]


class _Record:
    """Equal where all fields are; shown with them."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"{type(self).__name__}({fields})"


class Spawn(_Record):
    """Start a process for this worker; answer `worker_spawned`, then `worker_ready`, or `worker_exited`."""

    __slots__ = __match_args__ = ("worker",)

    def __init__(self, worker: WorkerRecord) -> None:
        self.worker = worker


class Retire(_Record):
    """Tell an idle worker to end by itself."""

    __slots__ = __match_args__ = ("worker", "reason")

    def __init__(self, worker: WorkerRecord, reason: str) -> None:
        self.worker = worker
        self.reason = reason


class Kill(_Record):
    """SIGKILL the worker and its tree now; `worker_exited` follows when its death was observed."""

    __slots__ = __match_args__ = ("worker", "reason")

    def __init__(self, worker: WorkerRecord, reason: str) -> None:
        self.worker = worker
        self.reason = reason


class AskToStop(_Record):
    """Ask the worker's running task to stop; first note its stack where `wants_stack`. Answer `stop_acknowledged`."""

    __slots__ = __match_args__ = ("worker", "task", "wants_stack")

    def __init__(self, worker: WorkerRecord, task: TaskRecord, wants_stack: bool) -> None:
        self.worker = worker
        self.task = task
        self.wants_stack = wants_stack


class DumpStack(_Record):
    """Have the worker's signal handler write down what its threads do; it needs no reaction of the interpreter."""

    __slots__ = __match_args__ = ("worker",)

    def __init__(self, worker: WorkerRecord) -> None:
        self.worker = worker


class StopTool(_Record):
    """SIGKILL the biggest process that the worker's task started, and leave the worker."""

    __slots__ = __match_args__ = ("worker",)

    def __init__(self, worker: WorkerRecord) -> None:
        self.worker = worker


class Revoke(_Record):
    """Take back what this worker has not begun; answer `task_given_back` for each, last first."""

    __slots__ = __match_args__ = ("worker",)

    def __init__(self, worker: WorkerRecord) -> None:
        self.worker = worker


class Collect(_Record):
    """Have an idle worker collect its garbage; answer `worker_collected`."""

    __slots__ = __match_args__ = ("worker",)

    def __init__(self, worker: WorkerRecord) -> None:
        self.worker = worker


class SampleWorker(_Record):
    """Measure the worker's tree; answer `worker_sampled`."""

    __slots__ = __match_args__ = ("worker",)

    def __init__(self, worker: WorkerRecord) -> None:
        self.worker = worker


class SampleHost(_Record):
    """Measure the machine; answer `host_sampled`."""

    __slots__ = ()


class RoomFreed(_Record):
    """A `submit` that was refused for want of room is worth another try: there is room, or the pool is closed."""

    __slots__ = ()


class LookAtBudget(_Record):
    """Publish this pool's share, tell the other pools where `is_loud`, and look at theirs; answer `budget_seen`."""

    __slots__ = __match_args__ = ("is_loud",)

    def __init__(self, is_loud: bool) -> None:
        self.is_loud = is_loud


class PublishShare(_Record):
    """Publish this pool's share of the host's budget, and tell the other pools where `is_loud`."""

    __slots__ = __match_args__ = ("is_loud",)

    def __init__(self, is_loud: bool) -> None:
        self.is_loud = is_loud


class TakeSlots(_Record):
    """Take these slots of the host's budget, as far as they are free; answer `slots_taken`."""

    __slots__ = __match_args__ = ("slots",)

    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots = slots


class GiveSlots(_Record):
    """Give these slots back, and tell the other pools."""

    __slots__ = __match_args__ = ("slots",)

    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots = slots


class LeaveBudget(_Record):
    """This pool holds nothing and waits for nothing: let go of whatever tells the others of it."""

    __slots__ = ()


class BreakerChanged(_Record):
    """Tell the breaker's listeners."""

    __slots__ = __match_args__ = ("old", "new", "reason")

    def __init__(self, old: str, new: str, reason: str) -> None:
        self.old = old
        self.new = new
        self.reason = reason


class Warn(_Record):
    """Log a warning, and show it once to the user."""

    __slots__ = __match_args__ = ("message",)

    def __init__(self, message: str) -> None:
        self.message = message


class Close(_Record):
    """The pool is shut down and all workers are gone: end the keeper and the manager."""

    __slots__ = ()


Action: TypeAlias = (
    Dispatch | Resolve | Spawn | Retire | Kill | AskToStop | DumpStack | StopTool | Revoke | Collect | SampleWorker
    | SampleHost | RoomFreed | LookAtBudget | PublishShare | TakeSlots | GiveSlots | LeaveBudget | BreakerChanged | Warn
    | Close
)
