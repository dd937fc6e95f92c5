"""The independent record of every task: accepted when, settled how and how often, with which value.

It keeps in memory only what is open, and writes the rest to a file, so that the harness' own memory is flat however
long the run. Values are checked in a thread of its own: the executor's threads are not held up. `stress.oracle` reads
the file when the run is over.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

#: What a task may come to; beside it names of exceptions, which stand for their subclasses too.
VALUE: Final = "value"
CANCELLED: Final = "cancelled"
_EXAMPLES: Final = 20
_NOTES: Final = 1000


class Entry:
    """One task that is open. fates: what it may come to; attempts: how often it may begin."""

    __slots__ = ("accepted_at", "attempts", "expect", "fates", "is_journaled", "kind", "number")

    def __init__(self, number: int, kind: str, fates: tuple[str, ...], expect: Callable[[Any], bool], attempts: int,
                 is_journaled: bool) -> None:
        self.number = number
        self.kind = kind
        self.fates = fates
        self.expect = expect
        self.attempts = attempts
        self.is_journaled = is_journaled
        self.accepted_at = 0.0


class Ledger:
    """Any thread may write to it. `folder` gets the files `record` and (by the workers) `journal`."""

    def __init__(self, folder: Path) -> None:
        self.record_path = folder / "record"
        self.journal_path = folder / "journal"
        self._file = open(self.record_path, "w", buffering=1 << 16)  # noqa: SIM115  # as long as this object
        self._lock = threading.Lock()  # guards what stands up to the next comment, and `_file`
        self.open: dict[int, Entry] = {}
        self._next = 0
        self.accepted = 0
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()
        #: what errors said that no task was meant to come to, and in which process by their own words
        self.notes: dict[int, str] = {}
        #: rule -> how often it was broken, with some examples
        self.broken: dict[str, list[str]] = {}
        self._latencies: list[float] = []
        # -- end of what the lock guards
        self.last_settled_at = time.monotonic()
        self.room = threading.Condition(self._lock)
        self._arrived: queue.SimpleQueue[tuple[int, Future[Any] | None, float]] = queue.SimpleQueue()
        self._collector = threading.Thread(target=self._collect, name="stress-ledger", daemon=True)
        self._collector.start()

    # -- what those who submit say -------------------------------------------------------------------------------

    def number(self) -> int:
        """For the next task: its ticket has it, so it is drawn before the task is accepted."""
        with self._lock:
            self._next += 1
            return self._next - 1

    def accepted_as(self, entry: Entry, future: Future[Any]) -> None:
        """The executor took it."""
        entry.accepted_at = time.monotonic()
        with self._lock:
            self.open[entry.number] = entry
            self.accepted += 1
            self.by_kind[entry.kind] += 1
        number = entry.number
        future.add_done_callback(lambda done: self._arrived.put((number, done, time.monotonic())))

    def refuse(self, number: int, error: BaseException) -> None:
        """`submit` raised: the task must never run."""
        with self._lock:
            self.refused[type(error).__name__] += 1
            self._file.write(f"refused {number} {type(error).__name__}\n")

    def promised(self, what: str, number: int) -> None:
        """`cancel` or `kill` said True of it."""
        with self._lock:
            self._file.write(f"{what} {number}\n")

    def breaks(self, rule: str, example: str) -> None:
        """A rule was broken."""
        with self._lock:
            self._breaks(rule, example)

    def _breaks(self, rule: str, example: str) -> None:
        examples = self.broken.setdefault(rule, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)

    # -- what the executor says ----------------------------------------------------------------------------------

    def _collect(self) -> None:
        while True:
            number, future, when = self._arrived.get()
            if future is None:
                return
            with self._lock:
                entry = self.open.get(number)
                if entry is None:
                    self._breaks("once", f"task {number} was settled a second time")
            if entry is not None:
                self._settle(entry, future, when)
            del future, entry  # not kept until the next one comes

    def _settle(self, entry: Entry, future: Future[Any], when: float) -> None:
        outcome, error, is_allowed, wrong = _outcome(entry, future)
        # Where it ran, by the executor's own words: for tasks that were lost before they could write to the journal.
        pid = getattr(future, "worker_pid", None) or 0
        line = (f"settled {entry.number} {entry.kind} {outcome} {error or '-'} {int(is_allowed)} {entry.attempts} "
                f"{int(entry.is_journaled)} {entry.accepted_at:.6f} {when:.6f} {pid}\n")
        with self._lock:
            del self.open[entry.number]
            self.outcomes[outcome] += 1
            if error:
                self.errors[error] += 1
            if outcome == "failed" and not is_allowed and len(self.notes) < _NOTES:
                self.notes[entry.number] = f"in process {pid}: {future.exception()!s:.300}"
            if wrong:
                self._breaks("value", f"task {entry.number} ({entry.kind}) {wrong}")
            self._latencies.append(when - entry.accepted_at)
            self.last_settled_at = time.monotonic()
            self._file.write(line)
            self.room.notify_all()

    # -- what those who look ask ---------------------------------------------------------------------------------

    def take_latencies(self) -> list[float]:
        """Of what was settled since the last call: seconds from accepted to settled."""
        with self._lock:
            found, self._latencies = self._latencies, []
            return found

    @property
    def settled(self) -> int:
        """Tasks that are over."""
        return self.accepted - len(self.open)

    def wait_below(self, bound: int, timeout: float) -> bool:
        """Wait until fewer than so many tasks are open."""
        with self.room:
            return self.room.wait_for(lambda: len(self.open) < bound, timeout)

    def close(self) -> None:
        """Everything that was settled by now is in the file."""
        self._arrived.put((-1, None, 0.0))
        self._collector.join(60)
        with self._lock:
            self._file.close()


def _outcome(entry: Entry, future: Future[Any]) -> tuple[str, str, bool, str]:
    """How it ended, the error's name, whether that was to be, and what is wrong with the value."""
    if future.cancelled():
        return "cancelled", "", CANCELLED in entry.fates, ""
    error = future.exception()
    if error is not None:
        names = {base.__name__ for base in type(error).__mro__} - {"object", "BaseException", "Exception"}
        return "failed", type(error).__name__, not names.isdisjoint(entry.fates), ""
    try:
        is_right = entry.expect(future.result())
    except Exception as trouble:
        return "returned", "", VALUE in entry.fates, f"has a value that cannot be checked: {trouble!r:.200}"
    wrong = "" if is_right else f"returned another value: {future.result()!r:.80}"
    return "returned", "", VALUE in entry.fates, wrong
