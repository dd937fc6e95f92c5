"""The whole pool killed and started again, over and over; with a job log nothing is done twice that succeeded.

It runs `agentpool run --joblog FILE --resume` as a program of its own, as only another process can be killed.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from stress import procs
from stress.ledger import Entry
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run

#: What is promised, for the parent's death.
GONE_SECONDS: Final = 2.0
_JOB: Final = 'echo "began $1" >> "$0"; sleep "0.0$(($1 % 10))"; echo "ended $1" >> "$0"'
_ROUNDS: Final = 200
#: Where the run is by time.
_JOBS: Final = 600


def play(run: Run) -> None:
    """Start it, kill it at a random moment, look at what is left, and start it again, until all jobs are done."""
    jobs = _Jobs(run)
    pace = 1.0
    for _ in range(_ROUNDS):
        before = jobs.succeeded()
        program = jobs.start()
        try:
            program.wait(run.random.uniform(0.3, 1.5) * pace)
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGKILL)
            program.wait()
            jobs.kills += 1
            jobs.look_for_survivors()
        else:
            if not jobs.succeeded() >= jobs.all:
                run.ledger.breaks("ends", f"agentpool run ended with {program.returncode}: {jobs.error()}")
            break
        jobs.count()
        # On a busy machine it may be killed again and again before it has done anything.
        pace = 1.0 if jobs.succeeded() > before else min(pace * 1.5, 20.0)
    jobs.settle()
    jobs.clear_up()


class _Jobs:
    """Each appends a line to the journal when it begins and when it ends."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._log, self._journal = run.folder / "joblog", run.folder / "jobs"
        self._errors = run.folder / "errors"
        self._journal.touch()
        self._futures: dict[int, Future[Any]] = {}
        self.all = set(itertools.islice(run.budget(), run.plan.tasks or _JOBS))
        self.kills = 0
        #: job -> lines of its beginning at the first moment when the log had its success
        self._final: dict[int, int] = {}
        for number in self.all:
            entry = Entry(run.ledger.number(), "job", ("value",), lambda value: bool(value), 1, False)
            self._futures[number] = Future()
            run.ledger.accepted_as(entry, self._futures[number])

    def start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "agentpool", "run", "-j", "4", "--joblog", str(self._log), "--resume", "--",
                 "sh", "-c", _JOB, str(self._journal), "{}", ":::", *map(str, sorted(self.all))]
        with open(self._errors, "wb") as errors:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)

    def error(self) -> str:
        return self._errors.read_text(errors="replace")[-300:]

    def succeeded(self) -> set[int]:
        """By the job log, whole lines only. Read here anew: the program's own reading is under test."""
        found: set[int] = set()
        for line in (self._log.read_text().splitlines(keepends=True)[1:] if self._log.exists() else ()):
            words = line.split("\t")
            if line.endswith("\n") and len(words) == 9 and words[6:8] == ["0", "0"]:
                found.add(int(words[0]) - 1)
        return found

    def began(self) -> Counter[int]:
        lines = self._journal.read_text().splitlines()
        return Counter(int(line.split()[1]) for line in lines if line.startswith("began ") and line[6:].isdigit())

    def count(self) -> None:
        """Remember how often those had begun that have succeeded by now."""
        began = self.began()
        for number in self.succeeded():
            self._final.setdefault(number, began[number])

    def look_for_survivors(self) -> None:
        deadline = time.monotonic() + GONE_SECONDS
        while left := [one for one in self._run.before.processes() if not one.is_zombie]:
            if time.monotonic() > deadline:
                for one in left:
                    self._run.ledger.breaks("processes", f"{GONE_SECONDS:g} s after the parent was killed process "
                                            f"{one.pid} is alive: {procs.command(one.pid)[:120]!r}")
                    procs.send(one.pid, signal.SIGKILL)
                return
            time.sleep(0.01)
        _bury(self._run)

    def settle(self) -> None:
        """Each job's outcome, by log and journal."""
        done, began = self.succeeded(), self.began()
        for number, times in self._final.items():
            if began[number] > times:
                self._run.ledger.breaks("ran", f"job {number} had succeeded by the job log, and ran again")
        for number, future in self._futures.items():
            if number in done and began[number]:
                future.set_result(True)
            else:
                future.set_exception(RuntimeError(f"job {number} is not in the job log"))
        again = sum(count > 1 for count in began.values())
        self._run.facts |= {"times the parent was killed": self.kills,
                            "jobs that a kill cut short and that ran again": again}

    def clear_up(self) -> None:
        """A run that was killed leaves its folder, and a later one takes it away; an empty one after a minute.

        That minute is made to have passed. What is left then breaks the rule "files".
        """
        for trial in self._run.temporary.glob("????????"):
            if trial.is_file() and trial.stat().st_size <= len(b"blat"):
                trial.unlink()  # by which Python's tempfile tries whether it may write there; killed in between
        left = list(self._run.temporary.glob("agentpool-run-*"))
        for path in left:
            os.utime(path, (0, 0))
        words = [sys.executable, "-m", "agentpool", "run", "--", "true", ":::", "1"]
        ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if ended.returncode:
            self._run.ledger.breaks("ends", f"agentpool run ended with {ended.returncode}: {ended.stderr[-300:]}")
        self._run.facts["folders of killed runs that the next one removed"] = sum(not path.exists() for path in left)


def _bury(run: Run) -> None:
    """Collect the dead that came to this process."""
    for one in run.before.processes():
        if one.is_zombie and one.parent == os.getpid():
            try:
                os.waitpid(one.pid, os.WNOHANG)
            except ChildProcessError:
                continue


SCENARIO = Scenario(name="parent_kill", title="the whole pool is killed and started again, with a job log", play=play,
                    tasks=600, brief=150, needs=("joblog",))
