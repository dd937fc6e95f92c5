"""The manager: one thread per pool that waits, feeds the core, and performs its actions.

It decides nothing. Its lock guards the core, the outgoing side of all channels, and the list of actions that wait for
the manager thread; it is held for microseconds, never over a call that may block or run a user's code. `submit`,
`cancel` and the like run in their caller's thread; they write calls to a free worker themselves and leave everything
else to the thread. Futures are settled, and samples taken, outside the lock.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, cast

from agentpool.config import PoolSettings
from agentpool.core import actions as act
from agentpool.core.failures import fresh
from agentpool.core.records import HostState, TaskRecord, TaskSpec, WorkerExit, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.core.transitions import TaskState
from agentpool.errors import (
    AgentPoolError,
    ForkedPoolError,
    InternalError,
    PoolClosedError,
    QueueFullError,
    SessionLostError,
    TaskKilledError,
)
from agentpool.io.channel import Channel
from agentpool.io.reactor import Reactor
from agentpool.runtime import interrupts, lifecycle
from agentpool.runtime.door import Door
from agentpool.runtime.links import Link
from agentpool.runtime.reception import Event, Reception
from agentpool_worker.arena import WARM_SECONDS

if TYPE_CHECKING:
    from agentpool.io.arena import Held
    from agentpool.io.host import HostSampler
    from agentpool.runtime.announcer import Announcer
    from agentpool.runtime.budget import Clerk
    from agentpool.runtime.lastwords import LastWords
    from agentpool_worker.protocol import Payload

__all__ = ["Call", "Manager"]

T = TypeVar("T")

log = logging.getLogger("agentpool")

#: Why a pool ended by itself.
_TORN: Final = "an exception of a signal handler (Ctrl-C) came in the middle of a call of the pool; make a new one"
#: How long the manager waits for room in its own standard error before it tries again, in seconds.
_STDERR_RETRY: Final = 0.05


class Call(Protocol):
    """A task's future, as the manager sees it: it has the serialized call until the task is over."""

    #: that ran it last, or has it
    worker: WorkerRecord | None

    @property
    def payload(self) -> Payload | Held:
        """The pickle, or all of the call where it lies in the arena."""

    @property
    def buffers(self) -> Sequence[memoryview]:
        """What the pickle left out."""

    def settle(self, is_value: bool, payload: object) -> None:
        """Set the result (an `Encoded`) or the exception, and run the callbacks."""

    def settle_cancelled(self) -> None:
        """Become cancelled, and tell those who wait."""

    def receive_events(self, attempt: int, payloads: Sequence[bytes], dropped: int) -> None:
        """The running task said this; so many events of this attempt were lost in the worker."""


def _make_core(settings: PoolSettings, seed: int) -> Scheduler:
    if settings.budget is None:
        return Scheduler(settings, seed=seed)
    from agentpool.core.host_scheduler import HostScheduler

    return HostScheduler(settings, seed=seed)


