"""`agentpool sweep`: ends what dead pools left on this machine, or lists it. Starts no worker."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["sweep"]

_FAILED = 1


def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="List what would be ended; end nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="From the request to end to the kill.")
    ] = 1.0,
) -> None:
    """End processes that dead pools of this user left behind. Pools that live are not touched."""
    from agentpool.agents.leftovers import end_leftovers, find_leftovers

    found = find_leftovers()
    left = [] if dry_run else end_leftovers(found, grace)
    if as_json:
        print(json.dumps({
            "dry_run": dry_run,
            "found": [leftover.to_dict() for leftover in found],
            "not_ended": [leftover.to_dict() for leftover in left],
        }, indent=2))
    else:
        for line in _table([leftover.to_dict() for leftover in found]):
            print(line)
        print(_summary(len(found), len(left), dry_run))
    if left:
        raise typer.Exit(_FAILED)


def _table(rows: list[dict[str, object]]) -> list[str]:
    if not rows:
        return []
    titles = {"pid": "PID", "pool_pid": "POOL", "worker_id": "WORKER", "memory_mb": "MB", "age_seconds": "AGE s"}
    cells = [[*titles.values()], *([str("-" if row[key] is None else row[key]) for key in titles] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    commands = ["COMMAND", *(_printable(str(row["command"])) for row in rows)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), command])
        for line, command in zip(cells, commands, strict=True)
    ]


def _printable(text: str) -> str:
    from agentpool_worker.agents.rendering import printable, shortened

    return shortened(printable(text), 80)


def _summary(found: int, left: int, dry_run: bool) -> str:
    if not found:
        return "Nothing was left by a dead pool."
    what = f"{found} process{'es' if found > 1 else ''} of dead pools"
    if dry_run:
        return f"{what}; `agentpool sweep` ends {'them' if found > 1 else 'it'}."
    return f"{what} ended." if not left else f"{what}; {left} could not be ended."
