"""Tries the mutants, each in a fork of one session of pytest that has collected the tests: no start, no import.

    python -m stress.mutants run [PATTERN ...]        those without a result; crew.* or *.submit: of these functions
    python -m stress.mutants run --again survived     the survivors once more, after tests were added

First all tests are run once in a fork, to see that they pass, how long each takes and which functions of the core it
calls. A mutant sees only tests that call its function: first those that killed its neighbours, then the quick ones.
What survives the tests of less than half a second sees the others (random lives, the simulator) when all mutants have
had their first turn. Under a mutant a test may take ten times as long as without, and a gigabyte: more is noticed.

Results are lines of mutants/results.jsonl; interrupted, a run goes on where it stopped.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

from stress.mutants.generate import CORE, Mutant, of_core, put_in_place
from stress.mutants.results import Result, append, latest

ROOT: Final = Path(__file__).parents[2]
#: What no process is started for. `-k` takes more than one word, so the first names files and the others tests.
TESTS: Final = ("tests/unit", "tests/property", "tests/simulation/test_simulation.py")
CHOICE: Final = ("(test_core_ or test_scheduler_ or test_plan or test_recorded_schedules or "
                 "test_the_rules_themselves_agree) and not test_a_seed_replays_exactly and not test_orchestrator")
OPTIONS: Final = ("-q", "-s", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0",
                  "--hypothesis-profile=agentpool-mutants", "-k", CHOICE)
QUICK_SECONDS: Final = 0.5
_MORE_BYTES: Final = 1 << 30
_KILLED: Final = 1


@dataclass
class Known:
    """What the first run of the tests has shown."""

    seconds: dict[str, float] = field(default_factory=dict)
    #: function -> tests that call it
    callers: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


class Runner:
    """A plugin whose loop runs the tests not once but for each mutant."""

    def __init__(self, mutants: Sequence[Mutant], halves: Sequence[Mutant], results: Path, is_quick: bool) -> None:
        self.mutants = mutants
        #: survived the quick tests in an earlier run
        self.halves = halves
        self.results = results
        self.is_quick = is_quick
        self.known = Known()
        self.has_failed = False
        #: function -> tests that killed one of its mutants, the latest last
        self._killers: dict[str, list[str]] = defaultdict(list)
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.has_failed = self.has_failed or report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests could not be collected")
        self.items = {item.nodeid: item for item in session.items}
        self._conftest = session.config.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py"))
        for name in ("terminalreporter", "terminalprogress"):
            if (plugin := session.config.pluginmanager.get_plugin(name)) is not None:
                session.config.pluginmanager.unregister(plugin)
        self._learn()
        gc.collect()
        gc.freeze()
        survivors = self._pass(self.mutants, is_quick=True)
        if not self.is_quick:
            self._pass([*self.halves, *survivors], is_quick=False)
        return True

    # -- once, as they are ---------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """Raises Interrupted where a test fails without any mutant."""
        reader, writer = os.pipe()
        if not (pid := self._fork()):
            os.close(reader)
            with os.fdopen(writer, "w") as out:
                for item in self.items.values():
                    began, calls = time.process_time(), _Calls()
                    sys.setprofile(calls)
                    self._run(item)
                    sys.setprofile(None)
                    seconds = time.process_time() - began
                    out.write(json.dumps([item.nodeid, seconds, sorted(calls.seen), self.has_failed]) + "\n")
                    if self.has_failed:
                        break
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            for line in told:
                test, seconds, functions, has_failed = json.loads(line)
                if has_failed:
                    os.waitpid(pid, 0)
                    raise pytest.Session.Interrupted(f"{test} fails without any mutant")
                self.known.seconds[test] = seconds
                for function in functions:
                    self.known.callers[function].append(test)
        os.waitpid(pid, 0)
        if len(self.known.seconds) != len(self.items):
            raise pytest.Session.Interrupted("the first run of the tests did not end")
        print(f"{len(self.items)} tests, {sum(self.known.seconds.values()):.0f} s", flush=True)

    def _run(self, item: pytest.Item) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)

    # -- a mutant ------------------------------------------------------------------------------------------------

    def _pass(self, mutants: Sequence[Mutant], *, is_quick: bool) -> list[Mutant]:
        """Returns who survived."""
        survivors = []
        states: Counter[str] = Counter()
        for number, mutant in enumerate(mutants, 1):
            tests = [test for test in self._order(mutant)
                     if (self.known.seconds[test] < QUICK_SECONDS) is is_quick]
            began = time.monotonic()
            state, by = self._try(mutant, tests)
            append(self.results, Result(*mutant.key, state, by, is_quick, round(time.monotonic() - began, 3)))
            states[state] += 1
            if state == "survived":
                survivors.append(mutant)
                print(f"survived {'quick tests' if is_quick else 'all tests'}: {mutant.function}\n"
                      f"  - {mutant.before}\n  + {mutant.after}", flush=True)
            elif by:
                self._counts[mutant.module][by] += 1
                killers = self._killers[mutant.function]
                if by in killers:
                    killers.remove(by)
                killers.append(by)
            if number % 100 == 0 or number == len(mutants):
                print(f"{time.strftime('%H:%M:%S')} {'quick' if is_quick else 'slow'} tests: "
                      f"{number} of {len(mutants)}, {dict(states)}", flush=True)
        return survivors

    def _order(self, mutant: Mutant) -> list[str]:
        """Tests that call the function: what killed its neighbours, then the quick ones."""
        here = self._killers[mutant.function]
        module = [test for test, _ in self._counts[mutant.module].most_common(8)]
        return sorted(self.known.callers.get(mutant.function, ()), key=lambda test: (
            -here.index(test) - 2 if test in here else -1 if test in module else 0, self.known.seconds[test]))

    def _try(self, mutant: Mutant, tests: Sequence[str]) -> tuple[str, str]:
        """(state, the test that noticed it)."""
        if not tests:
            return "survived", ""
        reader, writer = os.pipe()
        if not (pid := self._fork()):
            os.close(reader)
            self._be(mutant, tests, writer)
        os.close(writer)
        with os.fdopen(reader) as told:
            begun = told.read().split("\n")
        _, status = os.waitpid(pid, 0)
        last = begun[-2] if len(begun) > 1 else ""
        if os.WIFSIGNALED(status):
            return "timeout" if os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM) else "killed", last
        return ("survived", "") if os.WEXITSTATUS(status) == 0 else ("killed", last)

    def _be(self, mutant: Mutant, tests: Sequence[str], writer: int) -> None:
        """In the fork; never returns."""
        code = _KILLED
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _MORE_BYTES,) * 2)
            put_in_place(mutant)
            for test in tests:
                os.write(writer, test.encode() + b"\n")
                # In CPU time, as the machine may be busy; the other is for a deadlock.
                signal.setitimer(signal.ITIMER_PROF, 2 + 10 * self.known.seconds[test])
                signal.setitimer(signal.ITIMER_REAL, 1800)
                self._run(self.items[test])
                if self.has_failed:
                    break
            else:
                code = 0
        finally:
            os._exit(code)

    def _fork(self) -> int:
        pid = os.fork()
        if not pid:
            for number in (signal.SIGPROF, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            self.has_failed = False
            if self._conftest is not None:
                self._conftest.pytest_sessionstart()  # which takes this for a copy that escaped from a test otherwise
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
        return pid


class _Calls:
    """A profile function: which functions of the core are called."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._codes: set[Any] = set()

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code not in self._codes:
            self._codes.add(frame.f_code)
            path = Path(frame.f_code.co_filename)
            if path.parent == CORE:
                self.seen.add(f"{path.stem}.{frame.f_code.co_qualname}")


def wanted(mutants: Iterable[Mutant], done: dict[tuple[str, str, int], Result], patterns: Sequence[str],
           again: Sequence[str]) -> list[Mutant]:
    """Those that are to be tried: without a result or with one of `again`, of functions that match a pattern."""
    return [mutant for mutant in mutants
            if (mutant.key not in done or done[mutant.key].state in again)
            and (not patterns or any(fnmatchcase(mutant.function, pattern) for pattern in patterns))]


def run(results: Path, patterns: Sequence[str], again: Sequence[str], is_quick: bool) -> int:
    """Returns the exit code of pytest: 0 where the tests pass without any mutant."""
    done, everything = latest(results), of_core()
    mutants = wanted(everything, done, patterns, again)
    halves = [] if is_quick else [one for one in wanted(everything, done, patterns, ["survived"])
                                  if one.key in done and done[one.key].is_half and "survived" not in again]
    print(f"{len(mutants)} mutants to try, {len(halves)} with the slow tests only", flush=True)
    if not mutants and not halves:
        return 0
    os.chdir(ROOT)
    return int(pytest.main([*OPTIONS, *TESTS], plugins=[Runner(mutants, halves, results, is_quick)]))
