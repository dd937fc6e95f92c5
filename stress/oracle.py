"""Judges a run that is over, by the ledger's record, the workers' journal, the faults' marks and the time series.

Each rule has a name; what breaks it is named with the task. It asks the executor nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stress.faults import Mark
from stress.ledger import VALUE

if TYPE_CHECKING:
    from stress.harness import Run

#: Rule -> what it says.
RULES: Final = {
    "accounted": "accepted = returned + failed + cancelled, nothing is open",
    "once": "nothing is settled twice",
    "value": "every value is the right one",
    "fate": "nothing fails, returns or is cancelled that should not, but for tasks whose process a fault killed",
    "ran": "by the workers' own journal: what returned ran to its end, what was cancelled never began, and nothing "
           "ran more often than it was allowed to, or twice at a time",
    "promises": "where cancel() or kill() said True, the task did not return",
    "refused": "submit refuses nothing, unless that is part of the scenario",
    "ends": "shutdown ends",
    "processes": "no process is left",
    "descriptors": "no descriptor is left",
    "threads": "no thread is left",
    "shared memory": "no shared memory is left",
    "files": "no temporary file is left",
    "parent memory": "the parent's memory is flat over the last half",
    "worker memory": "no worker's process tree grows beyond its bound",
    "floor": "where the machine is short of memory, the workers have no more of it together than there was to spare",
}
_EXAMPLES: Final = 20
#: Seconds after the keeper's death within which tasks die of it.
_KEEPER_DIES: Final = 1.0
#: Seconds within which a process that is killed or about to die is dead, and its tasks are known to be lost. Process
#: ids are used again: who had the same one before or after is another process.
_LOST_WITHIN: Final = 10.0
#: Shorter runs have no last half worth a slope.
_FLAT_FROM_SECONDS: Final = 60.0
_FLAT_MB: Final = 4.0


@dataclass
class Verdict:
    """broken: rule -> how often and examples. not_judged: rule -> why."""

    broken: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    not_judged: dict[str, str] = field(default_factory=dict)
    #: tasks that failed because a fault, or what an earlier task had left in it, killed their process
    lost_to_faults: int = 0
    #: tasks that failed though nobody had touched them
    innocent: int = 0
    memory_growth_mb: float | None = None
    memory_noise_mb: float | None = None

    @property
    def is_satisfied(self) -> bool:
        return not self.broken

    def breaks(self, rule: str, example: str) -> None:
        """One more."""
        self.counts[rule] = self.counts.get(rule, 0) + 1
        examples = self.broken.setdefault(rule, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)


@dataclass
class _Task:
    kind: str = ""
    outcome: str = ""
    error: str = ""
    is_allowed: bool = True
    attempts: int = 1
    is_journaled: bool = True
    accepted_at: float = 0.0
    settled_at: float = 0.0
    pid: int = 0
    cancelled: bool = False
    killed: bool = False
    times_settled: int = 0


class _Journal:
    """What the workers wrote: task -> when it began or ended, and where; process id -> when one was about to die."""

    def __init__(self, path: Path) -> None:
        self.began: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self.ended: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self.doomed: dict[int, list[float]] = defaultdict(list)
        if not path.exists():
            return
        with open(path) as file:
            for line in file:
                event, number, pid, when = line.split()
                if event == "doomed":
                    self.doomed[int(pid)].append(float(when))
                else:
                    (self.began if event == "began" else self.ended)[int(number)].append((float(when), int(pid)))


class _Blame:
    """Which process was killed by which fault, or by what an earlier task had left in it."""

    def __init__(self, marks: list[Mark], doomed: dict[int, list[float]]) -> None:
        self._doomed = doomed
        self._killed = {(pid, mark.at) for mark in marks if mark.kind == "kill_worker" for pid in mark.pids}
        self._keeper = [mark.at for mark in marks if mark.kind == "kill_keeper"]

    def explains(self, task: _Task, began: list[tuple[float, int]]) -> bool:
        """Whether one of these killed the task's process."""
        # Lost while its call was still on the way, or being rebuilt: it has no line in the journal.
        for when, pid in began or [(task.settled_at, task.pid)]:
            if any(at <= when and task.settled_at <= at + _LOST_WITHIN for at in self._doomed.get(pid, ())):
                return True
            if any(pid == dead and (when <= at + 0.5 or not began) and at - 0.5 <= task.settled_at <= at + _LOST_WITHIN
                   for dead, at in self._killed):
                return True
            if any(when <= at + _KEEPER_DIES and at - 0.5 <= task.settled_at <= at + _LOST_WITHIN
                   for at in self._keeper):
                return True
        return False


def judge(run: Run) -> Verdict:
    """The verdict. The ledger must be closed."""
    verdict = Verdict()
    for rule, examples in run.ledger.broken.items():
        for example in examples:
            verdict.breaks(rule, example)
    tasks, refused = _read(run.ledger.record_path)
    journal = _Journal(run.ledger.journal_path)
    _judge_tasks(verdict, tasks, journal, _Blame(run.chaos.marks, journal.doomed), run)
    for number in refused & journal.began.keys():
        verdict.breaks("ran", f"task {number} began although submit refused it")
    settled = sum(task.times_settled for task in tasks.values())
    if settled + len(run.ledger.open) != run.ledger.accepted:
        verdict.breaks("accounted", f"{run.ledger.accepted} accepted, {settled} settled, {len(run.ledger.open)} open")
    _judge_memory(verdict, run)
    return verdict


