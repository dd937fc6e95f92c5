"""The decisions about slots of the host's budget: whose turn it is, what is given back, what memory allows."""

from __future__ import annotations

import pytest

from agentpool.config import MB, HostBudget, PoolSettings
from agentpool.core.budget import LINGER_SECONDS, PATIENCE_SECONDS, TURN_SECONDS, Member, Share, View
from agentpool.errors import SettingsError


def share_in_line(budget: HostBudget, now: float = 10.0, slots: int = 1, need_mb: int = 0) -> Share:
    share = Share(budget)
    assert share.want(now, slots, need_mb * MB), "it entered the line, which the others are to be told"
    return share


def view(*members: Member, taken: tuple[int, ...] = ()) -> View:
    return View(own_id="me", taken=frozenset(taken), members=members)


def waiter(name: str, ticket: float, **fields: int | bool | float) -> Member:
    return Member(id=name, ticket=ticket, **{"agents": 2, **fields})  # type: ignore[arg-type]


def test_alone_it_takes_as_many_as_it_wants_and_the_budget_has() -> None:
    share = share_in_line(HostBudget(agents=3), slots=5)
    assert share.seen(10, view(), [0] * 5, 0) == [2, 1, 0]


def test_it_takes_one_at_a_time_while_others_wait() -> None:
    share = share_in_line(HostBudget(agents=4), now=10, slots=4)
    assert share.seen(10, view(waiter("b", 11, agents=4)), [0] * 4, 0) == [3]


def test_who_came_first_is_first() -> None:
    share = share_in_line(HostBudget(agents=2), now=10)
    assert share.seen(10, view(waiter("early", 9), taken=(0,)), [0], 0) == []
    assert share.waits_for == "1 ahead in line"
    assert share.seen(10, view(waiter("late", 11), taken=(0,)), [0], 0) == [1]


def test_a_slot_that_nobody_ahead_can_use_is_taken() -> None:
    """Its budget is smaller: it waits for slot 0, and slot 1 is none of its business."""
    share = share_in_line(HostBudget(agents=2), now=10)
    assert share.seen(10, view(waiter("small", 9, agents=1)), [0], 0) == [1]


def test_equal_tickets_are_ordered_by_name() -> None:
    share = share_in_line(HostBudget(agents=1), now=10)
    assert share.seen(10, view(waiter("zz", 10, agents=1)), [0], 0) == [0]
    assert share.seen(10, view(waiter("aa", 10, agents=1)), [0], 0) == []


def test_who_does_not_react_is_asked_and_then_passed_over() -> None:
    share = share_in_line(HostBudget(agents=1), now=10)
    stopped = view(waiter("stopped", 9, agents=1, looked_at=9))
    assert share.seen(10, stopped, [0], 0) == []
    assert not share.is_asking, "first it is given time"
    assert share.look_at == 10 + PATIENCE_SECONDS
    assert share.seen(11, stopped, [0], 0) == []
    assert share.is_asking
    assert share.seen(12, stopped, [0], 0) == []
    assert share.seen(12, stopped, [0], 0) == [0]


def test_who_reacts_and_waits_for_memory_is_not_passed_over() -> None:
    share = share_in_line(HostBudget(agents=1), now=10)
    for now in range(10, 60):
        there = view(waiter("big", 9, agents=1, looked_at=now - 0.5, wants_memory=True))
        assert share.seen(now, there, [0], 0) == []


def test_who_was_passed_over_is_respected_again_when_it_reacts() -> None:
    share = share_in_line(HostBudget(agents=1), now=10)
    stopped = view(waiter("stopped", 9, agents=1, looked_at=9))
    for now in (10, 11, 12):
        assert share.seen(now, stopped, [0], 0) == []
    assert share.seen(13, view(waiter("stopped", 9, agents=1, looked_at=12.5)), [0], 0) == []


def test_memory_of_all_pools_and_of_those_ahead_counts() -> None:
    budget = HostBudget(agents=8, memory_mb=800)
    running = Member(id="a", slots=1, committed_bytes=400 * MB)
    assert share_in_line(budget).seen(10, view(running, taken=(7,)), [300 * MB], 50 * MB) == [6]
    assert share_in_line(budget).seen(10, view(running, taken=(7,)), [400 * MB], 50 * MB) == []
    ahead = waiter("b", 9, agents=8, need_bytes=100 * MB)
    share = share_in_line(budget)
    assert share.seen(10, view(running, ahead, taken=(7,)), [300 * MB], 50 * MB) == []
    assert share.wants_memory
    assert "550 of 800 MB are in use, 300 are needed" in share.waits_for


