"""Plans a prompt into agents and runs the plan through a pool.

A plan is a graph of agents: which depend on which, what happens where one fails, and what all of them may cost. How
their tasks are placed, throttled and retried is the pool's business, how their results read the agents' own. Any
thread may call this; everything runs in the thread that does.

    words     which stock agents a prompt's words ask for
    plans     plans, checked where they are made
    mapping   plans as plain data, as a file has them
    prompts   what an agent is called with
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
from agentpool.orchestrator.running import OnUpdate, run_plan
from agentpool.orchestrator.words import REVIEWERS

if TYPE_CHECKING:
    from agentpool.pool import AgentPool

__all__ = [
    "REVIEWERS",
    "AgentOutcome",
    "AgentTry",
    "OrchestrationReport",
    "Plan",
    "PlannedAgent",
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
    pool: AgentPool | None = None,
    on_update: OnUpdate | None = None,
    budget_seconds: float | None = None,
    budget_mb: float | None = None,
    stops_on_failure: bool = False,
) -> OrchestrationReport:
    """Plan `prompt`, run the plan through `pool`, and report.

    path: the current directory by default. Everything else, and all errors, as in `plan` and `run_plan`.
    """
    todo = plan(
        prompt, path=os.curdir if path is None else path, out=out, agents=agents, budget_seconds=budget_seconds,
        budget_mb=budget_mb, stops_on_failure=stops_on_failure,
    )  # fmt: skip
    return run_plan(todo, pool, on_update=on_update)
