"""What the core knows of one task and one worker. Plain records: only the scheduler changes them.

A task's record is on the hot path: slots only, and what many tasks share stands in one `TaskSpec`.
Invariant comments (`#:`) are checked by `agentpool.core.invariants`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from agentpool.core.retry import RetryPolicy
from agentpool.core.timers import Timer
from agentpool.core.transitions import TaskState, WorkerState
from agentpool.errors import SessionLostError

__all__ = [
    "AttemptRecord",
    "HostState",
    "SessionRecord",
    "StopCause",
    "TaskRecord",
    "TaskSpec",
    "TreeState",
    "WorkerExit",
    "WorkerRecord",
]


#: The line of tasks that reserve memory and are in no group.
_FOR_MEMORY: Final = ("memory",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What the tasks of one `options(...)` view have in common. Times in seconds; None: not limited.

    `kind` is the agent kind whose warm instance is preferred. `soft_limit_bytes` overrides the pool's
    `memory_limit_mb` for the worker that ran the task. `policy` None: a task that began is never run again.
    """

    timeout: float | None = None
    queue_timeout: float | None = None
    policy: RetryPolicy | None = None
    priority: int = 0
    key: str | None = None
    kind: str | None = None
    name: str | None = None
    soft_limit_bytes: int | None = None
    #: over the hard limit, the biggest process that the task started is stopped before the task itself
    spares_task: bool = False
    hard_limit_bytes: int | None = None
    #: growth over its warm baseline at which the worker that ran the task is recycled, instead of the pool's limits
    growth_limit_bytes: int | None = None
    #: what the worker's tree is expected to use while it runs the task
    expected_bytes: int | None = None
    #: of this group no more run at once than that
    group: str | None = None
    group_limit: int | None = None
    #: its tasks run in one worker, in order, one at a time
    session: SessionRecord | None = None
    #: where the task waits if it needs more than a free worker; None: it does not
    line: object = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.session is not None:
            object.__setattr__(self, "line", self.session)
        elif self.group is not None and self.group_limit is not None:
            object.__setattr__(self, "line", self.group)
        elif self.expected_bytes is not None:
            object.__setattr__(self, "line", _FOR_MEMORY)


class SessionRecord:
    """One session, from its opening to its end. `idle_timeout` None: it may be idle for ever."""

    __slots__ = ("current", "error", "id", "idle_timeout", "is_closed", "key", "timer", "unresolved", "used_at",
                 "worker")

    def __init__(self, session_id: int, key: str | None, idle_timeout: float | None) -> None:
        self.id = session_id
        self.key = key
        self.idle_timeout = idle_timeout
        #: its worker: from its first task that begins, to its end or loss
        self.worker: WorkerRecord | None = None
        #: the task that has its turn: from when it begins until it is resolved, what it waits between attempts included
        self.current: TaskRecord | None = None
        #: why it was lost
        self.error: SessionLostError | None = None
        #: nothing more is accepted
        self.is_closed = False
        #: accepted tasks that are not resolved
        self.unresolved = 0
        #: when a task was submitted last
        self.used_at = 0.0
        self.timer: Timer | None = None

    @property
    def is_over(self) -> bool:
        """It was closed, or lost."""
        return self.is_closed or self.error is not None

    def __repr__(self) -> str:
        return f"<session {self.id} {self.key or ''} in {self.worker!r}, {self.unresolved} tasks>"


class StopCause:
    """Why a running task is being stopped: the error that its future will get.

    `is_timeout`: its stack is wanted. `is_final`: somebody ordered it, so no retry policy is asked.
    """

    __slots__ = ("asked_at", "error", "is_final", "is_timeout")

    def __init__(
        self, error: BaseException, asked_at: float, *, is_timeout: bool = False, is_final: bool = False
    ) -> None:
        self.error = error
        self.asked_at = asked_at
        self.is_timeout = is_timeout
        self.is_final = is_final


class AttemptRecord:
    """An attempt that began and ended, and was not the last one. `error` None: it returned, and its policy went on."""

    __slots__ = ("ended_at", "error", "peak_rss_bytes", "queued_at", "started_at", "worker")

    def __init__(self, task: TaskRecord, ended_at: float, error: BaseException | None) -> None:
        self.worker = task.worker
        self.queued_at = task.queued_at
        self.started_at = task.started_at
        self.ended_at = ended_at
        self.error = error
        self.peak_rss_bytes = task.peak_rss_bytes


class TaskRecord:
    """One accepted task."""

    __slots__ = (
        "attempts", "call_key", "dispatch_failures", "first_started_at", "handle", "hard_limit_bytes", "id",
        "idle_seconds", "is_alone", "is_isolated", "is_returned", "kills", "last_error", "past",
        "peak_rss_bytes", "queued_at", "spec", "started_at", "state", "stop", "timer", "tools_stopped", "worker",
    )

    def __init__(self, task_id: int, spec: TaskSpec, handle: object, call_key: object = None) -> None:
        self.id = task_id
        self.spec = spec
        #: the shell's business (its future and the serialized call); the core passes it through
        self.handle = handle
        #: groups calls of one function, whose durations are alike
        self.call_key = call_key
        self.state = TaskState.QUEUED
        #: started attempts, the current one included; an attempt that never began is not counted
        self.attempts = 0
        #: workers that died while they ran it
        self.kills = 0
        #: times it was sent to a worker that was lost before it began
        self.dispatch_failures = 0
        #: it was in a worker and came back: it is queued again whatever `max_pending` says
        self.is_returned = False
        #: since when it waits; where it never began, that is its submission
        self.queued_at = 0.0
        self.started_at = 0.0
        #: None exactly where `attempts` is 0
        self.first_started_at: float | None = None
        #: what its retry policy made it wait so far
        self.idle_seconds = 0.0
        #: set exactly while ASSIGNED, RUNNING or STOPPING
        self.worker: WorkerRecord | None = None
        #: set exactly while STOPPING
        self.stop: StopCause | None = None
        #: the one deadline of its present state: queue_timeout, timeout, kill grace or back-off; none while ASSIGNED
        self.timer: Timer | None = None
        #: of this attempt
        self.peak_rss_bytes = 0
        #: attempts that were followed, or will be, by another one; None: there are none
        self.past: list[AttemptRecord] | None = None
        #: it killed a worker before: it runs in a fresh worker, with nothing sent ahead behind it
        self.is_isolated = False
        #: its retry policy wants it to run while nothing else does; it is isolated as well
        self.is_alone = False
        #: the hard limit of this attempt, where a retry policy changed it
        self.hard_limit_bytes: int | None = spec.hard_limit_bytes
        #: processes of its own that were stopped in its place, in this attempt
        self.tools_stopped = 0
        self.last_error: BaseException | None = None

    @property
    def highest_rss_bytes(self) -> int:
        """The peak of all its attempts."""
        return max([self.peak_rss_bytes, *(attempt.peak_rss_bytes for attempt in self.past or ())])

    def __repr__(self) -> str:
        return f"<task {self.id} {self.spec.name or ''} {self.state.name} attempts={self.attempts}>"


