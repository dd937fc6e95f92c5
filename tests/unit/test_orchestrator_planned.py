"""Agents of a plan: what is refused and how it is said, what they are called with, what their results cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from agentpool.agents import AgentKind
from agentpool.config import MB
from agentpool.errors import PlanError
from agentpool.orchestrator import REVIEWERS, Kinds, Plan, PlannedAgent, plan
from agentpool.orchestrator.plans import label_of, nodes_of
from agentpool.orchestrator.prompts import RESULT_CHARACTERS, call_of, text_of
from agentpool.orchestrator.reports import cost_of, usage_of


class Kind:
    def run(self, prompt: str, **kwargs: Any) -> str:
        return prompt


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"policy": "maybe"}, "agent 'a': policy must be 'required' or 'optional', got 'maybe'"),
            ({"after": 3}, "agent 'a': after must be a sequence of names, got 3"),
            ({"after": [Kind]}, "agent 'a': after must be a sequence of names"),
            ({"fallback": Kind}, "agent 'a': fallback must be a sequence of kinds"),
            ({"prompt": 3}, "agent 'a': prompt must be a string, a function of the results, or None, got 3"),
            ({"kwargs": [1]}, "agent 'a': kwargs must map names to values, got [1]"),
            ({"options": {"timeout": 0}}, "agent 'a': timeout must be greater than 0"),
            ({"options": {"timeuot": 1}}, "agent 'a': unknown option timeuot"),
            ({"options": {"name": "x"}}, "agent 'a': the option 'name' is set by the orchestrator itself"),
            ({"expected_memory_mb": -1}, "agent 'a': expected_memory_mb must be a number greater than 0, got -1"),
            ({"expected_memory_mb": True}, "must be a number"),
            ({"results_as": "found"}, "agent 'a': results_as has nothing to pass on"),
            ({"results_as": "no name", "after": ["b"]}, "results_as must be the name of a keyword, got 'no name'"),
            ({"results_as": "x", "after": ["b"], "kwargs": {"x": 1}}, "'x' is in kwargs and in results_as"),
            ({"prompt": "{results[c]}", "after": ["b"]}, "'c' is not among its dependencies: after is ['b']"),
        ],
    )
    def test_an_agent_that_cannot_be(self, given: dict[str, Any], said: str) -> None:
        with pytest.raises(PlanError, match=re.escape(said)):
            PlannedAgent(Kind, "a", **given)

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: Plan("x", agents=(PlannedAgent(Kind), PlannedAgent(Kind))), "two agents are called"),
            (lambda: Plan("x", agents=(Kind,)), "agents must be PlannedAgent(...)s"),  # type: ignore[arg-type]
            (lambda: Plan(3), "prompt must be a string, got 3"),  # type: ignore[arg-type]
            (lambda: Plan("x", budget_seconds=0), "budget_seconds must be a number greater than 0, got 0"),
            (lambda: Plan("x", budget_mb=float("nan")), "budget_mb must be a number greater than 0, got nan"),
            (lambda: Plan("x", agents=(PlannedAgent(Kind, "a", after="b"),)), "'a' is to run after 'b'"),
        ],
    )
    def test_a_plan_that_cannot_be(self, make: Callable[[], Plan], said: str) -> None:
        with pytest.raises(PlanError, match=re.escape(said)):
            make()


def test_names_and_lists_are_made_regular() -> None:
    agent = PlannedAgent(Kind, after="b", fallback=["security-analyst"])
    assert agent.name.endswith(":Kind")
    assert (agent.after, agent.fallback) == (("b",), ("security-analyst",))
    assert PlannedAgent("security-analyst").name == "security-analyst"


def test_what_is_expected() -> None:
    agents = (PlannedAgent(Kind, "a", expected_memory_mb=50, fallback=[Kind]), PlannedAgent(Kind, "b", after="a"))
    a, b = nodes_of(Plan("x", agents=agents), 100)
    assert (a.expected_bytes, b.expected_bytes) == ((50 * MB, 50 * MB), (100 * MB,))
    assert nodes_of(Plan("x", agents=agents, budget_mb=60), 100)[1].expected_bytes == (60 * MB,)


class TestCalls:
    def test_text_of_results(self) -> None:
        assert text_of("as it\nis") == "as it\nis"
        assert text_of({"summary": "all well", "other": 1}) == "all well"
        long = text_of("x" * (RESULT_CHARACTERS + 5))
        assert long.endswith("x\n(5 more characters are left out here)")
        assert long.count("x") == RESULT_CHARACTERS

    def prompt(self, agent: PlannedAgent, plans: str = "x", **results: Any) -> str:
        return call_of(Plan(plans), agent, Kind().run, results, {"gone": "ValueError: no"})[0]

    def test_the_plans_own_prompt(self) -> None:
        assert self.prompt(PlannedAgent(Kind), "do {results}") == "do {results}"
        after = PlannedAgent(Kind, after=["a", "gone"])
        assert self.prompt(after, "do {results[a]} {results[b]}", a="this") == "do this {results[b]}"
        assert self.prompt(after, "{results[gone]}", a="this") == "(gone has no result: ValueError: no)"

    def test_results_are_not_looked_at_again(self) -> None:
        agent = PlannedAgent(Kind, after=["a", "b"], prompt=r"{results[a]} {results[b]} \1 {x}")
        assert self.prompt(agent, a="{results[b]}", b=r"\g<0>") == r"{results[b]} \g<0> \1 {x}"

    def test_keywords(self) -> None:
        plan = Plan("x", "/code", "/out")

        def some(prompt: str, *, out: str | None) -> None: ...
        def positional(path: str, /) -> None: ...

        agent = PlannedAgent(Kind, kwargs={"depth": 2})
        assert call_of(plan, agent, some, {}, {})[1] == {"depth": 2, "out": "/out"}
        assert call_of(plan, agent, positional, {}, {})[1] == {"depth": 2}
        assert call_of(plan, agent, Kind().run, {}, {})[1] == {"depth": 2, "path": "/code", "out": "/out"}
        assert call_of(plan, agent, object(), {}, {})[1].keys() == {"depth", "path", "out"}  # nothing is known of it
        assert call_of(Plan("x"), agent, Kind().run, {}, {})[1] == {"depth": 2}


class Answer:
    usage: ClassVar[dict[str, Any]] = {"input_tokens": 3, "output_tokens": "many", "cache_read_input_tokens": True}
    cost_usd = 0.5


class Odd:
    @property
    def usage(self) -> int:
        raise RuntimeError("not now")


def test_what_a_result_says_of_its_cost() -> None:
    assert usage_of({"usage": {"input_tokens": 1, "odd": 2, "output_tokens": 3}}) == {
        "input_tokens": 1, "output_tokens": 3}  # fmt: skip
    assert usage_of(Answer()) == {"input_tokens": 3}
    assert usage_of(Odd()) is usage_of(None) is usage_of("usage") is usage_of({"usage": None}) is None
    assert (cost_of({"total_cost_usd": 1}), cost_of(Answer()), cost_of({"cost_usd": "1"})) == (1.0, 0.5, None)


class TestKinds:
    """Registered kinds, with what they expect and how reports call them."""

    def test_what_they_expect_is_reserved(self) -> None:
        large = AgentKind(name="large", agent=Kind, expected_memory_mb=300)
        agents = (
            PlannedAgent(large, "a", fallback=[Kind]),
            PlannedAgent(large, "b", expected_memory_mb=40),
        )
        found = [node.expected_bytes for node in nodes_of(Plan("x", agents=agents), 100)]
        assert found == [(300 * MB, 100 * MB), (40 * MB,)]
        with pytest.raises(PlanError, match=r"'a' is expected to hold 300 MB, more than the whole budget of 200 MB"):
            Plan("x", agents=agents, budget_mb=200)

    def test_an_expectation_is_a_task_option_too(self) -> None:
        assert PlannedAgent(Kind, "a", expected_memory_mb=40).all_options == {"expected_memory_mb": 40}
        with pytest.raises(PlanError, match=r"'a': expected_memory_mb \(40\) is above hard_memory_limit_mb \(30\)"):
            PlannedAgent(Kind, "a", expected_memory_mb=40, options={"hard_memory_limit_mb": 30})

    def test_what_they_are_called(self) -> None:
        docs = AgentKind(name="docs", agent="claude")
        assert PlannedAgent(docs).name == "docs"
        assert label_of(docs) == "docs (claude)"
        assert label_of(AgentKind(name="claude", agent="claude")) == "claude"
        assert label_of(AgentKind(name="own", agent=Kind)) == "own"
        assert label_of("claude") == "claude"

    def test_which_of_them_a_prompt_names(self) -> None:
        kinds = Kinds(
            "claude",
            project={name: AgentKind(name=name, agent="claude") for name in ("docs-writer", "test")},
            user={name: AgentKind(name=name, agent="claude", description="the user's") for name in ("test", "code")},
        )

        def named(prompt: str) -> list[str]:
            return [kind.name for kind in kinds.named_in(prompt)]

        assert named("review this code and test it") == []
        for prompt in ("have the docs writer look", "use docs-writer.", "@docs-writer: go"):
            assert named(prompt) == ["docs-writer"]
        assert named("ask the test agent, then the agent code") == ["test", "code"]
        assert named("@Test") == ["test"]
        assert [kind.description for kind in kinds] == ["", "", "the user's"]

    def test_what_a_budget_has_no_room_for_is_left_to_the_stock_agent(self) -> None:
        found = {name: AgentKind(name=name, agent="claude", expected_memory_mb=330) for name in (REVIEWERS[0], "docs")}

        def kinds_in(budget_mb: float | None, *, falls_back: bool = True) -> list[Any]:
            kinds = Kinds("claude", project=found, falls_back=falls_back)
            planned = plan("look for vulnerabilities", path=".", kinds=kinds, budget_mb=budget_mb)
            return [label_of(agent.kind) for agent in planned.agents]

        assert kinds_in(None) == kinds_in(400) == [f"{REVIEWERS[0]} (claude)"]
        assert kinds_in(300) == [REVIEWERS[0]]
        with pytest.raises(PlanError, match="330 MB, more than the whole budget of 300 MB"):
            kinds_in(300, falls_back=False)
