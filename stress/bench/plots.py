"""A run as pictures: SVG, small, without a background, in colours that are legible on white and on black.

Needs matplotlib. A plot is drawn where the run has its figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from stress.bench.contenders import BASELINE, OURS, all_contenders
from stress.bench.crews import SIZES
from stress.bench.figures import numbers, ratios
from stress.bench.goals import GOALS
from stress.bench.meters import median

if TYPE_CHECKING:
    from stress.bench.runner import Results

#: Half-way between black and white: a contrast above 4 to both.
INK = "#757b85"
OURS_COLOUR = "#2f81f7"
GOAL_COLOUR = "#d9632b"
#: A marker and a colour for each other pool; of the bare mechanisms all are alike.
PEERS = {
    BASELINE: ("|", INK),
    "ppe-forkserver": ("x", "#8c8f94"),
    "mp-pool": ("o", "#bf8700"),
    "loky": ("s", "#1a9e55"),
    "pebble": ("^", "#a371f7"),
    "billiard": ("v", "#d2539d"),
    "mpire": ("D", "#1b9aa0"),
}
FLOOR = ("*", INK)

#: Row of the chart of ratios -> case, metric; whether more is better.
RATIOS = {
    "no-ops, one by one": ("noop", "submit", True),
    "map, chunksize 1": ("noop", "map_1", True),
    "map, chunked": ("noop", "map_best", True),
    "one at a time, median": ("latency", "p50", False),
    "one at a time, p99": ("latency", "p99", False),
    "while the parent computes": ("busy-parent", "rate", True),
    "echo 1 MiB": ("payload", "b1m", True),
    "echo 64 MiB": ("payload", "b64m", True),
    "echo 64 MiB numpy": ("payload", "np64m", True),
}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and searchable
    "svg.hashsalt": "agentpool",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """All plots for which there are figures: title -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, title, plot in (
            ("ratios.svg", "How many times faster than ProcessPoolExecutor", ratio_chart),
            ("latency.svg", "Round trip of one no-op at a time, median and p99", latency_chart),
            ("many-workers.svg", "Round trip and manager's CPU with 10 to 1,000 workers", crowd_chart),
        ):
            figure = plot(results)
            if figure is not None:
                figure.savefig(folder / name, transparent=True, bbox_inches="tight", metadata={"Date": None})
                plt.close(figure)
                drawn[title] = folder / name
    return drawn


def _quicker(results: Results, name: str, row: str) -> list[float]:
    """Ratios of a row, turned so that more is better."""
    case, metric, more = RATIOS[row]
    found = ratios(results.get(case, {}), name, metric)
    return found if more else [1 / ratio for ratio in found if ratio]


def _goal(case: str, metric: str) -> float | None:
    """The bound of a goal."""
    return next((goal.bound for goal in GOALS if (goal.case, goal.metric) == (case, metric)), None)


def ratio_chart(results: Results) -> Any:
    """A bar for agentpool, marks for the others and for the goal."""
    rows = [row for row in RATIOS if _quicker(results, OURS, row)]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(rows) + 1.1))
    shown: set[str] = set()
    for at, row in enumerate(rows):
        mine = _quicker(results, OURS, row)
        middle = median(mine)
        axes.barh(at, middle - 0.1, left=0.1, height=0.56, color=OURS_COLOUR, alpha=0.85, zorder=1)
        if len(mine) > 1:
            axes.hlines(at + 0.2, min(mine), max(mine), color=INK, linewidth=1.2, zorder=2)
        case, metric, more = RATIOS[row]
        if bound := _goal(case, metric):
            axes.vlines(bound if more else 1 / bound, at - 0.36, at + 0.36, color=GOAL_COLOUR, linewidth=2.2, zorder=4)
        for name, contender in all_contenders().items():
            found = _quicker(results, name, row)
            if not found or name in (OURS, BASELINE):
                continue
            marker, colour = FLOOR if contender.floor else PEERS[name]
            axes.plot(median(found), at, marker, color=colour, markersize=6, zorder=3,
                      markeredgecolor=None if marker == "x" else "white", markeredgewidth=1.4 if marker == "x" else 0.6)
            shown.add("bare mechanism" if contender.floor else name)
        axes.annotate(f"{middle:.1f} x", (1, at), xycoords=("axes fraction", "data"), xytext=(5, 0),
                      textcoords="offset points", va="center", color=OURS_COLOUR, fontweight="bold")
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(0.1, 100)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than ProcessPoolExecutor with fork, in the same run (median; log scale)")
    _legend(axes, shown, with_goal=True)
    return figure