def test_one_runs_whatever_the_memory_says_where_nobody_runs() -> None:
    share = share_in_line(HostBudget(agents=2, memory_mb=100), slots=2)
    assert share.seen(10, view(), [5000 * MB, 5000 * MB], 0) == [1]


def test_memory_is_looked_at_again_after_a_time_where_it_is_what_is_missing() -> None:
    share = share_in_line(HostBudget(agents=2, memory_mb=100))
    assert share.seen(10, view(Member(id="a", slots=1, committed_bytes=200 * MB), taken=(0,)), [0], 0) == []
    assert share.look_at is not None
    assert share.look_at > 10


def test_slots_without_a_task_linger_and_go_at_once_when_somebody_waits() -> None:
    share = share_in_line(HostBudget(agents=2), slots=2)
    share.took(10, [1, 0])
    share.used(2)
    assert share.idle_slots(20, 1) == []
    assert share.idle_slots(20 + LINGER_SECONDS / 2, 1) == []
    assert share.idle_slots(20 + LINGER_SECONDS, 1) == [1]
    share.rang()
    assert share.idle_slots(20.1, 1) == [0]


def test_a_slot_had_its_turn_only_when_somebody_waits_and_it_was_used() -> None:
    share = share_in_line(HostBudget(agents=2, memory_mb=None), slots=2)
    share.took(10, [1])
    assert share.ended_turns(99, 1, [0]) == []
    share.is_contended = True
    assert share.ended_turns(99, 1, [0]) == [], "its worker is still starting"
    share.used(1)
    share.held[1] = 99
    assert share.ended_turns(99 + TURN_SECONDS / 2, 1, [0]) == []
    assert share.ended_turns(99 + TURN_SECONDS, 1, [0]) == [1]


def test_a_task_with_an_expectation_is_weighed_before_it_gets_a_slot_that_is_there() -> None:
    share = share_in_line(HostBudget(agents=1, memory_mb=800), need_mb=300)
    taken = share.seen(10, view(), [300 * MB], 0)
    share.took(10, taken)
    assert share.ended_turns(10, 1, [300 * MB]) == [], "that is what it was taken for"
    share.used(1)
    assert share.ended_turns(11, 1, [300 * MB]) == [0]


def test_over_the_memory_nothing_goes_on_while_others_run() -> None:
    share = share_in_line(HostBudget(agents=2, memory_mb=100))
    share.took(10, share.seen(10, view(), [0], 0))
    share.used(1)
    share.seen(20, view(Member(id="a", slots=1, committed_bytes=200 * MB), taken=(0,)), [], 0)
    assert share.is_over
    assert share.ended_turns(20, 1, [0]) == [1]


def test_it_leaves_the_line_and_says_so() -> None:
    share = share_in_line(HostBudget())
    assert share.want(11, 0, 0)
    assert share.ticket is None
    assert not share.want(12, 0, 0)


@pytest.mark.parametrize(("given", "words"), [
    ({"agents": 0}, "agents of the host's budget must be greater than 0, got 0"),
    ({"agents": 10_000}, "must be at most 4096, got 10000"),
    ({"memory_mb": -1}, "memory_mb of the host's budget must be greater than 0, got -1"),
    ({"directory": "here"}, "directory of the host's budget must be an absolute path, got 'here'"),
])
def test_a_budget_out_of_range_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError) as raised:
        HostBudget(**given)  # type: ignore[arg-type]
    assert words in str(raised.value)


def test_a_budget_means_the_scope_and_the_scope_a_budget() -> None:
    assert PoolSettings.make(budget=HostBudget(agents=5)).scope == "host"
    assert PoolSettings.make(scope="host").budget == HostBudget(agents=2, memory_mb=800.0)
    assert PoolSettings.make().budget is None
    with pytest.raises(SettingsError, match="leave one of them out"):
        PoolSettings.make(scope="pool", budget=HostBudget())
    with pytest.raises(SettingsError, match="scope must be 'pool' or 'host'"):
        PoolSettings.make(scope="moon")
