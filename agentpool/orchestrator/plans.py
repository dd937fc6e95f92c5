"""Plans: which agents are to run, in which order, and what may go wrong. Checked where they are made.

Knows nothing of pools and tasks. Any thread may call it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Final, Literal

from agentpool.agents.registry import AgentKind, kind_of
from agentpool.config import MB, TaskOptions
from agentpool.core.plan import PlanNode, check_nodes
from agentpool.errors import PlanError, SettingsError
from agentpool.orchestrator.prompts import named_results
from agentpool.orchestrator.runners import Kinds
from agentpool.orchestrator.words import GENERAL, REVIEWERS, asked_for
from agentpool_worker.agents.base import STOCK, kind_name, resolve

__all__ = [
    "AgentKindLike",
    "Plan",
    "PlannedAgent",
    "Policy",
    "check_kinds",
    "checked_paths",
    "label_of",
    "nodes_of",
    "plan",
    "run_on",
]

#: What `pool.submit_agent` takes.
AgentKindLike = str | type[Any] | AgentKind
Policy = Literal["required", "optional"]
PromptMaker = Callable[[Mapping[str, Any]], str]

#: Options of a task that are the orchestrator's own business.
_OWN_OPTIONS: Final = frozenset({"name", "block"})


@dataclass(frozen=True, slots=True)
class PlannedAgent:
    """One agent of a plan.

    kind: as `pool.submit_agent` takes it. name: in reports and dependencies; by default the kind's own.
    reason: why it was chosen.
    prompt: None: the plan's. A string: where the agent has dependencies, `{results}` in it becomes what they came to,
        and `{results[NAME]}` what NAME came to, as text. A function: called in the thread that runs the plan with the
        results by name, returns the prompt.
    kwargs: further keywords of the agent's `run`; they win over `path` and `out` of the plan.
    after: names of agents that must have ended before. One whose required dependency did not succeed is skipped.
    results_as: a keyword of `run` that gets the results of the dependencies that succeeded, as a dict by name.
    policy: "required": its failure fails the plan and skips what depends on it; "optional": it does neither, and what
        depends on it runs without its result.
    fallback: kinds that are tried in its place, in order, each when the one before it has failed for good.
    options: as `pool.options` takes them, such as `timeout`, `retry`, `hard_memory_limit_mb`.
    expected_memory_mb: what it is expected to hold, reserved while it runs, in the plan's `budget_mb` and as the task
        option of this name; by default the kind's, and in the budget else the pool's `memory_limit_mb`.

    Raises PlanError for what no agent can be.
    """

    kind: AgentKindLike
    name: str = ""
    reason: str = ""
    _: KW_ONLY
    prompt: str | PromptMaker | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    after: Sequence[str] = ()
    results_as: str | None = None
    policy: Policy = "required"
    fallback: Sequence[AgentKindLike] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    expected_memory_mb: float | None = None

    def __post_init__(self) -> None:
        name = self.name or (self.kind.name if isinstance(self.kind, AgentKind) else kind_name(self.kind))
        _check(isinstance(name, str), f"an agent's name must be a string, got {name!r}")
        object.__setattr__(self, "name", name)
        for part in ("after", "fallback"):
            object.__setattr__(self, part, _tuple(name, part, getattr(self, part)))
        _check(self.prompt is None or isinstance(self.prompt, str) or callable(self.prompt),
               f"agent {name!r}: prompt must be a string, a function of the results, or None, got {self.prompt!r}")
        for part in ("kwargs", "options"):
            given = getattr(self, part)
            _check(isinstance(given, Mapping) and all(isinstance(key, str) for key in given),
                   f"agent {name!r}: {part} must map names to values, got {given!r}")
        _check(self.policy in ("required", "optional"),
               f"agent {name!r}: policy must be 'required' or 'optional', got {self.policy!r}")
        _check_number(f"agent {name!r}: expected_memory_mb", self.expected_memory_mb)
        self._check_options()
        self._check_results()

    def _check_options(self) -> None:
        if own := sorted(_OWN_OPTIONS & set(self.options)):
            raise PlanError(f"agent {self.name!r}: the option {own[0]!r} is set by the orchestrator itself")
        try:
            TaskOptions().updated(self.all_options)
        except SettingsError as error:
            raise PlanError(f"agent {self.name!r}: {error}") from error

    @property
    def all_options(self) -> dict[str, Any]:
        """`options`, and what else of it is a task option."""
        expected = {} if self.expected_memory_mb is None else {"expected_memory_mb": self.expected_memory_mb}
        return {**expected, **self.options}

    @property
    def kinds(self) -> tuple[AgentKindLike, ...]:
        """Its kind, then its fallbacks."""
        return (self.kind, *self.fallback)

    def _check_results(self) -> None:
        if self.results_as is not None:
            _check(isinstance(self.results_as, str) and self.results_as.isidentifier(),
                   f"agent {self.name!r}: results_as must be the name of a keyword, got {self.results_as!r}")
            _check(bool(self.after), f"agent {self.name!r}: results_as has nothing to pass on: no dependency is named "
                                     "in after")
            _check(self.results_as not in self.kwargs,
                   f"agent {self.name!r}: {self.results_as!r} is in kwargs and in results_as: which is it?")
        if self.after and isinstance(self.prompt, str):
            for other in named_results(self.prompt):
                _check(other in self.after, f"agent {self.name!r}: its prompt has {{results[{other}]}}, and {other!r} "
                                            f"is not among its dependencies: after is {list(self.after)}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Which agents run for `prompt`, in which order, within which bounds.

    path, out: passed to each agent whose `run` takes them: what to look at, and where to write (None: nowhere). With
        `path` None neither is passed.
    agents: each runs as soon as those in its `after` have ended and the pool and the budget have room for it.
    budget_seconds: for the whole plan; then what runs is stopped, and what has not begun is skipped.
    budget_mb: memory for all agents that run at a time, in MB. Each start reserves what is expected of it; no agent may
        hold more than this alone, and where all together hold more, one is stopped.
    stops_on_failure: the first required agent that fails ends the plan; by default the others go on.

    Raises PlanError for two agents of one name, unknown dependencies, cycles, and agents above the budget.
    """

    prompt: str
    path: str | None = None
    out: str | None = None
    agents: tuple[PlannedAgent, ...] = ()
    _: KW_ONLY
    budget_seconds: float | None = None
    budget_mb: float | None = None
    stops_on_failure: bool = False

    def __post_init__(self) -> None:
        _check(isinstance(self.prompt, str), f"prompt must be a string, got {self.prompt!r}")
        object.__setattr__(self, "agents", tuple(self.agents))
        for agent in self.agents:
            _check(isinstance(agent, PlannedAgent), f"agents must be PlannedAgent(...)s, got {agent!r}")
        _check_number("budget_seconds", self.budget_seconds)
        _check_number("budget_mb", self.budget_mb)
        nodes_of(self, 0.0)


