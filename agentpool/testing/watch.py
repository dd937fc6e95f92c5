"""A scheduler that is looked at after every event, and counts of the transitions that it made.

`watched(Scheduler)` is a subclass that behaves the same: around each event it checks the invariants, and every change
of a task's or worker's state is looked up in the tables, whoever makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import wraps
from typing import Any, Final, TypeVar, cast

from agentpool.core import actions as act
from agentpool.core.invariants import check
from agentpool.core.records import TaskRecord, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.core.transitions import (
    BREAKER_TRANSITIONS,
    TASK_TRANSITIONS,
    WORKER_TRANSITIONS,
    BreakerState,
    TaskState,
    WorkerState,
)
from agentpool.errors import InternalError
from agentpool.testing.quickcheck import is_well

__all__ = ["EVENTS", "Coverage", "WatchedTask", "WatchedWorker", "watched"]

S = TypeVar("S", bound=IntEnum)

#: What a manager may tell a scheduler.
EVENTS: Final = (
    "agent_set_up", "cancel", "close_session", "drain", "force_open", "host_sampled", "initializer_failed",
    "kill_task", "kill_worker", "pause", "recycle", "reset_breaker", "resize", "resume", "shutdown", "start",
    "stop_acknowledged", "stop_all", "submit", "task_finished", "task_given_back", "task_skipped", "tick",
    "worker_collected", "worker_exited", "worker_ready", "worker_sampled", "worker_spawned",
)
_WIDTH: Final = 8
_RESOLVE: Final = act.RESOLVE
_ADMITS: Final = (BreakerState.CLOSED, BreakerState.HALF_OPEN)


class _Table:
    """How often each transition of one table was made."""

    def __init__(self, table: Mapping[S, Mapping[S, str]]) -> None:
        self._table: Mapping[Any, Mapping[Any, str]] = table
        self.counts = [0] * (_WIDTH * _WIDTH)
        self.forbidden = frozenset(
            old * _WIDTH + new for old in table for new in table if new not in table[old]
        )

    def rows(self) -> list[tuple[str, str, int]]:
        """(from, to, times) for each transition of the table."""
        return [
            (old.name, new.name, self.counts[old * _WIDTH + new]) for old, after in self._table.items() for new in after
        ]

    def refuse(self, record: object, old: int, new: int) -> None:
        states = list(self._table)
        raise InternalError(f"the_tables_are_kept: {record!r} went from {states[old].name} to {states[new].name}")


_tables: Final = {
    "task": _Table(TASK_TRANSITIONS),
    "worker": _Table(WORKER_TRANSITIONS),
    "breaker": _Table(BREAKER_TRANSITIONS),
}


class Coverage:
    """The counts of this process, of all watched schedulers together."""

    @staticmethod
    def rows() -> dict[str, list[tuple[str, str, int]]]:
        """By table ("task", "worker", "breaker"): (from, to, times)."""
        return {name: table.rows() for name, table in _tables.items()}

    @staticmethod
    def clear() -> None:
        """Begin at 0."""
        for table in _tables.values():
            table.counts[:] = [0] * len(table.counts)


def _state_property(record: type, table: _Table) -> property:
    # The getter is the slot's own, in C: this is read far more often than it is set.
    slot = record.__dict__["state"]
    put, get, counts, forbidden = slot.__set__, slot.__get__, table.counts, table.forbidden

    def set_state(self: Any, new: int) -> None:
        old = get(self)
        index = old * _WIDTH + new
        counts[index] += 1
        if index in forbidden:
            table.refuse(self, old, new)
        put(self, new)

    return property(get, set_state)


class WatchedTask(TaskRecord):
    """Every change of its state is counted, and refused where the table has it not."""

    __slots__ = ()
    state = cast(TaskState, _state_property(TaskRecord, _tables["task"]))


class WatchedWorker(WorkerRecord):
    """The same of a worker."""

    __slots__ = ()
    state = cast(WorkerState, _state_property(WorkerRecord, _tables["worker"]))


def _breaker_moved(old: BreakerState, new: BreakerState) -> None:
    table = _tables["breaker"]
    index = old * _WIDTH + new
    table.counts[index] += 1
    if index in table.forbidden:
        table.refuse("breaker", old, new)


def _examine(core: Any) -> None:
    core.events += 1
    if core.is_thorough:
        check(core)
    elif not is_well(core):
        check(core)  # says which rule, and why; it has the last word
        core.disagreements += 1


def _event(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    if name == "submit":

        @wraps(method)
        def submitted(self: Any, now: float, task: TaskRecord, **kwargs: Any) -> None:
            task.__class__ = WatchedTask
            method(self, now, task, **kwargs)
            _examine(self)

        return submitted
    if name == "tick":

        @wraps(method)
        def ticked(self: Any, now: float) -> None:
            due = self.next_deadline()
            method(self, now)
            if due is not None and due <= now:  # otherwise there was nothing to do, every turn, and nothing changed
                _examine(self)

        return ticked
    if name in ("shutdown", "stop_all", "cancel"):

        @wraps(method)
        def withdrawn(self: Any, now: float, *args: Any, **kwargs: Any) -> Any:
            result = method(self, now, *args, **kwargs)
            for task in (args if result else ()) if name == "cancel" else result:
                self.note_resolved(task)
            _examine(self)
            return result

        return withdrawn

    if name == "host_sampled":

        @wraps(method)
        def measured(self: Any, *args: Any, **kwargs: Any) -> None:
            self.held = {one.id: max(one.rss_bytes, self.held.get(one.id, 0)) for one in self.workers.values()}
            method(self, *args, **kwargs)
            _examine(self)

        return measured

    @wraps(method)
    def event(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        _examine(self)
        return result

    return event


def watched(base: type[Scheduler] = Scheduler) -> type[Scheduler]:
    """A subclass of `base` that is looked at. Raises InternalError, in the midst of an event, for what is wrong."""

    class Watched(base):  # type: ignore[misc,valid-type]
        #: all rules by their own functions, instead of `quickcheck`
        is_thorough = False
        #: what it was told, and how often it was asked what to do and had something
        events = 0
        #: times that `quickcheck` was wrong: it does not know of a change of the rules
        disagreements = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            #: tasks of which the end was told
            self.resolved: set[int] = set()
            self.breaker_was = self.breaker.state
            #: the most that each worker held when its task began, and at a reading of the host since then
            self.held: dict[int, int] = {}

        def note_resolved(self, task: TaskRecord) -> None:
            if task.id in self.resolved:
                raise InternalError(f"resolved_exactly_once: {task!r} is resolved for the second time",
                                    story=self.story())
            self.resolved.add(task.id)

        def take_actions(self, now: float) -> list[act.Action]:
            actions: list[act.Action] = super().take_actions(now)
            if not actions:
                return actions
            begun: list[act.Dispatch] = []
            for action in actions:
                if isinstance(action, tuple):
                    if action[0] == _RESOLVE:
                        self.note_resolved(action[1])
                    elif action[2].spec.expected_bytes is not None:
                        begun.append(action)
                elif isinstance(action, act.Spawn):
                    self._look_at_start(action.worker)
                elif isinstance(action, act.BreakerChanged):
                    self._look_at_breaker(action)
            if begun:
                self._look_at_promises(begun)
            _examine(self)
            if (self._is_dirty or self._hungry) and (more := super().take_actions(now)):
                raise InternalError(f"one_taking_is_enough: at the second there were {more}", story=self.story())
            return actions

        def _look_at_start(self, worker: WorkerRecord) -> None:
            worker.__class__ = WatchedWorker
            if self.breaker.state not in _ADMITS:
                raise InternalError(f"no_start_while_open: {worker!r} is started while the breaker is "
                                    f"{self.breaker.state.label}", story=self.story())

        def _look_at_promises(self, begun: list[act.Dispatch]) -> None:
            """What all may still take is there, once for each. The core's own sum is not asked."""
            self.held.update({worker.id: worker.rss_bytes for _, worker, _ in begun})
            need = {
                worker.id: max(0, worker.running.spec.expected_bytes - self.held[worker.id])
                for worker in self.workers.values()
                if worker.running is not None and worker.running.spec.expected_bytes is not None
            }
            host = self.governor.host
            most = host.available_bytes - self.governor.floor_bytes(host)
            # One that runs alone begins whatever there is, and who needs no more than its worker holds takes nothing.
            is_promised = any(need[worker.id] and not task.is_alone for _, worker, task in begun)
            if is_promised and sum(need.values()) > most:
                raise InternalError(f"memory_is_promised_once: workers were promised {need}, {most} bytes were to be "
                                    "had", story=self.story())

        def _look_at_breaker(self, change: act.BreakerChanged) -> None:
            old, new = BreakerState[change.old.upper()], BreakerState[change.new.upper()]
            if old is not self.breaker_was:
                raise InternalError(f"listeners_hear_all: {change} came when it was last {self.breaker_was.label}",
                                    story=self.story())
            self.breaker_was = new
            _breaker_moved(old, new)

    for name in EVENTS:
        setattr(Watched, name, _event(name, getattr(base, name)))
    Watched.__name__ = Watched.__qualname__ = f"Watched{base.__name__}"
    return Watched
