"""The decisions about slots of the host's budget: whose turn it is, what is given back, what memory allows."""

from __future__ import annotations

import pytest

from agentpool.config import MB, HostBudget, PoolSettings
from agentpool.core.budget import LINGER_SECONDS, LOOK_SECONDS, PATIENCE_SECONDS, TURN_SECONDS, Member, Share, View
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


def test_who_cannot_be_told_of_an_end_looks_again_by_time() -> None:
    share = share_in_line(HostBudget(agents=1))
    taken = View(own_id="me", taken=frozenset({0}), members=(waiter("b", 1, slots=1),))
    assert share.seen(10, taken, [0], 0) == []
    assert share.look_at is None, "whoever has the slot rings when it gives it back, or its end is noticed"
    blind = View(own_id="me", taken=frozenset({0}), members=taken.members, is_blind=True)
    assert share.seen(11, blind, [0], 0) == []
    assert share.look_at == 11 + PATIENCE_SECONDS


def test_no_turn_has_ended_where_no_slot_is_free_for_a_task() -> None:
    share = share_in_line(HostBudget(agents=1))
    share.took(10, [0])
    share.used(1)
    share.is_contended = True
    assert share.ended_turns(99, 0, []) == []
    assert share.ended_turns(99, 1, [0]) == [0]


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


# -- in detail -----------------------------------------------------------------------------------------------------


def runner(name: str = "a", **fields: int | bool | float) -> Member:
    return Member(id=name, **{"slots": 1, **fields})  # type: ignore[arg-type]


def test_a_fresh_share_has_nothing_and_wants_nothing() -> None:
    share = Share(HostBudget(agents=3, memory_mb=1.5))
    shown = {name: value for name, value in vars(share).items() if not name.startswith("_")}
    assert shown == {
        "agents": 3, "memory_bytes": 1.5 * MB, "held": {}, "unused": set(), "ticket": None, "need_bytes": 0,
        "cleared_bytes": 0, "is_contended": False, "is_memory_wanted": False, "wants_memory": False, "is_over": False,
        "has_company": False, "spare_since": None, "look_at": None, "is_asking": False, "waits_for": "",
    }


def test_whoever_leaves_the_line_waits_for_nothing_and_forgets_whom_it_suspected() -> None:
    share = share_in_line(HostBudget(agents=1, memory_mb=100), need_mb=50)
    assert share.need_bytes == 50 * MB
    stopped = waiter("stopped", 9, agents=1, looked_at=9)
    share.seen(10, view(stopped), [0], 0)
    share.seen(11, view(stopped), [0], 0)
    assert share.is_asking
    assert share.waits_for == "1 ahead in line"
    assert share.want(11.5, 0, 0)
    assert (share.wants_memory, share.waits_for, share.need_bytes) == (False, "", 0)
    assert share.want(12, 1, 0)
    assert share.seen(12, view(stopped), [0], 0) == []
    assert share.seen(12.1, view(stopped), [0], 0) == [], "it is given its time again"


def test_whoever_enters_the_line_keeps_what_it_knows() -> None:
    share = share_in_line(HostBudget(agents=2, memory_mb=100))
    share.seen(10, view(runner(committed_bytes=200 * MB), taken=(0,)), [0], 0)
    assert (share.wants_memory, share.waits_for[:6]) == (True, "memory")
    assert not share.want(11, 3, 7)
    assert (share.wants_memory, share.waits_for[:6], share.need_bytes) == (True, "memory", 7)
    assert share.want(12, 0, 0)
    assert (share.wants_memory, share.waits_for) == (False, "")


def test_what_it_waits_for_is_told_in_words() -> None:
    share = share_in_line(HostBudget(agents=2))
    share.seen(10, view(runner(slots=2), taken=(0, 1)), [0], 0)
    assert share.waits_for == "a slot"
    share.seen(10, view(runner(), waiter("b", 9), taken=(0,)), [0], 0)
    assert share.waits_for == "1 ahead in line"
    share.seen(10, view(runner(slots=2), waiter("b", 9), taken=(0, 1)), [0], 0)
    assert share.waits_for == "a slot", "nobody ahead could take one either"
    share.seen(10, view(), [0], 0)
    assert share.waits_for == ""


def test_a_look_shows_who_else_is_there_and_what_they_want() -> None:
    share = Share(HostBudget(agents=2))
    for members, shown in [
        ((runner(),), (True, False, False)),
        ((waiter("b", 9),), (True, True, False)),
        ((waiter("b", 9), waiter("c", 9, wants_memory=True)), (True, True, True)),
        ((runner(wants_memory=True),), (True, False, False)),  # it said so before it left the line
        ((), (False, False, False)),
    ]:
        assert share.seen(10, view(*members), [], 0) == []
        assert (share.has_company, share.is_contended, share.is_memory_wanted) == shown, members


