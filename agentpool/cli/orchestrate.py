"""`agentpool orchestrate`: a prompt planned into agents, run through a pool, with progress, a report and the health.

Main thread only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from agentpool.cli.terminal import Interrupted, Interrupts, UsageProblem, give_up_output
from agentpool.config import DEFAULT_MAX_PENDING, PoolOptions, PoolSettings

if TYPE_CHECKING:
    from agentpool.orchestrator import OrchestrationReport, Plan
    from agentpool.pool import AgentPool

__all__ = ["orchestrate"]

_FAILED: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestrateOptions:
    """The command line of `agentpool orchestrate`, as it was given."""

    prompt: str
    path: str
    out: str | None
    agents: Sequence[str]
    as_json: bool
    timeout: float | None
    max_workers: int | None
    max_concurrent: int | None
    memory_limit: float | None


def orchestrate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What is to be done, in words.")],
    path: Annotated[str, typer.Option(metavar="DIR", help="The code to work on: a directory or a file.")] = ".",
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where agents write files to; without it they write none.")
    ] = None,
    agents: Annotated[
        list[str] | None,
        typer.Option("--agent", metavar="NAME", help="Run this agent, not those that are planned; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document: report and health.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Stop an agent that runs longer.")] = None,
    max_workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Worker processes at most.  [default: 4]")
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Agents that run at once.  [default: 2, or what --max-workers says]"),
    ] = None,
    memory_limit: Annotated[
        float | None, typer.Option(metavar="MB", help="Stop an agent whose whole process tree uses more memory.")
    ] = None,
) -> None:
    """Plan a prompt into agents, run them in pooled workers, and report."""
    options = OrchestrateOptions(
        prompt=prompt, path=path, out=out, agents=agents or [], as_json=as_json, timeout=timeout,
        max_workers=max_workers, max_concurrent=max_concurrent, memory_limit=memory_limit,
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
    with _make_pool(options) as pool:
        try:
            with interrupts.allowed():
                report = _watched(chosen, pool, options)
        except BaseException as error:
            # Leaving the pool's block by an ordinary exception would wait for the agents.
            pool.emergency_stop(f"ended by {type(error).__name__}")
            raise
    if options.as_json:
        found = report.to_dict()
        print(json.dumps({"report": found, "health": found.pop("health")}, indent=2))
    else:
        # The only pool is this one, whose figures are the sums that stand above.
        health = {name: value for name, value in report.health.items() if name != "pools"}
        print(f"\n{report.to_text()}\n\nHealth report\n{json.dumps(health, indent=2)}")
    sys.stdout.flush()
    return 0 if report.ok else _FAILED


def _plan(options: OrchestrateOptions) -> Plan:
    from agentpool.orchestrator import plan

    if any(":" in agent for agent in options.agents):
        # "module:Class" is looked up from here, as `python -m agentpool` does by itself.
        sys.path.insert(0, os.getcwd())
    try:
        return plan(options.prompt, path=options.path, out=options.out, agents=options.agents or None)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UsageProblem(str(error)) from error


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
    return AgentPool(options.max_workers, **settings)
