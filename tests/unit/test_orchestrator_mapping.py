"""Plans as plain data: what they mean, and how what is wrong with them is said."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agentpool.errors import PlanError
from agentpool.orchestrator import plan_from_mapping

WHOLE = """
prompt = "do it"
path = "src"
out = "made"
budget_seconds = 10
budget_mb = 500.5
stops_on_failure = true

[agents.security-analyst]

[agents.model]
kind = "command"
prompt = "echo {results}"
after = "security-analyst"
policy = "optional"
fallback = ["test-generator"]
results_as = "env"
expected_memory_mb = 300
[agents.model.kwargs]
stdin = "x"
[agents.model.options]
timeout = 5
"""


def test_every_key(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    plan = plan_from_mapping(tomllib.loads(WHOLE), base=tmp_path)
    assert (plan.prompt, plan.path, plan.out) == ("do it", str(tmp_path / "src"), str(tmp_path / "made"))
    assert (plan.budget_seconds, plan.budget_mb, plan.stops_on_failure) == (10, 500.5, True)
    first, second = plan.agents
    assert (first.kind, first.name, first.policy, first.after) == (
        "security-analyst", "security-analyst", "required", ())  # fmt: skip
    assert (second.kind, second.name, second.prompt, second.after, second.policy, second.fallback) == (
        "command", "model", "echo {results}", ("security-analyst",), "optional", ("test-generator",))  # fmt: skip
    assert (second.results_as, second.expected_memory_mb, second.kwargs, second.options) == (
        "env", 300, {"stdin": "x"}, {"timeout": 5})  # fmt: skip


def test_the_path_is_the_base_by_default(tmp_path: Path) -> None:
    plan = plan_from_mapping({"prompt": "x", "agents": {"a": {"kind": "command"}}}, base=tmp_path)
    assert (plan.path, plan.out) == (str(tmp_path), None)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "prompt is missing"),
        ({"agents": {}}, "there are no agents"),
        ({"agents": {"a": 3}}, "agents.a must be a table, got 3"),
        ({"agents": [{"name": "a"}]}, "agents must be a table"),
        ({"promt": "x"}, "promt is unknown (did you mean prompt?); known are prompt, path"),
        ({"xyz": "x"}, "xyz is unknown; known are"),
        ({"prompt": 3}, "prompt must be a string, got 3"),
        ({"budget_mb": "1 GB"}, "budget_mb must be a number, got '1 GB'"),
        ({"budget_seconds": True}, "budget_seconds must be a number, got True"),
        ({"budget_seconds": -1}, "budget_seconds must be a number greater than 0, got -1"),
        ({"stops_on_failure": "yes"}, "stops_on_failure must be true or false, got 'yes'"),
        ({"agents": {"a": {"afterr": "b"}}}, "agents.a.afterr is unknown (did you mean after?)"),
        ({"agents": {"a": {"name": "b"}}}, "agents.a.name is unknown"),
        ({"agents": {"a": {"after": [1]}}}, "agents.a.after must be a string or a list of strings, got [1]"),
        ({"agents": {"a": {"kwargs": "x"}}}, "agents.a.kwargs must be a table, got 'x'"),
        ({"agents": {"a": {"kind": 3}}}, "agents.a.kind must be a string"),
        ({"agents": {"a": {"policy": "maybe"}}}, "agents.a: agent 'a': policy must be 'required' or 'optional'"),
        ({"agents": {"a": {"options": {"timeout": "1s"}}}}, "agents.a: agent 'a': timeout must be a number"),
        ({"agents": {"a": {"kind": "command", "after": "b"}}}, "agent 'a' is to run after 'b', which is no agent"),
        ({"agents": {"a": {"kind": "command", "after": "a"}}}, "a -> a"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], said: str) -> None:
    whole = data if not data else {"prompt": "x", "agents": {"a": {"kind": "command"}}, **data}
    with pytest.raises(PlanError, match=re.escape(said)):
        plan_from_mapping(whole)


def test_paths_are_checked(tmp_path: Path) -> None:
    agents = {"a": {"kind": "command"}}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan_from_mapping({"prompt": "x", "path": "nowhere", "agents": agents}, base=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        plan_from_mapping({"prompt": "x", "out": "file", "agents": agents}, base=tmp_path)
