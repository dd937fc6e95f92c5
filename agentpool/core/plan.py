"""A plan of agents that depend on each other: what may start now, what is skipped and why, when the budget is spent.

Pure: events come in, each with `now`; `take_actions` says what to do. It knows nothing of pools, tasks, prompts and
results: an agent is a name with its dependencies, and succeeded or failed. One thread at a time; the orchestrator's.
"""

from __future__ import annotations

import bisect
import enum
import graphlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agentpool.config import MB
from agentpool.errors import InternalError, PlanError

__all__ = ["Ending", "NodeState", "PlanNode", "PlanState", "StartAgent", "StopAgent", "check_nodes"]

#: Seconds after which an agent that the pool had no room for is offered again.
POSTPONED_SECONDS: Final = 0.1


class NodeState(enum.Enum):
    """The first three are on the way, the others are final."""

    WAITING = "waiting"
    STARTED = "started"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    STOPPED = "stopped"

    @property
    def is_final(self) -> bool:
        return self in _FINAL


_FINAL: Final = frozenset({NodeState.SUCCEEDED, NodeState.FAILED, NodeState.SKIPPED, NodeState.STOPPED})


class Ending(enum.Enum):
    """How a plan came to its end: by itself, or before that."""

    COMPLETED = "completed"
    #: `budget_seconds` had passed
    BUDGET_SPENT = "budget_spent"
    #: a required agent failed, and the plan stops on that
    FAILURE = "failure"
    #: Ctrl-C, or an error of whoever watches
    INTERRUPTED = "interrupted"
    #: the pool was closed
    POOL_LOST = "pool_lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanNode:
    """One agent. `expected_bytes`: what it is expected to hold, first by its own kind, then by each fallback."""

    name: str
    after: tuple[str, ...] = ()
    is_required: bool = True
    expected_bytes: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class StartAgent:
    """Start it as its own kind (`choice` 0) or as a fallback (1, 2, ...)."""

    name: str
    choice: int


@dataclass(frozen=True, slots=True)
class StopAgent:
    """Stop it. It has ended only when `succeeded` or `failed` says so."""

    name: str
    reason: str


def check_nodes(nodes: Sequence[PlanNode], budget_bytes: int | None = None) -> None:
    """Raises PlanError for what can never be run to its end: duplicates, unknown dependencies, cycles, too much."""
    names = {node.name for node in nodes}
    seen: set[str] = set()
    for node in nodes:
        if node.name in seen:
            raise PlanError(f"two agents are called {node.name!r}: dependencies and results need one name for each")
        seen.add(node.name)
        for other in node.after:
            if other not in names:
                raise PlanError(f"agent {node.name!r} is to run after {other!r}, which is no agent of this plan; its "
                                f"agents are {', '.join(sorted(names))}")
        if budget_bytes is not None and max(node.expected_bytes) > budget_bytes:
            raise PlanError(f"agent {node.name!r} is expected to hold {max(node.expected_bytes) / MB:g} MB, more than "
                            f"the whole budget of {budget_bytes / MB:g} MB: raise the budget or lower its "
                            "expected_memory_mb")
    try:
        graphlib.TopologicalSorter({node.name: node.after for node in nodes}).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        raise PlanError("the agents wait for each other in a circle, so that none of them could ever start: "
                        f"{' -> '.join(circle)} (each runs after the one before it): remove one of these "
                        "dependencies") from None


class _Node:
    """Where one agent stands."""

    __slots__ = ("choice", "dependents", "name", "not_before", "open", "place", "reason", "seen_bytes", "spec", "state")

    def __init__(self, spec: PlanNode, place: int) -> None:
        self.spec = spec
        self.name = spec.name
        #: in the plan's order
        self.place = place
        self.state = NodeState.WAITING
        #: 0: its own kind, else which fallback
        self.choice = 0
        #: dependencies that have not ended
        self.open = len(set(spec.after))
        self.dependents: list[_Node] = []
        #: the pool had no room for it: it is not offered again before
        self.not_before: float | None = None
        #: why it was skipped or is stopped
        self.reason: str | None = None
        #: the last reading of what it holds, and when that was taken
        self.seen_bytes: tuple[float, int] | None = None

    @property
    def expected_bytes(self) -> int:
        return self.spec.expected_bytes[self.choice]

    @property
    def held_bytes(self) -> int:
        return 0 if self.seen_bytes is None else self.seen_bytes[1]


