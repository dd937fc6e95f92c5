"""`agentpool status`: how one pool stands: once, or again and again until it ends."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, Final

import typer

from agentpool.cli.budget_view import TITLES, budget_line, budget_of, member_row, share_words
from agentpool.cli.reach import EXIT_CODES, Folder, Json, Pool, print_json, reach
from agentpool.cli.tables import make_table, mb_words, print_renderable, seconds_words
from agentpool.control.client import ControlClient

__all__ = ["EXAMPLES", "status"]

EXAMPLES: Final = f"""{EXIT_CODES}
\b
Examples:
  agentpool status
  agentpool status --pool reviews --watch
  agentpool status --json | jq .stats.queue_length
"""

_WORKER_TITLES: Final = ["WORKER", "PID", "STATE", "MEMORY", "PROCS", "DONE", "FOR", "TASK"]


def status(
    pool: Pool = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until the pool ends.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="Between two looks.")] = 1.0,
    as_json: Json = False,
    place: Folder = None,
) -> None:
    """Show how a pool stands: its workers, queue, memory and breaker. With --json --watch one object a line."""
    with reach(pool, place) as client:
        if watch:
            _watch(client, interval, as_json)
            return
        status = _with_budget(client.call("status"))
    if as_json:
        print_json(status)
    else:
        print_renderable(_shown(status))


def _with_budget(status: dict[str, Any]) -> dict[str, Any]:
    """With the budget that the pool shares with others, as those say now."""
    return {**status, "budget": budget_of(status["stats"])}


def _watch(client: ControlClient, interval: float, as_json: bool) -> None:
    snapshots = client.follow("watch", interval=interval, seconds=interval + 10)
    who = client.hello["pool"]
    if as_json:
        for snapshot in snapshots:
            print(json.dumps(_with_budget(snapshot)), flush=True)
    elif sys.stdout.isatty():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            for snapshot in snapshots:
                live.update(_shown({"pool": who, **_with_budget(snapshot)}), refresh=True)
    else:
        for snapshot in snapshots:
            print(_line(snapshot["stats"]), flush=True)
    print(f"Pool {who['name']} ended.", file=sys.stderr)


def _line(stats: dict[str, Any]) -> str:
    return (f"{stats['status']}: {stats['total_agents']}/{stats['max_pool_size']} workers, {stats['running']} running, "
            f"{stats['queue_length']} queued, {mb_words(stats['memory_mb'])}, breaker "
            f"{stats['circuit_breaker']['state']}")


def _shown(status: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    who, stats, breaker = status["pool"], status["stats"], status["breaker"]
    counters = stats["counters"]
    lines = [
        f"Pool {who['name']} ({who['id']}), {_line(stats)}",
        f"{counters['completed']} done, {counters['failed']} failed, {counters['cancelled']} cancelled, "
        f"{stats['waiting_to_retry']} wait for a retry; at most {stats['max_concurrent']} at once; up "
        f"{seconds_words(stats['uptime_seconds'])}",
    ]
    lines += [f"! {reason}" for reason in stats["reasons"]]
    if breaker["seconds_left"] is not None:
        how = "held closed" if breaker["is_held_closed"] else "forced open"
        lines.append(f"! the breaker is {how} for another {seconds_words(breaker['seconds_left'])}")
    if budget := stats["host_budget"]:
        lines.append(share_words(budget))
    parts: list[Any] = [Text("\n".join(lines))]
    if stats["workers"]:
        parts += [Text(), make_table(_WORKER_TITLES, [_row(worker) for worker in stats["workers"]],
                                     right="WORKER PID MEMORY PROCS DONE FOR", states="STATE")]
    if view := status["budget"]:
        parts += [Text(f"\n{budget_line(view)}"),
                  make_table(TITLES, map(member_row, view["members"]), right="PID RUNNING MEMORY")]
    return Group(*parts)


def _row(worker: dict[str, Any]) -> tuple[object, ...]:
    return (worker["id"], worker["pid"] or "-", worker["status"], mb_words(worker["memory_mb"]), worker["processes"],
            worker["tasks_done"], seconds_words(worker["task_seconds"] or worker["idle_seconds"]),
            worker["task"] or worker["leaves_because"] or "-")
