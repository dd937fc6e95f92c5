"""A run as Markdown: the goals, then a table a case. Puts it between the markers of a page. Pure but for that file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stress.bench.contenders import BASELINE
from stress.bench.figures import column, entry, mishaps, ratio_text, ratios, spread
from stress.bench.goals import GOALS, Verdict, judge

if TYPE_CHECKING:
    from stress.bench.registry import Case
    from stress.bench.runner import Cell, Results

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
#: More than this used by others is named.
NOISE_CORES = 0.25
#: What `versions` has beside packages.
NO_PACKAGES = ("python", "kernel")


def page(data: dict[str, Any], cases: dict[str, Case], images: dict[str, str]) -> str:
    """All of it. `images`: the plots that were drawn, title -> address."""
    results: Results = data["results"]
    parts = [heading(data), goals_table(results, cases)]
    parts += [f"![{title}]({address})" for title, address in images.items()]
    parts += ["### All contenders, case by case", LEGEND]
    parts += [case_table(cases[name], cells) for name, cells in results.items() if name in cases]
    return "\n\n".join(parts)


LEGEND = (
    f"Median [least to most] over the rounds, and behind it in bold the ratio to {BASELINE} where it says something. "
    "The contenders whose names begin with `bare` are no pools, but what a parent in Python can reach on this machine "
    "with nothing of a pool around it."
)


def heading(data: dict[str, Any]) -> str:
    """Where, when, what, and how noisy it was."""
    versions: dict[str, str] = data["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name not in NO_PACKAGES)
    loads = [cell["foreign_cpu"] for cells in data["results"].values() for rows in cells.values() for cell in rows]
    lines = [
        f"Measured {data['date']} on {data['machine']} with Python {versions['python']}; {packages}. Run by "
        f"`{data['command']}`.",
    ]
    if loads:
        noisy = sum(load > NOISE_CORES for load in loads)
        lines.append(f"In {noisy} of {len(loads)} cells other programs used more than {NOISE_CORES} cores meanwhile.")
    if data.get("quick"):
        lines.append("**A quick run: one round, few contenders. It shows that all works, and no more.**")
    return "\n".join(lines)


def goals_table(results: Results, cases: dict[str, Case]) -> str:
    """Each goal beside what was measured."""
    verdicts = [verdict for verdict in (judge(goal, results) for goal in GOALS) if verdict.values]
    if not verdicts:
        return "No case that has a goal was run for agentpool."
    met = sum(verdict.outcome == "met" for verdict in verdicts)
    lines = [
        f"{met} of {len(verdicts)} goals met.",
        "",
        f"| 2 workers unless said | agentpool | ratio to {BASELINE} | goal | met? | best other pool | bare mechanism |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_goal_row(verdict, cases) for verdict in verdicts])


def _goal_row(verdict: Verdict, cases: dict[str, Case]) -> str:
    goal = verdict.goal
    measured = f"{spread(verdict.values, goal.digits)} {goal.unit}".rstrip()
    has_ratio = verdict.ratios and cases[goal.case].metrics[goal.metric].ratio
    ratio = f"{ratio_text(verdict.ratios)}{_range(verdict.ratios)}" if has_ratio else "-"
    outcome = "met" if verdict.outcome == "met" else f"**{verdict.outcome}**"
    others = [f"{best[0]} {best[1]}" if best else "-" for best in (verdict.best_peer, verdict.best_floor)]
    return "| " + " | ".join([goal.title, measured, ratio, goal.text, outcome, *others]) + " |"


def _range(values: list[float]) -> str:
    return f" [{min(values):.2f} to {max(values):.2f}]" if len(values) > 1 else ""


def case_table(spec: Case, cells: dict[str, list[Cell]]) -> str:
    """All contenders in one case."""
    keys = [key for key in spec.metrics if any(v is not None for rows in cells.values() for v in column(rows, key))]
    lines = [f"#### {spec.name}: {spec.title}", ""]
    rounds = max(map(len, cells.values()))
    note = f"{rounds} round{'s' if rounds > 1 else ''}. {spec.note}".rstrip()
    if len(cells) == 1:
        [(name, rows)] = cells.items()
        lines += [f"| | {name} |", "|---|---|"]
        facts = {spec.metrics[key].heading: entry(column(rows, key), spec.metrics[key].digits) for key in keys}
        if mishaps(rows):
            facts["mishaps"] = mishaps(rows)
        return "\n".join([*lines, *(f"| {heading} | {fact} |" for heading, fact in facts.items()), "", note])
    lines.append("| " + " | ".join(["contender", *(spec.metrics[key].heading for key in keys), "mishaps"]) + " |")
    lines.append("|" + "---|" * (len(keys) + 2))
    for name, rows in cells.items():
        row = [name]
        for key in keys:
            text = entry(column(rows, key), spec.metrics[key].digits)
            against = ratios(cells, name, key) if spec.metrics[key].ratio and name != BASELINE else []
            row.append(f"{text} **{ratio_text(against)}**" if against else text)
        lines.append("| " + " | ".join([*row, mishaps(rows)]) + " |")
    return "\n".join([*lines, "", note])


def put(text: str, path: Path) -> None:
    """Between the markers of the page; a page without them gets them at its end."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, found, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if found else "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
