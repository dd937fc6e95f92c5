"""What agentpool is to reach, and whether a run reached it. Pure: results in, verdicts out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stress.bench.contenders import OURS, all_contenders
from stress.bench.figures import column, numbers, ratio_text, ratios, written
from stress.bench.meters import median

if TYPE_CHECKING:
    from stress.bench.runner import Results


class Goal(NamedTuple):
    """A bound on a metric, or on its ratio to the baseline."""

    title: str
    case: str
    metric: str
    bound: float
    #: `more`: at least the bound; otherwise at most.
    more: bool = False
    ratio: bool = False
    unit: str = ""
    digits: int = 0
    #: A metric that must say "yes" for a contender to compare with.
    wants: str = ""

    @property
    def text(self) -> str:
        sign = "≥" if self.more else "≤"
        return f"{sign} {self.bound:g} x" if self.ratio else f"{sign} {self.bound:,g} {self.unit}".rstrip()

    def write(self, values: list[float]) -> str:
        return ratio_text(values) if self.ratio else f"{written(median(values), self.digits)} {self.unit}".rstrip()


def _faster(title: str, case: str, metric: str, bound: float, unit: str = "/s") -> Goal:
    return Goal(title, case, metric, bound, more=True, ratio=True, unit=unit)


GOALS = [
    _faster("20,000 no-ops, submitted one by one", "noop", "submit", 8),
    _faster("`map`, chunksize 1", "noop", "map_1", 8),
    _faster("`map`, chunked", "noop", "map_best", 3.5),
    Goal("one no-op at a time, median", "latency", "p50", 0.45, ratio=True, unit="µs"),
    Goal("one no-op at a time, p99", "latency", "p99", 0.5, ratio=True, unit="µs"),
    _faster("results while the parent's main thread computes", "busy-parent", "rate", 40),
    _faster("echo of 1 MiB bytes", "payload", "b1m", 2.5, "MiB/s"),
    _faster("echo of 64 MiB bytes", "payload", "b64m", 3, "MiB/s"),
    _faster("echo of a 64 MiB numpy array", "payload", "np64m", 8, "MiB/s"),
    Goal("constructor to first result", "cold-first", "first_ms", 35, unit="ms", digits=1),
    Goal("constructor to results of all of 16 workers", "cold-16", "all_ms", 60, unit="ms", digits=1),
    Goal("idle worker, one of 16: USS", "cold-16", "uss", 2.5, unit="MiB", digits=2),
    Goal("idle worker, one of 16: PSS", "cold-16", "pss", 3, unit="MiB", digits=2),
    Goal("parent's memory per pending task", "pending", "bytes_task", 1800, unit="B"),
    Goal("crash of one task among 200: next result", "crash", "next_ms", 10, unit="ms", digits=1),
    Goal("crash of one task among 200: others lost", "crash", "lost", 0),
    Goal("0.5 s limit on a 60 s task: resolved", "timeout", "resolve_ms", 520, unit="ms", wants="own"),
    Goal("20 leaks of 50 MB, 300 MB limit: peak RSS of a worker", "leak", "peak", 360, unit="MiB"),
    Goal("16 workers idle for 10 s, monitoring on: CPU", "idle", "cpu_ms", 15, unit="ms", digits=1),
    Goal("parent SIGKILLed: workers left", "orphan", "busy", 0),
    Goal("parent SIGKILLed: grandchildren left", "orphan", "grand", 0),
    Goal("retired worker's last result to its successor's first, median", "recycle", "gap_ms", 3, unit="ms", digits=2),
    Goal("1,000 mostly sleeping workers: round trip of one more task, median", "many", "trip_ms_1000", 5, unit="ms",
         digits=2),
    Goal("manager's CPU per worker, 1,000 workers / 10 workers (flat)", "many", "flat", 1.2, digits=2),
    Goal("1,000 no-ops around a 2 s task, 2 workers: no-ops done", "slow-one", "done_ms", 500, unit="ms"),
    Goal("1 ms ticker in the parent while 50,000 tasks pass: median beat", "ticker", "p50_ms", 2, unit="ms", digits=2),
]


class Verdict(NamedTuple):
    """What a run says of a goal."""

    goal: Goal
    #: As measured, and as ratios to the baseline: one a round. Empty where it was not measured.
    values: list[float]
    ratios: list[float]
    #: "not measured", "met" or "not met"
    outcome: str
    #: The best of the other pools and its figure, and the best of the bare mechanisms and its: (name, figure) or None.
    best_peer: tuple[str, str] | None
    best_floor: tuple[str, str] | None


def judge(goal: Goal, results: Results) -> Verdict:
    """A goal against a run: the median over the rounds decides."""
    cells = results.get(goal.case, {})
    values, own_ratios = numbers(cells.get(OURS, []), goal.metric), ratios(cells, OURS, goal.metric)
    counted = own_ratios if goal.ratio else values
    if not counted:
        outcome = "not measured"
    else:
        figure = median(counted)
        outcome = "met" if (figure >= goal.bound if goal.more else figure <= goal.bound) else "not met"
    return Verdict(goal, values, own_ratios, outcome, _best(goal, results, False), _best(goal, results, True))


def _best(goal: Goal, results: Results, floor: bool) -> tuple[str, str] | None:
    """Among pools, or among bare mechanisms, in the measure of the goal. The baseline counts where it is no ratio."""
    cells = results.get(goal.case, {})
    found: list[tuple[float, str, list[float]]] = []
    for name, contender in all_contenders().items():
        if name == OURS or contender.floor != floor:
            continue
        if goal.wants and "yes" not in column(cells.get(name, []), goal.wants):
            continue
        values = ratios(cells, name, goal.metric) if goal.ratio else numbers(cells.get(name, []), goal.metric)
        if values:
            found.append((median(values), name, values))
    if not found:
        return None
    _, name, values = max(found) if goal.more else min(found)
    return name, goal.write(values)
