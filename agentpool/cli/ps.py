"""`agentpool ps`: the pools of this user on this host, agent programs that no pool owns, and what dead pools left."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from agentpool.cli.budget_view import TITLES, budget_line, budgets, limit_words, limits, member_row
from agentpool.cli.reach import Folder, Json, folders, print_json
from agentpool.cli.tables import mb_words, print_table, seconds_words
from agentpool.control.client import FoundPool, find_pools
from agentpool.control.wire import ControlError

__all__ = ["EXAMPLES", "ps"]

EXAMPLES: Final = """\b
Exit code: 0, also where there is no pool; 2: wrong command line.

\b
Examples:
  agentpool ps
  agentpool ps --no-agents
  agentpool ps --json | jq -r '.pools[].id'
"""


def ps(
    agents: Annotated[bool, typer.Option("--agents/--no-agents", help="List processes of no living pool too.")] = True,
    as_json: Json = False,
    place: Folder = None,
) -> None:
    """List this user's pools on this host, the budgets that they share, agent programs that no pool owns, and processes
    that dead pools left.
    """
    pools = [_ask(found) for found in find_pools(folders(place))]
    owned = {worker["pid"] for pool in pools for worker in pool.get("stats", {}).get("workers", ())}
    foreign = _foreign(owned - {None}) if agents else None
    orphans = _orphans() if agents else None
    shared = budgets((pool["stats"] for pool in pools if "stats" in pool), is_everywhere=place is None)
    told = limits()
    if as_json:
        print_json({"pools": pools, "foreign_agents": foreign, "orphans": orphans, "budgets": shared,
                    "budget_limits": told})
        return
    if pools:
        print_table(
            ["ID", "NAME", "PID", "STATUS", "WORKERS", "RUNNING", "QUEUED", "MEMORY", "BREAKER", "UP", "COMMAND"],
            [_row(pool) for pool in pools], right="PID WORKERS RUNNING QUEUED MEMORY UP", states="STATUS BREAKER",
        )
    else:
        print("No pool of this user is running.")
    for view in shared:
        print(f"\n{budget_line(view)}")
        print_table(TITLES, map(member_row, view["members"]), right="PID RUNNING MEMORY")
    if shared:
        print(limit_words(told))
    if foreign and foreign["count"]:
        print(f"\n{foreign['count']} agent programs of no pool use {mb_words(foreign['memory_mb'])}:")
        _print_foreign(foreign["processes"])
    if orphans:
        print(f"\n{len(orphans)} processes were left by pools that are dead; `agentpool sweep` ends them:")
        print_table(["PID", "POOL", "MEMORY", "UP", "COMMAND"],
                    [(each["pid"], each["pool_pid"], mb_words(each["memory_mb"]), seconds_words(each["age_seconds"]),
                      each["command"]) for each in orphans], right="PID POOL MEMORY UP")


def _ask(found: FoundPool) -> dict[str, Any]:
    """What a pool says of itself, as one flat entry; or why it says nothing."""
    if not found.problem:
        try:
            with found.connect() as client:
                status = client.call("status")
                return {**status["pool"], "socket": found.path, "stats": status["stats"], "breaker": status["breaker"]}
        except ControlError as error:
            return {**found.pool, "socket": found.path, "problem": str(error)}
    return {"id": found.id, "socket": found.path, "problem": found.problem}


def _row(pool: dict[str, Any]) -> tuple[object, ...]:
    stats = pool.get("stats")
    if stats is None:
        return (pool["id"], pool.get("name", "-"), pool["id"].partition("-")[0], "silent", *"------", pool["problem"])
    return (
        pool["id"], pool["name"], pool["pid"], stats["status"], f"{stats['total_agents']}/{stats['max_pool_size']}",
        stats["running"], stats["queue_length"], mb_words(stats["memory_mb"]), pool["breaker"]["state"],
        seconds_words(stats["uptime_seconds"]), " ".join(pool["command"]),
    )


def _print_foreign(processes: list[dict[str, Any]]) -> None:
    titles = ["PID", "NAME", "MEMORY", "UP"]
    rows = [[each["pid"], each["name"], mb_words(each["memory_mb"]), seconds_words(each["age_seconds"])]
            for each in processes]
    if any(each["session"] for each in processes):
        titles += ["STATUS", "SESSION", "FOLDER"]
        for row, each in zip(rows, processes, strict=True):
            row += [each["session"].get(key, "-") for key in ("status", "name", "cwd")]
    print_table(titles, rows, right="PID MEMORY UP", states="STATUS")


def _orphans() -> list[dict[str, Any]]:
    from agentpool.agents.leftovers import find_leftovers

    return [leftover.to_dict() for leftover in find_leftovers()]


def _foreign(owned: set[int]) -> dict[str, Any]:
    """What `find_foreign_agents` says; for each process also the session that it is, as far as Claude Code knows."""
    from agentpool.monitor import DEFAULT_AGENT_NAMES, find_foreign_agents

    found = find_foreign_agents(DEFAULT_AGENT_NAMES, owned)
    sessions = {}
    if "claude" in found["by_name"]:
        from agentpool.cli.claude_sessions import find_sessions

        sessions = find_sessions()
    for process in found["processes"]:
        process["session"] = sessions.get(process["pid"], {})
    return found
