"""A run over time as one SVG: throughput, latency, memory, breaker and queue, with the faults as marks.

Needs matplotlib. Legible on white and on black.
"""

from __future__ import annotations

import io
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

INK: Final = "#757b85"
COLOURS: Final = {"rate": "#2f81f7", "p50": "#1a9e55", "p95": "#bf8700", "p99": "#d9632b", "pool": "#2f81f7",
                  "parent": "#a371f7", "open": "#2f81f7", "queue": "#bf8700", "running": "#1a9e55"}
FAULTS: Final = {"kill_worker": "#d33a3a", "stop_worker": "#bf8700", "kill_keeper": "#8b1a8b",
                 "fill_disk": "#1b9aa0", "starve_descriptors": "#1a9e55", "load_cpu": "#757b85"}
_BREAKER: Final = ("closed", "half_open", "open", "forced_open")
STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "legend.fontsize": 8, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.15,
}


def svg(one: dict[str, Any]) -> str:
    """The picture of one result, which has two rows or more."""
    rows = one["series"]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(6, 1, figsize=(11, 11), sharex=True, layout="constrained",
                                    height_ratios=(2, 2, 2, 2, 1.4, 0.8))
        times = [row["t"] for row in rows]
        _throughput(axes[0], times, rows)
        _latency(axes[1], times, rows)
        _memory(axes[2], times, rows)
        _workers(axes[3], rows)
        _queue(axes[4], times, rows)
        _breaker(axes[5], times, rows)
        _marks(figure, axes, one["marks"])
        axes[-1].set_xlabel("seconds")
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg"):]


def _line(axes: Any, times: list[float], rows: list[dict[str, Any]], key: str, label: str, colour: str,
          scale: float = 1.0) -> None:
    points = [(t, row[key] * scale) for t, row in zip(times, rows, strict=True) if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.1)


def _throughput(axes: Any, times: list[float], rows: list[dict[str, Any]]) -> None:
    _line(axes, times, rows, "rate", "tasks settled a second", COLOURS["rate"])
    axes.set_ylabel("tasks a second")
    axes.set_ylim(bottom=0)


def _latency(axes: Any, times: list[float], rows: list[dict[str, Any]]) -> None:
    for name in ("p50", "p95", "p99"):
        _line(axes, times, rows, name, name, COLOURS[name], 1000)
    axes.set_ylabel("latency, ms")
    axes.set_yscale("log")
    axes.legend(loc="upper right", ncols=3)


def _memory(axes: Any, times: list[float], rows: list[dict[str, Any]]) -> None:
    _line(axes, times, rows, "pool_mb", "all workers", COLOURS["pool"])
    _line(axes, times, rows, "parent_mb", "parent", COLOURS["parent"])
    axes.set_ylabel("memory, MB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=2)


def _workers(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A line for each process; a break is its end."""
    lives: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for pid, size in row["workers_mb"].items():
            lives.setdefault(pid, []).append((row["t"], size))
    for number, points in enumerate(lives.values()):
        axes.plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.8, color=f"C{number % 10}",
                  marker="." if len(points) < 3 else None, markersize=3)
    axes.set_ylabel("each worker, MB")
    axes.set_ylim(bottom=0)


def _queue(axes: Any, times: list[float], rows: list[dict[str, Any]]) -> None:
    _line(axes, times, rows, "open", "open", COLOURS["open"])
    _line(axes, times, rows, "queue", "queued", COLOURS["queue"])
    _line(axes, times, rows, "running", "running", COLOURS["running"])
    axes.set_ylabel("tasks")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=3)


def _breaker(axes: Any, times: list[float], rows: list[dict[str, Any]]) -> None:
    points = [(t, _BREAKER.index(row["breaker"])) for t, row in zip(times, rows, strict=True) if row.get("breaker")]
    if points:
        axes.step(*zip(*points, strict=True), where="post", color=COLOURS["rate"])
    axes.set_yticks(range(len(_BREAKER)), [name.replace("_", " ") for name in _BREAKER])
    axes.set_ylim(-0.3, len(_BREAKER) - 0.7)
    axes.set_ylabel("breaker")


def _marks(figure: Any, axes: Any, marks: list[dict[str, Any]]) -> None:
    shown = {}
    for mark in marks:
        for panel in axes:
            line = panel.axvline(mark["at"], color=FAULTS.get(mark["kind"], INK), linewidth=0.7, alpha=0.55)
        shown[mark["kind"].replace("_", " ")] = line
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=len(shown))
