"""A bench for the core: a bare scheduler, a hand on everything that it asks for, and a clock that a test moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from agentpool.config import MB, PoolSettings
from agentpool.core import actions as act
from agentpool.core.host_scheduler import HostScheduler
from agentpool.core.invariants import check
from agentpool.core.records import HostState, TaskRecord, TaskSpec, TreeState, WorkerExit, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.core.transitions import TaskState

A = TypeVar("A")

FRESH_BYTES = 20 * MB
PLENTY = HostState(total_bytes=10_000 * MB, available_bytes=8_000 * MB)


class Bench:
    """Events go in by name; what comes out is sorted into `sent`, `outcomes` and `actions`. Rules are checked always.

    Questions about the machine are answered with `host` at once; a test that wants to do that sets `host` to None.
    """

    def __init__(self, **settings: Any) -> None:
        made = PoolSettings.make(**settings)
        self.core = Scheduler(made, seed=1) if made.budget is None else HostScheduler(made, seed=1)
        self.now = 0.0
        self.host: HostState | None = PLENTY
        #: what was asked for, in order, but for dispatches, outcomes and readings of the machine
        self.actions: list[Any] = []
        #: (worker, task) in order of dispatch
        self.sent: list[tuple[WorkerRecord, TaskRecord]] = []
        #: task id -> (is_value, payload)
        self.outcomes: dict[int, tuple[bool, Any]] = {}
        self.host_asked = 0
        self._ids = iter(range(1, 1 << 30))

    def take(self) -> None:
        """Perform what can be performed here."""
        check(self.core)
        while actions := self.core.take_actions(self.now):
            for action in actions:
                self._sort(action)
        check(self.core)
        self.core.story()  # must not fail itself when a defect is to be reported

    def _sort(self, action: Any) -> None:
        if isinstance(action, tuple):
            if action[0] == act.DISPATCH:
                self.sent.append((action[1], action[2]))
            else:
                assert action[1].id not in self.outcomes, "resolved twice"
                self.outcomes[action[1].id] = (action[2], action[3])
        elif isinstance(action, act.SampleHost):
            self.host_asked += 1
            if self.host is not None:
                self.core.host_sampled(self.now, self.host)
        else:
            self.actions.append(action)

    def asked(self, kind: type[A]) -> list[A]:
        """The actions of one kind since they were asked for last; they are taken out."""
        found = [action for action in self.actions if isinstance(action, kind)]
        self.actions = [action for action in self.actions if not isinstance(action, kind)]
        return found

    # -- events --------------------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Time passes, each deadline on the way is kept."""
        end = self.now + seconds
        while (deadline := self.core.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.core.tick(self.now)
            self.take()
        self.now = end

    def submit(self, call_key: object = None, **spec: Any) -> TaskRecord:
        task = TaskRecord(next(self._ids), TaskSpec(**spec), None, call_key)
        self.core.submit(self.now, task)
        self.take()
        return task

    def ready(self, worker: WorkerRecord, rss_bytes: int = FRESH_BYTES) -> WorkerRecord:
        self.core.worker_spawned(self.now, worker, 100 + worker.id)
        self.core.worker_ready(self.now, worker, 100 + worker.id, rss_bytes)
        self.take()
        return worker

    def spawned(self) -> list[WorkerRecord]:
        """Workers that were asked for since."""
        return [action.worker for action in self.asked(act.Spawn)]

    def started(self, **spec: Any) -> tuple[TaskRecord, WorkerRecord]:
        """A task, and a worker made for it, which runs it."""
        task = self.submit(**spec)
        if task.state is TaskState.QUEUED:
            (worker,) = self.spawned()
            self.ready(worker)
        assert task.state is TaskState.RUNNING
        assert task.worker is not None
        return task, task.worker

    def finish(self, task: TaskRecord, value: object = None, *, seconds: float = 0.0, rss_bytes: int = 0,
               peak_bytes: int = 0) -> None:
        self._ended(task, True, value, seconds, rss_bytes, peak_bytes)

    def fail(self, task: TaskRecord, error: BaseException, *, seconds: float = 0.0) -> None:
        self._ended(task, False, error, seconds, 0, 0)

    def _ended(self, task: TaskRecord, is_value: bool, payload: object, seconds: float, rss: int, peak: int) -> None:
        assert task.worker is not None
        self.core.task_finished(self.now, task.worker, task, is_value=is_value, payload=payload, seconds=seconds,
                                rss_bytes=rss, peak_bytes=peak)
        self.take()

    def idle_worker(self, **finish: Any) -> WorkerRecord:
        """A worker that has run one task."""
        task, worker = self.started()
        self.finish(task, **finish)
        return worker

    def exit(self, worker: WorkerRecord, code: int | None = -9, *, began: bool = True, **how: Any) -> None:
        self.core.worker_exited(self.now, worker, WorkerExit(exit_code=code, began=began, **how))
        self.take()

    def sample(self, worker: WorkerRecord, rss_mb: float | None) -> None:
        reading = None if rss_mb is None else TreeState(int(rss_mb * MB))
        self.core.worker_sampled(self.now, worker, reading)
        self.take()

    def do(self, event: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Any other event of the core: `do(core.shutdown, cancel_futures=True)`."""
        result = event(self.now, *args, **kwargs)
        self.take()
        return result


@pytest.fixture
def make_bench() -> type[Bench]:
    return Bench
