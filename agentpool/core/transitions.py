"""The life cycles of task, worker and breaker, as tables: `{state: {next state: when}}`.

The tables are the single truth: the core refuses a move that is not in them, and the diagrams in docs/reference.md are
drawn from them by `python -m agentpool.core.transitions`. Knows nothing of the rest of the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final, TypeVar

__all__ = [
    "BREAKER_TRANSITIONS",
    "TASK_TRANSITIONS",
    "WORKER_TRANSITIONS",
    "BreakerState",
    "TaskState",
    "WorkerState",
    "allowed_masks",
    "mermaid",
]


class TaskState(IntEnum):
    """Where a task is. RESOLVED is final; its future tells how."""

    QUEUED = 0
    ASSIGNED = 1
    RUNNING = 2
    STOPPING = 3
    WAITING_RETRY = 4
    RESOLVED = 5


class WorkerState(IntEnum):
    """Where a worker process is. GONE is final: its death was observed."""

    STARTING = 0
    IDLE = 1
    BUSY = 2
    CHECKING = 3
    RETIRING = 4
    KILLED = 5
    GONE = 6


class BreakerState(IntEnum):
    """Whether the spawn path is open to new workers. (An open breaker refuses, as an open electrical circuit does.)"""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2
    FORCED_OPEN = 3

    @property
    def label(self) -> str:
        """The name that users see: lower case."""
        return self.name.lower()


_T, _W, _B = TaskState, WorkerState, BreakerState

TASK_TRANSITIONS: Final[Mapping[TaskState, Mapping[TaskState, str]]] = {
    _T.QUEUED: {
        _T.ASSIGNED: "sent ahead to a busy worker, behind short tasks",
        _T.RUNNING: "sent to a free worker",
        _T.RESOLVED: "cancelled, queue_timeout, breaker, pool broken",
    },
    _T.ASSIGNED: {
        _T.RUNNING: "the task before it ended",
        _T.QUEUED: "given back, or its worker was lost before it began",
    },
    _T.RUNNING: {
        _T.RESOLVED: "its result or error arrived, or its worker was lost",
        _T.WAITING_RETRY: "failed and its retry policy says again, or its worker was lost before it began",
        _T.STOPPING: "asked to stop by a timeout, a kill or a memory limit",
        _T.QUEUED: "its worker passed over it, and it had not begun",
    },
    _T.STOPPING: {
        _T.RESOLVED: "ended or killed",
        _T.WAITING_RETRY: "ended or killed, and its retry policy says again",
    },
    _T.WAITING_RETRY: {
        _T.QUEUED: "the back-off is over",
        _T.RESOLVED: "cancelled, pool broken",
    },
    _T.RESOLVED: {},
}

WORKER_TRANSITIONS: Final[Mapping[WorkerState, Mapping[WorkerState, str]]] = {
    _W.STARTING: {
        _W.IDLE: "ready",
        _W.KILLED: "start_timeout, the pool stops or shrinks, or by hand",
        _W.GONE: "the start failed",
    },
    _W.IDLE: {
        _W.BUSY: "given a task",
        _W.CHECKING: "its memory may be over the limit",
        _W.RETIRING: "idle_timeout, tasks per child, pool over its memory, resize, by hand, shutdown",
        _W.KILLED: "the pool stops, or by hand",
        _W.GONE: "died",
    },
    _W.BUSY: {
        _W.IDLE: "its last task ended",
        _W.CHECKING: "its last task ended and its memory is looked at",
        _W.RETIRING: "its last task ended and it is to be recycled",
        _W.KILLED: "its task would not stop, or passed the hard memory limit, or by hand",
        _W.GONE: "died",
    },
    _W.CHECKING: {
        _W.IDLE: "within its limit",
        _W.RETIRING: "over its limit, twice, garbage collected, or resize, by hand, shutdown",
        _W.KILLED: "does not answer, or the pool stops, or by hand",
        _W.GONE: "died",
    },
    _W.RETIRING: {
        _W.KILLED: "did not end in time, or by hand",
        _W.GONE: "ended",
    },
    _W.KILLED: {_W.GONE: "its death was observed"},
    _W.GONE: {},
}

BREAKER_TRANSITIONS: Final[Mapping[BreakerState, Mapping[BreakerState, str]]] = {
    _B.CLOSED: {
        _B.OPEN: "failed starts, or too little memory",
        _B.FORCED_OPEN: "force_open()",
    },
    _B.OPEN: {
        _B.HALF_OPEN: "the waiting time is over and memory suffices",
        _B.CLOSED: "memory suffices again and no failed starts had opened it, or reset()",
        _B.FORCED_OPEN: "force_open()",
    },
    _B.HALF_OPEN: {
        _B.CLOSED: "the probe became ready, or reset()",
        _B.OPEN: "the probe failed, or too little memory",
        _B.FORCED_OPEN: "force_open()",
    },
    _B.FORCED_OPEN: {_B.CLOSED: "reset(), or the time that was ordered is over"},
}

_S = TypeVar("_S", bound=IntEnum)


def allowed_masks(table: Mapping[_S, Mapping[_S, str]]) -> tuple[int, ...]:
    """For each state, the bit set of the states that may follow: one shift and one `and` on the hot path."""
    return tuple(sum(1 << after for after in table[state]) for state in sorted(table))


def mermaid(table: Mapping[_S, Mapping[_S, str]]) -> str:
    """The table as a mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for state, successors in table.items():
        lines += [f"    {state.name} --> {after.name}: {when}" for after, when in successors.items()]
        if not successors:
            lines.append(f"    {state.name} --> [*]")
    return "\n".join(lines)


if __name__ == "__main__":
    for title, diagram in (
        ("task", mermaid(TASK_TRANSITIONS)),
        ("worker", mermaid(WORKER_TRANSITIONS)),
        ("breaker", mermaid(BREAKER_TRANSITIONS)),
    ):
        print(f"### {title}\n\n```mermaid\n{diagram}\n```\n")
