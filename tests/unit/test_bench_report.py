"""The benchmark's arithmetic: ratios by round, goals, and what is written of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stress.bench import figures, goals, report
from stress.bench.cases import CASES
from stress.bench.contenders import all_contenders


def cells(key: str, *values: object) -> list[dict[str, Any]]:
    return [{"metrics": {key: value}} if value is not None else {"status": "failed"} for value in values]


def goal(case: str, metric: str) -> goals.Goal:
    return next(goal for goal in goals.GOALS if (goal.case, goal.metric) == (case, metric))


def test_ratios_are_round_by_round() -> None:
    """A noisy round slows both down: the ratio of the medians would be another."""
    rows = {"ppe-fork": cells("submit", 10, 1, 10), "agentpool": cells("submit", 80, 9, 81)}
    assert figures.ratios(rows, "agentpool", "submit") == [8, 9, 8.1]


def test_a_round_that_failed_has_no_ratio() -> None:
    rows = {"ppe-fork": cells("submit", 10, None, 10), "agentpool": cells("submit", 80, 9, None)}
    assert figures.ratios(rows, "agentpool", "submit") == [8]
    assert figures.mishaps(rows["agentpool"]) == "failed 1/3"


def test_words_are_counted_and_numbers_summed_up() -> None:
    assert figures.entry([3.0, 1.0, 2.0], 1) == "2.0 [1.0 to 3.0]"
    assert figures.entry([1.0, "never", None], 0) == "1, never 1/2"
    assert figures.entry([], 0) == "-"


@pytest.mark.parametrize(("ours", "outcome"), [(80, "met"), (79, "not met"), (None, "not measured")])
def test_a_goal_of_a_ratio(ours: float | None, outcome: str) -> None:
    results = {"noop": {"ppe-fork": cells("submit", 10), "mp-pool": cells("submit", 40),
                        "agentpool": cells("submit", ours), "bare-16": cells("submit", 90)}}
    verdict = goals.judge(goal("noop", "submit"), results)
    assert verdict.outcome == outcome
    assert (verdict.best_peer, verdict.best_floor) == (("mp-pool", "4.00 x"), ("bare-16", "9.00 x"))


@pytest.mark.parametrize(("ours", "outcome"), [(520, "met"), (521, "not met")])
def test_a_goal_in_its_own_unit(ours: float, outcome: str) -> None:
    """Who has no limit of its own only stops waiting, and is no comparison."""
    rows = {"ppe-fork": [{"metrics": {"own": "no", "resolve_ms": 500}}],
            "pebble": [{"metrics": {"own": "yes", "resolve_ms": 600}}],
            "agentpool": [{"metrics": {"own": "yes", "resolve_ms": ours}}]}
    verdict = goals.judge(goal("timeout", "resolve_ms"), {"timeout": rows})
    assert verdict.outcome == outcome
    assert verdict.best_peer == ("pebble", "600 ms")


def test_goals_are_about_metrics_that_cases_have() -> None:
    assert len({(goal.case, goal.metric) for goal in goals.GOALS}) == len(goals.GOALS)
    for each in goals.GOALS:
        assert each.metric in CASES[each.case].metrics
        assert not each.ratio or CASES[each.case].metrics[each.metric].ratio


def test_contenders_name_cases_that_there_are() -> None:
    for name, contender in all_contenders().items():
        assert set(contender.cases or ()) <= set(CASES), name
        assert contender.__doc__


def test_a_report_is_put_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.put("new", page)
    report.put("newer", page)
    assert page.read_text() == f"before\n{report.BEGIN}\nnewer\n{report.END}\nafter\n"


def test_a_page_names_what_was_met_and_what_was_not() -> None:
    rows = {"ppe-fork": cells("submit", 10), "agentpool": cells("submit", 80)}
    rows["agentpool"][0]["metrics"]["map_1"] = 5
    rows["ppe-fork"][0]["metrics"]["map_1"] = 1
    for cell in (*rows["ppe-fork"], *rows["agentpool"]):
        cell["foreign_cpu"] = 0.0
    data = {"versions": {"python": "3.11"}, "date": "today", "machine": "2 cores", "command": "python -m stress.bench",
            "results": {"noop": rows}}
    text = report.page(data, CASES, {"Ratios": "img/ratios.svg"})
    assert "1 of 2 goals met." in text
    assert "| 8.00 x | ≥ 8 x | met |" in text
    assert "| 5.00 x | ≥ 8 x | **not met** |" in text
    assert "![Ratios](img/ratios.svg)" in text
    assert "#### noop: 20,000 no-op tasks, 2 workers" in text