@pytest.mark.parametrize(("memory_mb", "own", "members", "taken", "is_over"), [
    (100, 50, [runner(committed_bytes=51 * MB)], (0,), True),
    (100, 50, [runner(committed_bytes=50 * MB)], (0,), False),
    (100, 101, [], (), False),  # nobody else runs: it may go on
    (100, 101, [], (0,), True),  # somebody who publishes nothing
    (100, 101, [runner()], (), True),
    (100, 101, [runner(slots=0)], (), False),
    (100, 50, [runner()], (0,), False),
    (None, 50, [runner(committed_bytes=10**12)], (0,), False),
])
def test_over_the_memory_is_what_all_use_together_while_others_run(
    memory_mb: float | None, own: int, members: list[Member], taken: tuple[int, ...], is_over: bool
) -> None:
    share = Share(HostBudget(agents=2, memory_mb=memory_mb))
    share.seen(10, view(*members, taken=taken), [], own * MB)
    assert share.is_over is is_over


def test_who_is_not_alone_looks_again_while_it_holds_a_slot() -> None:
    share = Share(HostBudget(agents=2))
    share.seen(10, view(runner()), [], 0)
    assert share.look_at is None, "it holds nothing"
    share.took(10, [1])
    share.seen(10, view(), [], 0)
    assert share.look_at is None, "it is alone"
    share.seen(10, view(runner()), [], 0)
    assert share.look_at == 10 + LOOK_SECONDS


def test_an_end_that_nobody_would_notice_is_looked_for() -> None:
    share = share_in_line(HostBudget(agents=1))
    blind = View(own_id="me", taken=frozenset((0,)), members=(runner(),), is_blind=True)
    share.seen(10, blind, [0], 0)
    assert share.look_at == 10 + PATIENCE_SECONDS
    share.want(11, 0, 0)
    share.seen(11, blind, [], 0)
    assert share.look_at is None, "it waits for nothing"


def test_the_earliest_reason_to_look_again_counts() -> None:
    share = share_in_line(HostBudget(agents=2, memory_mb=100))
    blind = View(own_id="me", taken=frozenset((0,)), members=(runner(committed_bytes=200 * MB),), is_blind=True)
    share.seen(10, blind, [0], 0)
    assert share.wants_memory
    assert share.look_at == 10 + PATIENCE_SECONDS, "for memory alone it would be later"


def test_two_ahead_leave_what_each_can_use_in_the_order_of_their_tickets() -> None:
    """The first can use slot 0 only where the second has not taken it."""
    share = share_in_line(HostBudget(agents=3), now=10)
    early, late = waiter("z", 8, agents=1), waiter("a", 9, agents=3)
    assert share.seen(10, view(late, early, taken=(1,)), [0], 0) == []
    assert share.waits_for == "2 ahead in line"
    first, second = waiter("z", 8, agents=3), waiter("a", 9, agents=1)
    assert share.seen(10, view(second, first), [0], 0) == [1]
    wide, narrow = waiter("a", 9, agents=2), waiter("b", 8, agents=1)
    assert share.seen(10, view(wide, narrow, taken=(2,)), [0], 0) == []


def test_who_looks_just_as_it_is_passed_over_has_not_reacted() -> None:
    share = share_in_line(HostBudget(agents=1), now=10)
    for now in (10, 11, 12):
        assert share.seen(now, view(waiter("s", 9, agents=1, looked_at=9)), [0], 0) == []
    assert share.seen(13, view(waiter("s", 9, agents=1, looked_at=12)), [0], 0) == [0]


def test_who_looks_in_the_moment_in_which_it_is_asked_has_reacted() -> None:
    share = share_in_line(HostBudget(agents=1), now=10)
    share.seen(10, view(waiter("s", 9, agents=1, looked_at=9)), [0], 0)
    share.seen(11, view(waiter("s", 9, agents=1, looked_at=9)), [0], 0)
    for _ in range(2):
        assert share.seen(12, view(waiter("s", 9, agents=1, looked_at=11)), [0], 0) == []


def test_each_that_stands_ahead_has_its_own_time_and_one_is_asked_though_another_is_not() -> None:
    share = share_in_line(HostBudget(agents=3), now=10)
    old, new = waiter("old", 8, agents=3, looked_at=8), waiter("new", 7, agents=3, looked_at=8)
    share.seen(10, view(old, taken=(0,)), [0], 0)
    share.seen(10.5, view(new, old, taken=(0,)), [0], 0)
    share.seen(11, view(new, old, taken=(0,)), [0], 0)
    assert share.is_asking, "the one that stands there for a second, behind one that came just now"
    assert share.look_at == 10.5 + PATIENCE_SECONDS
    reacts = waiter("z", 8.5, agents=3, looked_at=11.2)
    share.seen(11.2, view(old, reacts, taken=(0,)), [0], 0)
    share.seen(12.0, view(old, reacts, taken=(0,)), [0], 0)
    assert not share.is_asking


def test_one_is_asked_and_the_next_in_line_has_reacted() -> None:
    share = share_in_line(HostBudget(agents=3), now=10)
    quick, slow = waiter("q", 9, agents=3, looked_at=9), waiter("s", 8, agents=3, looked_at=8)
    share.seen(10, view(quick, taken=(0,)), [0], 0)
    share.seen(11, view(quick, taken=(0,)), [0], 0)
    assert share.is_asking
    share.seen(11, view(slow, quick, taken=(0,)), [0], 0)
    share.seen(12, view(slow, waiter("q", 9, agents=3, looked_at=11.5), taken=(0,)), [0], 0)
    assert share.is_asking, "s is asked, although q, that comes after it, was not asked again"


