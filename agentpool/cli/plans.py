"""Plans and what they cost, as tables for a terminal and as data.

Formats, and runs nothing.
"""

from __future__ import annotations

import graphlib
import io
from typing import TYPE_CHECKING, Any, Final, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentpool.config import MB
from agentpool.orchestrator.plans import label_of
from agentpool_worker.agents.rendering import jsonable, printable

if TYPE_CHECKING:
    from agentpool.orchestrator import AgentOutcome, OrchestrationReport, Plan

__all__ = ["cost_table", "plan_as_dict", "plan_table", "print_table"]

#: Columns of a table that no terminal bounds.
_WIDTH: Final = 160
_STYLES: Final = {"succeeded": "green", "failed": "red", "stopped": "red", "skipped": "yellow"}
_NONE: Final = "-"


def print_table(table: Table, stream: TextIO) -> None:
    """`table` on `stream`; what no terminal bounds is as wide as it needs to be, and has no blanks at its ends."""
    console = Console(file=stream)
    if console.is_terminal:
        console.print(table)
        return
    console = Console(file=io.StringIO(), width=_WIDTH)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines() if line.strip()), file=stream)


def steps_of(plan: Plan) -> dict[str, int]:
    """How many agents, at least, have to end one after the other before each: 1 for those that start at once."""
    after = {agent.name: agent.after for agent in plan.agents}
    steps: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(after).static_order():
        steps[name] = 1 + max((steps[other] for other in after[name]), default=0)
    return steps


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan, JSON-able."""
    steps = steps_of(plan)
    return {
        "prompt": plan.prompt,
        "path": plan.path,
        "out": plan.out,
        "budget_seconds": plan.budget_seconds,
        "budget_mb": plan.budget_mb,
        "stops_on_failure": plan.stops_on_failure,
        "agents": [
            {
                "name": agent.name,
                "kind": label_of(agent.kind),
                "step": steps[agent.name],
                "reason": agent.reason,
                "prompt": jsonable(agent.prompt),
                "kwargs": jsonable(agent.kwargs),
                "after": list(agent.after),
                "results_as": agent.results_as,
                "policy": agent.policy,
                "fallback": [label_of(kind) for kind in agent.fallback],
                "options": jsonable(agent.options),
                "expected_memory_mb": agent.expected_memory_mb,
            }
            for agent in plan.agents
        ],
    }


def plan_table(plan: Plan) -> Table:
    """What would run: a row for each agent, those that start first first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Step", justify="right")
    for title in ("Agent", "Kind", "After", "Policy", "Fallback", "Why"):
        table.add_column(title, overflow="fold")
    steps = steps_of(plan)
    for agent in sorted(plan.agents, key=lambda each: steps[each.name]):
        cells = (agent.name, label_of(agent.kind), ", ".join(agent.after), agent.policy,
                 ", ".join(label_of(kind) for kind in agent.fallback), agent.reason)
        table.add_row(str(steps[agent.name]), *(Text(printable(cell) or _NONE) for cell in cells))
    return table


def cost_table(report: OrchestrationReport) -> Table:
    """What each agent cost, and all of them together."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    peak = f"{report.peak_rss_bytes / MB:.0f} MB" if report.peak_rss_bytes else _NONE
    tries = sum(agent.attempts for agent in report.agents)
    table.add_column("Agent", "all together", overflow="fold")
    table.add_column("State", "ok" if report.ok else "FAILED", no_wrap=True)
    for title, footer in (("Attempts", str(tries)), ("Waited", ""), ("Ran", ""),
                          ("In all", f"{report.wall_seconds:.2f} s"), ("Peak", peak)):
        table.add_column(title, footer, justify="right", no_wrap=True)
    has_costs = report.usage is not None or report.cost_usd is not None
    if has_costs:
        table.add_column("Tokens in/out", _tokens(report.usage), justify="right", no_wrap=True)
        table.add_column("Cost", _cost(report.cost_usd), justify="right", no_wrap=True)
    table.add_column("Note", printable(report.ending_reason or ""), overflow="fold")
    for agent in report.agents:
        _add_costs(table, agent, has_costs=has_costs)
    return table


def _add_costs(table: Table, agent: AgentOutcome, *, has_costs: bool) -> None:
    is_run = bool(agent.tries)
    cells = [
        str(agent.attempts) if is_run else _NONE,
        f"{agent.queue_seconds:.2f} s" if is_run else _NONE,
        f"{agent.elapsed_seconds:.2f} s" if agent.attempts else _NONE,
        f"{agent.wall_seconds:.2f} s" if is_run else _NONE,
        f"{agent.peak_rss_bytes / MB:.0f} MB" if agent.peak_rss_bytes else _NONE,
    ]
    if has_costs:
        cells += [_tokens(agent.usage), _cost(agent.cost_usd)]
    state = agent.state if agent.required or agent.ok else f"{agent.state} (optional)"
    table.add_row(Text(printable(agent.name)), Text(state, style=_STYLES[agent.state]), *cells, Text(_note(agent)))


def _note(agent: AgentOutcome) -> str:
    if agent.ok:
        return f"fell back to {printable(agent.kind)}" if len(agent.tries) > 1 else ""
    error = agent.reason or (agent.error or "")
    return printable(next(iter(error.strip().splitlines()), ""))


def _tokens(usage: dict[str, int] | None) -> str:
    if usage is None:
        return _NONE
    taken = sum(count for name, count in usage.items() if name not in ("output_tokens", "total_tokens"))
    return f"{taken} / {usage.get('output_tokens', 0)}"


def _cost(cost_usd: float | None) -> str:
    return _NONE if cost_usd is None else f"${cost_usd:.4f}"
