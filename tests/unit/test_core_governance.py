from __future__ import annotations

from typing import Any

import pytest

from agentpool.config import MB, BreakerSettings, PoolSettings
from agentpool.core.breaker import Breaker
from agentpool.core.governance import CPU_CONSECUTIVE, HYSTERESIS, Governor, biggest_offender, leaving_bytes
from agentpool.core.records import HostState, StopCause, TaskRecord, TaskSpec, WorkerRecord
from agentpool.core.retry import RetryPolicy
from agentpool.core.transitions import BreakerState, WorkerState


def make(**settings: Any) -> tuple[Governor, Breaker]:
    breaker = Breaker(BreakerSettings())
    return Governor(PoolSettings.make(**settings), breaker), breaker


def host(
    available_mb: float = 8000, cpu: float = 0.0, pressure: float | None = None, source: str = "host"
) -> HostState:
    return HostState(10_000 * MB, int(available_mb * MB), cpu, pressure, source)


class TestAvailableMemory:
    def test_below_the_floor_the_breaker_opens_at_once_and_says_why(self) -> None:
        governor, breaker = make(min_available_mb=512)
        governor.host_sampled(0.0, host(312), 0.0)
        assert breaker.state is BreakerState.OPEN
        assert breaker.reason == "host has 312 MB available, needs 512"
        assert governor.reasons == {"available": breaker.reason}

    def test_a_container_is_named(self) -> None:
        governor, breaker = make(min_available_mb=512)
        governor.host_sampled(0.0, host(312, source="cgroup v2 /docker/abc"), 0.0)
        assert breaker.reason.startswith("cgroup v2 /docker/abc has")

    def test_the_default_floor_is_5_percent_of_the_total(self) -> None:
        governor, _ = make()
        assert governor.floor_bytes(host()) == 500 * MB

    def test_a_floor_of_zero_is_taken_as_said(self) -> None:
        governor, breaker = make(min_available_mb=0)
        governor.host_sampled(0.0, host(0), 0.0)
        assert breaker.state is BreakerState.CLOSED

    def test_pressure_above_its_threshold_counts_as_too_little(self) -> None:
        governor, breaker = make(pressure_threshold=60)
        governor.host_sampled(0.0, host(pressure=75), 0.0)
        assert breaker.reason == "memory pressure is 75 % (PSI some avg10), above the threshold of 60 %"

    def test_it_recovers_after_two_good_readings_in_a_row(self) -> None:
        governor, breaker = make(min_available_mb=500)
        governor.host_sampled(0.0, host(400), 0.0)
        governor.host_sampled(2.0, host(600), 0.0)
        assert breaker.state is BreakerState.OPEN
        governor.host_sampled(4.0, host(600), 0.0)
        assert breaker.state is BreakerState.CLOSED
        assert governor.reasons == {}

    @pytest.mark.parametrize("reading", [host(540), host(pressure=58)])
    def test_a_reading_only_just_good_keeps_it_open_and_starts_counting_anew(self, reading: HostState) -> None:
        governor, breaker = make(min_available_mb=500, pressure_threshold=60)
        governor.host_sampled(0.0, host(400), 0.0)
        for now in (2.0, 6.0, 10.0):
            governor.host_sampled(now, host(600), 0.0)
            governor.host_sampled(now + 2, reading, 0.0)
        assert breaker.state is BreakerState.OPEN
        assert "available" in governor.reasons


class TestCpu:
    def test_a_high_reading_must_be_sustained_to_degrade(self) -> None:
        governor, breaker = make()
        for now in range(2):
            governor.host_sampled(now, host(cpu=95), 0.0)
        assert governor.reasons == {}
        governor.host_sampled(2, host(cpu=95), 0.0)
        assert governor.reasons == {"cpu": "host CPU is at 95 %, above the threshold of 80 %"}
        assert breaker.state is BreakerState.CLOSED

    def test_it_is_taken_back_with_hysteresis(self) -> None:
        governor, _ = make()
        for now in range(3):
            governor.host_sampled(now, host(cpu=95), 0.0)
        governor.host_sampled(3, host(cpu=78), 0.0)
        assert "cpu" in governor.reasons
        governor.host_sampled(4, host(cpu=70), 0.0)
        assert governor.reasons == {}

    @pytest.mark.parametrize(("policy", "own", "forbids"),
                             [("throttle", 10.0, True), ("throttle", 90.0, False), ("report", 10.0, False)])
    def test_only_the_cpu_of_others_and_only_when_asked_for_forbids_growth(self, policy, own, forbids) -> None:
        governor, _ = make(cpu_policy=policy)
        for now in range(3):
            assert not governor.forbids_growth
            governor.host_sampled(now, host(cpu=95), own)
        assert governor.forbids_growth is forbids