class WorkerRecord:
    """One worker process, from the decision to start it to the observation of its death."""

    __slots__ = (
        "backlog", "backlog_timer", "baseline_bytes", "check_stage", "cpu_seconds", "growth_limit_bytes", "id",
        "idle_since", "is_leaving", "is_ordered", "is_over_hard_limit", "is_probe", "limit_bytes", "pid",
        "processes", "ration", "reason", "reserved_bytes", "retire_reason", "rss_bytes", "running",
        "sample_interval", "sample_timer", "sampled_at", "samples", "session", "soft_limit_bytes", "spawned_at",
        "state", "state_timer", "task_limit", "tasks_done", "wants_check", "warm_bytes", "warm_kinds",
    )

    def __init__(self, worker_id: int, now: float) -> None:
        self.id = worker_id
        self.pid: int | None = None
        self.state = WorkerState.STARTING
        self.spawned_at = now
        self.idle_since = now
        #: it is the single start that a half-open breaker admitted; STARTING, or KILLED meanwhile
        self.is_probe = False
        #: the task it runs; set exactly while BUSY (or KILLED while a task ran)
        self.running: TaskRecord | None = None
        #: sent to it and not begun; empty unless `running` is set
        self.backlog: deque[TaskRecord] = deque()
        self.tasks_done = 0
        #: never more than this many tasks done, running and in the backlog together
        self.task_limit: int | None = None
        #: why it is to be recycled as soon as its tasks ended
        self.retire_reason: str | None = None
        #: while BUSY: it retires with the tasks it still may run, so that its successor may start beside it
        self.is_leaving = False
        #: an operator had it killed: neither it nor its task is to blame
        self.is_ordered = False
        #: why it was retired or killed, for the counters and the report
        self.reason = ""
        self.warm_kinds: set[str] = set()
        #: set while STARTING, CHECKING, RETIRING and KILLED: what it owes is bounded in time. While IDLE: idle_timeout
        self.state_timer: Timer | None = None
        self.backlog_timer: Timer | None = None
        self.sample_timer: Timer | None = None
        #: RSS of the fresh worker, set up agents included; None until it is ready
        self.baseline_bytes: int | None = None
        #: the soft limit of the task that ran last, where it set one
        self.soft_limit_bytes: int | None = None
        self.growth_limit_bytes: int | None = None
        #: its tree's memory after what it keeps was set up and first used: the first reading after that
        self.warm_bytes: int | None = None
        #: the options of the task at its head, where that is in a group or reserves memory
        self.ration: TaskSpec | None = None
        #: it runs the tasks of this session only, and is retired with it; never reset
        self.session: SessionRecord | None = None
        #: promised to that task, and not in the reading of the worker that went with the last one of the host
        self.reserved_bytes = 0
        #: RSS above which it is recycled after a task, as those two and the settings make it
        self.limit_bytes: int | None = None
        #: a reading was above that: its memory is looked at when its tasks have ended
        self.wants_check = False
        #: while CHECKING, what it waits for. 0: a reading, 1: its garbage to be collected, 2: the second reading
        self.check_stage = 0
        self.rss_bytes = 0
        self.processes = 1
        self.cpu_seconds = 0.0
        self.sampled_at: float | None = None
        self.sample_interval = 0.0
        self.samples: deque[tuple[float, int]] = deque(maxlen=8)
        self.is_over_hard_limit = False

    def __repr__(self) -> str:
        return f"<worker {self.id} pid={self.pid} {self.state.name} done={self.tasks_done}>"


@dataclass(frozen=True, slots=True)
class TreeState:
    """A reading of one worker's process tree."""

    rss_bytes: int
    processes: int = 1
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class HostState:
    """A reading of the machine, or of the container this process lives in, whichever is tighter."""

    total_bytes: int
    available_bytes: int
    cpu_percent: float = 0.0
    pressure_percent: float | None = None
    source: str = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExit:
    """How a worker ended, as far as it is known. `exit_code` is negative for a signal, None where nobody could tell.

    `began` says whether the task at its head had begun: the worker notes that in shared memory before it
    touches the call. `begun`: ids of the tasks behind it that had begun as well, which happens only where its results
    could not be believed. `story` is a fault report that the dying interpreter wrote, `stderr_tail` its last words.
    """

    exit_code: int | None
    began: bool = True
    begun: frozenset[int] = frozenset()
    stderr_tail: str = ""
    story: str = ""
    keeper_lost: bool = False
