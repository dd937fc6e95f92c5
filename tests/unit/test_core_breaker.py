from __future__ import annotations

import pytest

from agentpool.config import BreakerSettings
from agentpool.core.breaker import Breaker
from agentpool.core.transitions import BREAKER_TRANSITIONS, BreakerState
from agentpool.errors import InternalError

CLOSED, OPEN, HALF_OPEN, FORCED = BreakerState


def make(**settings: float) -> Breaker:
    return Breaker(BreakerSettings(**{"failure_threshold": 3, "window_seconds": 60.0, "open_seconds": 30.0,
                                      "max_open_seconds": 300.0, **settings}))  # type: ignore[arg-type]


def fail(breaker: Breaker, *moments: float) -> None:
    for now in moments:
        breaker.start_failed(now, f"fork failed at {now:g}", is_probe=False)


def opened() -> Breaker:
    breaker = make()
    fail(breaker, 0.0, 1.0, 2.0)
    return breaker


def half_open() -> Breaker:
    breaker = opened()
    breaker.tick(32.0)
    return breaker


def changes(breaker: Breaker) -> list[tuple[BreakerState, BreakerState]]:
    taken = [(old, new) for old, new, _ in breaker.changes]
    breaker.changes.clear()
    return taken


def test_a_new_breaker_is_closed_and_starts_are_allowed() -> None:
    breaker = make()
    assert breaker.state is CLOSED
    assert breaker.reason == ""
    assert breaker.allows_start()
    assert not breaker.start_began()
    breaker.start_succeeded(is_probe=False)
    assert breaker.changes == []
    assert breaker.deadline() is None


def test_failed_starts_within_the_window_open_it_and_the_reason_says_so() -> None:
    breaker = make()
    fail(breaker, 0.0, 1.0)
    assert breaker.state is CLOSED
    fail(breaker, 2.0)
    assert breaker.state is OPEN
    assert not breaker.allows_start()
    assert breaker.reason == "3 failed starts within 60 s, last: fork failed at 2"
    assert breaker.failure_count(2.0) == 3
    assert changes(breaker) == [(CLOSED, OPEN)]


def test_failures_out_of_the_window_do_not_count() -> None:
    breaker = make()
    fail(breaker, 0.0, 1.0, 60.5, 61.0)
    assert breaker.state is CLOSED
    assert breaker.failure_count(61.0) == 2
    assert breaker.failure_count(200.0) == 0


def test_it_is_tried_again_after_open_seconds() -> None:
    breaker = opened()
    assert breaker.deadline() == 32.0
    breaker.tick(31.9)
    assert breaker.state is OPEN
    breaker.tick(32.0)
    assert breaker.state is HALF_OPEN
    assert breaker.reason == "waiting time is over, and one worker is tried"
    assert breaker.deadline() is None


def test_half_open_admits_one_probe_at_a_time() -> None:
    breaker = half_open()
    assert breaker.allows_start()
    assert breaker.start_began()
    assert not breaker.allows_start()
    breaker.probe_abandoned()
    assert breaker.allows_start()


def test_a_probe_that_becomes_ready_closes_it_and_forgets_the_failures() -> None:
    breaker = half_open()
    breaker.start_began()
    breaker.start_succeeded(is_probe=True)
    assert breaker.state is CLOSED
    assert breaker.reason == ""
    assert breaker.failure_count(33.0) == 0
    assert not breaker.is_probing
    assert changes(breaker) == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]


def test_a_start_from_before_is_no_probe_and_changes_nothing() -> None:
    breaker = half_open()
    breaker.start_succeeded(is_probe=False)
    assert breaker.state is HALF_OPEN
    fail(breaker, 33.0, 33.0, 33.0)
    assert breaker.state is HALF_OPEN


def test_each_failed_probe_doubles_the_wait_up_to_the_maximum() -> None:
    breaker = opened()
    waits = []
    for _ in range(5):
        now = breaker.deadline()
        assert now is not None
        breaker.tick(now)
        breaker.start_began()
        breaker.start_failed(now, "it hangs", is_probe=True)
        assert breaker.state is OPEN
        assert breaker.reason == "the probe failed: it hangs"
        waits.append(breaker.retry_at - now)
    assert waits == [60.0, 120.0, 240.0, 300.0, 300.0]


