"""performance-auditor: ruff's PERF, SIM, C4, ASYNC and C90 rules over the files of a directory, worst functions first.

ruff is a program, started once per run (17 ms and 19 MB on the tenacity package). What is left to do here is to find
out which function each finding is in, and to put the functions in order.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Final, NamedTuple

from agentpool_worker.agents.base import Agent
from agentpool_worker.agents.sources import SourceFiles, chunks, count, find_ruff, find_sources, missing_tool

__all__ = ["PerformanceAuditor"]

RULES: Final = "PERF,SIM,C4,ASYNC,C90"
#: A function above this is a finding. It is the default of mccabe and of ruff.
COMPLEX: Final = 10
#: A function above this is a finding of high severity: more paths than anyone tests.
VERY_COMPLEX: Final = 20
#: What one finding adds to its function's score, beside the function's complexity. A call that blocks the event loop
#: costs every other task its time, so it outweighs a wasteful loop, and that outweighs what is merely roundabout.
WEIGHTS: Final = {"ASYNC": 10, "PERF": 5, "C4": 2, "SIM": 1}
#: The worst functions that a result lists.
MOST_FUNCTIONS: Final = 50
#: Well below what any system allows for a command line, so that a large project is checked in few calls.
COMMAND_LINE_CHARACTERS: Final = 100_000

_SEVERITY_BY_RULE: Final = {"ASYNC": "high", "PERF": "medium", "C4": "low", "SIM": "low"}
_SEVERITY_RANKS: Final = {"high": 0, "medium": 1, "low": 2}


class PerformanceAuditor(Agent):
    """Reports slow, roundabout and over-complex code, by function."""

    name: ClassVar[str] = "performance-auditor"
    idempotent: ClassVar[bool] = True

    def __init__(self) -> None:
        self._ruff: list[str] = []

    def setup(self) -> None:
        """Find ruff. Raises ModuleNotFoundError, with the cure, where it is missing."""
        try:
            self._ruff = find_ruff()
        except ModuleNotFoundError as error:
            if error.name != "ruff":
                raise
            missing_tool(self.name, "ruff", error)

    def run(self, prompt: str, *, path: str, out: str | None = None) -> dict[str, Any]:
        """Check every Python file of `path` (a file or a directory).

        prompt: not interpreted; always the same rules. The project's own ruff settings are not read, its `# noqa`
        comments are.
        out: a directory to leave out, for that is where test-generator writes.
        Raises FileNotFoundError where `path` does not exist, RuntimeError where ruff itself fails. Returns JSON-able
        data: `agent`, `summary`; `functions`, the worst 50, worst first (`function`, `file`, `line`, `score`,
        `complexity`, `findings`, `rules`); `findings` in the same order of functions (`file`, relative to `path`,
        `line`, `severity`, `confidence`, `rule`, `message`, `function`); `totals`, `files`, `errors`. The score is the
        function's cyclomatic complexity plus `WEIGHTS` for each finding in it; a complexity above 10 is a finding.
        """
        sources = find_sources(path, leave_out=out)
        audit = _Audit(sources)
        for paths in chunks(sources.paths, COMMAND_LINE_CHARACTERS):
            audit.add(paths, self._check(paths))
        return audit.result(self.name)

    def _check(self, paths: list[str]) -> list[dict[str, Any]]:
        command = [
            *self._ruff, "check", "--isolated", "--no-cache", "--quiet", "--exit-zero", "--output-format", "json",
            "--select", RULES, "--config", "lint.mccabe.max-complexity=0",
            "--target-version", f"py{sys.version_info.major}{sys.version_info.minor}", "--", *paths,
        ]  # fmt: skip
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        # The output decides, not the exit code: a process that reaps all its children robs subprocess of that.
        try:
            found: list[dict[str, Any]] = json.loads(done.stdout)
        except ValueError:
            said = done.stderr.decode(errors="replace").strip()[-2000:] or f"exit code {done.returncode}"
            raise RuntimeError(f"ruff failed ({' '.join(self._ruff)}): {said}") from None
        return found


class _Function(NamedTuple):
    """A function's `name` within its module, and its lines, decorators included."""

    name: str
    line: int
    first: int
    last: int


class _Entry:
    """What is known of one function, or of a module's code outside functions (complexity 0)."""

    __slots__ = ("complexity", "file", "findings", "function", "line")

    def __init__(self, file: str, function: str, line: int) -> None:
        self.file = file
        self.function = function
        self.line = line
        self.complexity = 0
        self.findings: list[dict[str, Any]] = []

    @property
    def score(self) -> int:
        return self.complexity + sum(WEIGHTS.get(_group(finding["rule"]), 0) for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "function": self.function,
            "file": self.file,
            "line": self.line,
            "score": self.score,
            "complexity": self.complexity,
            "findings": len(self.findings),
            "rules": _tally(finding["rule"] for finding in self.findings),
        }


