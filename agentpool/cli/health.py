"""`agentpool health`: the health report of this host, with all pools of this user, as JSON. Starts no worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer

from agentpool.cli.reach import Folder, Pool, answer_no, choose, failure, folders
from agentpool.control.client import FoundPool, find_pools
from agentpool.control.wire import ControlError
from agentpool.errors import AgentPoolError

__all__ = ["EXAMPLES", "health"]

EXAMPLES: Final = """\b
Exit code: 0; with --check 1 where the status is not "ok"; 2: wrong command
line; 3: no such pool; 4: several pools, say which.

\b
Examples:
  agentpool health
  agentpool health --check --indent 0 || echo "look at it"
  agentpool health --pool reviews
"""


class _RemotePool:
    """Another process's pool, as the monitor wants one; read once. Raises ControlError: it ended since it was found."""

    def __init__(self, found: FoundPool) -> None:
        self._found = found
        self.name = f"{found.pool.get('name') or '?'} ({found.id})"
        self._problem = found.problem
        self._stats: dict[str, Any] = {}
        if not self._problem:
            try:
                with found.connect() as client:
                    self._stats = {**client.call("stats"), "name": self.name}
            except ControlError as error:
                if error.code == "gone":
                    raise
                self._problem = str(error)

    def get_pool_stats(self) -> Mapping[str, Any]:
        if self._problem:
            raise AgentPoolError(self._problem)
        return self._stats

    def emergency_stop(self, reason: str) -> Mapping[str, Any]:
        with self._found.connect() as client:
            stopped: dict[str, Any] = client.call("shutdown", reason=reason)
            return stopped


def health(
    indent: Annotated[int, typer.Option(min=0, metavar="N", help="Blanks per level; 0: all in one line.")] = 2,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 where the status is not \"ok\".")] = False,
    pool: Pool = None,
    place: Folder = None,
) -> None:
    """Print the health report of this host as JSON: memory, CPU, this user's pools, and agents that no pool owns."""
    from agentpool.monitor import ResourceMonitor, get_resource_monitor

    found = find_pools(folders(place)) if pool is None else [choose(pool, place)]
    remote = []
    for one in found:
        try:
            remote.append(_RemotePool(one))
        except ControlError as error:
            if pool is not None:  # it is the one that is asked for, and a report without it is no answer
                raise failure(error) from None
    monitor = ResourceMonitor(remote) if remote else get_resource_monitor()
    report = monitor.get_health_report()
    print(json.dumps(report, indent=indent or None))
    answer_no(check and report["status"] != "ok")
