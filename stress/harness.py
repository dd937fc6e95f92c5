"""One run of one scenario: it makes the executor, hands tasks to it, keeps everybody who watches, and ends it all.

Written so that an executor which loses tasks, hangs or cannot be shut down ends the run all the same, with a finding.
"""

from __future__ import annotations

import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stress import procs, work
from stress.faults import Chaos, make_small_disk, remove_small_disk
from stress.ledger import VALUE, Entry, Ledger
from stress.recorder import Recorder
from stress.remains import Before
from stress.scenarios import Scenario
from stress.target import Target

#: Where `starve_descriptors` is to come, so many are the limit: taking a million would be another kind of pressure.
_DESCRIPTORS: Final = 1024
_SHUTDOWN_SECONDS: Final = 60.0
#: Views of the executor that are kept.
_VIEWS: Final = 100
_LEAK_PATIENCE: Final = 10.0


@dataclass(frozen=True)
class Plan:
    """What was asked for. Of tasks and seconds at least one is set."""

    tasks: int | None
    seconds: float | None
    seed: int = 0
    with_faults: bool = True


class Run:
    """What a scenario is given. `submit`, `budget`, `calm` and `note` are all that most need; any thread may call."""

    def __init__(self, scenario: Scenario, target: Target, plan: Plan, folder: Path) -> None:
        self.scenario = scenario
        self.target = target
        self.plan = plan
        self.folder = folder
        self.seed = plan.seed
        self.random = random.Random(plan.seed)
        self.is_stopped = False
        self.gave_up_at: float | None = None
        #: tasks that were open when nothing moved any more
        self.stalled = 0
        self.facts: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.rebuilt = 0
        self.shutdown_seconds = 0.0
        self._lock = threading.Lock()  # guards _executor, _views, _count and rebuilt
        self._executor: Executor | None = None
        self._views: dict[tuple[tuple[str, Any], ...], tuple[Executor, Any]] = {}
        self._count = 0
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        disk = None
        if plan.with_faults and "fill_disk" in scenario.faults:
            if why := make_small_disk(self.temporary):
                self.skipped["fill_disk"] = why
            else:
                disk = self.temporary
        self.census = procs.Census()
        self.before = Before(self.temporary)
        self.ledger = Ledger(folder)
        self.recorder = Recorder(folder / "series", self.ledger, self.census, self._look, plan.seconds)
        kinds = scenario.faults if plan.with_faults else ()
        self.chaos = Chaos(kinds, scenario.fault_every, plan.seed, self.census, disk)

    # -- for scenarios -------------------------------------------------------------------------------------------

    @property
    def executor(self) -> Executor:
        """The one under test; it is made on first use."""
        with self._lock:
            if self._executor is None:
                given = self.scenario.settings
                self._executor = self.target.make(self.scenario.workers, given(self) if callable(given) else given)
            return self._executor

    def replace_executor(self, old: Executor) -> None:
        """The next task goes to a new one. Once for each, whoever asks."""
        with self._lock:
            if self._executor is old:
                self._executor = None
                self._views.clear()
                self.rebuilt += 1

    def budget(self) -> Iterator[int]:
        """Counts tasks, over all threads, until the run is to end."""
        while not self.is_over:
            with self._lock:
                if self.plan.tasks is not None and self._count >= self.plan.tasks:
                    return
                self._count += 1
                number = self._count - 1
            yield number

    @property
    def is_over(self) -> bool:
        """No more tasks are wanted."""
        late = self.plan.seconds is not None and time.monotonic() - self.recorder.began_at > self.plan.seconds
        return self.is_stopped or late

    def submit(self, kind: str, function: Callable[..., Any], *args: Any, fates: tuple[str, ...] = (VALUE,),
               expect: Callable[[int, Any], bool] | None = None, attempts: int = 1, **options: Any
               ) -> Future[Any] | None:
        """`function(ticket, *args)` as a task; None where the executor refused it, which is on record.

        fates: what it may come to. expect(right value, value): whether the value is right; else it must be equal.
        attempts: how often it may begin. options: of `AgentPool.options`; left out where the executor has none.
        """
        number = self.ledger.number()
        ticket = (str(self.ledger.journal_path), self.seed, number)
        is_journaled = function is not work.noop
        right = work.right_value(self.seed, number)
        test = _equals(right) if expect is None else _bound(expect, right)
        entry = Entry(number, kind, fates, test, attempts, is_journaled)
        executor = self.executor
        try:
            view = self._view(executor, options)
            future: Future[Any] = (view.submit(function, ticket, *args) if is_journaled
                                   else view.submit(function, self.seed, number))
        except Exception as error:
            self._refused(executor, number, error)
            return None
        future.stress_number = number  # type: ignore[attr-defined]
        self.ledger.accepted_as(entry, future)
        return future

    def calm(self, bound: int) -> None:
        """Wait until fewer than so many tasks are open. Where nothing moves any more, the run is stopped."""
        while not self.is_stopped and not self.ledger.wait_below(bound, 0.5):
            if time.monotonic() - self.ledger.last_settled_at > self.scenario.patience:
                self.give_up(len(self.ledger.open))

    def give_up(self, stalled: int = 0) -> None:
        """End the run before its time. What becomes of tasks from now on is not the executor's fault."""
        self.is_stopped = True
        if self.gave_up_at is None:
            self.gave_up_at, self.stalled = time.monotonic(), stalled

    def cancel(self, future: Future[Any]) -> bool:
        """`future.cancel()`, on record."""
        if said := future.cancel():
            self.ledger.promised("cancel", future.stress_number)  # type: ignore[attr-defined]
        return said

    def kill(self, future: Future[Any]) -> bool:
        """`future.kill()`, on record; where there is none, `cancel`."""
        kill = getattr(future, "kill", None)
        if kill is None:
            self.skipped["kill"] = "futures have no kill()"
            return self.cancel(future)
        if said := bool(kill()):
            self.ledger.promised("kill", future.stress_number)  # type: ignore[attr-defined]
        return said

    def _refused(self, executor: Executor, number: int, error: Exception) -> None:
        name = type(error).__name__
        self.ledger.refuse(number, error)
        if name not in self.scenario.may_refuse:
            self.ledger.breaks("refused", f"submit raised {name}: {error!s:.200}")
        if isinstance(error, BrokenExecutor) or (isinstance(error, RuntimeError) and not self.target.is_ours):
            # What its users do: make another one.
            with suppress(Exception):
                executor.shutdown(wait=False)
            self.replace_executor(executor)

    def _view(self, executor: Executor, options: dict[str, Any]) -> Any:
        if not options:
            return executor
        if not self.target.is_ours:
            lacking = [name for name in options if not (name == "timeout" and "timeout" in self.target.features)]
            for name in lacking:
                self.skipped[f"option {name}"] = f"{self.target.label} has none"
                del options[name]
            if not options:
                return executor
        key = tuple(sorted(options.items()))
        with self._lock:
            of, view = self._views.get(key, (None, None))
            if of is not executor:
                view = executor.options(**options)  # type: ignore[attr-defined]
                if self._executor is executor and len(self._views) < _VIEWS:
                    self._views[key] = executor, view
            return view

    # -- for the recorder ----------------------------------------------------------------------------------------

    def _look(self) -> dict[str, Any]:
        executor = self._executor
        stats = getattr(executor, "get_pool_stats", None)
        if stats is None:
            return {"breaker": None, "queue": None, "running": None, "status": None}
        found = stats()
        return {"breaker": found["circuit_breaker"]["state"], "queue": found["queue_length"],
                "running": found["running"], "status": found["status"]}

    # -- the whole -----------------------------------------------------------------------------------------------

    def play(self) -> None:
        """The scenario, from the first task to the last trace of the executor."""
        with self._surroundings():
            self.recorder.start()
            self.chaos.start()
            try:
                self.scenario.play(self)
            except KeyboardInterrupt:
                self.give_up()
                self.facts["interrupted"] = True
            finally:
                self.chaos.stop()
            self._await_all()
            self.recorder.stop()
            self._keep_counters()
            self._shut_down()
            self.ledger.close()
            work.close_journals()
            self._look_for_remains()

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        procs.adopt_orphans()
        outer, limits = os.environ.get("TMPDIR"), resource.getrlimit(resource.RLIMIT_NOFILE)
        os.environ["TMPDIR"] = str(self.temporary)
        tempfile.tempdir = None
        if "starve_descriptors" in self.chaos.kinds and limits[0] > _DESCRIPTORS:
            resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            os.environ.pop("TMPDIR")
            if outer is not None:
                os.environ["TMPDIR"] = outer
            tempfile.tempdir = None

    def _await_all(self) -> None:
        self.ledger.last_settled_at = time.monotonic()
        self.calm(1)
        if self.is_stopped and self._executor is not None:
            # Interrupted, or nothing moves: what is queued is given up, as a user would.
            self._in_time(lambda executor: executor.shutdown(wait=True, cancel_futures=True))
            self.ledger.wait_below(1, 1.0)
        if self.stalled:
            self.ledger.breaks("accounted", f"{self.stalled} tasks were never settled: nothing came for "
                               f"{self.scenario.patience:g} s")

    def _keep_counters(self) -> None:
        stats = getattr(self._executor, "get_pool_stats", None)
        if stats is not None:
            self.facts["counters"] = _flat(stats()["counters"])

    def _shut_down(self) -> None:
        if self._executor is None:
            return
        began = time.monotonic()
        stop = bool(self.ledger.open)
        if not self._in_time(lambda executor: executor.shutdown(wait=True, cancel_futures=stop)):
            self.ledger.breaks("ends", f"shutdown took more than {_SHUTDOWN_SECONDS:g} s")
            self.before.end()
        self.shutdown_seconds = time.monotonic() - began

    def _in_time(self, end: Callable[[Executor], None]) -> bool:
        """In a thread that may be left behind."""
        executor = self._executor
        assert executor is not None
        thread = threading.Thread(target=end, args=(executor,), name="stress-shutdown", daemon=True)
        thread.start()
        patience = _SHUTDOWN_SECONDS if not self.ledger.open else 10.0
        thread.join(patience)
        return not thread.is_alive()

    def _look_for_remains(self) -> None:
        self._executor = None
        self._views.clear()
        for rule, what in self.before.await_nothing(_LEAK_PATIENCE).items():
            for one in what:
                self.ledger.breaks(rule, f"left behind: {one}")
        self.before.end()
        if self.chaos.disk is not None:
            remove_small_disk(self.chaos.disk)


def _flat(counters: dict[str, Any]) -> dict[str, int]:
    """`recycled: {memory: 3}` as `recycled memory: 3`."""
    found: dict[str, int] = {}
    for name, value in counters.items():
        found |= {f"{name} {key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _equals(right: int) -> Callable[[Any], bool]:
    return lambda value: bool(value == right)


def _bound(expect: Callable[[int, Any], bool], right: int) -> Callable[[Any], bool]:
    return lambda value: expect(right, value)
