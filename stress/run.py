"""`python -m stress run`: scenarios with real processes, judged by an oracle that asks the executor nothing."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from stress import report
from stress.harness import Plan, Run
from stress.live import Live, quiet
from stress.oracle import judge
from stress.scenarios import NAMES, Scenario, load
from stress.target import KNOWN, OURS, Target

OK, BROKEN, USAGE, INTERRUPTED = 0, 1, 2, 130
OUT: Final = Path("stress/out")
#: Of what was written to standard error so many characters are kept, in the JSON file.
_LAST_WORDS: Final = 4000

DESCRIPTION = """\
Plays a scenario with real processes while faults are injected, and judges what came of it by a record of its own: every
accepted task returned, failed or was cancelled, once, with the right value; no process, descriptor, thread, shared
memory or file is left; the parent's memory is flat and the workers' within their bound.
"""
EPILOG = f"""\
examples:
  python -m stress run --list                          what there is
  python -m stress run crashy                          one scenario
  python -m stress run soak --minutes 20 --seed 7      for as long as you like, with the same choices again
  python -m stress run burst --tasks 1000000
  python -m stress run all --brief                     each for some seconds: make stress
  python -m stress run crashy --executor ppe --add     another pool, into the same report
  python -m stress run crashy --executor my.module:Pool
  python -m stress run soak --minutes 1 --json > soak.json

Executors by short name: {', '.join(f'{name} ({full})' for name, full in KNOWN.items())}.
What they lack is skipped, and the report says so. The report: {OUT}/REPORT.md, report.html, report.json. Plots need
matplotlib: pip install -e '.[stress]'.

exit code: 0 the oracle is satisfied (or all was skipped); 1 a rule is broken; 2 wrong usage; 130 interrupted
"""


def run(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    if options.list:
        _list()
        return OK
    try:
        scenarios = [load(name) for name in (NAMES if "all" in options.scenario else options.scenario)]
        target = Target(options.executor)
    except (LookupError, ImportError, AttributeError, TypeError) as error:
        print(f"python -m stress run: {error}", file=sys.stderr)
        return USAGE
    if not scenarios:
        print("python -m stress run: name a scenario; --list shows them", file=sys.stderr)
        return USAGE
    if len(scenarios) == 1:
        results, code = _one(scenarios[0], target, options)
    else:
        results, code = _several(scenarios, options)
    _report(results, options)
    return code


def _one(scenario: Scenario, target: Target, options: argparse.Namespace) -> tuple[list[report.Result], int]:
    """In this process."""
    if why := target.why_not(scenario.needs):
        print(f"{scenario.name}: skipped, as {target.label} lacks {why}", file=sys.stderr)
        return [report.skipped(scenario.name, scenario.title, target.name, target.label, why)], OK
    folder = Path(tempfile.mkdtemp(prefix="agentpool-stress-"))
    try:
        began = time.monotonic()
        with quiet(folder / "stderr") as screen:
            stress = Run(scenario, target, _plan(scenario, options), folder)
            with Live(stress, screen):
                stress.play()
        found = report.result(stress, judge(stress), time.monotonic() - began)
        found["last_words"] = (folder / "stderr").read_text(errors="replace")[-_LAST_WORDS:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    code = INTERRUPTED if stress.facts.get("interrupted") else OK if found["is_satisfied"] else BROKEN
    return [found], code


def _plan(scenario: Scenario, options: argparse.Namespace) -> Plan:
    tasks, minutes = options.tasks, options.minutes
    if tasks is None and minutes is None:
        tasks = scenario.brief if options.brief else scenario.tasks
        minutes = scenario.brief_minutes if options.brief else scenario.minutes
    seconds = None if minutes is None else minutes * 60
    return Plan(tasks, seconds, options.seed, not options.no_faults)


def _several(scenarios: list[Scenario], options: argparse.Namespace) -> tuple[list[report.Result], int]:
    """Each in a process of its own: one's memory and leftovers are not another's."""
    results: list[report.Result] = []
    worst = OK
    with tempfile.TemporaryDirectory(prefix="agentpool-stress-") as folder:
        for scenario in scenarios:
            words = [sys.executable, "-m", "stress", "run", scenario.name, "--executor", options.executor, "--seed",
                     str(options.seed), "--out", folder]
            words += ["--brief"] * options.brief + ["--no-faults"] * options.no_faults
            for name in ("tasks", "minutes"):
                if getattr(options, name) is not None:
                    words += [f"--{name}", str(getattr(options, name))]
            code = subprocess.run(words, check=False, stdout=subprocess.DEVNULL).returncode
            part = Path(folder) / "report.json"
            if code in (OK, BROKEN) and part.exists():
                results += json.loads(part.read_text())
                part.unlink()
            else:
                print(f"{scenario.name}: ended with {code} and without a report", file=sys.stderr)
            if code == INTERRUPTED:
                return results, INTERRUPTED
            worst = max(worst, BROKEN if code else OK)
    return results, worst


def _report(results: list[report.Result], options: argparse.Namespace) -> None:
    kept = []
    earlier = options.out / "report.json"
    if options.add and earlier.exists():
        new = {(one["scenario"], one["executor"]) for one in results}
        kept = [one for one in json.loads(earlier.read_text()) if (one["scenario"], one["executor"]) not in new]
    paths = report.write([*kept, *results], options.out)
    if options.json:
        print(json.dumps(results))
    else:
        print("\n".join(report.section(one) for one in results) if len(results) == 1 else report.table(results))
    for one in results:
        broken = {rule: found for rule, found in one.get("rules", {}).items() if found["state"] == "broken"}
        word = "skipped" if one["why_skipped"] else "satisfied" if one["is_satisfied"] else "BROKEN"
        print(f"{one['scenario']} ({one['label']}): {word} {', '.join(broken)}".rstrip(), file=sys.stderr)
    print(f"wrote {', '.join(map(str, paths))}", file=sys.stderr)
    if len(results) > 1:
        words = Counter("skipped" if one["why_skipped"] else "satisfied" if one["is_satisfied"] else "BROKEN"
                        for one in results)
        print(f"{len(results)} scenarios: {', '.join(f'{count} {word}' for word, count in words.items())}",
              file=sys.stderr)


def _list() -> None:
    for name in NAMES:
        scenario = load(name)
        size = f"{scenario.tasks:,} tasks" if scenario.tasks else f"{scenario.minutes:g} minutes"
        print(f"{name:12} {scenario.title} ({size}, {scenario.workers} workers)")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError("must be greater than 0")
    return number


def _count(text: str) -> int:
    number = int(text.replace(",", "").replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_to(subcommands: Any) -> None:
    """Add this subcommand to the parser of `python -m stress`."""
    parser = subcommands.add_parser("run", help="scenarios with real processes", description=DESCRIPTION,
                                    epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help=f"{', '.join(NAMES)}, or all")
    parser.add_argument("--list", action="store_true", help="show the scenarios, and stop")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--minutes", type=_positive, metavar="M", help="for so long")
    size.add_argument("--tasks", type=_count, metavar="N", help="so many tasks")
    size.add_argument("--brief", action="store_true", help="only for some seconds")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all random choices (default: %(default)s)")
    parser.add_argument("--executor", default=OURS, metavar="MODULE:CLASS", help="under test (default: %(default)s)")
    parser.add_argument("--no-faults", action="store_true", help="inject none")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="of the report (default: %(default)s)")
    parser.add_argument("--add", action="store_true", help="keep what the report there has of other runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=lambda options: _leave(run(options)))


def _leave(code: int) -> int:
    """An executor that could not be shut down would hold up the end of this process."""
    if any(thread.name == "stress-shutdown" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