class PlanState:
    """See the module. `budget_bytes` is for the agents that run, together; `budget_seconds` from `now` on.

    Events: `succeeded`, `failed`, `postponed`, `memory_sampled`, `tick`, `ended`. After each, `take_actions`.
    """

    def __init__(
        self,
        now: float,
        nodes: Sequence[PlanNode],
        *,
        budget_seconds: float | None = None,
        budget_bytes: int | None = None,
        stops_on_failure: bool = False,
    ) -> None:
        check_nodes(nodes, budget_bytes)
        self._nodes = {node.name: _Node(node, place) for place, node in enumerate(nodes)}
        for node in self._nodes.values():
            for other in set(node.spec.after):
                self._nodes[other].dependents.append(node)
        self.budget_seconds = budget_seconds
        self.budget_bytes = budget_bytes
        self.stops_on_failure = stops_on_failure
        self.ending = Ending.COMPLETED
        #: why it ended early, in words
        self.ending_reason: str | None = None
        self._deadline = None if budget_seconds is None else now + budget_seconds
        self._unsettled = len(self._nodes)
        #: started or stopping
        self._active: dict[str, _Node] = {}
        #: waiting, with nothing left to wait for but memory and the pool; in the plan's order
        self._ready = [node for node in self._nodes.values() if not node.open]
        self._stops: list[StopAgent] = []
        #: the agents together were over the budget at this reading
        self._over_since: float | None = None
        self.peak_bytes = 0

    # -- looking -------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Has every agent come to its end?"""
        return not self._unsettled

    def state_of(self, name: str) -> NodeState:
        return self._nodes[name].state

    def choice_of(self, name: str) -> int:
        """Which of its kinds it has been given last: 0 its own, then its fallbacks."""
        return self._nodes[name].choice

    def reason_of(self, name: str) -> str | None:
        """Why it was skipped or stopped."""
        return self._nodes[name].reason

    def next_deadline(self) -> float | None:
        """When to call `tick` at the latest; None: there is nothing that time alone changes."""
        times = [node.not_before for node in self._ready if node.not_before is not None]
        if self._deadline is not None and self.ending is Ending.COMPLETED:
            times.append(self._deadline)
        return min(times, default=None)

    # -- what is to be done --------------------------------------------------------------------------------------

    def take_actions(self, now: float) -> list[StartAgent | StopAgent]:
        """What to do, stops first. Each start must be answered by `succeeded`, `failed` or `postponed`."""
        self.tick(now)
        actions: list[StartAgent | StopAgent] = [*self._stops]
        self._stops.clear()
        left = []
        for node in self._ready:
            if (node.not_before is not None and now < node.not_before) or not self._has_memory_for(node):
                left.append(node)
                continue
            node.state, node.not_before = NodeState.STARTED, None
            self._active[node.name] = node
            actions.append(StartAgent(node.name, node.choice))
        self._ready = left
        return actions

    def _has_memory_for(self, node: _Node) -> bool:
        """Counted is what a running agent holds, but at least what it is expected to: it may not have taken it yet."""
        if self.budget_bytes is None or not self._active:
            return True
        taken = sum(max(other.expected_bytes, other.held_bytes) for other in self._active.values())
        return taken + node.expected_bytes <= self.budget_bytes

    # -- events --------------------------------------------------------------------------------------------------

    def succeeded(self, now: float, name: str) -> None:
        """Its task returned. A result that was there before the stop that was asked for counts."""
        node = self._leave(name)
        node.reason = None
        self._settle(node, NodeState.SUCCEEDED)

    def failed(self, now: float, name: str) -> None:
        """Its task failed for good, whatever the reason: the fallback is next, or it has failed."""
        node = self._leave(name)
        if node.state is NodeState.STOPPING and self.ending is not Ending.COMPLETED:
            self._settle(node, NodeState.STOPPED)
        elif self.ending is Ending.COMPLETED and node.choice + 1 < len(node.spec.expected_bytes):
            node.choice += 1
            node.state, node.reason = NodeState.WAITING, None
            self._make_ready(node)
        else:
            self._settle(node, NodeState.FAILED)
            if self.stops_on_failure and node.spec.is_required:
                self.ended(now, Ending.FAILURE, f"the required agent {name} failed")

    def postponed(self, now: float, name: str) -> None:
        """The pool has no room for it now. It was not started."""
        node = self._leave(name)
        if node.state is NodeState.STOPPING:
            self._settle(node, NodeState.SKIPPED)
            return
        node.state, node.not_before = NodeState.WAITING, now + POSTPONED_SECONDS
        self._make_ready(node)

    def memory_sampled(self, now: float, readings: Mapping[str, tuple[float, int]]) -> None:
        """The last readings of what running agents hold: when each was taken, and bytes.

        Where all together are over the budget, the one that is furthest above what was expected of it is stopped, once
        a later reading of it has shown the same: a program that is about to start another one counts twice for a while.
        """
        for name, reading in readings.items():
            if (node := self._active.get(name)) is not None:
                node.seen_bytes = reading
        held = sum(node.held_bytes for node in self._active.values())
        self.peak_bytes = max(self.peak_bytes, held)
        running = [node for node in self._active.values() if node.state is NodeState.STARTED and node.seen_bytes]
        # One alone that is over it has the budget for its hard limit, which is the pool's to keep.
        if self.budget_bytes is None or held <= self.budget_bytes or len(self._active) < 2 or not running:
            self._over_since = None
            return
        if len(running) < len(self._active):
            return  # one is being stopped already: its memory comes back first
        if self._over_since is None:
            self._over_since = max(node.seen_bytes[0] for node in running if node.seen_bytes)
        worst = max(running, key=lambda node: node.held_bytes - node.expected_bytes)
        assert worst.seen_bytes is not None
        if worst.seen_bytes[0] > self._over_since:
            self._over_since = None
            self._stop(worst, f"the agents together held {held / MB:.0f} MB, more than the budget of "
                              f"{self.budget_bytes / MB:g} MB, and this one was furthest above what was expected of it")

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self._deadline is not None and now >= self._deadline and self._unsettled:
            self.ended(now, Ending.BUDGET_SPENT, f"the budget of {self.budget_seconds:g} s is spent")

    def ended(self, now: float, ending: Ending, reason: str) -> None:
        """The plan ends here: what runs is stopped, nothing else starts. The first ending stands."""
        if self.ending is not Ending.COMPLETED or not self._unsettled:
            return
        self.ending, self.ending_reason = ending, reason
        self._ready.clear()
        for node in self._nodes.values():
            if node.state is NodeState.WAITING:
                node.reason = reason
                # One that waits for its fallback has failed already.
                self._finish(node, NodeState.FAILED if node.choice else NodeState.SKIPPED)
            elif node.state is NodeState.STARTED:
                self._stop(node, reason)

    # -- inside --------------------------------------------------------------------------------------------------

    def _stop(self, node: _Node, reason: str) -> None:
        node.state, node.reason = NodeState.STOPPING, reason
        self._stops.append(StopAgent(node.name, reason))

    def _leave(self, name: str) -> _Node:
        node = self._active.pop(name, None)
        if node is None:
            raise InternalError(f"agent {name!r} of a plan ended without having been started")
        node.seen_bytes = None
        if self._stops:  # it ended before it could be stopped
            self._stops = [stop for stop in self._stops if stop.name != name]
        return node

    def _make_ready(self, node: _Node) -> None:
        """Where the plan has it: what was planned first starts first."""
        bisect.insort(self._ready, node, key=lambda each: each.place)

    def _finish(self, node: _Node, state: NodeState) -> None:
        node.state = state
        self._unsettled -= 1

    def _settle(self, node: _Node, state: NodeState) -> None:
        """It has come to its end, and with it those that cannot do without it."""
        self._finish(node, state)
        settled = [node]
        while settled:
            other = settled.pop()
            lacks = other.spec.is_required and other.state is not NodeState.SUCCEEDED
            for dependent in other.dependents:
                if dependent.state is not NodeState.WAITING:
                    continue
                dependent.open -= 1
                if lacks:
                    dependent.reason = f"it needs {other.name}, which {_WORDS[other.state]}"
                    self._finish(dependent, NodeState.SKIPPED)
                    settled.append(dependent)
                elif not dependent.open:
                    self._make_ready(dependent)


_WORDS: Final = {NodeState.FAILED: "failed", NodeState.SKIPPED: "was skipped", NodeState.STOPPED: "was stopped"}
