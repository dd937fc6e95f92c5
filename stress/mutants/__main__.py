"""What `mutmut run` found, as Markdown: how many mutants of each module were killed, and who survived, and why.

    python -m stress.mutants                      the table, and survivors that nobody has explained
    python -m stress.mutants --write docs/mutants.md

Why a survivor is let live stands in `survivors.json`, by function and by what was changed in it, as numbers of mutants
change with each line that is added. Exit code: 0; 1 where less than 90 % were killed, or where there is no result.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

WANTED_PERCENT: Final = 90.0
STATES: Final = ("killed", "timeout", "survived", "unchecked")
#: Exit codes that mutmut notes.
_KILLED: Final = (1, 3)
_SURVIVED: Final = 0
_NO_TESTS: Final = (5, 33)
_EXPLANATIONS: Final = Path(__file__).with_name("survivors.json")


@dataclass(frozen=True)
class Mutant:
    """One changed line. `function` is `module.Class.method`; state: killed, survived, timeout, unchecked."""

    function: str
    state: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.function, self.before, self.after


def read(folder: Path) -> list[Mutant]:
    """All mutants of a run of mutmut. Raises FileNotFoundError where there was none."""
    found = [mutant for meta in sorted((folder / "agentpool/core").glob("*.meta")) for mutant in _of(meta)]
    if not found:
        raise FileNotFoundError(f"no results of mutmut in {folder}; make mutants")
    return found


def _of(meta: Path) -> Iterator[Mutant]:
    source = meta.with_suffix("")
    for key, code in json.loads(meta.read_text())["exit_code_by_key"].items():
        mangled = key.rsplit(".", 1)[1]
        function, number = mangled.rsplit("__mutmut_", 1)
        name = function.removeprefix("x_") if function.startswith("x_") else function[2:].replace("ǁ", ".")
        state = ("unchecked" if code is None else "killed" if code in _KILLED else "survived"
                 if code == _SURVIVED or code in _NO_TESTS else "timeout")
        before, after = "", ""
        if state != "killed":
            before, after = _change(source, f"{function}__mutmut_orig", f"{function}__mutmut_{number}")
        yield Mutant(f"{source.stem}.{name}", state, before, after)


@cache
def _functions(source: Path) -> dict[str, list[str]]:
    text = source.read_text()
    lines = text.split("\n")
    return {node.name: lines[node.lineno - 1:node.end_lineno] for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef)}


def _change(source: Path, original: str, mutant: str) -> tuple[str, str]:
    functions = _functions(source)
    old = "\n".join(functions[original]).replace(original, "", 1)
    new = "\n".join(functions[mutant]).replace(mutant, "", 1)
    lines = list(difflib.unified_diff(old.split("\n"), new.split("\n"), n=0, lineterm=""))[2:]
    return tuple(" ".join(line[1:].strip() for line in lines if line.startswith(sign))  # type: ignore[return-value]
                 for sign in "-+")


def explanations() -> dict[tuple[str, str, str], str]:
    """(function, before, after) -> why."""
    return {(one["function"], before, after): one["why"]
            for one in json.loads(_EXPLANATIONS.read_text()) for before, after in one["changes"]}


def percent(mutants: Sequence[Mutant]) -> float:
    """Killed of all that were checked; one that never ends has been noticed too."""
    states = Counter(mutant.state for mutant in mutants)
    checked = len(mutants) - states["unchecked"]
    return 100 * (states["killed"] + states["timeout"]) / checked if checked else 0.0


def table(mutants: Sequence[Mutant]) -> str:
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


def survivors(mutants: Sequence[Mutant], why: dict[tuple[str, str, str], str]) -> str:
    """Grouped by the reason, unexplained ones first."""
    groups: dict[str, list[Mutant]] = {}
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
    parser.add_argument("--results", type=Path, default=Path("mutants"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put table and survivors behind its marker")
    options = parser.parse_args(words)
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