def test_the_wait_is_short_again_after_a_success() -> None:
    breaker = half_open()
    breaker.start_began()
    breaker.start_failed(32.0, "no", is_probe=True)
    breaker.tick(92.0)
    breaker.start_began()
    breaker.start_succeeded(is_probe=True)
    fail(breaker, 100.0, 101.0, 102.0)
    assert breaker.deadline() == 132.0


def test_a_hold_opens_it_and_its_release_closes_it_as_no_start_had_failed() -> None:
    breaker = make()
    breaker.hold("available", "host has 312 MB available, needs 512")
    assert breaker.state is OPEN
    assert breaker.reason == "host has 312 MB available, needs 512"
    assert breaker.deadline() is None
    breaker.tick(1e9)
    assert breaker.state is OPEN
    breaker.release("available", 1e9)
    assert breaker.state is CLOSED
    assert breaker.reason == ""


def test_it_stays_open_until_the_last_hold_is_released() -> None:
    breaker = make()
    breaker.hold("available", "too little memory")
    breaker.hold("critical", "the pool is too big")
    breaker.release("available", 1.0)
    assert breaker.state is OPEN
    assert breaker.reason == "the pool is too big"
    breaker.release("critical", 2.0)
    assert breaker.state is CLOSED


def test_a_hold_shows_the_latest_figures_and_tells_listeners_once() -> None:
    breaker = make()
    breaker.hold("available", "312 MB")
    breaker.hold("available", "311 MB")
    assert breaker.reason == "311 MB"
    breaker.hold("available", "311 MB")
    assert changes(breaker) == [(CLOSED, OPEN)]


def test_a_hold_on_top_of_failures_leaves_the_failures_their_time() -> None:
    breaker = opened()
    breaker.hold("available", "too little memory")
    assert breaker.reason == "too little memory"
    breaker.release("available", 10.0)
    assert breaker.state is OPEN
    assert breaker.reason.startswith("3 failed starts")
    breaker.tick(32.0)
    assert breaker.state is HALF_OPEN


def test_a_hold_that_outlasts_the_failures_waiting_time_is_followed_by_a_probe() -> None:
    breaker = opened()
    breaker.hold("available", "too little memory")
    breaker.tick(100.0)
    assert breaker.state is OPEN
    breaker.release("available", 101.0)
    assert breaker.state is HALF_OPEN
    assert breaker.reason == "memory suffices again, and one worker is tried"


def test_a_hold_after_a_successful_probe_is_followed_by_none() -> None:
    breaker = half_open()
    breaker.start_began()
    breaker.start_succeeded(is_probe=True)
    breaker.hold("available", "too little memory")
    breaker.release("available", 101.0)
    assert breaker.state is CLOSED


def test_a_hold_takes_half_open_back() -> None:
    breaker = half_open()
    breaker.hold("available", "too little memory")
    assert breaker.state is OPEN
    assert not breaker.allows_start()


def test_a_hold_that_comes_and_goes_admits_no_second_probe() -> None:
    breaker = half_open()
    breaker.start_began()
    breaker.hold("available", "too little memory")
    breaker.release("available", 33.0)
    assert breaker.state is HALF_OPEN
    assert not breaker.allows_start()
    breaker.start_succeeded(is_probe=True)
    assert breaker.state is CLOSED


def test_a_probe_that_ends_while_a_hold_keeps_it_open_changes_no_state() -> None:
    for succeeds in (True, False):
        breaker = half_open()
        breaker.start_began()
        breaker.hold("available", "too little memory")
        if succeeds:
            breaker.start_succeeded(is_probe=True)
        else:
            breaker.start_failed(33.0, "no", is_probe=True)
        assert breaker.state is OPEN
        breaker.release("available", 34.0)
        assert breaker.allows_start()


def test_to_release_what_does_not_hold_is_harmless() -> None:
    breaker = make()
    breaker.release("available", 0.0)
    assert breaker.state is CLOSED


