"""A plan of agents: what starts when, what is skipped, what is stopped. On a clock that the test moves."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from agentpool.config import MB
from agentpool.core.plan import (
    POSTPONED_SECONDS,
    Ending,
    NodeState,
    PlanNode,
    PlanState,
    StartAgent,
    StopAgent,
    check_nodes,
)
from agentpool.errors import InternalError, PlanError

S = NodeState


def node(name: str, *after: str, optional: bool = False, mb: float | tuple[float, ...] = 0) -> PlanNode:
    expected = mb if isinstance(mb, tuple) else (mb,)
    return PlanNode(
        name=name, after=after, is_required=not optional, expected_bytes=tuple(int(each * MB) for each in expected)
    )


def plan(*nodes: PlanNode, **given: Any) -> PlanState:
    if (budget_mb := given.pop("budget_mb", None)) is not None:
        given["budget_bytes"] = budget_mb * MB
    return PlanState(0.0, nodes, **given)


def started(state: PlanState, now: float = 0.0) -> list[str]:
    """Takes the actions, of which all must be starts."""
    actions = state.take_actions(now)
    assert all(isinstance(action, StartAgent) for action in actions)
    return [action.name for action in actions]


def states(state: PlanState, names: str) -> list[NodeState]:
    return [state.state_of(name) for name in names]


class TestRefused:
    @pytest.mark.parametrize(
        ("nodes", "said"),
        [
            ([node("a", "a")], "a -> a"),
            ([node("a", "c"), node("b", "a"), node("c", "b"), node("d")], "circle"),
            ([node("a"), node("b", "c")], "'b' is to run after 'c', which is no agent of this plan; its "
                                           "agents are a, b"),
            ([node("a"), node("a")], "two agents are called 'a'"),
        ],
    )
    def test_what_could_never_end(self, nodes: list[PlanNode], said: str) -> None:
        with pytest.raises(PlanError, match=re.escape(said)):
            plan(*nodes)

    def test_the_cycle_is_shown_in_the_order_of_its_dependencies(self) -> None:
        nodes = [node("deploy", "test"), node("build", "deploy"), node("test", "build"), node("other")]
        with pytest.raises(PlanError) as caught:
            plan(*nodes)
        [shown] = re.findall(r"\w+(?: -> \w+)+", str(caught.value))
        circle = shown.split(" -> ")
        assert len(circle) == 4
        assert circle[0] == circle[-1]
        after = {each.name: each.after for each in nodes}
        for before, behind in itertools.pairwise(circle):
            assert before in after[behind]

    def test_an_agent_that_alone_is_above_the_budget(self) -> None:
        with pytest.raises(PlanError, match=r"'b' is expected to hold 300 MB, more than the whole budget of 200 MB"):
            plan(node("a", mb=100), node("b", mb=(100, 300)), budget_mb=200)

    def test_a_long_chain_is_no_recursion(self) -> None:
        nodes = [node("0"), *(node(str(number), str(number - 1)) for number in range(1, 5000))]
        state = plan(*nodes)
        assert started(state) == ["0"]
        state.failed(1, "0")
        assert state.is_over
        assert state.reason_of("4999") == "it needs 4998, which was skipped"


class TestOrder:
    def test_a_diamond(self) -> None:
        state = plan(node("top"), node("left", "top"), node("right", "top"), node("end", "left", "right"))
        assert started(state) == ["top"]
        assert started(state) == []
        state.succeeded(1, "top")
        assert started(state, 1) == ["left", "right"]
        state.succeeded(2, "right")
        assert started(state, 2) == []
        state.succeeded(3, "left")
        assert started(state, 3) == ["end"]
        assert not state.is_over
        state.succeeded(4, "end")
        assert state.is_over
        assert state.ending is Ending.COMPLETED
        assert states(state, ["top", "left", "right", "end"]) == [S.SUCCEEDED] * 4  # type: ignore[arg-type]

    def test_the_plans_order_among_those_that_may_start(self) -> None:
        state = plan(node("c"), node("late", "c"), node("a"), node("b", "a"))
        assert started(state) == ["c", "a"]
        state.succeeded(1, "a")
        state.succeeded(1, "c")
        assert started(state, 1) == ["late", "b"]

    def test_a_dependency_named_twice_is_one(self) -> None:
        state = plan(node("a"), node("b", "a", "a"))
        started(state)
        state.succeeded(1, "a")
        assert started(state, 1) == ["b"]

    def test_no_agents_are_over_at_once(self) -> None:
        assert plan().is_over

    def test_what_was_not_started_cannot_end(self) -> None:
        state = plan(node("a"))
        with pytest.raises(InternalError, match="without having been started"):
            state.succeeded(0, "a")

    def test_no_room_in_the_pool_is_tried_again(self) -> None:
        state = plan(node("a"), node("b"))
        assert state.next_deadline() is None
        assert started(state) == ["a", "b"]
        state.postponed(0, "a")
        assert started(state) == []
        assert state.next_deadline() == POSTPONED_SECONDS
        assert started(state, POSTPONED_SECONDS) == ["a"]
        assert state.next_deadline() is None


class TestFailures:
    def test_a_required_one_takes_with_it_what_needs_it_and_nothing_else(self) -> None:
        state = plan(node("a"), node("b", "a"), node("c", "b"), node("x"), node("d", "x", "c"))
        assert started(state) == ["a", "x"]
        state.failed(1, "a")
        assert states(state, "abcd") == [S.FAILED, S.SKIPPED, S.SKIPPED, S.SKIPPED]
        assert state.reason_of("b") == "it needs a, which failed"
        assert state.reason_of("d") == "it needs c, which was skipped"
        assert not state.is_over
        state.succeeded(2, "x")
        assert state.is_over
        assert state.ending is Ending.COMPLETED

    def test_an_optional_one_costs_nobody_anything(self) -> None:
        state = plan(node("a", optional=True), node("b", "a"))
        started(state)
        state.failed(1, "a")
        assert started(state, 1) == ["b"]

    def test_an_optional_one_that_is_skipped_itself_does_not_either(self) -> None:
        state = plan(node("a"), node("b", "a", optional=True), node("c", "b"))
        started(state)
        state.failed(1, "a")
        assert state.state_of("b") is S.SKIPPED
        assert started(state, 1) == ["c"]

    def test_two_failed_dependencies_skip_once(self) -> None:
        state = plan(node("a"), node("b"), node("c", "a", "b"))
        started(state)
        state.failed(1, "a")
        state.failed(1, "b")
        assert state.is_over
        assert state.reason_of("c") == "it needs a, which failed"

    def test_fallbacks_are_tried_in_order(self) -> None:
        state = plan(node("a", mb=(0, 0, 0)), node("b", "a"))
        for choice in range(3):
            assert state.take_actions(choice) == [StartAgent("a", choice)]
            assert state.choice_of("a") == choice
            assert state.state_of("b") is S.WAITING
            state.failed(choice, "a")
        assert states(state, "ab") == [S.FAILED, S.SKIPPED]

    def test_a_fallback_that_succeeds_counts(self) -> None:
        state = plan(node("a", mb=(0, 0)), node("b", "a"))
        started(state)
        state.failed(1, "a")
        started(state, 1)
        state.succeeded(2, "a")
        assert started(state, 2) == ["b"]
        assert state.choice_of("a") == 1

    def test_a_plan_may_stop_on_the_first_failure(self) -> None:
        state = plan(node("a"), node("b"), node("c", "b"), node("o", optional=True), stops_on_failure=True)
        started(state)
        state.failed(1, "o")
        assert state.ending is Ending.COMPLETED
        state.failed(2, "a")
        assert state.ending is Ending.FAILURE
        assert state.ending_reason == "the required agent a failed"
        assert state.take_actions(2) == [StopAgent("b", "the required agent a failed")]
        assert state.state_of("c") is S.SKIPPED
        state.failed(3, "b")
        assert state.state_of("b") is S.STOPPED
        assert state.is_over


class TestTime:
    def test_the_budget_ends_everything(self) -> None:
        state = plan(node("a"), node("b"), node("c", "a"), node("d", "b"), budget_seconds=10)
        started(state)
        assert state.next_deadline() == 10
        state.succeeded(9.9, "a")
        state.tick(10)
        assert state.ending is Ending.BUDGET_SPENT
        assert state.take_actions(10) == [StopAgent("b", "the budget of 10 s is spent")]
        assert state.take_actions(11) == []
        assert state.next_deadline() is None
        assert states(state, "abcd") == [S.SUCCEEDED, S.STOPPING, S.SKIPPED, S.SKIPPED]
        assert state.reason_of("c") == "the budget of 10 s is spent"
        assert not state.is_over
        state.failed(12, "b")
        assert state.is_over
        assert state.state_of("b") is S.STOPPED
        assert state.reason_of("b") == "the budget of 10 s is spent"

    def test_nothing_starts_after_it_even_unticked(self) -> None:
        state = plan(node("a"), node("b", "a"), budget_seconds=10)
        started(state)
        state.succeeded(10.5, "a")
        assert state.take_actions(10.5) == []
        assert states(state, "ab") == [S.SUCCEEDED, S.SKIPPED]
        assert state.is_over

    def test_a_result_that_comes_before_the_stop_counts(self) -> None:
        state = plan(node("a"), budget_seconds=1)
        started(state)
        state.take_actions(1)
        state.succeeded(1.1, "a")
        assert state.state_of("a") is S.SUCCEEDED
        assert state.reason_of("a") is None

    def test_no_fallback_once_it_is_spent(self) -> None:
        state = plan(node("running", mb=(0, 0)), node("failed", mb=(0, 0)), budget_seconds=1)
        started(state)
        state.failed(0.9, "failed")
        state.tick(1)
        state.failed(1.1, "running")
        assert state.state_of("failed") is S.FAILED
        assert state.state_of("running") is S.STOPPED
        assert state.is_over

    def test_a_plan_that_is_over_has_its_ending(self) -> None:
        state = plan(node("a"), budget_seconds=1)
        started(state)
        state.succeeded(0.5, "a")
        state.tick(2)
        state.ended(2, Ending.INTERRUPTED, "x")
        assert state.ending is Ending.COMPLETED

    def test_the_first_ending_stands(self) -> None:
        state = plan(node("a"), budget_seconds=1)
        started(state)
        state.ended(0.5, Ending.INTERRUPTED, "Ctrl-C")
        state.tick(2)
        assert (state.ending, state.ending_reason) == (Ending.INTERRUPTED, "Ctrl-C")

    def test_an_end_while_the_pool_refuses(self) -> None:
        state = plan(node("a"), budget_seconds=1)
        started(state)
        state.ended(0.5, Ending.POOL_LOST, "closed")
        state.postponed(0.5, "a")
        assert state.take_actions(0.5) == []
        assert state.state_of("a") is S.SKIPPED
        assert state.is_over


class TestMemory:
    def test_what_is_expected_is_reserved(self) -> None:
        state = plan(*(node(name, mb=100) for name in "abc"), budget_mb=250)
        assert started(state) == ["a", "b"]
        state.succeeded(1, "a")
        assert started(state, 1) == ["c"]

    def test_a_small_one_passes_a_large_one_that_has_to_wait(self) -> None:
        state = plan(node("a", mb=100), node("large", mb=200), node("small", mb=50), budget_mb=250)
        assert started(state) == ["a", "small"]
        state.succeeded(1, "a")
        assert started(state, 1) == ["large"]

    def test_what_is_held_counts_where_it_is_more(self) -> None:
        state = plan(*(node(name, mb=50) for name in "ab"), node("c", "a", mb=50), budget_mb=200)
        assert started(state) == ["a", "b"]
        state.succeeded(1, "a")
        state.memory_sampled(1, {"b": (1.0, 160 * MB), "a": (0.5, 999 * MB)})
        assert started(state, 1) == []
        state.memory_sampled(2, {"b": (2.0, 150 * MB)})
        assert started(state, 2) == ["c"]
        assert state.peak_bytes == 160 * MB

    def test_the_fallback_has_an_expectation_of_its_own(self) -> None:
        state = plan(node("a", mb=(50, 150)), node("b", mb=100), budget_mb=200)
        assert started(state) == ["a", "b"]
        state.failed(1, "a")
        assert started(state, 1) == []
        state.succeeded(2, "b")
        assert state.take_actions(2) == [StartAgent("a", 1)]

    def over(self, **given: Any) -> PlanState:
        """Two agents that run, of which b holds far more than it should, at one reading."""
        state = plan(node("a", mb=150), node("b", mb=(20, 20)), budget_mb=200, **given)
        assert started(state) == ["a", "b"]
        state.memory_sampled(1, {"a": (0.9, 140 * MB), "b": (1.0, 80 * MB)})
        assert state.take_actions(1) == []
        return state

    def test_the_one_furthest_above_its_expectation_is_stopped_after_a_second_reading(self) -> None:
        state = self.over()
        state.memory_sampled(1.2, {"a": (1.2, 141 * MB), "b": (1.0, 80 * MB)})
        assert state.take_actions(1.2) == []  # nothing new is known of b
        state.memory_sampled(2, {"a": (1.2, 141 * MB), "b": (2.0, 81 * MB)})
        [stop] = state.take_actions(2)
        assert isinstance(stop, StopAgent)
        assert stop.name == "b"
        assert "held 222 MB, more than the budget of 200 MB" in stop.reason
        assert state.ending is Ending.COMPLETED
        # While it is on its way out nobody else pays for it.
        state.memory_sampled(3, {"a": (3.0, 141 * MB), "b": (3.0, 81 * MB)})
        state.memory_sampled(4, {"a": (4.0, 141 * MB), "b": (4.0, 81 * MB)})
        assert state.take_actions(4) == []
        # Then it is an agent that failed: its fallback is next.
        state.failed(5, "b")
        assert state.take_actions(5) == [StartAgent("b", 1)]
        state.failed(6, "b")
        assert state.state_of("b") is S.FAILED

    def test_a_reading_that_flaps_stops_nobody(self) -> None:
        state = self.over()
        state.memory_sampled(2, {"b": (2.0, 40 * MB)})
        state.memory_sampled(3, {"b": (3.0, 80 * MB)})
        assert state.take_actions(3) == []

    def test_without_a_reading_nobody_is_judged(self) -> None:
        state = plan(node("a", mb=10), node("b", mb=10), budget_mb=20)
        assert started(state) == ["a", "b"]
        state.memory_sampled(1, {})
        assert state.take_actions(1) == []

    def test_one_alone_is_left_to_its_hard_limit(self) -> None:
        state = plan(node("a", mb=10), budget_mb=20)
        started(state)
        for now in (1.0, 2.0, 3.0):
            state.memory_sampled(now, {"a": (now, 30 * MB)})
        assert state.take_actions(3) == []

    def test_without_a_budget_memory_is_only_noted(self) -> None:
        state = plan(node("a", mb=10))
        started(state)
        for now in (1.0, 2.0, 3.0):
            state.memory_sampled(now, {"a": (now, 5000 * MB)})
        assert state.take_actions(3) == []
        assert state.peak_bytes == 5000 * MB


def test_which_states_are_final() -> None:
    assert {state for state in NodeState if state.is_final} == {S.SUCCEEDED, S.FAILED, S.SKIPPED, S.STOPPED}


def test_an_agent_that_takes_the_whole_budget_fits() -> None:
    check_nodes([PlanNode(name="a", expected_bytes=(100 * MB,))], 100 * MB)
