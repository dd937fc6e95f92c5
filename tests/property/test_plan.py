"""Every plan ends: random graphs, policies, budgets and fates of agents, with the promises checked at every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentpool.config import MB
from agentpool.core.plan import Ending, NodeState, PlanNode, PlanState, StartAgent, StopAgent
from agentpool.errors import PlanError

STEPS = 2000


@dataclass
class Case:
    nodes: list[PlanNode]
    budget_seconds: float | None
    budget_bytes: int | None
    stops_on_failure: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(0, 12))
    budget = draw(st.one_of(st.none(), st.integers(1, 400)))
    nodes = []
    for number in range(count):
        earlier = [str(other) for other in range(number)]
        after = draw(st.lists(st.sampled_from(earlier), max_size=4)) if earlier else []
        most = 400 if budget is None else budget
        expected = draw(st.lists(st.integers(0, most).map(lambda mb: mb * MB), min_size=1, max_size=3))
        nodes.append(PlanNode(name=str(number), after=tuple(after), is_required=draw(st.booleans()),
                              expected_bytes=tuple(expected)))
    order = draw(st.permutations(nodes))
    return Case(order, draw(st.one_of(st.none(), st.floats(0.1, 30))), None if budget is None else budget * MB,
                draw(st.booleans()))


@dataclass
class Run:
    """Performs what is asked for, with the fates that are drawn, and checks what must hold."""

    case: Case
    #: of fates: drawn one by one they would cost Hypothesis a minute
    chance: Random
    now: float = 0.0
    running: dict[str, int] = field(default_factory=dict)
    stopping: set[str] = field(default_factory=set)
    held: dict[str, tuple[float, int]] = field(default_factory=dict)
    begun: set[tuple[str, int]] = field(default_factory=set)
    final: dict[str, NodeState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case = self.case
        self.specs = {node.name: node for node in case.nodes}
        self.state = PlanState(0.0, case.nodes, budget_seconds=case.budget_seconds, budget_bytes=case.budget_bytes,
                               stops_on_failure=case.stops_on_failure)

    def perform(self) -> None:
        for action in self.state.take_actions(self.now):
            if isinstance(action, StopAgent):
                assert action.name in self.running
                assert action.name not in self.stopping, "asked to stop twice"
                self.stopping.add(action.name)
            else:
                self.start(action)
        self.check()

    def start(self, action: StartAgent) -> None:
        name, spec = action.name, self.specs[action.name]
        assert name not in self.running, "two at once"
        assert self.state.ending is Ending.COMPLETED, "started after the end"
        assert self.case.budget_seconds is None or self.now < self.case.budget_seconds, "started after the budget"
        for other in spec.after:
            assert self.state.state_of(other).is_final, "started before its dependency had ended"
            assert self.state.state_of(other) is NodeState.SUCCEEDED or not self.specs[other].is_required
        if self.chance.random() < 0.1:
            self.state.postponed(self.now, name)
            return
        assert (name, action.choice) not in self.begun, "one kind was started twice"
        assert action.choice == 0 or (name, action.choice - 1) in self.begun, "a fallback before its kind"
        self.begun.add((name, action.choice))
        self.running[name] = spec.expected_bytes[action.choice]
        if self.case.budget_bytes is not None:
            others = sum(max(self.held.get(other, (0, 0))[1], expected) for other, expected in self.running.items()
                         if other != name)
            assert len(self.running) == 1 or others + self.running[name] <= self.case.budget_bytes, "over the budget"

    def end_one(self) -> None:
        name = self.chance.choice(sorted(self.running))
        del self.running[name]
        self.stopping.discard(name)
        self.held.pop(name, None)
        if self.chance.random() < 0.5:
            self.state.succeeded(self.now, name)
        else:
            self.state.failed(self.now, name)

    def sample(self) -> None:
        for name in self.running:
            self.held[name] = (self.now, self.chance.randrange(300) * MB)
        self.state.memory_sampled(self.now, dict(self.held))

    def check(self) -> None:
        for name, spec in self.specs.items():
            state = self.state.state_of(name)
            assert (state in (NodeState.STARTED, NodeState.STOPPING)) == (name in self.running)
            if state.is_final:
                assert self.final.setdefault(name, state) is state, "settled twice"
            if state is NodeState.SKIPPED and self.state.ending is Ending.COMPLETED:
                lacking = [other for other in spec.after if self.specs[other].is_required
                           and self.state.state_of(other).is_final
                           and self.state.state_of(other) is not NodeState.SUCCEEDED]
                assert lacking, "skipped without a cause"
            assert (self.state.reason_of(name) is not None) >= (state in (NodeState.SKIPPED, NodeState.STOPPED))
        assert self.state.is_over == (len(self.final) == len(self.specs))

    def drive(self) -> None:
        self.perform()
        for _ in range(STEPS):
            if self.state.is_over:
                break
            choices = ["wait", "sample", *(["end"] * 3 if self.running else [])]
            step = self.chance.choice(choices)
            if step == "end":
                self.end_one()
            elif step == "sample":
                self.sample()
            else:
                deadline = self.state.next_deadline()
                assert self.running or deadline is not None, "nothing runs and nothing is awaited"
                self.now = max(self.now, deadline) if deadline is not None else self.now + 1
            self.perform()
        assert self.state.is_over, "it did not end"
        assert not self.running


@settings(max_examples=400, deadline=None)
@given(case=cases(), seed=st.integers(0, 1 << 30))
def test_every_plan_ends_in_order_and_within_its_budget(case: Case, seed: int) -> None:
    Run(case, Random(seed)).drive()


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_without_failures_and_limits_everything_succeeds(case: Case) -> None:
    state = PlanState(0.0, case.nodes, stops_on_failure=case.stops_on_failure)
    while not state.is_over:
        actions = state.take_actions(0.0)
        assert actions
        for action in actions:
            state.succeeded(0.0, action.name)
    assert {state.state_of(node.name) for node in case.nodes} <= {NodeState.SUCCEEDED}
    assert state.ending is Ending.COMPLETED


@settings(max_examples=200, deadline=None)
@given(case=cases(), data=st.data())
def test_a_cycle_is_always_refused_and_shown(case: Case, data: st.DataObject) -> None:
    assume(len(case.nodes) > 1)
    circle = data.draw(st.permutations([node.name for node in case.nodes]))[: data.draw(st.integers(2, 4))]
    before = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    nodes = [PlanNode(name=node.name, after=(*node.after, *([before[node.name]] if node.name in before else [])))
             for node in case.nodes]
    with pytest.raises(PlanError, match=" -> "):
        PlanState(0.0, nodes)
