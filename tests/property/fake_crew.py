"""A crew of imaginary processes, and an oracle that knows what really ran: the world around a bare `Scheduler`.

`World` performs the scheduler's actions as the manager does, and feeds back what the processes do, in the order in
which a pipe would carry it. Its methods are what can happen; who calls them in which order is the driver's business:
Hypothesis in `test_scheduler_machine`, a seeded generator in `test_scheduler_long_runs`. No clock, no process.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from agentpool.config import MB, PoolSettings
from agentpool.core import actions as act
from agentpool.core.budget import Member, View
from agentpool.core.host_scheduler import HostScheduler
from agentpool.core.invariants import check
from agentpool.core.records import HostState, TaskRecord, TaskSpec, TreeState, WorkerExit, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.core.transitions import BreakerState, TaskState
from agentpool.errors import PoolClosedError, QueueFullError, SessionLostError, TaskKilledError

TOTAL = 10_000 * MB


class Frame:
    """One dispatch of a task to a process."""

    def __init__(self, task: TaskRecord) -> None:
        self.task = task
        self.is_revoked = False
        self.is_given_back = False


class Process:
    """What runs behind a WorkerRecord. It works through its frames in order; `outbox` has what is not delivered yet."""

    def __init__(self, worker: WorkerRecord) -> None:
        self.worker = worker
        self.is_ready = False
        self.is_dead = False
        self.is_killed = False
        self.is_sent_home = False
        self.is_collecting = False
        self.asked: list[TaskRecord] = []
        self.frames: deque[Frame] = deque()
        self.current: Frame | None = None
        self.outbox: deque[tuple[str, Frame, bool, object]] = deque()

    def __repr__(self) -> str:
        return f"<process {self.worker.id}>"


class World:
    """The scheduler and everything around it."""

    def __init__(self, settings: PoolSettings, seed: int = 0) -> None:
        self.now = 0.0
        self.core = Scheduler(settings, seed=seed) if settings.budget is None else HostScheduler(settings, seed=seed)
        #: of the host's budget: what this pool has, and what imaginary others have
        self.own_slots: set[int] = set()
        self.others_slots: set[int] = set()
        self.other_waits = False
        self.others_bytes = 0
        self.is_look_wanted = False
        self.processes: list[Process] = []
        self.tasks: list[TaskRecord] = []
        self.outcomes: dict[int, object] = {}
        self.begun: Counter[int] = Counter()
        self.sample_wanted: list[WorkerRecord] = []
        self.is_host_wanted = False
        self.is_somebody_waiting = False
        self.closes = 0
        self.is_lazy = False
        self.warnings: list[str] = []
        self._numbers = iter(range(1, 1 << 40))

    # -- performing ----------------------------------------------------------------------------------------------

    def settle_down(self) -> None:
        """After each event: the rules hold, before and after the actions are taken, and one taking is enough."""
        check(self.core)
        if self.is_lazy:
            return
        self.perform()

    def perform(self) -> None:
        actions = self.core.take_actions(self.now)
        check(self.core)
        assert self.core.take_actions(self.now) == [], "the second time there was still something to do"
        if any(isinstance(action, act.RoomFreed) for action in actions):
            self.is_somebody_waiting = False  # at once: what other actions lead to is looked at before its turn
        for action in actions:
            self._perform(action)
        check(self.core)
        if self.is_somebody_waiting:
            limit = self.core.settings.max_pending
            assert limit is not None
            assert len(self.core.queue) >= limit, "there is room, and nobody told the one who waits for it"
            assert not self.core.is_closing
            assert not self.core.is_draining

    def _perform(self, action: act.Action) -> None:
        if isinstance(action, tuple):
            if action[0] == act.DISPATCH:
                for process in self._alive(action[1]):
                    process.frames.append(Frame(action[2]))
            else:
                self._resolved(action[1], action[3])
            return
        match action:
            case act.Spawn(worker):
                assert self.core.breaker.state in (BreakerState.CLOSED, BreakerState.HALF_OPEN)
                self.processes.append(Process(worker))
            case act.Kill(worker):
                for process in self._alive(worker):
                    process.is_killed = True
            case act.Retire(worker):
                for process in self._alive(worker):
                    process.is_sent_home = True
            case act.Revoke(worker):
                self.revoke(worker, may_collide=False)
            case act.AskToStop(worker, task):
                for process in self._alive(worker):
                    process.asked.append(task)
            case act.Collect(worker):
                for process in self._alive(worker):
                    process.is_collecting = True
            case act.SampleWorker(worker):
                self.sample_wanted.append(worker)
            case act.SampleHost():
                self.is_host_wanted = True
            case act.RoomFreed():
                pass
            case act.Close():
                self.closes += 1
            case act.Warn(message):
                self.warnings.append(message)
            case act.LookAtBudget():
                self.is_look_wanted = True
            case act.TakeSlots(slots):
                got = tuple(slot for slot in slots if slot not in self.others_slots)
                assert not self.own_slots.intersection(got), "it has that slot"
                self.own_slots.update(got)
                self._host().slots_taken(self.now, got)
                self.settle_down()
            case act.GiveSlots(slots):
                assert self.own_slots.issuperset(slots), "that is not its own"
                self.own_slots.difference_update(slots)
            case act.BreakerChanged() | act.DumpStack() | act.PublishShare() | act.LeaveBudget():
                pass

    def _alive(self, worker: WorkerRecord) -> list[Process]:
        """The worker's process, or none: orders for a dead one come to nothing."""
        return [process for process in self.processes if process.worker is worker and not process.is_dead]

    @property
    def living(self) -> list[Process]:
        return [process for process in self.processes if not process.is_dead]

    def _resolved(self, task: TaskRecord, outcome: object) -> None:
        assert task.id not in self.outcomes, f"{task!r} is resolved for the second time"
        assert task.state is TaskState.RESOLVED
        assert task.attempts == self.begun[task.id], f"{task!r} began {self.begun[task.id]} times"
        self.outcomes[task.id] = outcome

    # -- what users do -------------------------------------------------------------------------------------------

    def submit(self, spec: TaskSpec, call_key: object = None) -> None:
        task = TaskRecord(next(self._numbers), spec, None, call_key)
        try:
            self.core.submit(self.now, task)
        except SessionLostError:
            assert spec.session is not None
            assert spec.session.error is not None
        except PoolClosedError:
            is_over = spec.session is not None and spec.session.is_closed
            assert self.core.is_closing or self.core.is_draining or is_over
        except QueueFullError:
            self.is_somebody_waiting = True
        except ValueError:
            assert self.core.broken is not None
        else:
            self.tasks.append(task)
        self.settle_down()

    @property
    def unresolved(self) -> list[TaskRecord]:
        return [task for task in self.tasks if task.state is not TaskState.RESOLVED]

    def cancel(self, task: TaskRecord) -> None:
        if task.state is TaskState.ASSIGNED and task.worker is not None:
            self.revoke(task.worker, only=task)
        if self.core.cancel(self.now, task):
            self._resolved(task, CancelledError())
        self.settle_down()

    def kill_task(self, task: TaskRecord) -> None:
        was = task.state
        is_stopping = self.core.kill_task(self.now, task, TaskKilledError("killed"))
        assert is_stopping is (was in (TaskState.RUNNING, TaskState.STOPPING))
        self.settle_down()

    def shutdown(self, *, cancel_futures: bool) -> None:
        if cancel_futures:
            for process in self.living:
                self.revoke(process.worker)
        for task in self.core.shutdown(self.now, cancel_futures=cancel_futures):
            self._resolved(task, CancelledError())
        self.settle_down()

    def stop_all(self) -> None:
        for task in self.core.stop_all(self.now, TaskKilledError("stopped")):
            self._resolved(task, CancelledError())
        self.settle_down()

    def force_open(self) -> None:
        self.core.force_open(self.now, "by hand")
        self.settle_down()

    def reset_breaker(self) -> None:
        self.core.reset_breaker(self.now)
        self.settle_down()

    def operate(self, order: Callable[..., object], *about: object) -> None:
        order(self.now, *about)
        self.settle_down()

    # -- what processes do ---------------------------------------------------------------------------------------

    def ready(self, process: Process, rss_bytes: int = 20 * MB) -> None:
        process.is_ready = True
        self.core.worker_spawned(self.now, process.worker, 1000 + process.worker.id)
        self.core.worker_ready(self.now, process.worker, 1000 + process.worker.id, rss_bytes)
        self.settle_down()

    def initializer_failed(self, process: Process, error: BaseException) -> None:
        self.core.initializer_failed(self.now, process.worker, error)
        self.settle_down()

    def step(self, process: Process, *, is_value: bool = True, payload: object = None) -> None:
        """The process goes on by itself: it begins a call, passes over a revoked one, or ends the one it runs."""
        current = process.current
        if current is not None:
            process.current = None
            process.outbox.append(("result", current, is_value, payload))
        elif process.frames:
            frame = process.frames.popleft()
            if frame.is_revoked:
                process.outbox.append(("skip", frame, False, None))
            else:
                self._begin(process, frame)
        self.settle_down()

    def _begin(self, process: Process, frame: Frame) -> None:
        task = frame.task
        assert task.state is not TaskState.QUEUED, f"{task!r} is run although it was given back"
        elsewhere = [other for other in self.living if other.current is not None and other.current.task is task]
        assert not elsewhere, f"{task!r} runs in {elsewhere} too"
        process.current = frame
        self.begun[task.id] += 1
        assert task.spec.policy is not None or self.begun[task.id] == 1, f"{task!r} began twice, and may not"
        running = sum(1 for other in self.living if other.current is not None)
        assert running <= self.core.concurrency + self.core.overhang, f"{running} tasks run"
        assert self.core.settings.budget is None or running <= len(self.own_slots), f"{running} run in {self.own_slots}"

    def revoke(self, worker: WorkerRecord, *, only: TaskRecord | None = None, may_collide: bool = True) -> None:
        """Take back what the process has not begun. At the very next one both sides may collide: then it tells."""
        for process in self._alive(worker):
            for index, frame in reversed(list(enumerate(process.frames))):
                task = frame.task
                if frame.is_revoked or task is worker.running or (only is not None and task is not only):
                    continue
                frame.is_revoked = True
                if index == 0 and process.current is None and may_collide:
                    continue
                frame.is_given_back = True
                self.core.task_given_back(self.now, task)

    def take_back_head(self, process: Process) -> None:
        """The call was sent to a free worker, and is taken back before it began."""
        head = process.worker.running
        for frame in process.frames:
            if frame.task is head and not frame.is_revoked:
                frame.is_revoked = frame.is_given_back = True
                self.core.task_given_back(self.now, frame.task)
                break
        self.settle_down()

    def deliver(self, process: Process, *, seconds: float = 0.0, rss_bytes: int = 0, is_twice: bool = False) -> None:
        """The next message of the process arrives."""
        what, frame, is_value, payload = process.outbox.popleft()
        for _ in range(1 + is_twice):
            if what == "result":
                self.core.task_finished(self.now, process.worker, frame.task, is_value=is_value, payload=payload,
                                        seconds=seconds, rss_bytes=rss_bytes)
            elif not frame.is_given_back:
                self.core.task_skipped(self.now, process.worker, frame.task)
        self.settle_down()

    def acknowledge(self, process: Process, stack: str) -> None:
        task = process.asked.pop()
        self.core.stop_acknowledged(self.now, process.worker, task, stack)
        self.settle_down()

    def collected(self, process: Process) -> None:
        process.is_collecting = False
        self.core.worker_collected(self.now, process.worker)
        self.settle_down()

    def die(self, process: Process, exit_code: int | None = -9, *, keeper_lost: bool = False) -> None:
        """Its results arrive, then its death is observed."""
        while process.outbox:
            self.deliver(process)
        process.is_dead = True
        head = process.worker.running
        began = process.current is not None and process.current.task is head
        self.core.worker_exited(self.now, process.worker,
                                WorkerExit(exit_code=exit_code, began=began, keeper_lost=keeper_lost))
        self.settle_down()

    # -- the other pools of the host -----------------------------------------------------------------------------

    def _host(self) -> HostScheduler:
        assert isinstance(self.core, HostScheduler)
        return self.core

    def ring(self) -> None:
        """Something changed at another pool."""
        self._host().budget_rang(self.now)
        self.settle_down()

    def answer_look(self) -> None:
        """The pool sees what the others do. They came later, so that it is its turn when there is a slot."""
        self.is_look_wanted = False
        ticket = self.now + 1 if self.other_waits else None
        other = Member(id="other", agents=self._host().share.agents, slots=len(self.others_slots),
                       committed_bytes=self.others_bytes, ticket=ticket, wants_memory=self.other_waits)
        members = (other,) if self.others_slots or self.other_waits else ()
        self._host().budget_seen(self.now, View(own_id="me", taken=frozenset(self.others_slots), members=members))
        self.settle_down()

    # -- what is measured ----------------------------------------------------------------------------------------

    def answer_sample(self, rss_bytes: int | None) -> None:
        worker = self.sample_wanted.pop(0)
        reading = None if rss_bytes is None or not self._alive(worker) else TreeState(rss_bytes, 1, self.now)
        self.core.worker_sampled(self.now, worker, reading)
        self.settle_down()

    def answer_host(self, available: int = TOTAL // 2, cpu: float = 5.0, pressure: float | None = None) -> None:
        self.is_host_wanted = False
        self.core.host_sampled(self.now, HostState(TOTAL, available, cpu, pressure), 2)
        self.settle_down()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)
        deadline = self.core.next_deadline()
        assert deadline is None or deadline > self.now, "a tick leaves nothing due"
        self.settle_down()

    def jump(self) -> None:
        """To the next deadline."""
        self.settle_down()
        deadline = self.core.next_deadline()
        if deadline is not None:
            self.advance(max(0.0, deadline - self.now))

    # -- the end -------------------------------------------------------------------------------------------------

    def run_to_the_end(self, patience: int = 60) -> None:
        """Everybody behaves: all tasks are resolved and the floor is kept; then, after shutdown, Close comes once."""
        self.is_lazy = False
        self.settle_down()
        core = self.core
        for session in list(core.sessions.values()):
            self.operate(core.close_session, session)
        self._be_kind_until(lambda: not core.unresolved, patience)
        if not core.is_closing and core.broken is None:
            self._be_kind_until(lambda: core.live >= core.settings.min_workers, patience)
        self.shutdown(cancel_futures=False)
        self._be_kind_until(lambda: core.is_closed, patience)
        assert self.closes == 1
        assert not self.living
        missing = [task for task in self.tasks if task.id not in self.outcomes]
        assert not missing, f"never resolved: {missing}"
        self.advance(1000.0)
        assert self.closes == 1

    def _be_kind_until(self, condition: Callable[[], bool], patience: int) -> None:
        rounds, resolved = 0, len(self.outcomes)
        while not condition():
            assert rounds < patience, f"nothing goes on:\n{self.core.story()}\n{list(self.core.queue)}"
            self.be_kind()
            rounds = rounds + 1 if len(self.outcomes) == resolved else 0
            resolved = len(self.outcomes)

    def be_modest(self) -> None:
        """The other pools give back what they have."""
        is_unheard = self._host().share.ticket is not None  # `others_change` may have given back without a word
        if self.others_slots or self.other_waits or self.others_bytes or is_unheard:
            self.others_slots.clear()
            self.other_waits, self.others_bytes = False, 0
            self.ring()
        if self.is_look_wanted:
            self.answer_look()

    def be_kind(self) -> None:
        before: Any = (len(self.outcomes), self.core.counters.spawned, len(self.living))
        if self.core.breaker.state is BreakerState.FORCED_OPEN:
            self.reset_breaker()
        if self.core.is_paused:
            self.operate(self.core.resume)
        if self.is_host_wanted:
            self.answer_host()
        if self.core.settings.budget is not None:
            self.be_modest()
        while self.sample_wanted:
            self.answer_sample(20 * MB)
        for process in self.living:
            if process.is_killed:
                self.die(process)
            elif not process.is_ready:
                self.ready(process)
            elif process.is_collecting:
                self.collected(process)
            else:
                while process.current is not None or process.frames:
                    self.step(process, payload="kind")
                while process.outbox:
                    self.deliver(process)
                if process.is_sent_home:
                    self.die(process, 0)
        if before == (len(self.outcomes), self.core.counters.spawned, len(self.living)):
            self.jump()
