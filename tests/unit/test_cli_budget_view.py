"""The host-wide budget in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentpool.cli import budget_view
from agentpool.io.shared_budget import SharedBudget


def pool(directory: object) -> dict[str, Any]:
    return {"host_budget": {"agents": 2, "memory_mb": 800, "slots": 0, "waits_for": "", "directory": directory}}


def test_a_pool_that_shares_none_or_does_not_say_where_has_none() -> None:
    assert budget_view.budget_of({"host_budget": None}) is None
    assert budget_view.budget_of({"host_budget": {"agents": 2, "slots": 1}}) is None
    assert budget_view.budgets([{}, {"host_budget": None}], is_everywhere=False) == []


def test_to_look_makes_no_directory(tmp_path: Path) -> None:
    view = budget_view.budget_of(pool(str(tmp_path / "none")))
    assert view is not None
    assert budget_view.budget_line(view) == f"Host budget in {tmp_path}/none: nobody takes part now"
    assert not (tmp_path / "none").exists()
    assert budget_view.budgets([pool(str(tmp_path / "none"))], is_everywhere=False) == []


def test_members_stand_in_order_with_what_they_wait_for(tmp_path: Path) -> None:
    members = [SharedBudget(str(tmp_path / "budget")) for _ in range(3)]
    told = [
        {"pid": 1, "name": "waits", "agents": 2, "memory_bytes": None, "ticket": 0.0},
        {"pid": 2, "name": "needs", "agents": 3, "memory_bytes": 100 << 20, "ticket": 0.0, "wants_memory": True,
         "need_bytes": 70 << 20},
        {"pid": 3, "name": "runs", "agents": 2, "memory_bytes": 800 << 20, "slots": 2, "committed_bytes": 50 << 20},
    ]
    try:
        for member, record in zip(members, told, strict=True):
            member.join()
            member.publish(record)
        view = budget_view.budget_of(pool(str(tmp_path / "budget")))
    finally:
        for member in members:
            member.leave()
    assert view is not None
    assert budget_view.budget_line(view).endswith("2 of 3 agents run, 2 waiting, 50 MB in use or promised"), (
        "one of them is not limited"
    )
    rows = {row[1]: row for row in map(budget_view.member_row, view["members"])}
    assert next(iter(rows)) == "runs"
    assert rows["runs"] == (3, "runs", 2, "50 MB", "2 agents, 800 MB", "-")
    assert rows["waits"][4] == "2 agents, any memory"
    assert str(rows["waits"][5]).startswith("a slot, ")
    assert str(rows["needs"][5]).startswith("memory (70 MB), ")
