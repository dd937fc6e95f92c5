"""Mutation testing of `agentpool/core`: tries mutants, and says what was found, and who survived, and why.

    python -m stress.mutants run [--quick] [--again STATE] [PATTERN ...]    make mutants: those without a result
    python -m stress.mutants                                                the table, and survivors without a reason
    python -m stress.mutants --write docs/mutants.md

Why a survivor is let live stands in `survivors.json`, by function and by what was changed in it, as numbers of mutants
change with each line that is added. Results of functions that are not what they were are left out: such a mutant is not
tried yet. Exit code: 0; 1 where less than 90 % were killed, or where there is no result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stress.mutants.results import latest

WANTED_PERCENT: Final = 90.0
STATES: Final = ("killed", "timeout", "survived", "unchecked")
_EXPLANATIONS: Final = Path(__file__).with_name("survivors.json")


@dataclass(frozen=True)
class Tried:
    """One changed line. `function` is `module.Class.method`; state: killed, survived, timeout, unchecked."""

    function: str
    state: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.function, self.before, self.after


def read(results: Path) -> list[Tried]:
    """All mutants of the core as it is. Raises FileNotFoundError where none was tried."""
    from stress.mutants.generate import of_core

    done = latest(results)
    found = [Tried(one.function, done[one.key].state if one.key in done else "unchecked", one.before, one.after)
             for one in of_core()]
    if all(one.state == "unchecked" for one in found):
        raise FileNotFoundError(f"no results in {results}; make mutants")
    return found


def explanations() -> dict[tuple[str, str, str], str]:
    """(function, before, after) -> why."""
    return {(one["function"], before, after): one["why"]
            for one in json.loads(_EXPLANATIONS.read_text()) for before, after in one["changes"]}


def percent(mutants: Sequence[Tried]) -> float:
    """Killed of all that were checked; one that never ends has been noticed too."""
    states = Counter(mutant.state for mutant in mutants)
    checked = len(mutants) - states["unchecked"]
    return 100 * (states["killed"] + states["timeout"]) / checked if checked else 0.0


def table(mutants: Sequence[Tried]) -> str:
    """A row for each module."""
    lines = ["| module | mutants | killed | ran too long | survived | not tried | killed, % |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    modules = sorted({mutant.function.partition(".")[0] for mutant in mutants})
    for name in [*modules, "all"]:
        part = [mutant for mutant in mutants if name in ("all", mutant.function.partition(".")[0])]
        states = Counter(mutant.state for mutant in part)
        figures = " | ".join(f"{count:,}" for count in (len(part), *(states[one] for one in STATES)))
        lines.append(f"| {name} | {figures} | {percent(part):.1f} |")
    return "\n".join(lines)


def survivors(mutants: Sequence[Tried], why: dict[tuple[str, str, str], str]) -> str:
    """Grouped by the reason, unexplained ones first."""
    groups: dict[str, list[Tried]] = {}
    for mutant in mutants:
        if mutant.state == "survived":
            groups.setdefault(why.get(mutant.key, ""), []).append(mutant)
    parts = []
    for reason, group in sorted(groups.items(), key=lambda item: (item[0] != "", -len(item[1]))):
        parts.append(f"### {reason or 'Not looked at yet'} ({len(group)})\n\n" + "\n".join(
            f"- `{one.function}`: {_code(one.before)} becomes {_code(one.after)}" for one in group))
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`" if text else "nothing"


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stress.mutants", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("mutants/results.jsonl"), metavar="FILE",
                        help="default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put table and survivors behind its marker")
    tries = parser.add_subparsers(dest="command", metavar="run").add_parser("run", help="try mutants")
    tries.add_argument("patterns", nargs="*", metavar="PATTERN", help="of these functions: 'crew.*' '*.submit'")
    tries.add_argument("--again", action="append", default=[], choices=["killed", "survived", "timeout"],
                       help="those with that result once more")
    tries.add_argument("--quick", action="store_true", help="with the quick tests only, the others another time")
    options = parser.parse_args(words)
    if options.command == "run":
        from stress.mutants.run import run

        return run(options.results, options.patterns, options.again, options.quick)
    try:
        mutants = read(options.results)
    except FileNotFoundError as error:
        print(f"python -m stress.mutants: {error}", file=sys.stderr)
        return 1
    why = explanations()
    print(table(mutants))
    new = [mutant for mutant in mutants if mutant.state == "survived" and mutant.key not in why]
    print("\n".join(f"not looked at yet: {one.function}\n  - {one.before}\n  + {one.after}" for one in new))
    if unchecked := sum(mutant.state == "unchecked" for mutant in mutants):
        print(f"{unchecked} were not checked: call make mutants again, it goes on where it stopped")
    if options.write is not None:
        head, marker, _ = options.write.read_text().partition(MARKER)
        options.write.write_text(f"{head}{marker}\n\n{table(mutants)}\n\n## Survivors\n\n{survivors(mutants, why)}\n")
    return 0 if percent(mutants) >= WANTED_PERCENT else 1


MARKER: Final = "<!-- below: python -m stress.mutants --write docs/mutants.md -->"

if __name__ == "__main__":
    sys.exit(main())
