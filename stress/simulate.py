"""`python -m stress simulate`: plays schedules of faults, says what they reached, and what they broke.

The playing is `agentpool.testing`'s; this divides it among processes, shows how it goes on, and adds up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentpool.testing import Coverage, Failure, Report, Schedule, Simulator, shrunken

OK, BROKEN, UNREACHED, INTERRUPTED = 0, 1, 3, 130
#: With fewer schedules than this nobody expects every transition to be reached.
ENOUGH = 20_000
_CHUNK = 1000

DESCRIPTION = """\
Plays schedules of faults against the real core and manager, on an imaginary machine and in virtual time: tasks that
fail, hang, time out and are cancelled; workers that crash, freeze, start slowly or never and answer too late; the
keeper's death; memory, breaker, shutdown at any instant. After every event all invariants are checked, and at the end
what was promised for each task.
"""
EPILOG = """\
examples:
  python -m stress simulate                                   20,000 schedules, about 10 seconds on two cores
  python -m stress simulate --schedules 1000000 --seed 7      as before a release
  python -m stress simulate --seed 7 --number 4711            one schedule of that run once more
  python -m stress simulate --replay tests/simulation/seeds   recorded schedules
  python -m stress simulate --save tests/simulation/seeds     on a failure, record its shrunken schedule there
  python -m stress simulate --json > figures.json             figures for machines; progress goes to standard error

exit code: 0 all promises kept and all transitions reached; 1 a promise was broken; 2 wrong usage; 3 a transition was
reached by no schedule, of 20,000 or more: the simulator does not do what it should; 130 interrupted
"""


@dataclass
class Totals:
    """What all processes found together."""

    schedules: int = 0
    events: int = 0
    tasks: int = 0
    seconds: float = 0.0
    #: how tasks ended -> how many
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    #: table -> {(from, to): times}
    coverage: dict[str, dict[tuple[str, str], int]] = field(default_factory=dict)

    def add(self, report: Report, rows: dict[str, list[tuple[str, str, int]]]) -> None:
        """Add one chunk's."""
        self.schedules += report.schedules
        self.events += report.events
        self.tasks += report.tasks
        self.ends += report.ends
        self.failures += report.failures
        for table, transitions in rows.items():
            counts = self.coverage.setdefault(table, {})
            for old, new, times in transitions:
                counts[old, new] = counts.get((old, new), 0) + times

    @property
    def unreached(self) -> list[str]:
        """Transitions that no schedule made."""
        return [f"{table}: {old} -> {new}" for table, counts in self.coverage.items()
                for (old, new), times in counts.items() if not times]

    def as_json(self, seed: int, processes: int) -> dict[str, Any]:
        """Figures for machines."""
        return {
            "schedules": self.schedules, "events": self.events, "tasks": self.tasks, "seed": seed,
            "processes": processes, "seconds": round(self.seconds, 3),
            "schedules_per_second": round(self.schedules / self.seconds, 1) if self.seconds else None,
            "coverage": {table: {f"{old} -> {new}": times for (old, new), times in counts.items()}
                         for table, counts in self.coverage.items()},
            "unreached": self.unreached,
            "ends": dict(self.ends.most_common()),
            "failures": [{"rule": failure.rule, "message": failure.message, "story": failure.story,
                          "schedule": failure.schedule.as_json()} for failure in self.failures],
        }


_simulator: Simulator | None = None


def _play(start: int, stop: int, seed: int) -> tuple[Report, dict[str, list[tuple[str, str, int]]]]:
    """One chunk, in whichever process."""
    global _simulator
    _simulator = _simulator or Simulator()
    Coverage.clear()
    report = _simulator.run(range(start, stop), seed)
    return report, Coverage.rows()


def _chunks(count: int, seed: int, processes: int) -> Iterator[tuple[Report, dict[str, list[tuple[str, str, int]]]]]:
    ranges = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    if processes == 1:
        for start, stop in ranges:
            yield _play(start, stop, seed)
        return
    # The standard library's pool, as the one under test should not vouch for itself.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as executor:
        try:
            for done in as_completed([executor.submit(_play, start, stop, seed) for start, stop in ranges]):
                yield done.result()
        finally:
            executor.shutdown(cancel_futures=True)


