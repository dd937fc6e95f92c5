"""The scheduler of a pool that shares the host's budget: when it looks, takes, gives back, tells, and leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentpool.config import MB, HostBudget
from agentpool.core import actions as act
from agentpool.core.budget import LINGER_SECONDS, LOOK_SECONDS, PATIENCE_SECONDS, TURN_SECONDS, Member, View
from agentpool.core.host_scheduler import HostScheduler
from agentpool.core.placement import TRUST_AFTER
from agentpool.core.records import SessionRecord, WorkerRecord
from agentpool.core.retry import Escalate, compile_policy
from agentpool.core.transitions import WorkerState

BUDGET_ACTIONS = (act.LookAtBudget, act.PublishShare, act.TakeSlots, act.GiveSlots, act.LeaveBudget)
LOUD, QUIET = ("look", True), ("look", False)
Told = list[tuple[object, ...]]


class House:
    """A pool and what others it sees."""

    def __init__(self, make_bench: Any, agents: int = 2, memory_mb: float | None = 800, **settings: Any) -> None:
        self.bench = make_bench(budget=HostBudget(agents=agents, memory_mb=memory_mb), **{"max_workers": 4} | settings)
        self.core: HostScheduler = self.bench.core

    def said(self) -> Told:
        """What the pool wanted of the budget since it was asked last, in order."""
        words = {act.LookAtBudget: "look", act.PublishShare: "publish", act.TakeSlots: "take", act.GiveSlots: "give",
                 act.LeaveBudget: "leave"}
        found = [one for one in self.bench.actions if isinstance(one, BUDGET_ACTIONS)]
        self.bench.actions = [one for one in self.bench.actions if not isinstance(one, BUDGET_ACTIONS)]
        return [(words[type(one)], *(getattr(one, name) for name in getattr(one, "__match_args__", ())))
                for one in found]

    def sees(self, *members: Member, taken: tuple[int, ...] = ()) -> Told:
        self.bench.do(self.core.budget_seen, View(own_id="me", taken=frozenset(taken), members=members))
        return self.said()

    def gets(self, *slots: int) -> Told:
        self.bench.do(self.core.slots_taken, slots)
        return self.said()

    def rings(self) -> Told:
        self.bench.do(self.core.budget_rang)
        return self.said()

    def runs(self, slot: int = 1, rss_mb: float = 20, **spec: Any) -> tuple[Any, WorkerRecord]:
        """A task in a fresh worker, in that slot."""
        task = self.bench.submit(**spec)
        self.sees()
        self.gets(slot)
        (worker,) = self.bench.spawned()
        self.bench.ready(worker, int(rss_mb * MB))
        assert task.worker is worker
        self.said()
        return task, worker


@pytest.fixture
def make_house(make_bench: Any) -> Callable[..., House]:
    return lambda *args, **settings: House(make_bench, *args, **settings)


def waiter(**fields: Any) -> Member:
    return Member(**{"id": "b", "agents": 2, "ticket": 1e9} | fields)


# -- from wanting to having ----------------------------------------------------------------------------------------


def test_a_task_looks_first_takes_then_and_starts_a_worker_only_with_a_slot(make_house) -> None:
    house = make_house()
    house.bench.advance(1)
    house.bench.take()
    assert house.said() == [], "without work it is not there for the others"
    task = house.bench.submit()
    assert house.said() == [LOUD], "once: the others are told that somebody waits"
    assert house.sees() == [("take", (1,))]
    assert not house.bench.spawned()
    house.bench.now = 3.0
    assert house.gets(1) == []
    assert house.core.share.held == {1: 3.0}
    house.bench.ready(*house.bench.spawned())
    assert house.bench.sent == [(task.worker, task)]
    assert house.core.concurrency == 1


def test_as_many_slots_are_taken_as_there_are_tasks_beyond_those_in_use(make_house) -> None:
    house = make_house(agents=8)
    house.runs(slot=7)
    for _ in range(2):
        house.bench.submit()
    assert house.said() == [LOUD]
    assert house.sees() == [("take", (6, 5))], "two more, not three"


def test_more_are_not_wanted_than_may_run_at_once(make_house) -> None:
    house = make_house(agents=8, max_concurrent=3)
    for _ in range(5):
        house.bench.submit()
    assert house.sees()[-1] == ("take", (7, 6, 5))


def test_an_answer_that_comes_when_nothing_is_wanted_any_more_takes_nothing(make_house) -> None:
    house = make_house()
    house.runs()
    assert house.sees() == []


def test_between_a_look_and_its_answer_a_bell_says_nothing_new(make_house) -> None:
    house = make_house()
    house.bench.submit()
    house.said()
    assert house.rings() == []
    assert house.sees() == [("take", (1,))]
    assert house.rings() == [], "until it is known which of them it got"
    assert house.gets() == [QUIET], "somebody was quicker: how is it now?"
    assert house.sees(taken=(0, 1)) == []
    assert house.rings() == [QUIET]
    assert house.sees() == [("take", (1,))]
    house.gets(1)
    assert house.rings() == [], "it has what it wants"


@pytest.mark.parametrize(("memory_mb", "said"), [(800, [QUIET]), (None, [])])
def test_with_idle_workers_and_no_slot_it_looks_only_where_memory_may_be_asked_of_it(
    make_house, memory_mb: float | None, said: Told
) -> None:
    house = make_house(memory_mb=memory_mb)
    task, _ = house.runs()
    house.bench.finish(task)
    house.bench.advance(LINGER_SECONDS)
    house.said()
    assert house.rings() == said


def test_who_was_given_less_than_it_wants_stands_in_line_again(make_house) -> None:
    house = make_house()
    house.bench.submit()
    house.bench.submit()
    assert house.sees(waiter())[-1] == ("take", (1,))
    house.bench.now = 5.0
    assert house.gets(1) == [LOUD]
    assert house.core.share.ticket == 5.0


def test_who_does_not_want_any_more_tells_those_behind_it(make_house) -> None:
    house = make_house()
    task = house.bench.submit()
    house.sees(taken=(0, 1))
    assert house.bench.do(house.core.cancel, task)
    assert house.said() == [("publish", True), ("leave",)]
    house.bench.submit()
    assert house.said() == [LOUD]


def test_the_others_are_asked_whether_they_are_still_there(make_house) -> None:
    house = make_house(agents=1)
    house.bench.submit()
    house.said()
    there = waiter(agents=1, ticket=-1.0, looked_at=-1.0)
    assert house.sees(there) == []
    house.bench.advance(PATIENCE_SECONDS)
    assert house.said() == [QUIET]
    assert house.sees(there) == [("publish", True)]


# -- memory --------------------------------------------------------------------------------------------------------


def test_each_task_to_come_is_weighed_against_what_is_used_and_promised(make_house) -> None:
    house = make_house(agents=4, memory_mb=500)
    house.runs(slot=3, rss_mb=50, expected_bytes=100 * MB)
    for mb in (200, 150, 60):
        house.bench.submit(expected_bytes=mb * MB)
    assert house.core.committed_bytes == 100 * MB, "what the task is still expected to use counts"
    house.said()
    assert house.sees() == [("take", (2, 1))], "100 + 200 + 150 fit, 60 more do not"
    assert house.core.committed_bytes == 450 * MB, "those to come count before they begin"


def test_a_task_that_uses_more_than_was_expected_counts_with_what_it_uses(make_house) -> None:
    house = make_house()
    house.runs(rss_mb=90, expected_bytes=60 * MB)
    assert house.core.committed_bytes == 90 * MB


def test_an_idle_worker_counts_with_what_it_uses(make_house) -> None:
    house = make_house()
    task, _ = house.runs(rss_mb=30, expected_bytes=60 * MB)
    house.bench.finish(task)
    assert house.core.committed_bytes == 30 * MB


def test_a_task_without_an_expectation_needs_nothing(make_house) -> None:
    house = make_house(memory_mb=100)
    house.bench.submit()
    house.said()
    others = Member(id="a", slots=1, committed_bytes=100 * MB)
    assert house.sees(others, taken=(0,)) == [("take", (1,))]
    assert house.core.own_member(0.0).need_bytes == 0


def test_the_worker_that_is_there_counts_towards_the_need_of_the_task(make_house) -> None:
    house = make_house(agents=4)
    first, _ = house.runs(slot=3, rss_mb=30)
    second, _ = house.runs(slot=2, rss_mb=50)
    house.bench.finish(first)
    house.bench.finish(second)
    house.bench.advance(LINGER_SECONDS * 2)
    house.said()
    tasks = [house.bench.submit(expected_bytes=mb * MB) for mb in (80, 20, 70)]
    assert house.core._needs(5) == [30 * MB, 0, 70 * MB], "the biggest first; a worker is there for two of them"
    assert house.core._needs(1) == [30 * MB]
    assert house.core.own_member(0.0).need_bytes == 30 * MB
    assert all(task.worker is None for task in tasks)


def test_a_task_that_says_what_it_needs_is_weighed_again_before_it_gets_the_slot_of_the_last_one(make_house) -> None:
    """It stands in line already, and nobody else would tell it that the slot is free: it looks for itself."""
    house = make_house(agents=1)
    task, _ = house.runs(slot=0)
    second = house.bench.submit(expected_bytes=100 * MB)
    assert house.said() == [LOUD]
    assert house.sees() == []
    house.bench.finish(task)
    assert house.said() == [("give", (0,)), QUIET]
    assert house.sees() == [("take", (0,))]
    house.gets(0)
    house.bench.take()
    assert second.worker is not None


def test_where_others_want_memory_idle_workers_end_down_to_the_floor(make_house) -> None:
    house = make_house(agents=4, min_workers=1, max_concurrent=3)
    tasks = [house.runs(slot=slot)[0] for slot in (3, 2, 1)]
    for task in tasks:
        house.bench.finish(task)
    house.bench.advance(LINGER_SECONDS * 2)
    assert not house.bench.asked(act.Retire)
    house.said()
    assert house.rings() == [QUIET]
    house.sees(waiter())
    assert not house.bench.asked(act.Retire), "it waits for a slot, not for memory"
    house.sees(waiter(wants_memory=True))
    retired = house.bench.asked(act.Retire)
    assert [one.worker.id for one in retired] == [1, 2]
    assert {one.reason for one in retired} == {"room in the host's budget"}


def test_a_pool_with_work_keeps_its_workers_whatever_others_want(make_house) -> None:
    house = make_house()
    task, _ = house.runs()
    house.bench.finish(task)
    house.bench.advance(LINGER_SECONDS * 2)
    house.bench.submit()
    house.sees(waiter(wants_memory=True, ticket=-1.0), taken=(0, 1))
    assert not house.bench.asked(act.Retire)


@pytest.mark.parametrize(("rss_bytes", "is_told"), [(4 * MB, False), (4 * MB + 1, True)])
def test_a_change_of_memory_is_told_where_it_is_great_enough(make_house, rss_bytes: int, is_told: bool) -> None:
    house = make_house()
    house.bench.submit()
    house.sees()
    house.gets(1)
    house.bench.ready(*house.bench.spawned(), rss_bytes)
    assert house.said() == ([("publish", False)] if is_told else [])


def test_a_great_pool_tells_only_of_great_changes_and_loudly_where_somebody_waits_for_memory(make_house) -> None:
    house = make_house(memory_limit_mb=None)
    _, worker = house.runs(rss_mb=160)
    house.bench.sample(worker, 170)
    assert house.said() == [], "160 MB were told: a sixteenth is 10 MB"
    house.bench.sample(worker, 170.5)
    assert house.said() == [("publish", False)]
    house.bench.sample(worker, 150)
    assert house.said() == [("publish", False)], "nobody waits for it"
    house.sees(waiter(wants_memory=True))
    house.bench.sample(worker, 120)
    assert house.said() == [("publish", True)]
    house.bench.sample(worker, 120)
    assert house.said() == []
    house.bench.sample(worker, 140)
    assert house.said() == [("publish", False)], "more is no good news"


def test_the_memory_of_workers_that_are_gone_is_not_remembered(make_house) -> None:
    house = make_house()
    task, worker = house.runs(rss_mb=20)
    house.bench.finish(task)
    house.bench.advance(LINGER_SECONDS * 2)
    house.said()
    house.bench.exit(worker)
    assert house.said() == [("leave",)]
    house.bench.advance(100)
    house.bench.submit()
    house.sees()
    house.gets(1)
    house.bench.ready(*house.bench.spawned(), 20 * MB)
    assert house.said() == [("publish", False)], "0 MB was what the others knew"


# -- giving back ---------------------------------------------------------------------------------------------------


def test_a_slot_without_a_task_lingers_and_goes_back_by_itself(make_house) -> None:
    house = make_house()
    task, _ = house.runs()
    house.bench.now = 1.0
    house.bench.finish(task)
    assert house.said() == []
    house.bench.advance(LINGER_SECONDS / 2)
    assert house.said() == []
    house.bench.advance(LINGER_SECONDS)
    assert house.said() == [("give", (1,))]
    assert (house.core.concurrency, house.core.share.held) == (0, {})
    house.bench.advance(LOOK_SECONDS)
    assert house.said() == [], "its worker is still there, so it does not leave"


def test_the_next_task_uses_the_slot_that_lingers(make_house) -> None:
    house = make_house()
    task, worker = house.runs()
    house.bench.finish(task)
    again = house.bench.submit()
    assert again.worker is worker
    assert house.said() == []
    house.bench.advance(1)
    assert house.said() == []
    house.bench.finish(again)
    house.bench.advance(LINGER_SECONDS)
    assert house.said() == [("give", (1,))], "the timer of the second time"


def test_a_slot_goes_back_at_once_where_somebody_waits(make_house) -> None:
    house = make_house()
    first, _ = house.runs(slot=1)
    second, _ = house.runs(slot=0)
    assert house.rings() == []
    house.bench.finish(first)
    assert house.said() == [("give", (1,))]
    assert house.core.concurrency == 1
    house.bench.finish(second)
    assert house.said() == [("give", (0,))]


def test_when_its_turn_is_over_a_slot_goes_back_before_the_next_task_of_the_pool(make_house) -> None:
    house = make_house()
    first, worker = house.runs(slot=1)
    second, third = house.bench.submit(), house.bench.submit()
    house.said()
    house.sees(waiter(ticket=-1.0), taken=(0,))
    house.bench.now = TURN_SECONDS / 2
    house.bench.finish(first)
    assert second.worker is worker, "a short one after another"
    assert house.said() == []
    house.bench.now = TURN_SECONDS
    house.bench.finish(second)
    assert house.said() == [("give", (1,)), QUIET]
    assert third.worker is None


def test_a_slot_whose_worker_still_starts_is_not_spare(make_house) -> None:
    house = make_house()
    house.bench.submit()
    house.sees()
    house.gets(1)
    assert house.rings() == []
    house.bench.advance(1)
    assert house.said() == []
    assert house.core.share.held


def test_with_the_last_worker_and_without_a_slot_it_leaves_and_comes_again(make_house) -> None:
    house = make_house()
    task, worker = house.runs()
    house.bench.finish(task)
    house.bench.exit(worker)
    assert house.said() == []
    house.bench.advance(LINGER_SECONDS)
    assert house.said() == [("give", (1,)), ("leave",)]
    house.bench.advance(100)
    house.bench.take()
    assert house.said() == [], "once"
    house.bench.submit()
    assert house.said() == [LOUD]


def test_a_closed_pool_wants_nothing(make_house) -> None:
    house = make_house()
    house.bench.do(house.core.shutdown, cancel_futures=False)
    assert house.bench.asked(act.Close)
    house.core.share.rang()
    house.bench.take()
    assert house.said() == []


def test_a_pool_that_closes_finishes_what_it_accepted(make_house) -> None:
    house = make_house()
    task = house.bench.submit()
    house.bench.do(house.core.shutdown, cancel_futures=False)
    assert house.sees()[-1] == ("take", (1,))
    house.gets(1)
    house.bench.ready(*house.bench.spawned())
    house.bench.finish(task, "done")
    assert house.bench.outcomes == {task.id: (True, "done")}


# -- looking by time -----------------------------------------------------------------------------------------------


def test_who_holds_a_slot_and_is_not_alone_looks_again_by_time(make_house) -> None:
    house = make_house()
    house.runs()
    others = Member(id="a", slots=1)
    house.bench.now = 10.0
    house.sees(others, taken=(0,))
    house.bench.advance(LOOK_SECONDS - 0.1)
    assert house.said() == []
    house.bench.advance(0.1)
    assert house.said() == [QUIET]
    house.bench.advance(LOOK_SECONDS)
    assert house.said() == [], "not before there is an answer"
    house.sees(others, taken=(0,))
    house.bench.advance(1)
    house.sees(others, taken=(0,))
    house.bench.advance(LOOK_SECONDS - 0.1)
    assert house.said() == [], "from the last look on"
    house.bench.advance(0.1)
    assert house.said() == [QUIET]
    house.sees()
    house.bench.advance(LOOK_SECONDS * 2)
    assert house.said() == [], "it is alone"


def test_who_has_left_meanwhile_does_not_look(make_house) -> None:
    house = make_house()
    task, worker = house.runs()
    house.sees(Member(id="a", slots=1), taken=(0,))
    house.bench.finish(task)
    house.bench.exit(worker)
    house.bench.advance(LINGER_SECONDS)
    assert house.said() == [("give", (1,)), ("leave",)]
    house.bench.advance(LOOK_SECONDS * 2)
    assert house.said() == []


# -- what is wanted ------------------------------------------------------------------------------------------------


def test_a_paused_pool_wants_no_slot_and_gives_back_what_it_has(make_house) -> None:
    house = make_house()
    task, _ = house.runs()
    house.bench.submit()
    house.said()
    house.bench.do(house.core.pause)
    assert house.said() == [("publish", True)], "it has left the line"
    house.bench.finish(task)
    house.bench.advance(LINGER_SECONDS)
    assert house.said() == [("give", (1,))]
    house.bench.do(house.core.resume)
    assert house.said() == [LOUD]


def test_where_no_process_may_start_slots_are_wanted_for_workers_that_are_there(make_house) -> None:
    house = make_house(agents=4)
    task, _ = house.runs(slot=3)
    house.bench.finish(task)
    house.bench.advance(LINGER_SECONDS)
    house.said()
    house.bench.do(house.core.force_open, "a test")
    for _ in range(3):
        house.bench.submit()
    assert house.said() == [LOUD]
    assert house.sees() == [("take", (3,))], "one is idle"
    house.bench.do(house.core.reset_breaker)
    house.gets(3)
    assert house.sees() == [("take", (2, 1))]


def test_where_no_process_may_start_and_none_is_there_no_slot_is_wanted(make_house) -> None:
    house = make_house()
    house.bench.do(house.core.force_open, "a test")
    house.bench.submit()
    assert house.said() == []


def test_while_a_task_runs_alone_no_other_slot_is_wanted(make_house) -> None:
    house = make_house(agents=4)
    task, worker = house.runs(slot=3, policy=Escalate(alone=True), hard_limit_bytes=100 * MB)
    house.bench.sample(worker, 500)
    house.bench.exit(worker)
    house.bench.advance(60)
    house.sees()
    house.gets(3)
    house.bench.ready(*house.bench.spawned())
    assert house.core.alone is task
    house.said()
    for _ in range(2):
        house.bench.submit()
    assert house.said() == []
    house.bench.finish(task)
    assert house.said() == [LOUD]


# -- what the others are told --------------------------------------------------------------------------------------


def test_the_others_are_told_what_it_holds_uses_and_waits_for(make_house) -> None:
    house = make_house(agents=3, memory_mb=500)
    house.runs(slot=2, rss_mb=50)
    house.bench.now = 7.0
    house.bench.submit(expected_bytes=600 * MB)
    house.sees(Member(id="a", slots=1), taken=(0,))
    assert house.core.own_member(9.0) == Member(
        id="", agents=3, slots=1, committed_bytes=50 * MB, ticket=7.0, need_bytes=600 * MB, wants_memory=True,
        looked_at=9.0)


# -- what is different -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_contended", [False, True])
def test_nothing_is_sent_ahead_while_somebody_waits(make_house, is_contended: bool) -> None:
    """Else the slot could not be given back before those have run as well."""
    house = make_house(agents=1, memory_mb=None)
    task, worker = house.runs(slot=0)
    for _ in range(TRUST_AFTER + 6):
        house.bench.submit(call_key="short")
    house.bench.finish(task)
    for _ in range(TRUST_AFTER - 1):
        house.bench.finish(worker.running, seconds=0.0001)
    assert not worker.backlog
    if is_contended:
        house.rings()
    house.bench.finish(worker.running, seconds=0.0001)
    assert bool(worker.backlog) is not is_contended


def test_a_slot_that_is_given_back_lowers_what_may_run_and_never_below_what_runs(make_house) -> None:
    house = make_house(max_concurrent=2)
    house.runs(slot=1)
    house.runs(slot=0)
    house.bench.do(house.core.resize, None, 1)
    assert (house.core.concurrency, house.core.overhang) == (1, 1)
    house.bench.do(house.core.resize, None, 4)
    assert (house.core.concurrency, house.core.overhang) == (2, 0)


# -- in detail -----------------------------------------------------------------------------------------------------


def test_beside_what_it_holds_no_more_is_taken_than_may_run(make_house) -> None:
    house = make_house(agents=8, max_concurrent=3)
    house.runs(slot=7)
    for _ in range(5):
        house.bench.submit()
    house.said()
    assert house.sees() == [("take", (6, 5))]


def test_a_pool_that_was_paused_since_it_looked_takes_nothing(make_house) -> None:
    house = make_house()
    house.bench.submit()
    house.said()
    house.core.pause(house.bench.now)
    assert house.sees() == [("publish", True), ("leave",)]


def test_the_last_worker_of_the_floor_stays_whatever_others_want(make_house) -> None:
    house = make_house(min_workers=1)
    task, worker = house.runs()
    house.bench.finish(task)
    house.bench.advance(LINGER_SECONDS)
    house.sees(waiter(wants_memory=True))
    assert not house.bench.asked(act.Retire)
    assert worker.state is WorkerState.IDLE


def test_a_slot_waits_for_the_worker_that_was_started_before_starts_were_forbidden(make_house) -> None:
    house = make_house(agents=4, memory_mb=None)
    house.bench.submit()
    house.sees()
    house.gets(3)
    (worker,) = house.bench.spawned()
    house.bench.do(house.core.force_open, "a test")
    house.bench.submit()
    house.bench.advance(1)
    assert house.said() == [], "one slot for one worker"
    assert house.core.share.held
    house.bench.ready(worker)
    assert house.core.active == 1


def test_a_slot_waits_for_the_worker_that_is_being_measured(make_house) -> None:
    house = make_house(agents=4, memory_mb=None)
    task, worker = house.runs(slot=3)
    house.bench.do(house.core.force_open, "a test")
    house.bench.submit()
    house.bench.submit()
    house.said()
    house.bench.finish(task, seconds=1.0)
    assert worker.state is WorkerState.CHECKING
    house.bench.advance(1)
    assert house.core.share.held
    house.bench.sample(worker, 20)
    assert house.core.active == 1


def test_a_session_that_has_a_worker_wants_its_slot_although_no_process_may_start(make_house) -> None:
    house = make_house(agents=4, memory_mb=None)
    session = SessionRecord(1, "k", None)
    task, _ = house.runs(slot=3, session=session)
    house.bench.finish(task)
    house.bench.advance(LINGER_SECONDS)
    house.bench.do(house.core.force_open, "a test")
    house.said()
    house.bench.submit(session=session)
    assert house.said() == [LOUD]
    assert house.sees() == [("take", (3,))]


def test_one_that_killed_its_worker_is_weighed_first(make_house) -> None:
    house = make_house(agents=4)
    task, worker = house.runs(slot=3, policy=compile_policy(3), expected_bytes=70 * MB)
    house.bench.exit(worker)
    house.bench.advance(30)
    assert task.is_isolated
    assert house.core.own_member(0.0).need_bytes == 70 * MB


def test_slots_that_are_spare_and_slots_whose_turn_is_over_go_back_together(make_house) -> None:
    house = make_house()
    first, second = house.runs(slot=1)[0], house.runs(slot=0)[0]
    assert house.rings() == []
    house.bench.submit()
    house.said()
    house.bench.now = 5.0
    for task in (first, second):
        house.core.task_finished(5.0, task.worker, task, is_value=True, payload=None, seconds=0.0, rss_bytes=0)
    house.bench.take()
    assert house.said()[0] == ("give", (1, 0))
    assert house.core.share.held == {}


def test_only_the_tasks_that_would_get_the_slots_are_weighed_again(make_house) -> None:
    house = make_house(agents=1)
    task, worker = house.runs(slot=0)
    plain = house.bench.submit()
    house.bench.submit(expected_bytes=100 * MB)
    house.said()
    house.sees()
    house.bench.finish(task)
    assert plain.worker is worker
    assert house.said() == []


def test_who_wants_nothing_needs_nothing(make_house) -> None:
    house = make_house()
    house.runs()
    assert house.core.own_member(0.0).need_bytes == 0