def _legend(axes: Any, shown: set[str], *, with_goal: bool) -> None:
    """Above the plot, in the order of the contenders."""
    entries = [Line2D([], [], color=OURS_COLOUR, linewidth=6, alpha=0.85, label=OURS)]
    if with_goal:
        entries.append(Line2D([], [], color=GOAL_COLOUR, marker="|", markersize=9, markeredgewidth=2.2, linestyle="",
                              label="goal"))
    for name, (marker, colour) in {**PEERS, "bare mechanism": FLOOR}.items():
        if name in shown:
            entries.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=name))
    axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=5, handletextpad=0.4,
                columnspacing=1.2)


def latency_chart(results: Results) -> Any:
    """For each contender a line from the median to the p99."""
    cells = results.get("latency", {})
    found = {name: (median(numbers(rows, "p50")), median(numbers(rows, "p99")))
             for name, rows in cells.items() if numbers(rows, "p50")}
    if OURS not in found:
        return None
    names = sorted(found, key=lambda name: found[name])
    figure, axes = plt.subplots(figsize=(7.2, 0.3 * len(names) + 0.9))
    for at, name in enumerate(names):
        middle, high = found[name]
        colour = OURS_COLOUR if name == OURS else INK
        axes.hlines(at, middle, high, color=colour, linewidth=2.2 if name == OURS else 1.4)
        axes.plot(middle, at, "o", color=colour, markersize=7)
        axes.plot(high, at, "|", color=colour, markersize=11, markeredgewidth=2.2)
        axes.annotate(f"{middle:,.0f} to {high:,.0f}", (high, at), xytext=(8, 0), textcoords="offset points",
                      va="center", color=colour, fontweight="bold" if name == OURS else "normal")
    axes.set_xscale("log")
    low, high = min(pair[0] for pair in found.values()), max(pair[1] for pair in found.values())
    axes.set_xlim(low / 1.3, high * 2)
    ticks = [x for x in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if low / 1.3 <= x <= high * 2]
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("microseconds for one round trip: median (dot) to p99 (bar); log scale")
    return figure


def crowd_chart(results: Results) -> Any:
    """Two panels over the number of workers."""
    cells = results.get("many", {}).get(OURS, [])
    sizes = [size for size in SIZES if numbers(cells, f"trip_ms_{size}")]
    if len(sizes) < 2:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.4), layout="constrained")
    for axes, key, title in (
        (left, "trip_ms", "round trip of one more task, ms"),
        (right, "cpu_us", "manager's CPU, µs per worker and second"),
    ):
        values = [numbers(cells, f"{key}_{size}") for size in sizes]
        least, most = list(map(min, values)), list(map(max, values))
        axes.fill_between(sizes, least, most, color=OURS_COLOUR, alpha=0.2, linewidth=0)
        axes.plot(sizes, list(map(median, values)), "o-", color=OURS_COLOUR)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(0, max(map(max, values)) * 1.25)
        axes.set_xlabel("workers, nearly all asleep")
        axes.set_title(title)
    bound = _goal("many", "trip_ms_1000")
    if bound and SIZES[-1] in sizes:
        left.set_ylim(0, max(left.get_ylim()[1], bound * 1.1))
        left.axhline(bound, color=GOAL_COLOUR, linewidth=1.6)
        left.annotate("goal", (sizes[0], bound), xytext=(0, -10), textcoords="offset points", color=GOAL_COLOUR)
    return figure
