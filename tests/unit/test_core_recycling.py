from __future__ import annotations

from random import Random
from typing import Any

import pytest

from agentpool.config import MB, PoolSettings
from agentpool.core import recycling
from agentpool.core.records import TreeState, WorkerRecord


def made(baseline_mb: float | None = None, task_limit_mb: float | None = None, **settings: Any) -> WorkerRecord:
    """A worker with its soft limit worked out."""
    worker = WorkerRecord(1, 0.0)
    worker.baseline_bytes = None if baseline_mb is None else int(baseline_mb * MB)
    worker.soft_limit_bytes = None if task_limit_mb is None else int(task_limit_mb * MB)
    recycling.set_soft_limit(PoolSettings.make(**settings), worker)
    return worker


@pytest.mark.parametrize(
    ("limit_mb", "case"),
    [
        (100, {"baseline_mb": 20}),
        (100, {"baseline_mb": 100}),
        (250, {"baseline_mb": 150}),
        (40, {"baseline_mb": 20, "task_limit_mb": 40}),
        (75, {"baseline_mb": 45, "memory_growth_mb": 30}),
        (100, {"baseline_mb": 80, "memory_growth_mb": 30}),
        (180, {"baseline_mb": 150, "memory_growth_mb": 30}),
        (180, {"baseline_mb": 150, "memory_growth_mb": 30, "memory_limit_mb": None}),
        (60, {"baseline_mb": 20, "task_limit_mb": 60, "memory_limit_mb": None}),
    ],
)
def test_the_soft_limit_is_the_lowest_of_absolute_and_growth_and_relative_where_the_worker_is_above_it_when_fresh(
    limit_mb: int, case: dict[str, Any]
) -> None:
    worker = made(**case)
    assert worker.limit_bytes == limit_mb * MB
    assert not recycling.is_over_soft_limit(worker, limit_mb * MB)
    assert recycling.is_over_soft_limit(worker, limit_mb * MB + 1)


def test_without_a_limit_no_worker_is_over_it() -> None:
    worker = made(20, memory_limit_mb=None)
    assert worker.limit_bytes is None
    assert not recycling.is_over_soft_limit(worker, 10**15)


def test_a_worker_above_its_limit_when_fresh_is_warned_of_with_cause_and_cure() -> None:
    settings = PoolSettings.make(memory_limit_mb=100)
    assert recycling.baseline_warning(settings, made(100)) is None
    warning = recycling.baseline_warning(settings, made(150))
    assert warning == (
        "a fresh worker already uses 150 MB (preload, initializer or agent setup), above memory_limit_mb (100); "
        "it will be recycled at 250 MB instead. Set memory_limit_mb above what a fresh worker needs, or "
        "memory_growth_mb"
    )
    assert recycling.baseline_warning(PoolSettings.make(memory_limit_mb=None), made(150)) is None


def test_the_warning_about_workers_that_are_always_over_names_the_cure() -> None:
    worker = made(20)
    worker.rss_bytes = 122 * MB
    text = recycling.always_over_warning(worker)
    assert "above its memory limit (100 MB) after its first task (now 122 MB)" in text
    assert "raise memory_limit_mb, or name those modules in preload" in text


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_small_task_limits_are_exact(limit: int) -> None:
    settings = PoolSettings.make(max_tasks_per_child=limit)
    assert {recycling.tasks_before_recycling(settings, Random(seed)) for seed in range(50)} == {limit}


def test_greater_task_limits_are_lowered_by_chance_by_a_tenth_at_most_and_never_raised() -> None:
    settings = PoolSettings.make(max_tasks_per_child=100)
    limits = {recycling.tasks_before_recycling(settings, Random(seed)) for seed in range(500)}
    assert limits == set(range(90, 101))
    assert recycling.tasks_before_recycling(PoolSettings.make(), Random(0)) is None


def test_a_reading_is_noted() -> None:
    worker = made()
    for now in range(10):
        recycling.record_reading(worker, now, TreeState(now * MB, processes=3, cpu_seconds=1.5))
    assert (worker.rss_bytes, worker.processes, worker.cpu_seconds, worker.sampled_at) == (9 * MB, 3, 1.5, 9)
    assert list(worker.samples) == [(now, now * MB) for now in range(2, 10)]


class TestInterval:
    def test_without_a_limit_steady_workers_are_read_ever_less_often(self) -> None:
        worker, intervals = made(), []
        for _ in range(8):
            worker.sample_interval = recycling.next_sample_interval(worker, None, 60.0)
            intervals.append(worker.sample_interval)
        assert intervals[0] == recycling.SAMPLE_BUSY
        assert intervals == sorted(intervals)
        assert intervals[-1] == recycling.SAMPLE_SLOWEST_BUSY

    def test_never_less_often_than_the_cleanup_interval(self) -> None:
        assert recycling.next_sample_interval(made(), None, 0.1) == 0.1

    def test_the_nearer_to_the_limit_the_more_often(self) -> None:
        worker, intervals = made(), []
        for rss_mb in (10, 500, 900, 990, 1000, 1200):
            worker.rss_bytes = rss_mb * MB
            intervals.append(recycling.next_sample_interval(worker, 1000 * MB, 60.0))
        assert intervals == sorted(intervals, reverse=True)
        assert intervals[-2:] == [recycling.SAMPLE_FASTEST] * 2

    def test_the_next_reading_comes_well_before_a_growing_worker_reaches_it(self) -> None:
        worker = made()
        recycling.record_reading(worker, 0.0, TreeState(100 * MB))
        recycling.record_reading(worker, 1.0, TreeState(500 * MB))
        worker.sample_interval = 2.0
        assert recycling.next_sample_interval(worker, 700 * MB, 60.0) == pytest.approx(200 / 400 / 4)

    def test_a_shrinking_worker_and_two_readings_of_one_moment_say_nothing_of_growth(self) -> None:
        worker = made()
        recycling.record_reading(worker, 0.0, TreeState(500 * MB))
        recycling.record_reading(worker, 0.0, TreeState(600 * MB))
        same_moment = recycling.next_sample_interval(worker, 4000 * MB, 60.0)
        recycling.record_reading(worker, 1.0, TreeState(100 * MB))
        assert same_moment == recycling.next_sample_interval(worker, 4000 * MB, 60.0) == recycling.SAMPLE_BUSY


@pytest.mark.parametrize(("rss_mb", "baseline_mb", "warm_mb"), [(150, 100, 150), (50, 100, 100)])
def test_growth_counts_from_no_less_than_the_fresh_worker_had(rss_mb: int, baseline_mb: int, warm_mb: int) -> None:
    worker = WorkerRecord(1, 0.0)
    worker.growth_limit_bytes, worker.rss_bytes, worker.baseline_bytes = 10 * MB, rss_mb * MB, baseline_mb * MB
    recycling.note_warm(PoolSettings(), worker)
    assert worker.warm_bytes == warm_mb * MB
    assert worker.limit_bytes == (warm_mb + 10) * MB