def nodes_of(plan: Plan, usual_mb: float) -> list[PlanNode]:
    """The plan as the core has it. `usual_mb`: expected of an agent that says nothing. Raises PlanError."""
    if plan.budget_mb is not None:
        usual_mb = min(usual_mb, plan.budget_mb)
    nodes = []
    for agent in plan.agents:
        expected = tuple(int((_expected_mb(agent, kind) or usual_mb) * MB) for kind in agent.kinds)
        nodes.append(PlanNode(name=agent.name, after=tuple(agent.after), is_required=agent.policy == "required",
                              expected_bytes=expected))
    check_nodes(nodes, None if plan.budget_mb is None else int(plan.budget_mb * MB))
    return nodes


def _expected_mb(agent: PlannedAgent, kind: AgentKindLike) -> float | None:
    given: float | None = agent.options.get("expected_memory_mb", agent.expected_memory_mb)
    found = kind_of(kind)
    return given if given is not None or found is None else found.expected_memory_mb


def label_of(kind: AgentKindLike) -> str:
    """What a kind is called in reports: an agent from a file with the program that runs it."""
    if not isinstance(kind, AgentKind):
        return kind_name(kind)
    is_program = isinstance(kind.agent, str) and kind.agent in STOCK and kind.agent != kind.name
    return f"{kind.name} ({kind.agent})" if is_program else kind.name


def _class_of(kind: AgentKindLike) -> type[Any]:
    found = kind_of(kind)
    return resolve(found.target if found is not None else kind)  # type: ignore[arg-type]


def check_kinds(plan: Plan) -> dict[str, list[type[Any]]]:
    """The classes of each agent's kind and fallbacks. Raises LookupError or TypeError for what is no agent."""
    classes = {}
    for agent in plan.agents:
        try:
            classes[agent.name] = [_class_of(kind) for kind in agent.kinds]
        except (LookupError, TypeError) as error:
            raise type(error)(f"agent {agent.name!r}: {error}") from error
    return classes


def plan(
    prompt: str,
    *,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    agents: Sequence[AgentKindLike | PlannedAgent] | None = None,
    budget_seconds: float | None = None,
    budget_mb: float | None = None,
    stops_on_failure: bool = False,
    kinds: Kinds | None = None,
) -> Plan:
    """Plan which agents to run for `prompt`.

    agents: the agents to run, whatever the prompt says: stock names, "module:Class", classes, or `PlannedAgent`s,
        which may depend on each other. None: the prompt's words decide. Words about security, performance and tests
        each ask for the agent concerned ("look for vulnerabilities": only the security-analyst), words after
        "without", "except" or "skip" leave it out, words after "no" or "not" do neither. Where nothing is asked for,
        and where a review is to be followed by tests ("review this and write tests"), all three run. It is a table of
        words, not a model: `agents` settles what it gets wrong.
    path: a Python file or a directory. out: a directory for written files, made if missing; None: none are written.
    budget_seconds, budget_mb, stops_on_failure: see `Plan`.
    kinds: agents that were found in files, see `kinds_for`: they stand for the stock agents of the same names, a prompt
        may name them, and a general review is by those of the project.

    Raises FileNotFoundError for a `path` that does not exist, NotADirectoryError where `out` is a file, LookupError
    for an unknown agent, TypeError for what is no agent, ValueError where no agent is left, PlanError (a ValueError)
    for agents that cannot be run together.
    """
    where, target = checked_paths(path, out)
    if isinstance(agents, str):
        raise TypeError(f"agents must be a sequence of agents, got the string {agents!r}: write [{agents!r}]")
    kinds = (kinds or Kinds()).within(budget_mb)
    chosen = _chosen_by_words(prompt, kinds) if agents is None else _chosen_by_name(agents, kinds)
    if not chosen:
        raise ValueError(f"no agent is left to run for the prompt {prompt!r}; known are {', '.join(REVIEWERS)}")
    return Plan(prompt, where, target, tuple(chosen), budget_seconds=budget_seconds, budget_mb=budget_mb,
                stops_on_failure=stops_on_failure)


