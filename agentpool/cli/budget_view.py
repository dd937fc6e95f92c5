"""The host-wide budget as commands show it: who holds slots, who waits, what memory is promised, and the limits.

Only looks: takes no part in the budget, and makes no directory. Any thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from agentpool.cli.config import Configuration, read_configuration
from agentpool.cli.tables import mb_words, seconds_words
from agentpool.cli.terminal import UsageProblem
from agentpool.config import MB
from agentpool.errors import SettingsError
from agentpool.io.rundir import default_runtime_directory
from agentpool.io.shared_budget import SharedBudget

__all__ = ["TITLES", "budget_line", "budget_of", "budgets", "limit_words", "limits", "member_row", "share_words"]

#: of the table of members
TITLES: Final = ("PID", "NAME", "RUNNING", "MEMORY", "LIMITS", "WAITS FOR")


def budgets(pools: Iterable[Mapping[str, Any]], *, is_everywhere: bool) -> list[dict[str, Any]]:
    """Those in which somebody takes part: of these pools (statistics) and, everywhere, that of the files and of all."""
    directories = []
    if is_everywhere:
        found, _ = _configuration()
        named = None if found is None else found.budget.directory
        directories = [_default_directory(), named or _default_directory()]
    directories += [directory for pool in pools if (directory := _directory_of(pool)) is not None]
    views = map(_look, dict.fromkeys(directories))
    return [view for view in views if view["members"] or view["problem"]]


def budget_of(stats: Mapping[str, Any]) -> dict[str, Any] | None:
    """The budget that a pool shares, by its statistics; None: it shares none."""
    directory = _directory_of(stats)
    return None if directory is None else _look(directory)


def _directory_of(stats: Mapping[str, Any]) -> str | None:
    """None: the pool shares no budget, or is of a version that does not tell where."""
    return (stats.get("host_budget") or {}).get("directory")


def _default_directory() -> str:
    """Where pools meet that were not told where."""
    return f"{default_runtime_directory()}/budget"


def _look(directory: str) -> dict[str, Any]:
    """What the pools say that take part in the budget of that directory."""
    try:
        records, problem = SharedBudget(directory).look_on() if os.path.exists(directory) else {}, ""
    except (OSError, SettingsError) as error:
        records, problem = {}, str(error)
    members = [_member(record, time.monotonic()) for record in records.values() if record]
    members.sort(key=lambda member: (-member["slots"], -(member["waits_seconds"] or 0.0), member["pid"]))
    memory = [member["memory_mb"] for member in members]
    return {
        "directory": directory,
        "problem": problem,
        "agents": max((member["agents"] for member in members), default=None),
        "memory_mb": None if None in memory else max(memory, default=None),
        "running": sum(member["slots"] for member in members),
        "waiting": sum(member["waits_seconds"] is not None for member in members),
        "promised_mb": round(sum(member["promised_mb"] for member in members), 1),
        "members": members,
    }


def _member(record: Mapping[str, Any], now: float) -> dict[str, Any]:
    ticket, memory = record.get("ticket"), record.get("memory_bytes")
    return {
        "pid": record.get("pid", 0),
        "name": record.get("name", "?"),
        "agents": record.get("agents", 0),
        "memory_mb": None if memory is None else round(memory / MB, 1),
        "slots": record.get("slots", 0),
        "promised_mb": round(record.get("committed_bytes", 0) / MB, 1),
        "waits_seconds": None if ticket is None else round(max(0.0, now - ticket), 1),
        "waits_for": "" if ticket is None else "memory" if record.get("wants_memory") else "a slot",
        "need_mb": round(record.get("need_bytes", 0) / MB, 1),
    }


def budget_line(view: Mapping[str, Any]) -> str:
    """One budget in a line."""
    if view["problem"]:
        return f"Host budget in {view['directory']}: {view['problem']}"
    if not view["members"]:
        return f"Host budget in {view['directory']}: nobody takes part now"
    limit = "" if view["memory_mb"] is None else f" of {mb_words(view['memory_mb'])}"
    waiting = f", {view['waiting']} waiting" if view["waiting"] else ""
    return (f"Host budget in {view['directory']}: {view['running']} of {view['agents']} agents run{waiting}, "
            f"{mb_words(view['promised_mb'])}{limit} in use or promised")


def share_words(told: Mapping[str, Any]) -> str:
    """What one pool has of its budget, by its statistics."""
    slots = f"{told['slots']} of {told['agents']} slots of the host's budget"
    return f"It holds {slots}" + (f", and waits for {told['waits_for']}" if told["waits_for"] else "")


def member_row(member: Mapping[str, Any]) -> tuple[object, ...]:
    """A row of the table."""
    memory = "any memory" if member["memory_mb"] is None else mb_words(member["memory_mb"])
    need = f" ({mb_words(member['need_mb'])})" if member["waits_for"] == "memory" else ""
    waits = f"{member['waits_for']}{need}, {seconds_words(member['waits_seconds'])}" if member["waits_for"] else "-"
    return (member["pid"], member["name"], member["slots"], mb_words(member["promised_mb"]),
            f"{member['agents']} agents, {memory}", waits)


# -- limits ----------------------------------------------------------------------------------------------------------


def _configuration() -> tuple[Configuration | None, str]:
    """What the files say; or why they cannot be used, which must keep nobody from looking at pools."""
    try:
        return read_configuration(), ""
    except (UsageProblem, OSError) as error:
        return None, str(error)


def limits() -> dict[str, Any]:
    """The budget that commands take part in: each value, and where it came from."""
    found, problem = _configuration()
    if found is None:
        return {"problem": problem}
    return {key: {"value": value.value, "source": value.source} for key, value in found.values.items()
            if key in ("budget.agents", "budget.memory_mb")}


def limit_words(told: Mapping[str, Any]) -> str:
    """The same in a line."""
    if "problem" in told:
        return f"Limits of commands: unknown. {told['problem']}"
    agents, memory = told["budget.agents"], told["budget.memory_mb"]
    limit = f"{memory['value']:g} MB" if memory["value"] else "any memory"
    return f"Limits of commands: {agents['value']} agents ({agents['source']}), {limit} ({memory['source']})"
