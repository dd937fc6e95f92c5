"""How any thread changes a pool's core: under one lock, and then what the core asks for is performed or left.

The lowest of six rooms of one manager: `Changes` < `Orders` (cancel, kill, what operators and the breaker's user say)
< `Intake` (how tasks come in) < `Ending` < `Performing` (what the core asks for) < `Manager` (the thread). Each knows
those below it, and of those above only the method declared abstract here.

The lock guards the core, the outgoing side of all channels, and the list of actions that wait for the manager thread;
it is held for microseconds, never over a call that may block or run a user's code. Calls are written to free workers at
once, by whoever has the lock; all other actions are left to the manager thread. Decides nothing. Any thread.
"""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, cast

from agentpool.config import PoolSettings
from agentpool.core import actions as act
from agentpool.core.failures import fresh
from agentpool.core.records import TaskRecord, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.errors import AgentPoolError, ForkedPoolError, PoolClosedError, TaskKilledError
from agentpool.io.reactor import Reactor
from agentpool.runtime import interrupts, lifecycle
from agentpool.runtime.door import Door
from agentpool.runtime.links import Link
from agentpool.runtime.reception import Event, Reception

if TYPE_CHECKING:
    from agentpool.io.arena import Held
    from agentpool.io.host import HostSampler
    from agentpool.runtime.announcer import Announcer
    from agentpool.runtime.budget import Clerk
    from agentpool_worker.protocol import Payload

__all__ = ["TORN", "Call", "Changes"]

#: Why a pool ended by itself.
TORN: Final = "an exception of a signal handler (Ctrl-C) came in the middle of a call of the pool; make a new one"


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


class Changes(ABC):
    """See the module."""

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

    @abstractmethod
    def _run(self) -> None:
        """What the manager thread does: see `Manager`."""

    # -- any thread ----------------------------------------------------------------------------------------------

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

    @property
    def is_own_thread(self) -> bool:
        """The caller is a thread of this pool, which runs the callbacks of futures: it must not wait for them."""
        announcer = self._announcer
        return threading.get_ident() == self._thread_id or (announcer is not None and announcer.is_caller)

    @property
    def is_finished(self) -> bool:
        """The pool is closed, and all its processes are gone."""
        return self._is_finished or self._is_forked

    @property
    def inbox(self) -> Iterable[TaskRecord]:
        """The same, in order. For reading under the lock; others may append meanwhile."""
        return self._inbox

    @property
    def left(self) -> int:
        """Tasks that were submitted and that the core does not know yet."""
        return len(self._inbox)

    def hold(self, payload: Payload, buffers: Sequence[memoryview]) -> Held | None:
        """Put a large call into the arena. None: it is to be sent as it is."""
        return self._staff.arena.hold(payload, buffers)

    # -- the lock ------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Under the lock: begin to change the core; `_is_inside = False` ends it.

        KeyboardInterrupt, or what another signal handler raises, comes between any two instructions of the main
        thread. A change that was torn by it cannot be mended, so the manager thread ends such a pool. Raises
        PoolClosedError then.
        """
        if self._is_inside:
            self._reactor.wake()
            raise PoolClosedError(f"cannot schedule new futures after shutdown: {TORN}")
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

    def _feed(self, event: Event) -> None:
        """Tell the core of something now. For the manager thread: `_section` written out, as no Ctrl-C comes there."""
        with self.lock:
            self._enter()
            now = time.monotonic()
            if self._inbox:
                self._collect(now)
            event(now)
            self._take(now)
            self._is_inside = False

    # -- under the lock ------------------------------------------------------------------------------------------

    def _start_if_open(self) -> None:
        """Under the lock: have a manager thread."""
        if self._thread is None and not self._is_finished:
            thread = threading.Thread(target=self._run, name=f"agentpool-manager-{self.name}", daemon=True)
            thread.start()
            self._thread = thread

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

    def _call_of(self, task: TaskRecord) -> Call | None:
        """The call of a task that is being settled; None: somebody settled it before."""
        self._open.pop(task.id, None)
        call, task.handle = task.handle, None
        return cast("Call | None", call)

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
