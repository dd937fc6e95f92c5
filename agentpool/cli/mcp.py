"""`agentpool mcp`: the command that serves agents to an MCP client. Checks what is needed; the rest: `mcp_server`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Final

import typer

from agentpool.cli.config import BUDGET_OPTION, read_configuration
from agentpool.cli.reach import Folder
from agentpool.cli.terminal import UsageProblem

__all__ = ["NEEDED", "can_serve", "mcp"]

NEEDED: Final = "serving MCP needs the package mcp, 2.3 or later: pip install 'agentpool-runtime[mcp]'"


def mcp(
    agents: Annotated[
        list[str] | None,
        typer.Option(
            "--agent", metavar="NAME",
            help="An agent that the client may run; may be repeated.  [default: security-analyst, performance-auditor, "
            "test-generator]. One that runs commands gives the client that right, whatever its own rules say.",
        ),
    ] = None,
    max_workers: Annotated[int, typer.Option(min=1, metavar="N", help="Worker processes at most.")] = 2,
    memory_limit: Annotated[
        float | None, typer.Option(metavar="MB", help="Stop an agent whose whole process tree uses more memory.")
    ] = None,
    budget: Annotated[bool | None, BUDGET_OPTION] = None,
    place: Folder = None,
) -> None:
    """Serve agents to an MCP client, such as Claude Code, over standard input and output."""
    if not can_serve():
        raise UsageProblem(NEEDED)
    from agentpool.cli.mcp_server import serve

    serve(
        names=agents or [], max_workers=max_workers, memory_limit=memory_limit,
        budget=None if budget is False else read_configuration().budget, place=place,
    )


def can_serve() -> bool:
    """The package mcp is there, and new enough. It is not imported, which takes half a second."""
    try:
        return find_spec("mcp.server.mcpserver") is not None
    except ModuleNotFoundError:  # a parent of it is none, or is another package
        return False