class _Audit:
    """Collects ruff's findings by function."""

    def __init__(self, sources: SourceFiles) -> None:
        self._sources = sources
        self._entries: list[_Entry] = []
        self._errors = list(sources.errors)
        self._failed: set[str] = set()

    def add(self, paths: list[str], found: list[dict[str, Any]]) -> None:
        """Take what ruff found in `paths`, all of it."""
        by_file: dict[str, list[dict[str, Any]]] = {}
        for item in found:
            by_file.setdefault(item["filename"], []).append(item)
        for path in paths:
            self._add_file(path, by_file.get(path, []))

    def _add_file(self, path: str, found: list[dict[str, Any]]) -> None:
        file = self._sources.relative(path)
        try:
            functions = _functions_by_line(path)
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            self._fail(file, f"{type(error).__name__}: {error}")
            return
        entries: dict[_Function | None, _Entry] = {}
        for item in found:
            row = item["location"]["row"]
            rule = item["code"] or item.get("name") or "invalid-syntax"
            if not _group(rule):
                self._fail(file, f"line {row}: {item['message']}")
                continue
            function = functions[row] if row < len(functions) else None
            if function not in entries:
                entries[function] = _Entry(file, *(("(module)", 1) if function is None else function[:2]))
            _record(entries[function], rule, row, item["message"])
        self._entries.extend(entries.values())

    def _fail(self, file: str, message: str) -> None:
        if file not in self._failed:  # the first error of a file is its cause, the others follow from it
            self._failed.add(file)
            self._errors.append({"file": file, "message": message})

    def result(self, agent: str) -> dict[str, Any]:
        """The agent's result, once everything was added."""
        worst = sorted(self._entries, key=lambda entry: (-entry.score, entry.file, entry.line))
        findings = [finding for entry in worst for finding in entry.findings]
        complexities = [entry.complexity for entry in worst if entry.complexity]
        files = len(self._sources.paths) - len(self._failed)
        summary = (
            f"{count(len(findings), 'finding')} in {count(len(complexities), 'function')} of {count(files, 'file')}; "
            f"{sum(c > COMPLEX for c in complexities)} more complex than {COMPLEX}"
        )
        if complexities:
            summary += f"; worst: {worst[0].function} ({worst[0].file}:{worst[0].line}, score {worst[0].score})"
        if self._errors:
            summary += f"; {count(len(self._errors), 'file')} could not be checked"
        return {
            "agent": agent,
            "summary": summary,
            "functions": [entry.as_dict() for entry in worst[:MOST_FUNCTIONS]],
            "findings": findings,
            "totals": {
                "findings": len(findings),
                "by_rule": _tally(finding["rule"] for finding in findings),
                "functions": len(complexities),
                "functions_over_complexity_10": sum(c > COMPLEX for c in complexities),
                "highest_complexity": max(complexities, default=0),
                "mean_complexity": round(sum(complexities) / len(complexities), 2) if complexities else 0.0,
            },
            "files": files,
            "errors": self._errors,
        }


def _record(entry: _Entry, rule: str, row: int, message: str) -> None:
    severity = _SEVERITY_BY_RULE.get(_group(rule))
    if rule == "C901":
        measured = re.search(r"\((\d+) > \d+\)", message)
        if measured is None:
            raise RuntimeError(f"this version of ruff words C901 in a way that is not understood: {message!r}")
        entry.complexity = max(entry.complexity, int(measured[1]))
        if entry.complexity <= COMPLEX:
            return
        severity = "high" if entry.complexity > VERY_COMPLEX else "medium"
        message = f"cyclomatic complexity {entry.complexity}, above {COMPLEX}"
    entry.findings.append(
        {
            "file": entry.file,
            "line": row,
            "severity": severity,
            "confidence": "high",
            "rule": rule,
            "message": message,
            "function": entry.function,
        }
    )
    entry.findings.sort(key=lambda finding: (_SEVERITY_RANKS[finding["severity"]], finding["line"], finding["rule"]))


def _group(rule: str) -> str:
    """The rule's family; empty: none that was asked for, so an error of the file's."""
    for group in ("ASYNC", "PERF", "SIM", "C4", "C9"):
        if rule.startswith(group) and rule[len(group) :].isdigit():
            return group
    return ""


def _tally(rules: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for rule in rules:
        counts[rule] = counts.get(rule, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _functions_by_line(path: str) -> list[_Function | None]:
    """The innermost function at each line of a file, from line 1 on; [0] is not used.

    Raises what makes the file unreadable to Python or ruff.
    """
    import warnings

    with open(path, "rb") as file:
        source = file.read()
    try:
        source.decode("utf-8")
    except UnicodeDecodeError as error:  # ruff passes over such a file, with a mere warning
        raise ValueError(f"not UTF-8, which is all that ruff reads: {error.reason} at byte {error.start}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the reviewed code's string escapes, not ours
        tree = ast.parse(source, path)
    lines: list[_Function | None] = [None] * (source.count(b"\n") + 2)
    for function in _walk(tree, ""):  # an inner function comes after the one it is in, and overwrites its part
        lines[function.first : function.last + 1] = [function] * (function.last + 1 - function.first)
    return lines


def _walk(node: ast.AST, prefix: str) -> Iterator[_Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # most of a tree, and without functions but lambdas, which ruff does not measure
        inner = prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{prefix}{child.name}."
            if not isinstance(child, ast.ClassDef):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                yield _Function(prefix + child.name, child.lineno, first, child.end_lineno or child.lineno)
        yield from _walk(child, inner)