class TestPoolMemory:
    def test_above_the_alert_the_pool_is_degraded_and_goes_on(self) -> None:
        governor, breaker = make()
        governor.pool_sampled(0.0, 501 * MB)
        assert governor.reasons == {"memory": "all workers use 501 MB together, above alert_memory_mb (500)"}
        assert breaker.state is BreakerState.CLOSED
        governor.pool_sampled(1.0, 480 * MB)
        assert "memory" in governor.reasons
        governor.pool_sampled(2.0, 450 * MB)
        assert governor.reasons == {}

    def test_above_the_critical_value_the_breaker_opens_with_hysteresis(self) -> None:
        governor, breaker = make()
        governor.pool_sampled(1.0, 801 * MB)
        assert breaker.reason == "all workers use 801 MB together, above critical_memory_mb (800)"
        assert governor.critical_since == 1.0
        governor.pool_sampled(2.0, 900 * MB)
        assert governor.critical_since == 1.0
        governor.pool_sampled(3.0, 790 * MB)
        assert governor.critical_since is None
        assert breaker.state is BreakerState.OPEN
        governor.pool_sampled(4.0, 720 * MB)
        assert breaker.state is BreakerState.CLOSED

    def test_without_limits_there_is_nothing_to_be_above(self) -> None:
        governor, breaker = make(memory_limit_mb=None)
        governor.pool_sampled(0.0, 10**15)
        assert governor.reasons == {}
        assert breaker.state is BreakerState.CLOSED

    def test_a_derived_limit_costs_no_task_unless_the_host_is_short_twice_in_a_row(self) -> None:
        governor, _ = make()
        governor.pool_sampled(0.0, 900 * MB)
        assert not governor.may_stop_one
        governor.host_sampled(0.0, host(100), 0.0)
        assert not governor.may_stop_one
        governor.host_sampled(2.0, host(100), 0.0)
        assert governor.may_stop_one
        governor.host_sampled(4.0, host(8000), 0.0)
        assert not governor.may_stop_one

    def test_a_limit_that_the_user_set_does(self) -> None:
        governor, _ = make(critical_memory_mb=700)
        assert governor.may_stop_one


def worker(number: int, rss_mb: int, state: WorkerState = WorkerState.BUSY, **spec: Any) -> WorkerRecord:
    record = WorkerRecord(number, 0.0)
    record.state, record.rss_bytes = state, rss_mb * MB
    if state is WorkerState.BUSY:
        record.running = TaskRecord(number, TaskSpec(**spec), None)
        record.running.started_at = float(number)
    return record


def stopped(record: WorkerRecord) -> WorkerRecord:
    assert record.running is not None
    record.running.stop = StopCause(OSError(), 0.0)
    return record


class TestVictim:
    def test_the_biggest_is_stopped_whatever_its_retry_policy(self) -> None:
        small, big = worker(1, 100, policy=RetryPolicy()), worker(2, 300)
        assert biggest_offender([small, big]) is big

    def test_of_equal_ones_that_which_may_run_again_then_the_latest_begun(self) -> None:
        first, retried, last = worker(1, 100), worker(2, 100, policy=RetryPolicy()), worker(3, 100)
        assert biggest_offender([first, retried, last]) is retried
        assert biggest_offender([first, last]) is last

    def test_who_runs_nothing_or_is_stopped_already_is_no_victim(self) -> None:
        assert biggest_offender([worker(1, 900, WorkerState.IDLE), stopped(worker(2, 800))]) is None

    def test_memory_of_those_who_go_is_about_to_be_free(self) -> None:
        workers = [worker(1, 1, WorkerState.RETIRING), worker(2, 10, WorkerState.KILLED), stopped(worker(3, 100)),
                   worker(4, 1000), worker(5, 10_000, WorkerState.IDLE)]
        assert leaving_bytes(workers) == 111 * MB


