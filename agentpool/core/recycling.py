"""Which worker is recycled, and why; how often a worker is measured.

Pure functions over records; they change nothing but the fields of the worker they are given. Called only by the
scheduler.
"""

from __future__ import annotations

from random import Random
from typing import Final

from agentpool.config import MB, PoolSettings
from agentpool.core.records import TreeState, WorkerRecord

__all__ = [
    "always_over_warning",
    "baseline_warning",
    "is_over_soft_limit",
    "next_sample_interval",
    "note_warm",
    "record_reading",
    "set_soft_limit",
    "tasks_before_recycling",
]

#: Share by which `max_tasks_per_child` is lowered at random, so that workers of one age do not all end at once.
TASK_LIMIT_JITTER: Final = 0.1
#: Limits of the sampling interval of a busy worker, in seconds.
SAMPLE_FASTEST: Final = 0.01
SAMPLE_BUSY: Final = 0.25
SAMPLE_SLOWEST_BUSY: Final = 2.0


def tasks_before_recycling(settings: PoolSettings, rng: Random) -> int | None:
    """How many tasks this worker will run; None: any number. Small limits are exact: jitter starts at 10 tasks."""
    limit = settings.max_tasks_per_child
    if limit is None:
        return None
    return limit - rng.randint(0, int(limit * TASK_LIMIT_JITTER))


def set_soft_limit(settings: PoolSettings, worker: WorkerRecord) -> None:
    """Work out the RSS above which this worker is recycled after a task, after what that depends on has changed.

    A worker that is above `memory_limit_mb` when fresh would be recycled after every task, for ever (celery#4125):
    for it the limit counts as growth over its baseline. A growth limit of the task's own counts from the warm worker,
    and stands for all limits of the pool that the task does not set as well.
    """
    limits = []
    baseline = worker.baseline_bytes or 0
    absolute = worker.soft_limit_bytes
    own_growth = worker.growth_limit_bytes
    if absolute is None and own_growth is None and settings.memory_limit_mb is not None:
        absolute = int(settings.memory_limit_mb * MB)
    if absolute is not None:
        limits.append(absolute if baseline <= absolute else baseline + absolute)
    if own_growth is not None:
        if worker.warm_bytes is not None:
            limits.append(worker.warm_bytes + own_growth)
    elif settings.memory_growth_mb is not None:
        limits.append(baseline + int(settings.memory_growth_mb * MB))
    worker.limit_bytes = min(limits, default=None)


def note_warm(settings: PoolSettings, worker: WorkerRecord) -> None:
    """This reading is the first after its first task with a growth limit of its own: that growth counts from here."""
    if worker.growth_limit_bytes is not None and worker.warm_bytes is None:
        worker.warm_bytes = max(worker.rss_bytes, worker.baseline_bytes or 0)
        set_soft_limit(settings, worker)


def is_over_soft_limit(worker: WorkerRecord, rss_bytes: int) -> bool:
    """Is this reading above the limit that recycles the worker?"""
    limit = worker.limit_bytes
    return limit is not None and rss_bytes > limit


def baseline_warning(settings: PoolSettings, worker: WorkerRecord) -> str | None:
    """The one warning about workers that are over the limit before they did anything; None: they are not."""
    limit = settings.memory_limit_mb
    baseline = worker.baseline_bytes or 0
    if limit is None or baseline <= limit * MB:
        return None
    return (
        f"a fresh worker already uses {baseline / MB:.0f} MB (preload, initializer or agent setup), above "
        f"memory_limit_mb ({limit:g}); it will be recycled at {baseline / MB + limit:.0f} MB instead. Set "
        "memory_limit_mb above what a fresh worker needs, or memory_growth_mb"
    )


def always_over_warning(worker: WorkerRecord) -> str:
    """The one warning about workers that are over the limit after their first task, one after the other."""
    return (
        f"worker after worker is above its memory limit ({(worker.limit_bytes or 0) / MB:.0f} MB) after its first task "
        f"(now {worker.rss_bytes / MB:.0f} MB), so each task pays for a new process. Usually that is what the task "
        "imports: raise memory_limit_mb, or name those modules in preload=(...), which makes them part of the baseline"
    )


def next_sample_interval(worker: WorkerRecord, hard_limit_bytes: int | None, cleanup_interval: float) -> float:
    """Seconds until a busy worker is measured again.

    Without a limit that stops its task the reading only feeds reports: steady workers are read ever less often. With
    one, the next reading comes at a quarter of the predicted time to it, so that a fast allocation is caught in time.
    """
    slowest = min(SAMPLE_SLOWEST_BUSY, cleanup_interval)
    steady = min(max(worker.sample_interval * 1.5, SAMPLE_BUSY), slowest)
    if hard_limit_bytes is None:
        return steady
    if worker.rss_bytes >= hard_limit_bytes:
        return SAMPLE_FASTEST
    room = hard_limit_bytes - worker.rss_bytes
    # Nothing is known of the next allocation: one that starts now at 1 GB/s must still be seen before it is far over.
    at_worst = room / (1024 * MB)
    rate = _growth_per_second(worker)
    predicted = room / rate / 4 if rate > 0 else steady
    return max(SAMPLE_FASTEST, min(steady, predicted, max(at_worst, 0.02)))


def _growth_per_second(worker: WorkerRecord) -> float:
    if len(worker.samples) < 2:
        return 0.0
    (t0, b0), (t1, b1) = worker.samples[-2], worker.samples[-1]
    return (b1 - b0) / (t1 - t0) if t1 > t0 else 0.0


def record_reading(worker: WorkerRecord, now: float, reading: TreeState) -> None:
    """Note a reading on the worker."""
    worker.rss_bytes = reading.rss_bytes
    worker.processes = reading.processes
    worker.cpu_seconds = reading.cpu_seconds
    worker.sampled_at = now
    worker.samples.append((now, reading.rss_bytes))
