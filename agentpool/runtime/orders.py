"""What is ordered of a pool from outside: to cancel or kill a task, to open its breaker, to pause, drain and resume.

See `changes` for the rooms of the manager. Decides nothing: the core is told, and what it refuses is raised. Any thread
may call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar, cast

from agentpool.core.records import TaskRecord
from agentpool.core.transitions import TaskState
from agentpool.errors import AgentPoolError, PoolClosedError, TaskKilledError
from agentpool.io.channel import Channel
from agentpool.runtime import interrupts
from agentpool.runtime.changes import Call, Changes
from agentpool.runtime.links import Link
from agentpool.runtime.reception import Event

if TYPE_CHECKING:
    from agentpool.runtime.announcer import Announcer
    from agentpool.runtime.lastwords import LastWords

__all__ = ["Orders"]

T = TypeVar("T")


class Orders(Changes):
    """See the module."""

    def start(self) -> None:
        """Start the floor of workers (`min_workers`) without waiting for a task."""
        with self._section() as now:
            self._start_if_open()
            self.core.start(now)
            self._take(now)

    def cancel(self, task: TaskRecord) -> bool:
        """Withdraw a task that has not begun. True: it will not run, and its future is cancelled."""
        with interrupts.held():  # also from the decision to the settling
            with self._section() as now:
                self._take_back(now, task)
                is_cancelled = self.core.cancel(now, task)
                self._take(now)
            if is_cancelled:
                self._settle_cancelled([task])
        return is_cancelled

    def kill(self, task: TaskRecord, reason: str) -> bool:
        """Stop a running task: asked first, killed after the grace. False: it is over, or has not begun."""
        with self._section() as now:
            error = TaskKilledError(f"task {task.id} was stopped: {reason}")
            is_stopping = self.core.kill_task(now, task, error)
            if not is_stopping and task.state is TaskState.ASSIGNED:
                # It has begun, as it could not be taken back, but the result of the call before it was not read yet.
                self._late_kills.append((task, error))
                self._reactor.wake()
                is_stopping = True
            self._take(now)
            self._wake_for_deadline()
        return is_stopping

    def _take_back(self, now: float, task: TaskRecord) -> None:
        if task.state is TaskState.ASSIGNED and task.worker is not None:
            link = self._staff.links.get(task.worker.id)
            if link is not None and link.channel.revoke(task.id):
                self.core.task_given_back(now, task)

    def _take_all_back(self, now: float) -> None:
        for link in self._staff.links.values():
            self._take_backlog_back(now, link)

    def _take_backlog_back(self, now: float, link: Link) -> None:
        for task in reversed(list(link.worker.backlog)):
            if link.channel.revoke(task.id):
                self.core.task_given_back(now, task)

    def _settle_cancelled(self, tasks: Sequence[TaskRecord]) -> None:
        for task in tasks:
            call = self._call_of(task)
            if call is not None:
                call.settle_cancelled()

    # -- the breaker ---------------------------------------------------------------------------------------------

    def force_open(self, reason: str, seconds: float | None = None) -> None:
        """Open the breaker by hand; None: until it is reset."""
        self._tell_breaker(lambda now: self.core.force_open(now, reason, seconds))

    def hold_closed(self, seconds: float) -> None:
        """Keep the breaker closed by hand for so long."""
        self._tell_breaker(lambda now: self.core.hold_closed(now, seconds))

    def reset_breaker(self) -> None:
        """Close the breaker by hand."""
        self._tell_breaker(self.core.reset_breaker)

    def _tell_breaker(self, event: Event) -> None:
        with self._section() as now:
            self._start_if_open()
            event(now)
            self._take(now)
            self._wake_for_deadline()

    # -- what operators order ------------------------------------------------------------------------------------

    def order(self, event: Callable[[float], T]) -> T:
        """Tell the core of an operator's order. Raises PoolClosedError where all is over, and what the event does."""
        if self._is_forked:
            self.check_open()
        with self._section() as now:
            try:
                if self._is_finished:
                    raise PoolClosedError(f"pool {self.name} is closed and its workers are gone{self._stop_reason}")
                self._start_if_open()
                result = event(now)
                self._take(now)
                self._wake_for_deadline()
            except AgentPoolError:
                self._is_inside = False  # the core refused, and changed nothing
                raise
        return result

    def order_open(self, event: Callable[[float], T]) -> T:
        """The same, of what has no meaning once the pool shuts down: that raises PoolClosedError then."""
        def checked(now: float) -> T:
            if self.core.is_closing:
                raise PoolClosedError(f"pool {self.name} is shutting down{self._stop_reason}: it finishes what it "
                                      "accepted, and can be neither paused nor resumed")
            return event(now)

        return self.order(checked)

    def drain(self) -> list[Call]:
        """Accept nothing until `resume`; returns the calls that are not over yet."""
        with suppress(PoolClosedError):  # then there is nothing to refuse
            self._takes_unlocked = False  # before what was left there is collected: nothing comes after it
            self.order_open(self.core.drain)
        return [cast(Call, call) for task in list(self._open.values()) if (call := task.handle) is not None]

    def resume(self) -> None:
        """Begin what waits, and accept tasks again."""
        def resumed(now: float) -> None:
            self.core.resume(now)
            self._takes_unlocked = self._may_take_unlocked()

        self.order_open(resumed)

    # -- looking -------------------------------------------------------------------------------------------------

    def announcer(self) -> Announcer | None:
        """What calls the callbacks for events; made with the first call. None: the pool is over.

        Raises RuntimeError where no thread can be had.
        """
        if self._announcer is None:
            from agentpool.runtime.announcer import Announcer

            with interrupts.held(), self.lock:
                if self._announcer is None and not self._is_finished:
                    self._announcer = Announcer(self.name)
        return self._announcer

    def open_tasks(self) -> Iterator[TaskRecord]:
        """Under the lock, which must be held on: what was accepted and is not over, oldest first."""
        return iter(self._open.values())

    def channels(self) -> dict[int, Channel]:
        """Each worker's channel, for its standard error."""
        with self.lock:
            return {worker: link.channel for worker, link in self._staff.links.items()}

    def ended_workers(self, asked: Iterable[int]) -> dict[int, LastWords]:
        """Workers that ended lately and wrote something to their standard error, and those of `asked` that ended."""
        with self.lock:
            return self._reception.ended.find(asked)