class TestToTheLimit:
    """What is just at a limit is not above it, and good enough is good enough."""

    def test_pressure_at_its_threshold_is_bearable(self) -> None:
        governor, breaker = make(pressure_threshold=60)
        governor.host_sampled(0.0, host(pressure=60), 0.0)
        assert breaker.state is BreakerState.CLOSED

    @pytest.mark.parametrize(("available", "pressure", "is_closed"), [
        (500 * HYSTERESIS, 60 / HYSTERESIS, True), (500 * HYSTERESIS - 1, 0, False),
        (8000, 60 / HYSTERESIS + 0.1, False),
    ])
    def test_it_recovers_at_a_distance_from_both(self, available: float, pressure: float, is_closed: bool) -> None:
        governor, breaker = make(min_available_mb=500, pressure_threshold=60)
        governor.host_sampled(0.0, host(400), 0.0)
        for now in (2.0, 4.0, 6.0):
            governor.host_sampled(now, host(available, pressure=pressure), 0.0)
        assert (breaker.state is BreakerState.CLOSED) is is_closed

    def test_the_breaker_that_recovers_is_told_when(self) -> None:
        """Failed starts had opened it as well: their 30 seconds are over by then, or not."""
        for good_at, state in ((10.0, BreakerState.OPEN), (100.0, BreakerState.HALF_OPEN)):
            governor, breaker = make(min_available_mb=500)
            for number in range(5):
                breaker.start_failed(float(number), "no luck", is_probe=False)
            governor.host_sampled(5.0, host(400), 0.0)
            governor.host_sampled(good_at, host(), 0.0)
            governor.host_sampled(good_at + 2, host(), 0.0)
            assert breaker.state is state

    def test_one_low_reading_between_good_ones_stops_nobody(self) -> None:
        governor, _ = make(min_available_mb=500)
        governor.host_sampled(0.0, host(400), 0.0)
        assert not governor.may_stop_one
        governor.host_sampled(2.0, host(), 0.0)
        governor.host_sampled(4.0, host(400), 0.0)
        assert not governor.may_stop_one
        governor.host_sampled(6.0, host(400), 0.0)
        assert governor.may_stop_one

    def test_the_first_good_reading_is_one_of_two(self) -> None:
        governor, breaker = make(min_available_mb=500)
        governor._breaker.hold("available", "by hand")
        governor.host_sampled(0.0, host(), 0.0)
        assert breaker.state is BreakerState.OPEN
        governor.host_sampled(2.0, host(), 0.0)
        assert breaker.state is BreakerState.CLOSED

    def test_cpu_at_its_threshold_is_no_reason(self) -> None:
        governor, _ = make(cpu_threshold_percent=80)
        for now in range(20):
            governor.host_sampled(float(now), host(cpu=80.0), 0.0)
        assert governor.reasons == {}

    def test_high_cpu_is_counted_in_a_row_from_nothing(self) -> None:
        governor, _ = make(cpu_threshold_percent=80)
        now = 0.0
        for _ in range(5):
            for cpu in [90.0] * (CPU_CONSECUTIVE - 1) + [80.0]:
                governor.host_sampled(now, host(cpu=cpu), 0.0)
                now += 1
        assert governor.reasons == {}

    def test_cpu_is_good_again_at_its_distance(self) -> None:
        governor, _ = make(cpu_threshold_percent=80)
        for now in range(CPU_CONSECUTIVE):
            governor.host_sampled(float(now), host(cpu=90.0), 0.0)
        assert governor.reasons
        governor.host_sampled(50.0, host(cpu=80 / HYSTERESIS + 0.1), 0.0)
        assert governor.reasons
        governor.host_sampled(51.0, host(cpu=80 / HYSTERESIS), 0.0)
        assert governor.reasons == {}

    def test_others_use_what_this_pool_does_not(self) -> None:
        governor, _ = make()
        governor.host_sampled(0.0, host(cpu=50.0), 49.5)
        assert governor.others_cpu_percent == 0.5
        governor.host_sampled(1.0, host(cpu=50.0), 60.0)
        assert governor.others_cpu_percent == 0.0
