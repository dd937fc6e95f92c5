"""Plans as plain data, as a TOML or JSON file has them. Reads no file: the command line does.

Knows nothing of pools. Any thread may call it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Final

from agentpool.errors import PlanError
from agentpool.orchestrator.plans import Plan, PlannedAgent, checked_paths, run_on
from agentpool.orchestrator.runners import kinds_for

__all__ = ["plan_from_mapping"]

_AGENT_KEYS: Final = tuple(field.name for field in fields(PlannedAgent) if field.name not in ("name", "reason"))
_TEXTS: Final = frozenset({"runner", "prompt", "path", "out", "kind", "results_as", "policy"})
_NUMBERS: Final = frozenset({"budget_seconds", "budget_mb", "expected_memory_mb"})
_TABLES: Final = frozenset({"agents", "kwargs", "options"})
_LISTS: Final = frozenset({"after", "fallback"})
_PLAN_KEYS: Final = ("prompt", "path", "out", "runner", "budget_seconds", "budget_mb", "stops_on_failure", "agents")


def plan_from_mapping(data: Mapping[str, Any], *, base: str | os.PathLike[str] = os.curdir) -> Plan:
    """The plan that `data` describes; `path` (by default `base` itself) and `out` are relative to `base`.

    Keys are the fields of `Plan`; `agents` maps the name of each agent to the fields of its `PlannedAgent`, of which
    `kind` is the name by default. Kinds are names, prompts are texts. Where there is a `runner`, the agents that
    `.claude/agents` describes, in `base` and then in the user's home, stand for the kinds of their names: `kinds_for`.

    Raises PlanError, which names the key, for unknown and missing keys, wrong types, and plans that cannot be carried
    out; FileNotFoundError and NotADirectoryError for its paths, as `plan` does.
    """
    _check_keys("", data, _PLAN_KEYS)
    if not data.get("prompt"):
        raise PlanError("prompt is missing: what is to be done, in words")
    if not data.get("agents"):
        raise PlanError("there are no agents: each is a table of its own, as in [agents.review] with kind = "
                        "\"security-analyst\"")
    path, out = checked_paths(os.path.join(base, data.get("path", "")),
                              None if data.get("out") is None else os.path.join(base, data["out"]))
    agents = tuple(_agent(name, table) for name, table in data["agents"].items())
    bounds = {key: data[key] for key in ("budget_seconds", "budget_mb", "stops_on_failure") if key in data}
    plan = Plan(data["prompt"], path, out, agents, **bounds)
    kinds = kinds_for(data.get("runner"), project=os.fspath(base), home=os.path.expanduser("~"))
    return run_on(plan, kinds)


def _agent(name: str, table: Any) -> PlannedAgent:
    where = f"agents.{name}"
    if not isinstance(table, Mapping):
        raise PlanError(f"{where} must be a table, got {table!r}")
    _check_keys(f"{where}.", table, _AGENT_KEYS)
    try:
        return PlannedAgent(**{"kind": name, **table, "name": name}, reason="planned")
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def _check_keys(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise PlanError(f"{where}{key} is unknown{hint}; known are {', '.join(known)}")
        _check_type(f"{where}{key}", key, value)


def _check_type(where: str, key: str, value: object) -> None:
    wanted = ""
    if key in _TEXTS and not isinstance(value, str):
        wanted = "a string"
    elif key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float))):
        wanted = "a number"
    elif key in _TABLES and not isinstance(value, Mapping):
        wanted = "a table"
    elif key == "stops_on_failure" and not isinstance(value, bool):
        wanted = "true or false"
    elif key in _LISTS and not (
        isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
    ):
        wanted = "a string or a list of strings"
    if wanted:
        raise PlanError(f"{where} must be {wanted}, got {value!r}")