def checked_paths(path: str | os.PathLike[str], out: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    """Both as absolute paths. Raises as `plan` does."""
    where = os.path.abspath(path)
    if not os.path.exists(where):
        raise FileNotFoundError(f"there is nothing at {where!r} to look at: path must be a Python file or a directory")
    target = None if out is None else os.path.abspath(out)
    if target is not None and os.path.exists(target) and not os.path.isdir(target):
        raise NotADirectoryError(f"out must be a directory for the agents to write to, but {target!r} is a file")
    return where, target


def run_on(plan: Plan, kinds: Kinds) -> Plan:
    """The same plan, with the agents that were found in files in place of the names of kinds."""
    return replace(plan, agents=tuple(_run_on(agent, kinds) for agent in plan.agents))


def _run_on(agent: PlannedAgent, kinds: Kinds) -> PlannedAgent:
    kind, *spare = (kinds.find(each) or each if isinstance(each, str) else each for each in agent.kinds)
    if kind is not agent.kind and kinds.falls_back and agent.kind in REVIEWERS and not spare:
        spare = [agent.kind]
    return replace(agent, kind=kind, fallback=tuple(spare))


def _chosen_by_words(prompt: str, kinds: Kinds) -> list[PlannedAgent]:
    """The agents that the prompt names; else those that its words mean; a general review is by all of the project's."""
    if named := kinds.named_in(prompt):
        chosen = [(kind.name, "the prompt names it") for kind in named]
    else:
        chosen = asked_for(prompt)
        names = [name for name, _ in chosen]
        if chosen and all(reason == GENERAL for _, reason in chosen):
            own = [name for name in kinds.project if name in names or name not in REVIEWERS]
            chosen = [(name, GENERAL) for name in own] or chosen
    return [_run_on(PlannedAgent(name, name, reason), kinds) for name, reason in chosen]


def _chosen_by_name(agents: Sequence[AgentKindLike | PlannedAgent], kinds: Kinds) -> list[PlannedAgent]:
    """Those that are only named are one where they are the same; those that are planned keep their names."""
    chosen: dict[str, PlannedAgent] = {}
    planned: list[PlannedAgent] = []
    for agent in agents:
        if isinstance(agent, PlannedAgent):
            planned.append(_run_on(agent, kinds))
            continue
        if agent == "command":
            raise LookupError("the agent 'command' runs command lines, not reviews: use `agentpool run`, "
                              f"PlannedAgent('command', prompt='a command line'), or one of {', '.join(REVIEWERS)}")
        name = _checked_name(agent, kinds)
        if name not in chosen:
            chosen[name] = _run_on(PlannedAgent(agent, name, "asked for by name"), kinds)
            planned.append(chosen[name])
    return planned


def _checked_name(agent: AgentKindLike, kinds: Kinds) -> str:
    """What an agent that is only named is called. Raises LookupError or TypeError for what is none."""
    if isinstance(agent, str) and kinds.find(agent) is not None:
        return agent
    found = kind_of(agent)
    if found is None and isinstance(agent, str) and ":" not in agent and agent not in STOCK:
        others = sorted({*(kind.name for kind in kinds), *STOCK} - {*REVIEWERS, "command"})
        known = ", ".join((*REVIEWERS, *others))
        raise LookupError(f"unknown agent {agent!r}; known are {known}, or 'module:Class', or a class")
    return kind_name(_class_of(agent)) if found is None else found.name


def _tuple(name: str, part: str, given: object) -> tuple[Any, ...]:
    """`after` and `fallback`; a single string is one name."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Sequence):
        found = tuple(given)
        if part == "fallback" or all(isinstance(each, str) for each in found):
            return found
    raise PlanError(f"agent {name!r}: {part} must be a sequence of {'kinds' if part == 'fallback' else 'names'}, "
                    f"got {given!r}")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)


def _check_number(name: str, value: float | None) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _check(value is None or (is_number and 0 < value <= 1e12), f"{name} must be a number greater than 0, got {value!r}")
