"""`agentpool health`: the health report of this host as JSON. Starts no worker."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["health"]


def health(
    indent: Annotated[int, typer.Option(min=0, metavar="N", help="Blanks per level; 0: all in one line.")] = 2,
) -> None:
    """Print the health report of this host as JSON: memory, CPU, pools, and agents that no pool owns."""
    from agentpool.monitor import get_resource_monitor

    print(json.dumps(get_resource_monitor().get_health_report(), indent=indent or None))
