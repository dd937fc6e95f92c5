"""Plans a prompt into agents and runs the plan through a pool.

A plan is a graph of agents: which depend on which, what happens where one fails, and what all of them may cost. How
their tasks are placed, throttled and retried is the pool's business, how their results read the agents' own. Any
thread may call this; everything runs in the thread that does.

    words     which stock agents a prompt's words ask for
    plans     plans, checked where they are made
    mapping   plans as plain data, as a file has them
    prompts   what an agent is called with
    runners   the kinds of `.claude/agents`, on a coding agent's command line
    running   carries out what `agentpool.core.plan` decides
    reports   what became of it, and what it cost
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentpool.orchestrator.mapping import plan_from_mapping
from agentpool.orchestrator.plans import AgentKindLike, Plan, PlannedAgent, plan
from agentpool.orchestrator.reports import AgentOutcome, AgentTry, OrchestrationReport, partial_report
from agentpool.orchestrator.runners import AUTO, Kinds, kinds_for
from agentpool.orchestrator.running import OnUpdate, run_plan
from agentpool.orchestrator.words import REVIEWERS

if TYPE_CHECKING:
    from agentpool.pool import AgentPool

__all__ = [
    "REVIEWERS",
    "AgentOutcome",
    "AgentTry",
    "Kinds",
    "OrchestrationReport",
    "Plan",
    "PlannedAgent",
    "kinds_for",
    "orchestrate_with_memory_management",
    "partial_report",
    "plan",
    "plan_from_mapping",
    "run_plan",
]


def orchestrate_with_memory_management(
    prompt: str,
    *,
    path: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    agents: Sequence[AgentKindLike | PlannedAgent] | None = None,
    runner: str | None = AUTO,
    pool: AgentPool | None = None,
    on_update: OnUpdate | None = None,
    budget_seconds: float | None = None,
    budget_mb: float | None = None,
    stops_on_failure: bool = False,
) -> OrchestrationReport:
    """Plan `prompt`, run the plan through `pool`, and report.

    path: the current directory by default.
    runner: "auto": where a coding agent's command line is installed (the first of claude, codex, gemini, copilot,
        opencode and aider), the agents that `.claude/agents` describes run on it: those of the current directory, then
        those of the user's home. They stand for the stock agents of the same names, which take over where they fail.
        The name of a program: that one; it must be installed. None, or "stock": no file is looked at.

    Everything else, and all errors, as in `plan`, `run_plan`, and for `runner` in `kinds_for`.
    """
    if runner == AUTO and agents is not None and not any(map(_is_named, agents)):
        runner = None  # nothing is to be looked up
    kinds = kinds_for(runner, project=os.getcwd(), home=os.path.expanduser("~"))
    todo = plan(
        prompt, path=os.curdir if path is None else path, out=out, agents=agents, budget_seconds=budget_seconds,
        budget_mb=budget_mb, stops_on_failure=stops_on_failure, kinds=kinds,
    )  # fmt: skip
    return run_plan(todo, pool, on_update=on_update)


def _is_named(agent: object) -> bool:
    kind = agent.kind if isinstance(agent, PlannedAgent) else agent
    return isinstance(kind, str) and ":" not in kind