class Manager:
    """See the module. One per pool; starts its thread with the first task."""

    def __init__(
        self, settings: PoolSettings, initializer: tuple[Payload, Sequence[memoryview]], name: str, seed: int = 0
    ) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.core = _make_core(settings, seed)
        self.listeners: list[Callable[[str, str, str], None]] = []
        self.started_at = time.monotonic()
        self._initializer = initializer
        self._task_ids = itertools.count(1)
        self._room = threading.Condition(self.lock)
        self._cold: deque[act.Action] = deque()
        #: tasks that were submitted while nobody was free, without the lock; the core does not know them yet
        self._inbox: deque[TaskRecord] = deque()
        #: tasks may be left there: there is no bound to wait for, and the pool is open
        self._takes_unlocked = self._may_take_unlocked()
        self._late_kills: list[tuple[TaskRecord, TaskKilledError]] = []
        #: accepted and not settled; what the handler of last resort fails
        self._open: dict[int, TaskRecord] = {}
        lifecycle.fill_standard_descriptors()
        self._reactor = Reactor()
        #: to the control socket, where the pool is to have one
        self.door = Door(name, self._reactor)
        self._reception = Reception(self.core, self._reactor)
        self._staff = self._reception.staff
        self._clerk = self._make_clerk()
        self._host: HostSampler | None = None
        #: there is one once somebody wants to be called for events
        self._announcer: Announcer | None = None
        self._sleeps_until = 0.0
        self._trims_at = 0.0
        self._thread: threading.Thread | None = None
        self._thread_id = 0
        self._is_finished = False
        self._is_forked = False
        self._is_dropped = False
        #: a thread is changing the core; seen by another one that has the lock: a signal's exception tore that change
        self._is_inside = False
        self._stop_reason = ""

    def _may_take_unlocked(self) -> bool:
        """There is no bound to wait for, and no slot: while a pool holds none, no task's end collects what is left."""
        return self.core.settings.max_pending is None and self.core.settings.budget is None

    def _make_clerk(self) -> Clerk | None:
        """Who sees to this pool's share of the host's budget; None: it has none."""
        if self.core.settings.budget is None:
            return None
        from agentpool.core.host_scheduler import HostScheduler
        from agentpool.runtime.budget import Clerk

        assert isinstance(self.core, HostScheduler)
        try:
            return Clerk(self.core, self.name, self._reactor, self._feed, self._reception.tell_later)
        except BaseException:  # a directory that cannot be used
            self._staff.close()
            self._reactor.close()
            raise

    # -- any thread ----------------------------------------------------------------------------------------------

    def submit(self, call: Call, spec: TaskSpec, call_key: object, *, block: bool) -> TaskRecord:
        """Accept a task, and send it to a worker at once where one is free.

        Raises PoolClosedError, QueueFullError (at once where `block` is False or the caller must not wait), or what
        broke the pool.
        """
        task = TaskRecord(next(self._task_ids), spec, call, call_key)
        core = self.core
        if (
            core.active >= core.concurrency
            and self._takes_unlocked
            and spec.queue_timeout is None
            and core.broken is None
            and self._leave(task)
        ):
            return task
        self.check_open()
        while True:
            is_held = interrupts.hold()
            try:
                self._accept(task)
                return task
            except QueueFullError:
                if not block or self.is_own_thread:
                    raise
            finally:
                if is_held:
                    self._release(task)
            self._wait_for_room()

    def _leave(self, task: TaskRecord) -> bool:
        """Leave a task, for which nobody is free now, to whoever changes the core next. False: the pool was closed.

        Every end of a running task is such a change, and collects what was left after it counted that end: so a task
        that was left too late for that finds a free place here.
        """
        core = self.core
        try:
            self._inbox.append(task)
            if not self._takes_unlocked:
                try:
                    self._inbox.remove(task)
                    return False
                except ValueError:  # somebody collected it: it was accepted in time
                    return True
            if core.active < core.concurrency:
                with self._section() as now:
                    self._take(now)
                    self._wake_for_deadline()
        except KeyboardInterrupt:
            self._withdraw(task)
            raise
        return True

    def _collect(self, now: float) -> None:
        """Under the lock: tell the core of the tasks that were left."""
        inbox, core = self._inbox, self.core
        while inbox:
            task = inbox.popleft()
            try:
                core.submit(now, task, is_one_of_many=True)
            except (AgentPoolError, RuntimeError) as error:  # closed or broken meanwhile
                self._cold.append((act.RESOLVE, task, False, error))
            else:
                self._open[task.id] = task

    def _accept(self, task: TaskRecord) -> None:
        with self.lock:
            self._start_if_open()  # before the task is accepted: where no thread can be had, nothing is lost
            self._enter()
            now = time.monotonic()
            if self._inbox:
                self._collect(now)
            try:
                self.core.submit(now, task)
            except (QueueFullError, SessionLostError):
                self._is_inside = False
                raise
            except PoolClosedError as error:
                self._is_inside = False
                raise PoolClosedError(f"{error}{self._stop_reason}") from None
            self._open[task.id] = task
            self._take(now)
            self._wake_for_deadline()
            self._is_inside = False

    def _release(self, task: TaskRecord) -> None:
        try:
            interrupts.release()
        except KeyboardInterrupt:
            self._withdraw(task)
            raise

    def _withdraw(self, task: TaskRecord) -> None:
        """Ctrl-C came while it was submitted: its submitter gets no future to withdraw it with."""
        with suppress(PoolClosedError):  # the pool is torn: everything is stopped anyway
            with self._section() as now:
                self._take(now)
            if task.id in self._open and not self.cancel(task):
                self.kill(task, "Ctrl-C came while it was submitted")

    def _wait_for_room(self) -> None:
        core, limit = self.core, self.core.settings.max_pending
        with self.lock:
            while (limit is not None and len(core.queue) >= limit and not core.is_closing and not core.is_draining
                   and core.broken is None):
                core.want_room()  # another one may have had the room that was announced
                self._room.wait()

    def _enter(self) -> None:
        """Under the lock: begin to change the core; `_is_inside = False` ends it.

        KeyboardInterrupt, or what another signal handler raises, comes between any two instructions of the main
        thread. A change that was torn by it cannot be mended, so the manager thread ends such a pool. Raises
        PoolClosedError then.
        """
        if self._is_inside:
            self._reactor.wake()
            raise PoolClosedError(f"cannot schedule new futures after shutdown: {_TORN}")
        self._is_inside = True

    @contextmanager
    def _section(self) -> Iterator[float]:
        """The lock, for changes of the core that are not on the hot path; yields the time."""
        with interrupts.held(), self.lock:
            self._enter()
            now = time.monotonic()
            if self._inbox:
                self._collect(now)
            yield now
            self._is_inside = False

    def check_open(self) -> None:
        """Raises what `submit` would raise for any task: the pool is closed, broken or another process's."""
        if self._is_forked:
            raise ForkedPoolError(
                "this pool belongs to the process that made it, of which this one is a fork; make a pool here"
            )
        if lifecycle.is_exiting():
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")  # to the letter as elsewhere
        if self.core.broken is not None:
            raise fresh(self.core.broken)
        if self.core.is_closing:
            raise PoolClosedError(f"cannot schedule new futures after shutdown{self._stop_reason}")

    def _start_if_open(self) -> None:
        """Under the lock: have a manager thread."""
        if self._thread is None and not self._is_finished:
            thread = threading.Thread(target=self._run, name=f"agentpool-manager-{self.name}", daemon=True)
            thread.start()
            self._thread = thread

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

    def _call_of(self, task: TaskRecord) -> Call | None:
        """The call of a task that is being settled; None: somebody settled it before."""
        self._open.pop(task.id, None)
        call, task.handle = task.handle, None
        return cast("Call | None", call)

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

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Accept nothing more; end when all is done. Safe from any thread, and any number of times."""
        if self._is_forked:
            return
        self._takes_unlocked = False
        cancelled: list[TaskRecord] = []
        with interrupts.held():
            # Where a change was torn the manager thread ends the pool by itself.
            with suppress(PoolClosedError), self._section() as now:
                if cancel_futures:
                    self._take_all_back(now)
                cancelled = self.core.shutdown(now, cancel_futures=cancel_futures)
                self._room.notify_all()
                self._take(now)
                self._reactor.wake()
            self._settle_cancelled(cancelled)
        self._join(wait)

    def stop_all(self, error: BaseException, reason: str, *, wait: bool) -> tuple[int, int, int]:
        """Kill everything now. Returns the numbers of workers stopped, tasks cancelled and tasks stopped."""
        if self._is_forked:
            return (0, 0, 0)
        self._takes_unlocked = False
        workers, active = 0, 0
        cancelled: list[TaskRecord] = []
        with interrupts.held():
            with suppress(PoolClosedError), self._section() as now:
                self._stop_reason = f": {reason}" if reason else ""
                workers, active = len(self.core.workers), self.core.active
                self._take_all_back(now)
                cancelled = self.core.stop_all(now, error)
                self._room.notify_all()
                self._take(now)
                self._reactor.wake()
            self._settle_cancelled(cancelled)
        self._join(wait)
        return (workers, len(cancelled), active)

    def drop(self) -> None:
        """Nobody holds the pool any more: finish what was accepted, then end. Takes no lock: a finalizer calls it."""
        self._is_dropped = True
        if self._thread is None and not self._is_finished:
            self._finish()
        elif not self._is_finished:
            self._reactor.wake()

    def _settle_cancelled(self, tasks: Sequence[TaskRecord]) -> None:
        for task in tasks:
            call = self._call_of(task)
            if call is not None:
                call.settle_cancelled()

    def _join(self, wait: bool) -> None:
        thread = self._thread
        if thread is None:
            with self.lock:
                if not self._is_finished:
                    self._finish()
        elif wait and not self.is_own_thread:
            thread.join()

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

    # -- what operators order: any thread ------------------------------------------------------------------------

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

    @property
    def is_own_thread(self) -> bool:
        """The caller is a thread of this pool, which runs the callbacks of futures: it must not wait for them."""
        announcer = self._announcer
        return threading.get_ident() == self._thread_id or (announcer is not None and announcer.is_caller)

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

    @property
    def inbox(self) -> Iterable[TaskRecord]:
        """The same, in order. For reading under the lock; others may append meanwhile."""
        return self._inbox

    @property
    def left(self) -> int:
        """Tasks that were submitted and that the core does not know yet."""
        return len(self._inbox)

    @property
    def is_finished(self) -> bool:
        """The pool is closed, and all its processes are gone."""
        return self._is_finished or self._is_forked

    def hold(self, payload: Payload, buffers: Sequence[memoryview]) -> Held | None:
        """Put a large call into the arena. None: it is to be sent as it is."""
        return self._staff.arena.hold(payload, buffers)

    def before_fork(self) -> None:
        """The parent is about to fork: see `Staff.keep_results`."""
        self._staff.keep_results()

    def abandon(self) -> None:
        """In a forked copy of the parent: become inert. The lock may have been held by a thread that is not here."""
        self._is_forked = True
        self._takes_unlocked = False
        self.lock = threading.Lock()
        self._room = threading.Condition(self.lock)
        self._staff.abandon()
        self.door.abandon()
        if self._clerk is not None:
            self._clerk.abandon()
        self._reactor.close()

    # -- under the lock ------------------------------------------------------------------------------------------

    def _take(self, now: float) -> None:
        """Send calls at once; leave all other actions to the manager thread."""
        if self._inbox:
            self._collect(now)
        actions = self.core.take_actions(now)
        cold = self._cold
        receivers: list[Link] = []
        for action in actions:
            if type(action) is tuple and action[0] == act.DISPATCH:
                link = self._dispatch(action[1], action[2])
                if link not in receivers:
                    receivers.append(link)
            elif type(action) is act.SampleWorker:
                # Before futures are settled: who has a result and submits again finds this worker free again.
                cold.appendleft(action)
            else:
                cold.append(action)
        for link in receivers:
            if not link.channel.flush():
                self._reception.watch_writing(link)
        if cold and threading.get_ident() != self._thread_id:
            self._reactor.wake()

    def _dispatch(self, worker: WorkerRecord, task: TaskRecord) -> Link:
        link = self._staff.links[worker.id]
        call = cast(Call, task.handle)
        call.worker = worker
        link.queue_call(task, call.payload, call.buffers)
        return link

    def _wake_for_deadline(self) -> None:
        deadline = self.core.next_deadline()
        if deadline is not None and deadline < self._sleeps_until and threading.get_ident() != self._thread_id:
            self._sleeps_until = deadline
            self._reactor.wake()

    # -- the manager thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._thread_id = threading.get_ident()
        self.door.open_soon()
        try:
            while not self._is_finished:
                self._turn()
        except BaseException as error:  # a defect of ours: fail what waits, end, and never hang
            self._fail(error)

    def _turn(self) -> None:
        with self.lock:
            if self._is_inside:
                raise PoolClosedError(_TORN)
            deadline = self.core.next_deadline()
            self._sleeps_until = float("inf") if deadline is None else deadline
        if self._cold or self._reception.has_events:
            seconds: float | None = 0.0
        elif deadline is not None:
            seconds = deadline - time.monotonic()
        else:
            seconds = None
        stderr = self._reception.stderr
        if stderr.is_waiting:
            seconds = _STDERR_RETRY if seconds is None else min(seconds, _STDERR_RETRY)
            self._reception.push_stderr()
        if self.door.is_due:
            seconds = self.door.wait_or_open(seconds)
        arena = self._staff.arena
        if arena.is_warm:
            seconds = WARM_SECONDS if seconds is None else min(seconds, WARM_SECONDS)
        for callback in self._reactor.wait(seconds):
            callback()
        if arena.is_warm and time.monotonic() > self._trims_at:
            self._trims_at = time.monotonic() + WARM_SECONDS
            self._staff.trim()
        late_kills = self._prepare_late_kills() if self._late_kills else ()
        with self.lock:  # written out: `_section` costs 3 us, and is for threads that Ctrl-C may interrupt
            self._enter()
            now = time.monotonic()
            self._sleeps_until = 0.0
            self._reception.tell_core(now)
            for task, error in late_kills:
                self.core.kill_task(now, task, error)
            if self._is_dropped and not self.core.is_closing:
                self._takes_unlocked = False
                self._collect(now)  # what was left was accepted, and is finished
                self.core.shutdown(now, cancel_futures=False)
            self.core.tick(now)
            self._take(now)
            self._is_inside = False
        if self._reception.said:
            self._deliver_events()
        while self._cold:
            self._perform(self._cold.popleft())

    def _deliver_events(self) -> None:
        """Hand on what running tasks said; before any of these tasks is resolved."""
        said, self._reception.said = self._reception.said, []
        for handle, attempt, payloads, dropped in said:
            cast(Call, handle).receive_events(attempt, payloads, dropped)

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

    def _prepare_late_kills(self) -> list[tuple[TaskRecord, TaskKilledError]]:
        late_kills, self._late_kills = self._late_kills, []
        for task, _ in late_kills:
            link = None if task.worker is None else self._staff.links.get(task.worker.id)
            if link is not None:
                self._reception.take_everything(link)
        return late_kills

    def _feed(self, event: Event) -> None:
        """Tell the core of something now."""
        with self._section() as now:
            event(now)
            self._take(now)

    # -- performing ----------------------------------------------------------------------------------------------

    def _perform(self, action: act.Action) -> None:
        match action:
            case (_, task, is_value, payload):
                self._resolve(task, is_value, payload)
            case act.SampleWorker(worker):
                link = self._staff.links.get(worker.id)
                reading = None if link is None else link.sample()
                self._feed(lambda now: self.core.worker_sampled(now, worker, reading))
            case act.SampleHost():
                self._sample_host()
            case act.Spawn(worker):
                self._spawn(worker)
            case act.RoomFreed():
                with self.lock:
                    self._room.notify_all()
            case act.BreakerChanged(old, new, reason):
                self._breaker_changed(old, new, reason)
            case act.Warn(message):
                log.warning("%s", message)
            case act.Close():
                self._finish()
            case (act.LookAtBudget() | act.PublishShare() | act.TakeSlots() | act.GiveSlots() | act.LeaveBudget()):
                assert self._clerk is not None
                self._clerk.perform(action)
            case act.Retire() | act.Kill() | act.AskToStop() | act.DumpStack() | act.StopTool() | act.Revoke() | (
                act.Collect()
            ):
                link = self._staff.links.get(action.worker.id)
                if link is not None:
                    self._perform_on(link, action)
            case _:
                raise InternalError(f"the core asked for {action!r}, and nobody performs that")

    def _perform_on(
        self,
        link: Link,
        action: act.Retire | act.Kill | act.AskToStop | act.DumpStack | act.StopTool | act.Revoke | act.Collect,
    ) -> None:
        match action:
            case act.Retire():
                with self.lock:
                    self._reactor.unwatch(link.channel.calls_fd)
                    link.channel.end_calls()
            case act.Kill():
                self._kill(link)
            case act.AskToStop(_, task, wants_stack):
                link.channel.ask_to_stop(task.id, wants_stack=wants_stack)
            case act.StopTool():
                link.stop_tool()
            case act.DumpStack():
                link.signal(signal.SIGUSR1)
            case act.Collect():
                with self.lock:
                    if not link.channel.send_collect():
                        self._reception.watch_writing(link)
            case act.Revoke():
                self._revoke(link)

    def _kill(self, link: Link) -> None:
        if link.is_kill_wanted and (link.pid is None or link.is_dead()) and link.keeper is self._staff.keeper:
            # Asked for the second time: it is dead, or was never forked, and the keeper does not say so.
            log.error("the keeper process does not answer; it is killed")
            link.keeper.kill()
        link.kill()

    def _resolve(self, task: TaskRecord, is_value: bool, payload: object) -> None:
        call = self._call_of(task)
        if call is not None:
            call.settle(is_value, payload)

    def _sample_host(self) -> None:
        if self._host is None:
            from agentpool.io.host import HostSampler

            self._host = HostSampler()
        reading = self._host.read()
        host = HostState(
            total_bytes=reading.total_bytes,
            available_bytes=reading.available_bytes,
            cpu_percent=reading.cpu_percent,
            pressure_percent=reading.pressure_some_avg10,
            source=reading.limit_source,
        )
        self._feed(lambda now: self.core.host_sampled(now, host, os.cpu_count() or 1))

    def _spawn(self, worker: WorkerRecord) -> None:
        channel = None
        try:
            channel = Channel(self._staff.arena, worker.id)
            link = Link(worker, channel, self._staff.keeper_for_spawn(), self.core.settings.memory_metric)
        except Exception as error:  # out of descriptors or processes, no interpreter, ...: a failed start
            if channel is not None:
                channel.close()
            failure = WorkerExit(exit_code=None, story=f"{type(error).__name__}: {error}")
            self._feed(lambda now: self.core.worker_exited(now, worker, failure))
            return
        with self.lock:
            self._staff.links[worker.id] = link
            if not channel.send_init(*self._initializer):
                self._reception.watch_writing(link)
        self._reception.watch(link)
        self._staff.hand_over(link)

    def _revoke(self, link: Link) -> None:
        """Take back what waits behind a call that takes its time, and what that worker had finished before it."""
        self._reception.take_everything(link)
        with self._section() as now:
            self._reception.tell_core(now)
            self._take_backlog_back(now, link)
            self._take(now)
        self._deliver_events()

    def _breaker_changed(self, old: str, new: str, reason: str) -> None:
        level = logging.WARNING if new == "open" else logging.INFO  # what was done by hand surprises nobody
        log.log(level, "circuit breaker %s: %s", new, reason or "recovered")
        for listener in list(self.listeners):
            try:
                listener(old, new, reason)
            except BaseException:  # SystemExit in it must not end this thread
                log.exception("a listener of the circuit breaker raised")

    # -- the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self._announcer is not None:
            self._announcer.close()  # first: it settles futures
        self._is_finished = True
        self.door.close()
        self._reception.stderr.drain()
        self._staff.close()
        if self._clerk is not None:
            self._clerk.close()
        self._reactor.close()

    def _fail(self, error: BaseException) -> None:
        """The handler of last resort: settle everything, end everything, never hang."""
        is_torn = isinstance(error, PoolClosedError)
        if not is_torn:
            log.critical("the manager thread of pool %s failed. What the core knew:\n%s", self.name, self.core.story(),
                         exc_info=error)
        self._takes_unlocked = False
        with self.lock:
            self._open.update((task.id, task) for task in self._inbox)
            self._inbox.clear()
            resolved = [action for action in self._cold if type(action) is tuple]
            self._cold.clear()
            failure: AgentPoolError
            if is_torn:
                failure = TaskKilledError(f"the task's pool was ended: {_TORN}")
                self._stop_reason = f": {_TORN}"
            else:
                failure = self.core.broken = InternalError(
                    f"agentpool failed: {type(error).__name__}: {error}. This is a defect: please report it",
                    story=self.core.story(),
                )
                failure.__cause__ = error
            self.core.is_closing = True
            self._room.notify_all()
        for _, task, is_value, payload in resolved:  # type: ignore[misc]  # calls are never cold
            self._resolve(task, bool(is_value), payload)
        for task in list(self._open.values()):
            self._resolve(task, False, fresh(failure))
        self._finish()