class _Progress:
    """One line on standard error: rewritten in a terminal, elsewhere a new one every ten seconds."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._started = time.perf_counter()
        self._shown_at = 0.0
        self._is_terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def show(self, totals: Totals) -> None:
        seconds = self.seconds
        if seconds - self._shown_at < (0.2 if self._is_terminal else 10):
            return
        self._shown_at = seconds
        rate = totals.schedules / seconds
        left = (self._count - totals.schedules) / rate if rate else 0
        text = (f"{totals.schedules:,} of {self._count:,} schedules, {rate:,.0f} a second, {left:.0f} s to go, "
                f"{len(totals.unreached)} transitions not reached")
        print(f"\r{text}\033[K" if self._is_terminal else text, end="" if self._is_terminal else "\n",
              file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    if options.replay:
        return _replay(options.replay)
    if options.number is not None:
        return _once(Schedule.drawn(options.seed, options.number), options)
    totals, progress = Totals(), _Progress(options.schedules)
    code = OK
    try:
        for report, rows in _chunks(options.schedules, options.seed, options.processes):
            totals.add(report, rows)
            progress.show(totals)
            if totals.failures:
                break
    except KeyboardInterrupt:
        code = INTERRUPTED
    totals.seconds = progress.seconds
    progress.end()
    totals.failures = [_shrunken(failure, options.save) for failure in totals.failures[:1]]
    if options.json:
        print(json.dumps(totals.as_json(options.seed, options.processes), indent=2))
    else:
        _print(totals, options)
    if totals.failures:
        return BROKEN
    if code == OK and totals.schedules >= ENOUGH and totals.unreached:
        return UNREACHED
    return code


def _shrunken(failure: Failure, folder: Path | None) -> Failure:
    print(f"\nschedule {failure.schedule.seed} broke a promise: {failure.rule}; cutting it down", file=sys.stderr)
    failure = shrunken(Simulator(), failure)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{failure.rule}-{failure.schedule.seed}.json"
        path.write_text(json.dumps({"rule": failure.rule, "about": failure.message.splitlines()[0],
                                    **failure.schedule.as_json()}, indent=1) + "\n")
        print(f"recorded as {path}", file=sys.stderr)
    return failure


def _print(totals: Totals, options: argparse.Namespace) -> None:
    print(f"{totals.schedules:,} schedules, {totals.events:,} events, {totals.tasks:,} tasks settled in "
          f"{totals.seconds:.1f} s: {totals.schedules / max(totals.seconds, 1e-9):,.0f} schedules a second "
          f"in {options.processes} process{'es' if options.processes > 1 else ''}, seed {options.seed}")
    for table, counts in totals.coverage.items():
        reached = sum(times > 0 for times in counts.values())
        print(f"\n{table}: {reached} of {len(counts)} transitions reached")
        for (old, new), times in counts.items():
            print(f"  {old:>13} -> {new:<13} {times:>12,}{'' if times else '   never'}")
    print("\nhow tasks ended")
    for how, times in totals.ends.most_common():
        print(f"  {how:<30} {times:>12,}")
    if totals.failures:
        number = totals.failures[0].schedule.seed
        print(f"\nA PROMISE WAS BROKEN by schedule {number} of seed {options.seed}; once more: "
              f"python -m stress simulate --seed {options.seed} --number {number}\n\n{totals.failures[0]}")
    elif totals.unreached and totals.schedules >= ENOUGH:
        print("\nNOT REACHED by any schedule, so the simulator is at fault:\n  " + "\n  ".join(totals.unreached))
    else:
        print("\nall promises kept")


def _once(schedule: Schedule, options: argparse.Namespace) -> int:
    failure = Simulator().play(schedule, is_thorough=True)
    if failure is None:
        print("all promises kept")
        return OK
    print(_shrunken(failure, options.save))
    return BROKEN


def _replay(path: Path) -> int:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    code, simulator = OK, Simulator()
    for file in files:
        failure = simulator.play(Schedule.from_json(json.loads(file.read_text())), is_thorough=True)
        print(f"{file}: {'kept' if failure is None else 'BROKEN'}")
        if failure is not None:
            print(failure)
            code = BROKEN
    print(f"{len(files)} recorded schedules")
    return code


def _count(text: str) -> int:
    number = int(text.replace(",", "").replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return path


def add_to(subcommands: Any) -> None:
    """Add this subcommand to the parser of `python -m stress`."""
    parser = subcommands.add_parser("simulate", help="schedules of faults in virtual time", description=DESCRIPTION,
                                    epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=_count, default=ENOUGH, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the run (default: %(default)s)")
    parser.add_argument("--processes", type=_count, default=min(2, os.cpu_count() or 1), metavar="P",
                        help="that play at the same time (default: %(default)s)")
    parser.add_argument("--number", type=int, metavar="K", help="play only this schedule of the run")
    parser.add_argument("--replay", type=_existing, metavar="PATH", help="play a recorded schedule, or a folder")
    parser.add_argument("--save", type=Path, metavar="DIR", help="record the shrunken schedule of a failure there")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.set_defaults(run=run)
