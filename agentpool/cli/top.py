"""`agentpool top`: a screen of one pool. Needs the extra `tui`."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from agentpool.cli.reach import EXIT_CODES, Folder, Pool, choose, failure
from agentpool.cli.terminal import CommandFailed, UsageProblem
from agentpool.control.wire import ControlError

__all__ = ["EXAMPLES", "top"]

EXAMPLES: Final = f"""{EXIT_CODES}
\b
Examples:
  agentpool top
  agentpool top --pool reviews --interval 0.5
"""


def top(
    pool: Pool = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60, metavar="SECONDS", help="Between two looks.")] = 1.0,
    place: Folder = None,
) -> None:
    """Show a pool on a screen: workers with memory, CPU and task, the queue, the breaker. Keys order it about."""
    try:
        from agentpool.cli.screen import PoolScreen
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        raise CommandFailed("top needs textual, which is not installed. Install it with: "
                            "pip install 'agentpool-runtime[tui]'", 1) from None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageProblem("top needs a terminal; elsewhere use: agentpool status --watch")
    found = choose(pool, place)
    if found.problem:
        raise failure(ControlError(found.problem, "silent"))
    PoolScreen(found.path, interval).run()
