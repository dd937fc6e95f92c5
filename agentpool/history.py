"""What became of each attempt of a task, put together when somebody asks for it. Any thread may call it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from agentpool.errors import MemoryLimitError, TaskKilledError, TaskTimeoutError, WorkerCrashedError

if TYPE_CHECKING:
    from agentpool.core.records import TaskRecord, WorkerRecord

__all__ = ["Attempt", "attempts_of"]

_OUTCOMES: Final = (
    (WorkerCrashedError, "crashed"),
    (TaskTimeoutError, "timed_out"),
    (MemoryLimitError, "over_memory"),
    (TaskKilledError, "killed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of a task: one that began, whatever came of it.

    number: from 1. Times in seconds since the epoch; queued_at: since when it waited for this attempt; ended_at: None
    while it runs. outcome: "running", "returned", "raised", "crashed" (its worker died), "timed_out", "over_memory" or
    "killed". error: in words, "" where there is none. peak_rss_bytes: the most memory seen in its worker's process tree
    meanwhile, 0: it was too short to be seen.
    """

    number: int
    worker_id: int | None
    worker_pid: int | None
    queued_at: float
    started_at: float
    ended_at: float | None
    outcome: str
    error: str
    peak_rss_bytes: int

    @property
    def seconds(self) -> float:
        """How long it ran, or runs."""
        return (time.time() if self.ended_at is None else self.ended_at) - self.started_at


def attempts_of(
    task: TaskRecord, worker: WorkerRecord | None, ended_at: float | None, error: BaseException | None
) -> list[Attempt]:
    """All attempts, oldest first. `worker`, `ended_at` (None: not yet) and `error` are those of the last one."""
    past = task.past or []
    ends = [(old.worker, old.queued_at, old.started_at, old.ended_at, old.error, old.peak_rss_bytes) for old in past]
    found: list[tuple[WorkerRecord | None, float, float, float | None, BaseException | None, int]] = [*ends]
    if task.attempts > len(past):
        found.append((worker, task.queued_at, task.started_at, ended_at, error, task.peak_rss_bytes))
    offset = time.time() - time.monotonic()
    return [
        Attempt(
            number=number,
            worker_id=None if by is None else by.id,
            worker_pid=None if by is None else by.pid,
            queued_at=queued + offset,
            started_at=started + offset,
            ended_at=None if ended is None else ended + offset,
            outcome="running" if ended is None else _outcome(failure),
            error="" if failure is None else f"{type(failure).__name__}: {failure}",
            peak_rss_bytes=peak,
        )
        for number, (by, queued, started, ended, failure, peak) in enumerate(found, 1)
    ]


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "returned"
    return next((word for kind, word in _OUTCOMES if isinstance(error, kind)), "raised")