@pytest.mark.parametrize(("needs", "slots", "cleared"), [
    ([60, 40, 1], [3, 2], 100),
    ([60, 41], [3], 60),
    ([20, 30, 40], [3, 2, 1], 90),
])
def test_as_many_are_taken_as_the_memory_has_room_for(needs: list[int], slots: list[int], cleared: int) -> None:
    share = share_in_line(HostBudget(agents=4, memory_mb=100), slots=9)
    assert share.seen(10, view(), [need * MB for need in needs], 0) == slots
    assert share.cleared_bytes == cleared * MB
    assert share.wants_memory is False, "it got one: for the next it stands in line again"


def test_what_a_pool_holds_already_counts_as_running() -> None:
    """It may not start a second task beyond the memory, although it would be the first that runs by this look."""
    share = Share(HostBudget(agents=2, memory_mb=100))
    share.took(5, [1])
    assert share.want(10, 2, 0)
    assert share.seen(10, view(), [200 * MB], 0) == []
    assert share.wants_memory is True


def test_who_was_quicker_leaves_nothing_cleared_and_the_ticket_as_it_was() -> None:
    share = share_in_line(HostBudget(agents=1))
    assert share.seen(10, view(), [100 * MB], 0) == [0]
    assert share.cleared_bytes == 100 * MB
    share.took(11, [])
    assert (share.ticket, share.cleared_bytes, share.held, share.unused) == (10, 0, {}, set())


def test_a_slot_that_was_taken_is_out_of_line_and_not_used_yet() -> None:
    share = share_in_line(HostBudget(agents=3))
    share.seen(10, view(), [30 * MB, 20 * MB], 0)
    share.took(11.5, [2, 1])
    assert share.ticket is None
    assert (share.held, share.unused, share.cleared_bytes) == ({2: 11.5, 1: 11.5}, {2, 1}, 50 * MB)
    share.used(0)
    assert share.unused == {2, 1}
    share.used(1)
    assert len(share.unused) == 1
    assert share.cleared_bytes == 50 * MB, "the other is still to come"
    share.used(1)
    assert len(share.unused) == 1, "the same one still runs"
    share.used(2)
    assert (share.unused, share.cleared_bytes) == (set(), 0)


def test_of_idle_slots_those_held_longest_go_first_and_the_rest_is_as_it_was() -> None:
    share = Share(HostBudget(agents=4))
    share.took(1, [3])
    share.used(1)
    share.took(2, [2, 1])
    share.cleared_bytes = 7
    assert share.idle_slots(5, 2) == []
    assert share.spare_since == 5
    assert share.idle_slots(6, 2) == [3, 2]
    assert (share.held, share.unused, share.cleared_bytes, share.spare_since) == ({1: 2}, {1}, 7, 5)
    assert share.idle_slots(6, 1) == [1]
    assert (share.held, share.unused, share.cleared_bytes, share.spare_since) == ({}, set(), 0, None)


def test_where_each_slot_has_its_task_none_is_spare() -> None:
    share = Share(HostBudget())
    share.took(1, [1])
    share.idle_slots(2, 1)
    assert share.spare_since == 2
    assert share.linger_until == 2 + LINGER_SECONDS
    assert share.idle_slots(3, 0) == []
    assert share.spare_since is None


@pytest.mark.parametrize("reason", ["need", "over", "contended"])
def test_no_more_turns_end_than_there_are_free_slots(reason: str) -> None:
    share = Share(HostBudget(agents=3, memory_mb=100))
    share.took(1, [2, 1, 0])
    share.used(3)
    share.is_over, share.is_contended = reason == "over", reason == "contended"
    needs = [1 if reason == "need" else 0]
    assert share.ended_turns(9, 0, needs) == []
    assert share.ended_turns(9, 1, needs) == [2]
    assert share.ended_turns(9, 2, needs) == [1, 0]


@pytest.mark.parametrize(("is_waiting", "holds", "memory_mb", "is_worth_it"), [
    (True, False, None, True), (True, True, 100, True),
    (False, False, 100, True),  # idle workers may have to go
    (False, False, None, False), (False, True, 100, False), (False, True, None, False),
])
def test_whether_a_bell_is_worth_a_look(
    is_waiting: bool, holds: bool, memory_mb: float | None, is_worth_it: bool
) -> None:
    share = Share(HostBudget(memory_mb=memory_mb))
    if holds:
        share.took(1, [1])
    if is_waiting:
        share.want(2, 2, 0)
    assert share.rang() is is_worth_it
    assert share.is_contended is True


def test_a_slot_that_was_used_stays_used_and_no_more_are_than_tasks_run() -> None:
    share = Share(HostBudget(agents=3))
    share.took(1, [2, 1, 0])
    share.used(1)
    share.used(0)
    assert len(share.unused) == 2
    share.used(2)
    assert len(share.unused) == 1
