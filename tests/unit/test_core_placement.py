from __future__ import annotations

from typing import Any

import pytest

from agentpool.core import placement
from agentpool.core.placement import Durations, KeyAffinity, choose_worker, fresh_worker, may_wait_behind
from agentpool.core.records import TaskRecord, TaskSpec, WorkerRecord


def task(call_key: object = "f", **spec: Any) -> TaskRecord:
    return TaskRecord(1, TaskSpec(**spec), None, call_key)


def worker(number: int, *kinds: str, done: int = 1) -> WorkerRecord:
    record = WorkerRecord(number, 0.0)
    record.warm_kinds.update(kinds)
    record.tasks_done = done
    return record


class TestChoice:
    def test_the_latest_idle_worker_is_taken_so_that_the_others_reach_their_idle_timeout(self) -> None:
        assert choose_worker(task(), [worker(1), worker(2)], KeyAffinity()).id == 2

    def test_a_warm_instance_of_the_kind_is_preferred(self) -> None:
        idle = [worker(1, "auditor"), worker(2), worker(3, "analyst")]
        assert choose_worker(task(kind="auditor"), idle, KeyAffinity()).id == 1

    def test_a_kind_without_a_warm_instance_takes_a_worker_without_any(self) -> None:
        idle = [worker(1), worker(2, "analyst")]
        assert choose_worker(task(kind="auditor"), idle, KeyAffinity()).id == 1

    def test_a_task_without_a_kind_leaves_warm_instances_for_their_kind(self) -> None:
        assert choose_worker(task(), [worker(1), worker(2, "analyst")], KeyAffinity()).id == 1

    def test_where_all_are_warm_for_others_the_latest_is_taken(self) -> None:
        assert choose_worker(task(kind="c"), [worker(1, "a"), worker(2, "b")], KeyAffinity()).id == 2

    def test_the_worker_of_the_key_comes_before_a_warm_instance(self) -> None:
        affinity, idle = KeyAffinity(), [worker(1), worker(2, "a")]
        affinity.used("session-7", idle[0])
        assert choose_worker(task(key="session-7", kind="a"), idle, affinity).id == 1

    def test_a_key_that_is_new_or_whose_worker_is_busy_takes_the_next_best(self) -> None:
        affinity, idle = KeyAffinity(), [worker(1), worker(2)]
        affinity.used("session-7", worker(3))
        assert choose_worker(task(key="session-7"), idle, affinity).id == 2
        assert choose_worker(task(key="session-8"), idle, affinity).id == 2

    def test_a_fresh_worker_never_ran_a_task(self) -> None:
        assert fresh_worker([worker(1), worker(2)]) is None
        assert fresh_worker([worker(1), fresh := worker(2, done=0), worker(3, done=0)]) is fresh


class TestKeyAffinity:
    def test_the_last_worker_counts(self) -> None:
        affinity = KeyAffinity()
        affinity.used("k", worker(1))
        affinity.used("k", second := worker(2))
        assert affinity.worker_of("k") is second
        assert affinity.worker_of("other") is None

    def test_it_is_bounded_and_forgets_the_longest_unused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "_REMEMBERED", 3)
        affinity = KeyAffinity()
        for key in ("a", "b", "c", "a", "d"):
            affinity.used(key, worker(1))
        assert [key for key in "abcd" if affinity.worker_of(key)] == ["a", "c", "d"]


class TestDurations:
    def measured(self, *seconds: float) -> Durations:
        durations = Durations()
        for each in seconds:
            durations.measured("f", each)
        return durations

    def test_an_unknown_function_goes_alone(self) -> None:
        assert Durations().backlog_for("f") == 0
        assert self.measured(1e-6, 1e-6, 1e-6).backlog_for("f") == 0

    def test_very_short_calls_travel_in_full_batches(self) -> None:
        assert self.measured(*[1e-6] * 4).backlog_for("f") == placement.MAX_BACKLOG

    def test_a_batch_is_expected_to_take_no_longer_than_its_time(self) -> None:
        assert self.measured(*[1e-4] * 4).backlog_for("f") == 20
        assert self.measured(*[0.003] * 4).backlog_for("f") == 0

    def test_one_slow_call_is_a_warning_that_many_quick_ones_must_undo(self) -> None:
        durations = self.measured(*[1e-5] * 50, 0.1)
        assert durations.backlog_for("f") == 0
        quick_ones = 0
        while durations.backlog_for("f") < 10:
            durations.measured("f", 1e-5)
            quick_ones += 1
        assert quick_ones > 10

    def test_functions_are_remembered_one_by_one_and_in_a_bounded_number(self, monkeypatch) -> None:
        monkeypatch.setattr(placement, "_REMEMBERED", 2)
        durations = self.measured(*[1e-6] * 4)
        assert durations.backlog_for("g") == 0
        durations.measured("g", 1.0)
        durations.measured("h", 1.0)
        assert durations.backlog_for("f") == 0
        assert len(durations._known) == 2


@pytest.mark.parametrize(
    ("may", "behind", "head"),
    [
        (True, {}, {}),
        (True, {}, {"priority": 5}),
        (False, {"priority": 5}, {}),
        (False, {"call_key": "g"}, {}),
        (False, {"kind": "a"}, {}),
        (False, {"key": "k"}, {}),
    ],
)
def test_only_calls_of_one_function_and_no_higher_priority_without_a_worker_to_prefer_wait_behind_each_other(
    may: bool, behind: dict[str, Any], head: dict[str, Any]
) -> None:
    assert may_wait_behind(task(**behind), task(**head)) is may


def test_nothing_waits_behind_a_task_that_killed_a_worker() -> None:
    killer = task()
    killer.is_isolated = True
    assert not may_wait_behind(task(), killer)
