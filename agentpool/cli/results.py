"""How one job of `agentpool run` ended, and how that is shown: text, grouped per job, or one JSON object a line.

Main thread only. Output of a job is in memory or in files of the run's own directory, which are removed once shown.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from agentpool.cli.joblog import STOPPED, JobLog, LogLine
from agentpool.cli.jobs import Job
from agentpool.cli.terminal import StatusLine, message
from agentpool.config import MB
from agentpool.errors import MemoryLimitError, TaskTimeoutError, WorkerCrashedError
from agentpool_worker.agents.command import CommandFailed, CommandResult

if TYPE_CHECKING:
    from agentpool.futures import AgentFuture

__all__ = ["JobResult", "Printer", "result_of", "result_of_problem"]

#: Exit value of a job that could not be made from its input; GNU parallel's "other error".
BAD_INPUT: Final = 255
_COPY_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class JobResult:
    """One ended job.

    exit_value, signal: as in the job log, where an end by signal has exit value 0, and a job that was stopped has -1.
    note: what a person should know that the command itself did not say.
    output_path: prefix of the files with its output, `PATH.out` and `PATH.err`, where it wrote any.
    """

    job: Job
    exit_value: int
    signal: int
    started_at: float
    seconds: float
    received: int = 0
    attempts: int = 0
    peak_rss_bytes: int = 0
    stderr: bytes = b""
    note: str | None = None
    output_path: str | None = None

    @property
    def has_succeeded(self) -> bool:
        return self.exit_value == 0 and self.signal == 0

    @property
    def exit_status(self) -> int:
        """As a shell would report this job: from 0 to 255."""
        if self.signal:
            return 128 + self.signal
        return self.exit_value if 0 <= self.exit_value <= 255 else BAD_INPUT

    def log_line(self) -> LogLine:
        return LogLine(
            self.job.number, self.started_at, self.seconds, self.received, self.exit_value, self.signal, self.job.line
        )


def result_of_problem(job: Job) -> JobResult:
    """The result of a job that cannot be run."""
    return JobResult(job, BAD_INPUT, 0, time.time(), 0.0, note=job.problem)


def result_of(job: Job, future: AgentFuture[Any], output_path: str) -> JobResult | None:
    """The result of a job whose future is done; None: it was cancelled before it began."""
    try:
        error = future.exception()
    except CancelledError:
        return None
    if error is None or isinstance(error, CommandFailed):
        return _ended(job, future, error.result if error is not None else future.result(), output_path)
    return _stopped(job, future, error, output_path)


def _ended(job: Job, future: AgentFuture[Any], result: CommandResult, output_path: str) -> JobResult:
    return JobResult(
        job,
        0 if result["signal"] else result["exit_code"],
        result["signal"],
        result["started_at"],
        result["seconds"],
        received=result["stdout_bytes"],
        attempts=future.attempts,
        peak_rss_bytes=future.peak_rss_bytes,
        stderr=result["stderr"],
        output_path=output_path,
    )


def _stopped(job: Job, future: AgentFuture[Any], error: BaseException, output_path: str) -> JobResult:
    seconds = future.snapshot().elapsed_seconds
    number = 0
    if isinstance(error, TaskTimeoutError):
        number, note = 15, f"was stopped after {error.timeout_seconds:g} s"
    elif isinstance(error, MemoryLimitError):
        number = 9
        note = (
            f"was stopped: its processes used {error.peak_rss_bytes / MB:.0f} MB, "
            f"the limit is {error.limit_bytes / MB:.0f} MB"
        )
    elif isinstance(error, WorkerCrashedError):
        number, note = max(0, -(error.exit_code or 0)), f"was lost with its worker: {error}"
    else:
        note = f"failed: {type(error).__name__}: {error}"
    with contextlib.suppress(FileNotFoundError):
        received = os.stat(output_path + ".out").st_size
        return JobResult(
            job, STOPPED, number, time.time() - seconds, seconds, received, future.attempts, future.peak_rss_bytes,
            note=note, output_path=output_path,
        )
    return JobResult(
        job, STOPPED, number, time.time() - seconds, seconds, 0, future.attempts, future.peak_rss_bytes,
        note=note, output_path=output_path,
    )


class Printer:
    """Shows results, as they come or in order of input, and logs them. `show` raises BrokenPipeError when nobody reads.

    status: cleared before anything is shown. log: where to note what was shown.
    """

    def __init__(
        self, *, status: StatusLine, keep_order: bool = False, as_json: bool = False, log: JobLog | None = None
    ) -> None:
        self.status = status
        self._keep_order = keep_order
        self._show = self._show_json if as_json else self._show_text
        self._log = log
        self._next = 0
        #: Ended before one that comes first.
        self._held: dict[int, JobResult | None] = {}

    def arrange(self, position: int, result: JobResult | None) -> Iterator[JobResult | None]:
        """One job ended (None: without ever having begun); what is to be shown now."""
        if not self._keep_order:
            yield result
            return
        self._held[position] = result
        while self._next in self._held:
            self._next += 1
            yield self._held.pop(self._next - 1)

    def log(self, result: JobResult) -> None:
        """Notes in the job log, if there is one, how a job ended."""
        if self._log is not None:
            self._log.write(result.log_line())

    def show(self, result: JobResult) -> None:
        """Writes one result whole, and removes the files that it was in."""
        self.status.clear()
        self._show(result)
        if result.output_path is not None:
            for ending in (".out", ".err"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(result.output_path + ending)

    def _show_text(self, result: JobResult) -> None:
        _copy(result.output_path, ".out", sys.stdout.buffer)
        sys.stderr.buffer.write(result.stderr)
        _copy(result.output_path, ".err", sys.stderr.buffer)
        if result.note is not None:
            message(f"job {result.job.number} {result.note}: {result.job.line}")

    def _show_json(self, result: JobResult) -> None:
        job = result.job
        record: dict[str, Any] = {
            "seq": job.number,
            "arguments": [_readable(value) for value in job.arguments],
            "command": _readable(job.line),
            "exit_code": result.exit_value,
            "signal": result.signal,
            "started_at": round(result.started_at, 3),
            "seconds": round(result.seconds, 3),
            "attempts": result.attempts,
            "peak_memory_mb": round(result.peak_rss_bytes / MB, 1),
            "error": result.note,
        }
        record |= _as_text("stdout", _read(result.output_path, ".out"))
        record |= _as_text("stderr", result.stderr + _read(result.output_path, ".err"))
        sys.stdout.buffer.write(json.dumps(record).encode() + b"\n")
        sys.stdout.buffer.flush()


def _readable(value: str) -> str:
    return os.fsencode(value).decode("utf-8", "replace")


def _as_text(name: str, data: bytes) -> dict[str, str]:
    """Under `name` as text, or, what is not UTF-8, under `name_base64`: JSON has no bytes."""
    try:
        return {name: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode("ascii")}


def _copy(output_path: str | None, ending: str, target: BinaryIO) -> None:
    if output_path is not None:
        with contextlib.suppress(FileNotFoundError), open(output_path + ending, "rb") as source:
            shutil.copyfileobj(source, target, _COPY_BYTES)
    target.flush()


def _read(output_path: str | None, ending: str) -> bytes:
    if output_path is not None:
        with contextlib.suppress(FileNotFoundError), open(output_path + ending, "rb") as source:
            return source.read()
    return b""
