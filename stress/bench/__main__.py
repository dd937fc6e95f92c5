"""The command: `python -m stress.bench`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stress.bench.cases import CASES
from stress.bench.contenders import BASELINE, OURS, Contender, all_contenders, takes_part, why_not
from stress.bench.figures import column, entry, ratio_text, ratios
from stress.bench.progress import Progress
from stress.bench.report import page, put
from stress.bench.runner import Runner, turns

if TYPE_CHECKING:
    from stress.bench.runner import Results

DESCRIPTION = "Side-by-side benchmark of process pools: agentpool, the standard library's, others."
EXAMPLES = """\
examples:
  python -m stress.bench                                      everything: about 25 minutes
  python -m stress.bench --quick                              one round, three pools: about 2 minutes
  python -m stress.bench --cases noop,cold --rounds 5         two cases (by the beginning of a name)
  python -m stress.bench --peers ppe-fork,loky,agentpool      these contenders only
  python -m stress.bench --json out.json                      keep the figures; what out.json has is kept or replaced
  python -m stress.bench --show out.json                      the tables of an earlier run
  python -m stress.bench --show out.json --write docs/benchmarks.md    write its page, with plots in docs/img

Ratios are to ppe-fork (ProcessPoolExecutor with fork) in the same round. Extra packages: pip install -e '.[bench]'.
"""
QUICK_PEERS = (BASELINE, "mp-pool", OURS)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stress.bench", description=DESCRIPTION, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", metavar="A,B", help="names or beginnings of names (default: all)")
    parser.add_argument("--peers", default="", metavar="A,B", help="contenders (default: all that are installed)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each case (default: 1 to 3, by its length)")
    parser.add_argument("--quick", action="store_true", help="one round, three contenders, fewer workers")
    parser.add_argument("--quiet", type=float, default=0.0, metavar="S",
                        help="before each cell, wait up to S seconds for other programs to be quiet")
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the figures into this file, case by case")
    parser.add_argument("--show", type=Path, metavar="JSON", help="measure nothing: print or write an earlier run")
    parser.add_argument("--write", type=Path, metavar="PAGE",
                        help="put the report between the page's markers, and plots into the folder img beside it")
    parser.add_argument("--list", action="store_true", help="name contenders and cases, and stop")
    options = parser.parse_args(words)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.show and not options.show.exists():
        parser.error(f"--show: there is no {options.show}")
    return options


def pick_cases(wanted: str) -> list[str]:
    """Those whose names begin with one of the words."""
    words = [word for word in wanted.split(",") if word]
    if unknown := [word for word in words if not any(name.startswith(word) for name in CASES)]:
        raise SystemExit(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    return [name for name in CASES if not words or name.startswith(tuple(words))]


def pick_contenders(wanted: str, quick: bool) -> dict[str, type[Contender]]:
    """In the order of the tables; those that are missing are named and skipped."""
    everyone = all_contenders()
    words = [word for word in wanted.split(",") if word] or (list(QUICK_PEERS) if quick else [])
    if unknown := [word for word in words if word not in everyone]:
        raise SystemExit(f"no such contender: {', '.join(unknown)}; there are {', '.join(everyone)}")
    chosen = {}
    for name, contender in everyone.items():
        if words and name not in words:
            continue
        if reason := why_not(contender):
            print(f"skipped {name}: {reason}", file=sys.stderr)
        else:
            chosen[name] = contender
    return chosen


def machine() -> str:
    memory = os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    model = f" ({models[0]})" if models and models[0] != "unknown" else ""
    return f"{os.cpu_count()} cores{model}, {memory:.0f} GiB, {platform.system()} {platform.release().split('-')[0]}"


def versions(contenders: dict[str, type[Contender]]) -> dict[str, str]:
    """Of what was measured."""
    found = {"python": platform.python_version()}
    names = [contender.needs[0] for contender in contenders.values() if contender.needs] + ["numpy"]
    for name in names:
        try:
            found[name] = metadata.version("agentpool-runtime" if name == OURS else name)
        except metadata.PackageNotFoundError:
            continue
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the cells, and keep what is known after each case."""
    contenders = pick_contenders(options.peers, options.quick)
    data: dict[str, Any] = {"versions": {}, "results": {}}
    if options.json and options.json.exists():
        data = json.loads(options.json.read_text())
    data |= {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "stress.bench", *_own_words()]),
        "quick": options.quick,
    }
    data["versions"] |= versions(contenders)
    cases = [CASES[name] for name in pick_cases(options.cases)]
    plan = list(turns(cases, contenders, options.rounds or (1 if options.quick else None)))
    results: Results = data["results"]
    with Runner(quick=options.quick, quiet_seconds=options.quiet) as runner, Progress(len(plan)) as progress:
        for spec, number, name in plan:
            if number == 0 and name == next(iter(_names(spec.name, contenders))):
                results[spec.name] = {}
            progress.begins(f"{spec.name} {number + 1} {name}")
            cell = runner.run(spec, name)
            cells = results[spec.name]
            cells.setdefault(name, []).append(cell)
            progress.ended(f"{spec.name:12} round {number + 1}  {name:14}", cell["seconds"],
                           cell.get("status") or _headline(spec.name, cells, name), bad="status" in cell)
            if options.json:
                _save(data, options.json)
    data["results"] = {name: results[name] for name in CASES if name in results}
    return data


def _names(case: str, contenders: dict[str, type[Contender]]) -> list[str]:
    return [name for name, contender in contenders.items() if takes_part(contender, case, CASES[case].wants)]


def _headline(case: str, cells: dict[str, list[dict[str, Any]]], name: str) -> str:
    """The first metric of the cell that just ended, and its ratio."""
    latest = {key: rows[-1:] for key, rows in cells.items()}
    for key, metric in CASES[case].metrics.items():
        text = entry(column(latest[name], key), metric.digits)
        if text != "-":
            ratio = ratios(latest, name, key) if metric.ratio and name != BASELINE else []
            return f"{metric.heading} {text}" + (f" ({ratio_text(ratio)})" if ratio else "")
    return ""


def _own_words() -> list[str]:
    """The command's arguments, without those that say where the result goes."""
    kept, words = [], iter(sys.argv[1:])
    for word in words:
        if word in ("--json", "--write"):
            next(words, None)
        elif not word.startswith(("--json=", "--write=")):
            kept.append(word)
    return kept


def _save(data: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1))
    part.replace(path)


def write(data: dict[str, Any], path: Path) -> None:
    """The page and its plots."""
    try:
        from stress.bench import plots
    except ImportError as error:
        print(f"no plots: {error}; pip install -e '.[bench]'", file=sys.stderr)
        images = {}
    else:
        images = {title: f"img/{file.name}" for title, file in plots.draw(data["results"], path.parent / "img").items()}
    put(page(data, CASES, images), path)
    print(f"wrote {path}", file=sys.stderr)


def main() -> None:
    options = parse()
    if options.list:
        for name, contender in all_contenders().items():
            reason = why_not(contender)
            print(f"{name:16}{(contender.__doc__ or '').splitlines()[0]}{f'  [{reason}]' if reason else ''}")
        print()
        for name, spec in CASES.items():
            print(f"{name:16}{spec.title}")
        return
    if options.show:
        data = json.loads(options.show.read_text())
    else:
        began = time.monotonic()
        data = measure(options)
        print(f"{time.monotonic() - began:.0f} s in all", file=sys.stderr)
    if options.write:
        write(data, options.write)
    else:
        print(page(data, CASES, {}))


if __name__ == "__main__":
    main()
