"""Which worker gets which task: warm instances, key affinity, how many calls travel together, when they are taken back.

Pure; called only by the scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from agentpool.core.records import TaskRecord, WorkerRecord

__all__ = ["GIVE_BACK_AFTER", "Durations", "KeyAffinity", "choose_worker", "fresh_worker", "may_wait_behind"]

#: Calls sent ahead to one busy worker at most.
MAX_BACKLOG: Final = 63
#: Calls travel together only where they are expected to take no longer than this, all of them, in seconds.
BATCH_SECONDS: Final = 0.002
#: A call that began so many seconds ago gives back what waits behind it.
GIVE_BACK_AFTER: Final = 0.01
#: Results of one function before its duration is trusted.
TRUST_AFTER: Final = 4
#: Functions whose durations are remembered.
_REMEMBERED: Final = 1024


class Durations:
    """Measured run times per function: exponentially weighted, and quick to rise, as one slow call is a warning."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: OrderedDict[object, tuple[int, float]] = OrderedDict()

    def measured(self, call_key: object, seconds: float) -> None:
        """A call of this function took so long."""
        known = self._known.get(call_key)
        if known is None:
            if len(self._known) >= _REMEMBERED:
                self._known.popitem(last=False)
            self._known[call_key] = (1, seconds)
            return
        count, mean = known
        weight = 0.5 if seconds > mean else 0.125
        self._known[call_key] = (count + 1, mean + (seconds - mean) * weight)

    def expected(self, call_key: object, calls: int) -> float | None:
        """Seconds that so many calls like this one will take; None: nobody knows."""
        known = self._known.get(call_key)
        return None if known is None else known[1] * calls

    def backlog_for(self, call_key: object) -> int:
        """How many calls like this one may wait in a worker behind the one it runs."""
        known = self._known.get(call_key)
        if known is None or known[0] < TRUST_AFTER:
            return 0
        mean = known[1]
        return MAX_BACKLOG if mean * MAX_BACKLOG <= BATCH_SECONDS else int(BATCH_SECONDS / mean)


class KeyAffinity:
    """Which worker ran the last task of a key. Bounded: the longest unused keys are forgotten."""

    __slots__ = ("_workers",)

    def __init__(self) -> None:
        self._workers: OrderedDict[str, WorkerRecord] = OrderedDict()

    def used(self, key: str, worker: WorkerRecord) -> None:
        """The worker runs a task of this key."""
        self._workers[key] = worker
        self._workers.move_to_end(key)
        if len(self._workers) > _REMEMBERED:
            self._workers.popitem(last=False)

    def worker_of(self, key: str) -> WorkerRecord | None:
        """The worker that ran the key's last task, alive or not."""
        return self._workers.get(key)


def choose_worker(task: TaskRecord, idle: Iterable[WorkerRecord], affinity: KeyAffinity) -> WorkerRecord:
    """The best idle worker for a task; there must be one.

    `idle` is in order of becoming idle. In this order: the worker of the task's key; one that holds a warm instance
    of its kind; the latest one that holds no warm instance (to leave those for their kind); the latest. The latest is
    preferred so that the others reach their idle timeout.
    """
    latest_first = list(idle)[::-1]
    spec = task.spec
    if spec.key is not None:
        preferred = affinity.worker_of(spec.key)
        if preferred is not None and any(worker is preferred for worker in latest_first):
            return preferred
    if spec.kind is not None:
        for worker in latest_first:
            if spec.kind in worker.warm_kinds:
                return worker
    for worker in latest_first:
        if not worker.warm_kinds:
            return worker
    return latest_first[0]


def fresh_worker(idle: Iterable[WorkerRecord]) -> WorkerRecord | None:
    """An idle worker that never ran a task, for a task that killed one before; None: there is none."""
    return next((worker for worker in idle if not worker.tasks_done), None)


def may_wait_behind(task: TaskRecord, head: TaskRecord) -> bool:
    """May this task be sent ahead to the worker that runs `head`, a call of which the duration is known?

    Only behind the same function, whose durations are alike; never behind one of lower priority, nor where the task
    has a worker of its own to prefer, nor behind a task that may kill its worker again.
    """
    spec = task.spec
    return (
        task.call_key == head.call_key
        and spec.kind is None
        and spec.key is None
        and spec.priority <= head.spec.priority
        and not head.is_isolated
        and head.spec.line is None
    )
