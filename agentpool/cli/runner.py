"""The loop of `agentpool run`: jobs in, results out, a bounded number of them in between.

Two threads. The reading thread makes jobs from the input, one at a time, and waits while `OUTSTANDING` of them are
not dealt with. The main thread does everything else: it submits, logs, prints and stops. They share the event queue
and the semaphore, nothing else; the pool's threads only put ended futures on the same queue.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from agentpool.cli.jobs import Job
from agentpool.cli.results import JobResult, Printer, result_of, result_of_problem
from agentpool.cli.terminal import Interrupted, Interrupts, UsageProblem, give_up_output, message
from agentpool.config import DEFAULT_MAX_PENDING

if TYPE_CHECKING:
    from agentpool.futures import AgentFuture
    from agentpool.pool import AgentPool

__all__ = ["OUTSTANDING", "Halt", "Runner"]

#: Jobs that were read and whose output has not been shown yet: the pool's queue, and what waits for `--keep-order`.
OUTSTANDING: Final = DEFAULT_MAX_PENDING
#: The exit code counts failed jobs up to here; one more stands for all beyond.
_MOST_COUNTED: Final = 100
_OTHER_ERROR: Final = 255
#: Beyond the pool's own grace, how long stopped jobs may take to disappear before they are killed outright.
_STOP_MARGIN_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Halt:
    """When to end before all jobs have run. now: kill the running ones; else start no more and let them end."""

    now: bool
    why: Literal["fail", "success", "done"]
    count: int

    @classmethod
    def parse(cls, text: str) -> Halt | None:
        """`never`, or `now|soon,fail|success|done=N` as GNU parallel has it (without percentages)."""
        if text == "never":
            return None
        match = re.fullmatch(r"(now|soon),(fail|success|done)=([1-9][0-9]*)", text)
        if match is None:
            raise UsageProblem(
                f"--halt {text}: must be never, or now or soon, a comma, and fail=N, success=N or done=N; "
                "for example --halt now,fail=1"
            )
        why = cast("Literal['fail', 'success', 'done']", match[2])
        return cls(match[1] == "now", why, int(match[3]))


class _Reader(threading.Thread):
    """Makes jobs ahead of the pool, and no further than `OUTSTANDING`."""

    def __init__(self, jobs: Iterator[Job], events: queue.SimpleQueue[_Event]) -> None:
        # A daemon: it may be waiting for a terminal or a pipe that never says anything again.
        super().__init__(name="agentpool-run-input", daemon=True)
        self._jobs = jobs
        self._events = events
        self._room = threading.Semaphore(OUTSTANDING)
        self._is_stopped = False

    def run(self) -> None:
        problem: Exception | None = None
        try:
            while self._has_room():
                job = next(self._jobs, None)
                if job is None or self._is_stopped:
                    break
                self._events.put(job)
        except Exception as error:  # reported by the main thread, which ends the run with it
            problem = error
        self._events.put(_InputEnded(problem))

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._is_stopped

    def make_room(self) -> None:
        self._room.release()

    def stop(self) -> None:
        self._is_stopped = True
        self._room.release()


@dataclass(frozen=True, slots=True)
class _InputEnded:
    problem: Exception | None


_Event = Job | _InputEnded | Future[object]


class Runner:
    """Runs jobs through a pool. Made and used on the main thread, for one run.

    directory: an empty directory for the jobs' output.
    """

    def __init__(
        self,
        pool: AgentPool,
        jobs: Iterator[Job],
        *,
        printer: Printer,
        interrupts: Interrupts,
        directory: str,
        halt: Halt | None = None,
    ) -> None:
        self._pool = pool
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._reader = _Reader(jobs, self._events)
        self._printer = printer
        self._status = printer.status
        self._interrupts = interrupts
        self._directory = directory
        self._halt = halt
        # A retry policy sees errors only, so a job that may be retried must fail with one.
        self._raises_on_failure = pool.settings.retry is not None
        # The pool starts the next queued job before this thread has heard how the last one ended. With a condition to
        # halt on, it is given no more than it can run.
        self._most_submitted = OUTSTANDING if halt is None else pool.settings.concurrency
        self._unsubmitted: deque[Job] = deque()
        self._jobs: dict[Future[object], Job] = {}
        self._has_input = True
        self._counts = {"done": 0, "fail": 0, "success": 0}
        self._halted_by: JobResult | None = None
        self._began = time.monotonic()

    def run(self) -> int:
        """Runs everything; the exit code. Nothing is left running, whatever happens."""
        self._reader.start()
        try:
            while self._has_input or self._jobs or self._unsubmitted:
                self._handle(self._next_event())
                if self._halted_by is not None and self._halt is not None and self._halt.now:
                    self._stop("halted")
                    break
        except Interrupted as interrupted:
            self._stop("interrupted")
            return interrupted.exit_code
        except BrokenPipeError:
            self._stop("the reader of the output has gone away")
            return give_up_output()
        except OSError as error:
            self._stop("failed")
            message(str(error))
            return _OTHER_ERROR
        except BaseException:
            self._stop("failed")
            raise
        finally:
            self._status.clear()
        return self._exit_code()

    def _next_event(self) -> _Event:
        while True:
            if self._status.is_due():
                self._status.draw(self._status_text())
            with self._interrupts.allowed():
                try:
                    return self._events.get(timeout=0.25 if self._status.is_shown else None)
                except queue.Empty:
                    continue

    def _handle(self, event: _Event) -> None:
        if isinstance(event, Job):
            if event.problem is None:
                self._unsubmitted.append(event)
            else:
                self._ended(event, None if self._halted_by is not None else result_of_problem(event))
        elif isinstance(event, _InputEnded):
            self._has_input = False
            if event.problem is not None:
                raise event.problem
        else:
            job = self._jobs.pop(event)
            self._ended(job, result_of(job, cast("AgentFuture[Any]", event), self._output_path(job)))
        while self._unsubmitted:
            if self._halted_by is not None:
                self._ended(self._unsubmitted.popleft(), None)
            elif len(self._jobs) < self._most_submitted:
                self._submit(self._unsubmitted.popleft())
            else:
                break

    def _submit(self, job: Job) -> None:
        future = self._pool.submit_agent(
            "command",
            job.line,
            argv=job.argv,
            shell=job.argv is None,
            check=self._raises_on_failure,
            output_limit_mb=None,
            output_path=self._output_path(job),
        )
        self._jobs[future] = job
        future.add_done_callback(self._events.put)

    def _output_path(self, job: Job) -> str:
        return os.path.join(self._directory, str(job.position))

    def _ended(self, job: Job, result: JobResult | None) -> None:
        if result is not None:
            self._counts["done"] += 1
            self._counts["success" if result.has_succeeded else "fail"] += 1
            self._check_halt(result)
        for due in self._printer.arrange(job.position, result):
            if due is not None:
                with self._interrupts.allowed():
                    self._printer.show(due)
                # After its output was shown: what a resume skips has been seen.
                self._printer.log(due)
            self._reader.make_room()

    def _check_halt(self, result: JobResult) -> None:
        halt = self._halt
        if halt is None or self._halted_by is not None or self._counts[halt.why] < halt.count:
            return
        self._halted_by = result
        self._reader.stop()

    def _stop(self, reason: str) -> None:
        """Cancels what waits, asks what runs to end, kills what does not. A second signal kills at once."""
        self._reader.stop()
        try:
            with self._interrupts.allowed():
                for future in reversed(list(self._jobs)):  # the last first, so that none moves up meanwhile
                    future.cancel()
                for future in self._jobs:
                    cast("AgentFuture[Any]", future).kill()
                wait(self._jobs, timeout=self._pool.settings.kill_grace + _STOP_MARGIN_SECONDS)
        except Interrupted:
            message("killing what still runs")
        self._pool.emergency_stop(reason)

    def _exit_code(self) -> int:
        if self._halted_by is not None and self._halt is not None:
            if self._halt.why == "success":
                return 0
            if self._halt.why == "fail" and self._halt.count == 1:
                return self._halted_by.exit_status
        return min(self._counts["fail"], _MOST_COUNTED + 1)

    def _status_text(self) -> str:
        stats = self._pool.get_pool_stats()
        seconds = int(time.monotonic() - self._began)
        failed = f", {self._counts['fail']} failed" if self._counts["fail"] else ""
        waiting = stats["queue_length"] + stats["waiting_to_retry"]
        more = "" if not self._has_input else "+"
        budget = stats["host_budget"]
        turn = f", waits for {budget['waits_for']}" if budget is not None and budget["waits_for"] else ""
        return (
            f"{self._counts['done']} done{failed}, {stats['running']} running, {waiting}{more} waiting{turn}, "
            f"{stats['memory_mb']:.0f} MB, {seconds // 60}:{seconds % 60:02d}"
        )
