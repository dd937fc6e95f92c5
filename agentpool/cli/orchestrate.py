"""`agentpool orchestrate`: a prompt planned into agents, or a plan from a file, run through a pool with live progress.

Main thread only.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from agentpool.cli.config import BUDGET_OPTION, budget_to_join
from agentpool.cli.terminal import Interrupted, Interrupts, UsageProblem, give_up_output
from agentpool.config import DEFAULT_MAX_PENDING, PoolOptions, PoolSettings

if TYPE_CHECKING:
    from agentpool.orchestrator import OrchestrationReport, Plan
    from agentpool.pool import AgentPool

__all__ = ["orchestrate"]

_FAILED: Final = 1
#: As `timeout` of coreutils says it.
_BUDGET_SPENT: Final = 124


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestrateOptions:
    """The command line of `agentpool orchestrate`, as it was given."""

    prompt: str | None
    plan: str | None
    path: str | None
    out: str | None
    agents: Sequence[str]
    runner: str | None
    budget_seconds: float | None
    budget_mb: float | None
    stop_on_failure: bool
    dry_run: bool
    as_json: bool
    timeout: float | None
    max_workers: int | None
    max_concurrent: int | None
    memory_limit: float | None
    budget: bool | None


_Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="What is to be done, in words; a plan file may have it.")
]
_Plan = Annotated[
    str | None,
    typer.Option("--plan", metavar="FILE", help="A plan (TOML): agents, and which of them waits for which."),
]
_Path = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The code to work on: a directory or a file.  [default: ., or the plan's]"),
]
_Out = Annotated[
    str | None, typer.Option(metavar="DIR", help="Where agents write files to; without it they write none.")
]
_Agents = Annotated[
    list[str] | None,
    typer.Option("--agent", metavar="NAME", help="Run this agent, not those that are planned; may be repeated."),
]
_Runner = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What runs the agents of .claude/agents: claude, codex, ..., auto (the first that is installed), or "
        "stock to leave them alone.  [default: auto, or the plan's]",
    ),
]
_BudgetSeconds = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="For the whole plan: then what runs is stopped.")
]
_BudgetMb = Annotated[
    float | None, typer.Option(metavar="MB", help="Memory for all agents that run at a time.")
]
_StopOnFailure = Annotated[
    bool, typer.Option("--stop-on-failure", help="End the plan on the first required agent that fails.")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the plan, show what would run and in which order, and end.")
]
_MaxWorkers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Worker processes at most.  [default: 4]")
]
_MaxConcurrent = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Agents that run at once.  [default: 2, or what --max-workers says]"),
]
_MemoryLimit = Annotated[
    float | None, typer.Option(metavar="MB", help="Stop an agent whose whole process tree uses more memory.")
]


def orchestrate(
    prompt: _Prompt = None,
    plan: _Plan = None,
    path: _Path = None,
    out: _Out = None,
    agents: _Agents = None,
    runner: _Runner = None,
    budget_seconds: _BudgetSeconds = None,
    budget_mb: _BudgetMb = None,
    stop_on_failure: _StopOnFailure = False,
    dry_run: _DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document: report and health.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Stop an agent that runs longer.")] = None,
    max_workers: _MaxWorkers = None,
    max_concurrent: _MaxConcurrent = None,
    memory_limit: _MemoryLimit = None,
    budget: Annotated[bool | None, BUDGET_OPTION] = None,
) -> None:
    """Plan a prompt into agents, or take a plan from a file, run them in pooled workers, and report."""
    options = OrchestrateOptions(
        prompt=prompt, plan=plan, path=path, out=out, agents=agents or [], runner=runner, budget_seconds=budget_seconds,
        budget_mb=budget_mb, stop_on_failure=stop_on_failure, dry_run=dry_run, as_json=as_json, timeout=timeout,
        max_workers=max_workers, max_concurrent=max_concurrent, memory_limit=memory_limit,
        budget=budget,
    )
    with Interrupts() as interrupts:
        try:
            code = _run(options, interrupts)
        except Interrupted as interrupted:
            code = interrupted.exit_code
        except BrokenPipeError:
            code = give_up_output()
    raise typer.Exit(code)


def _run(options: OrchestrateOptions, interrupts: Interrupts) -> int:
    """The exit code. Raises UsageProblem before anything has run; leaves nothing running, whatever is raised."""
    chosen = _plan(options)
    if options.dry_run:
        _print_plan(chosen, options)
        return 0
    with _make_pool(options) as pool:
        try:
            with interrupts.allowed():
                report = _watched(chosen, pool, options)
        except BaseException as error:
            # Leaving the pool's block by an ordinary exception would wait for the agents.
            pool.emergency_stop(f"ended by {type(error).__name__}")
            if isinstance(error, Interrupted):
                _print_partial(error, options)
            raise
    _print_report(report, options)
    if report.ok:
        return 0
    return _BUDGET_SPENT if report.ending == "budget_spent" else _FAILED


# -- the plan --------------------------------------------------------------------------------------------------------


def _plan(options: OrchestrateOptions) -> Plan:
    from agentpool.orchestrator.plans import check_kinds

    try:
        chosen = _planned_by_words(options) if options.plan is None else _planned_by_file(options, options.plan)
        check_kinds(chosen)
    except (OSError, ImportError, LookupError, TypeError, ValueError) as error:
        where = "" if options.plan is None else f"{options.plan}: "
        raise UsageProblem(f"{where}{error}") from error
    return chosen


def _planned_by_words(options: OrchestrateOptions) -> Plan:
    from agentpool.orchestrator import kinds_for, plan

    if options.prompt is None:
        raise UsageProblem("PROMPT is missing: say what is to be done, or name a plan with --plan")
    if any(":" in agent for agent in options.agents):
        # "module:Class" is looked up from here, as `python -m agentpool` does by itself.
        sys.path.insert(0, os.getcwd())
    return plan(
        options.prompt, path=options.path or os.curdir, out=options.out, agents=options.agents or None,
        budget_seconds=options.budget_seconds, budget_mb=options.budget_mb, stops_on_failure=options.stop_on_failure,
        kinds=kinds_for(options.runner or "auto", project=os.getcwd(), home=os.path.expanduser("~")),
    )  # fmt: skip


def _planned_by_file(options: OrchestrateOptions, file: str) -> Plan:
    from agentpool.orchestrator import plan_from_mapping

    if options.agents:
        raise UsageProblem("--agent and --plan contradict each other: the plan says which agents run")
    with open(file, "rb") as stream:
        data: dict[str, Any] = tomllib.load(stream)
    # Its agents are looked up beside it, as Python does for a script.
    folder = os.path.dirname(os.path.abspath(file))
    sys.path.insert(0, folder)
    data.setdefault("path", os.getcwd())
    given = {
        "prompt": options.prompt,
        "runner": options.runner,
        "path": None if options.path is None else os.path.abspath(options.path),
        "out": None if options.out is None else os.path.abspath(options.out),
        "budget_seconds": options.budget_seconds,
        "budget_mb": options.budget_mb,
        "stops_on_failure": options.stop_on_failure or None,
    }
    return plan_from_mapping({**data, **{key: value for key, value in given.items() if value is not None}}, base=folder)


def _print_plan(chosen: Plan, options: OrchestrateOptions) -> None:
    from agentpool.cli.plans import plan_as_dict, plan_table, print_table

    if options.as_json:
        print(json.dumps(plan_as_dict(chosen), indent=2))
    else:
        print_table(plan_table(chosen), sys.stdout)


# -- the run ---------------------------------------------------------------------------------------------------------


def _watched(chosen: Plan, pool: AgentPool, options: OrchestrateOptions) -> OrchestrationReport:
    """Runs the plan and shows how it goes."""
    from agentpool.cli.progress import progress_on
    from agentpool.orchestrator import run_plan

    # A machine reads standard output; a person may still watch.
    stream = sys.stderr if options.as_json else sys.stdout
    with progress_on(stream, lines=not options.as_json) as progress:
        return run_plan(chosen, pool, on_update=progress.update)


def _make_pool(options: OrchestrateOptions) -> AgentPool:
    from agentpool.pool import AgentPool

    settings: PoolOptions = {"max_pending": DEFAULT_MAX_PENDING, "task_timeout": options.timeout}
    if options.max_concurrent is not None:
        settings["max_concurrent"] = options.max_concurrent
    if options.memory_limit is not None:
        settings["hard_memory_limit_mb"] = options.memory_limit
        # A worker may not keep more than an agent may use.
        settings["memory_limit_mb"] = min(options.memory_limit, PoolSettings().memory_limit_mb or options.memory_limit)
    budget = budget_to_join(options.budget, options.max_concurrent or options.max_workers or 2, "the number of agents")
    if budget is not None:
        settings["budget"] = budget
    return AgentPool(options.max_workers, **settings)


# -- the report ------------------------------------------------------------------------------------------------------


def _print_report(report: OrchestrationReport, options: OrchestrateOptions) -> None:
    from agentpool.cli.plans import cost_table, print_table

    if options.as_json:
        found = report.to_dict()
        print(json.dumps({"report": found, "health": found.pop("health")}, indent=2))
    else:
        print(f"\n{report.to_text()}\n")
        print_table(cost_table(report), sys.stdout)
        # The only pool is this one, whose figures are the sums that stand above.
        health = {name: value for name, value in report.health.items() if name != "pools"}
        print(f"\nHealth report\n{json.dumps(health, indent=2)}")
    sys.stdout.flush()


def _print_partial(error: Interrupted, options: OrchestrateOptions) -> None:
    """What had come of it when the signal came. Nothing is there where it came before the first agent."""
    from agentpool.orchestrator import partial_report

    if (report := partial_report(error)) is not None:
        _print_report(report, options)