@pytest.mark.parametrize("make_it", [make, opened, half_open])
def test_forced_open_stays_until_reset(make_it) -> None:
    breaker = make_it()
    breaker.force_open("maintenance")
    assert breaker.state is FORCED
    assert breaker.reason == "maintenance"
    breaker.tick(1e9)
    breaker.hold("available", "too little memory")
    breaker.release("available", 1e9)
    breaker.start_succeeded(is_probe=True)
    fail(breaker, 1e9, 1e9, 1e9)
    assert breaker.state is FORCED
    assert not breaker.allows_start()
    assert breaker.deadline() is None
    breaker.force_open("longer")
    assert breaker.reason == "longer"
    breaker.reset()
    assert breaker.state is CLOSED
    assert breaker.reason == ""


def test_forced_open_always_has_a_reason() -> None:
    breaker = make()
    breaker.force_open("")
    assert breaker.reason == "forced open by hand"


@pytest.mark.parametrize("make_it", [opened, half_open])
def test_reset_closes_and_forgets(make_it) -> None:
    breaker = make_it()
    breaker.reset()
    assert breaker.state is CLOSED
    assert breaker.failure_count(2.0) == 0
    breaker.hold("available", "too little memory")
    breaker.release("available", 3.0)
    assert breaker.state is CLOSED, "the waiting time of the old failures is forgotten too"


def test_reset_of_a_closed_breaker_tells_nobody() -> None:
    breaker = make()
    fail(breaker, 0.0)
    breaker.reset()
    assert breaker.failure_count(0.0) == 0
    assert breaker.changes == []


def test_reset_clears_holds_which_open_it_again_at_the_next_reading() -> None:
    breaker = make()
    breaker.hold("available", "too little memory")
    breaker.reset()
    assert breaker.state is CLOSED
    breaker.hold("available", "too little memory")
    assert breaker.state is OPEN


def test_every_transition_of_the_table_is_taken_above_and_no_other_is_possible() -> None:
    for state in BreakerState:
        for after in BreakerState:
            breaker = make()
            breaker.state = state
            if after in BREAKER_TRANSITIONS[state]:
                breaker._move(after, "x")
                assert breaker.state is after
            else:
                with pytest.raises(InternalError, match=f"from {state.name} to {after.name}"):
                    breaker._move(after, "x")


def test_forced_open_for_a_time_ends_with_it() -> None:
    breaker = opened()
    breaker.force_open("maintenance", until=100.0)
    assert breaker.deadline() == 100.0
    breaker.tick(99.9)
    assert breaker.state is FORCED
    breaker.tick(100.0)
    assert breaker.state is CLOSED
    assert breaker.deadline() is None
    assert breaker.failure_count(100.0) == 0


def test_forced_open_again_without_a_time_lasts() -> None:
    breaker = make()
    breaker.force_open("for a while", until=100.0)
    breaker.force_open("for good")
    assert breaker.deadline() is None
    breaker.tick(1e6)
    assert (breaker.state, breaker.reason) == (FORCED, "for good")


def test_held_closed_neither_failures_nor_want_of_memory_open_it_until_its_time_is_over() -> None:
    breaker = opened()
    breaker.hold_closed(until=100.0)
    fail(breaker, 10.0, 11.0, 12.0, 13.0)
    breaker.hold("available", "host has 1 MB available")
    assert breaker.state is CLOSED
    assert breaker.allows_start()
    assert breaker.deadline() == 100.0
    breaker.tick(100.0)
    assert not breaker.is_held_closed
    assert breaker.state is CLOSED
    breaker.hold("available", "host has 1 MB available")
    assert breaker.state is OPEN


@pytest.mark.parametrize("end", ["reset", "force_open"])
def test_being_held_closed_ends_by_hand(end: str) -> None:
    breaker = make()
    breaker.hold_closed(until=100.0)
    breaker.reset() if end == "reset" else breaker.force_open("enough")
    assert not breaker.is_held_closed
    assert breaker.deadline() is None
    assert breaker.state is (CLOSED if end == "reset" else FORCED)