def _read(path: Path) -> tuple[dict[int, _Task], set[int]]:
    tasks: dict[int, _Task] = defaultdict(_Task)
    refused = set()
    with open(path) as file:
        for line in file:
            words = line.split()
            task = tasks[int(words[1])] if words[0] != "refused" else _Task()
            if words[0] == "refused":
                refused.add(int(words[1]))
            elif words[0] == "cancel":
                task.cancelled = True
            elif words[0] == "kill":
                task.killed = True
            else:
                task.times_settled += 1
                task.kind, task.outcome, task.error = words[2:5]
                task.is_allowed, task.attempts, task.is_journaled = words[5] == "1", int(words[6]), words[7] == "1"
                task.accepted_at, task.settled_at, task.pid = float(words[8]), float(words[9]), int(words[10])
    return dict(tasks), refused


def _judge_tasks(verdict: Verdict, tasks: dict[int, _Task], journal: _Journal, blame: _Blame,
                 run: Run) -> None:
    gave_up_at = run.gave_up_at or math.inf
    for number, task in tasks.items():
        if not task.times_settled:
            continue  # still open, which is another rule's
        began, ended = journal.began.get(number, []), journal.ended.get(number, [])
        name = f"task {number} ({task.kind})"
        if task.times_settled > 1:
            verdict.breaks("once", f"{name} was settled {task.times_settled} times")
        if (task.cancelled or task.killed) and task.outcome == "returned":
            verdict.breaks("promises", f"{name} returned though {'cancel' if task.cancelled else 'kill'}() said True")
        if task.cancelled and task.outcome != "cancelled":
            verdict.breaks("promises", f"{name} {task.outcome} {task.error} though cancel() said True")
        is_judged = not task.is_allowed and task.settled_at < gave_up_at
        if is_judged and not (task.killed and task.error == "TaskKilledError"):
            _judge_fate(verdict, task, name, blame.explains(task, began), run.ledger.notes.get(number, ""))
        if task.is_journaled:
            _judge_journal(verdict, task, name, began, ended)


def _judge_fate(verdict: Verdict, task: _Task, name: str, is_explained: bool, note: str) -> None:
    if task.outcome == "failed" and is_explained:
        verdict.lost_to_faults += 1
    elif task.outcome == "cancelled":
        if not (task.cancelled or task.killed):
            verdict.breaks("fate", f"{name} was cancelled, and nobody had asked for it")
    else:
        verdict.innocent += task.outcome == "failed"
        verdict.breaks("fate", f"{name} {task.outcome} {task.error.strip('-')} {note}".rstrip())


def _judge_journal(verdict: Verdict, task: _Task, name: str, began: list[tuple[float, int]],
                   ended: list[tuple[float, int]]) -> None:
    if len(began) > task.attempts:
        verdict.breaks("ran", f"{name} began {len(began)} times, of {task.attempts} allowed")
    if task.outcome == "returned" and not began:
        verdict.breaks("ran", f"{name} returned, and no worker had run it")
    if task.outcome == "cancelled" and began and task.attempts == 1:
        verdict.breaks("ran", f"{name} was cancelled, and had begun")
    for (end, pid), (begin, other) in zip(ended, began[1:], strict=False):
        if begin < end and pid != other:
            verdict.breaks("ran", f"{name} ran in {pid} and {other} at the same time")


def _judge_memory(verdict: Verdict, run: Run) -> None:
    bound = run.scenario.worker_peak_mb
    if bound is None:
        verdict.not_judged["worker memory"] = "the scenario sets no bound"
    elif not run.target.is_ours:
        verdict.not_judged["worker memory"] = "this executor promises none"
    elif run.recorder.peak_worker_mb > bound:
        verdict.breaks("worker memory", f"a worker's process tree had {run.recorder.peak_worker_mb:.0f} MB, of "
                                        f"{bound:.0f} at most")
    if run.recorder.floor_mb is None:
        verdict.not_judged["floor"] = "the scenario is not short of memory"
    elif run.recorder.crossed_mb > 0:
        verdict.breaks("floor", f"the workers had {run.recorder.crossed_mb:.0f} MB more than the "
                                f"{run.recorder.spare_mb:.0f} MB to spare, while less than "
                                f"{run.recorder.floor_mb:.0f} MB were available")
    rows = run.recorder.rows()
    if not rows or rows[-1]["t"] < _FLAT_FROM_SECONDS:
        verdict.not_judged["parent memory"] = f"the run is shorter than {_FLAT_FROM_SECONDS:.0f} s"
        return
    growth, noise = slope(rows)
    verdict.memory_growth_mb, verdict.memory_noise_mb = round(growth, 2), round(noise, 2)
    if growth > max(_FLAT_MB, 3 * noise):
        verdict.breaks("parent memory", f"it grew by {growth:.1f} MB over the last half; noise is {noise:.1f} MB")


def slope(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """How much the parent grew over the last half, by least squares, and the deviation from that line; MB."""
    half = [(row["t"], row["parent_mb"]) for row in rows if row["t"] >= rows[-1]["t"] / 2]
    count = len(half)
    mean_t, mean_y = sum(t for t, _ in half) / count, sum(y for _, y in half) / count
    spread = sum((t - mean_t) ** 2 for t, _ in half) or 1.0
    rise = sum((t - mean_t) * (y - mean_y) for t, y in half) / spread
    noise = math.sqrt(sum((y - mean_y - rise * (t - mean_t)) ** 2 for t, y in half) / count)
    return rise * (half[-1][0] - half[0][0]), noise


__all__ = ["RULES", "VALUE", "Verdict", "judge", "slope"]
