"""The words of what went wrong: builds the exceptions that futures get. Each names the cause and the cure.

Pure text; called only by the scheduler.
"""

from __future__ import annotations

import copy
import signal
from typing import Final, TypeVar

from agentpool.config import MB
from agentpool.core.records import SessionRecord, TaskRecord, WorkerExit, WorkerRecord
from agentpool.errors import (
    AgentPoolError,
    CircuitOpenError,
    MemoryLimitError,
    MemoryReservationError,
    QuarantinedError,
    QueueTimeoutError,
    SessionLostError,
    TaskTimeoutError,
    WorkerCrashedError,
    WorkerKilledError,
)

__all__ = [
    "circuit_open",
    "crashed",
    "end_words",
    "exit_words",
    "fresh",
    "memory_awaited",
    "memory_limit",
    "never_fits",
    "quarantined",
    "queue_timeout",
    "session_crashed",
    "session_retired",
    "shut_down_while_open",
    "start_words",
    "task_timeout",
]

C = TypeVar("C", bound=WorkerCrashedError)


def fresh(error: BaseException) -> BaseException:
    """The same error once more: an instance that several futures raise would gather everybody's tracebacks."""
    if not isinstance(error, AgentPoolError):
        return error  # not ours to copy
    again = copy.copy(error)
    if error.__cause__ is not None:
        again.__cause__ = error.__cause__
    if hasattr(error, "__notes__"):
        again.__notes__ = list(error.__notes__)
    return again


def _task_words(task: TaskRecord) -> str:
    return f"task {task.id}" + (f" ({task.spec.name})" if task.spec.name else "")


def exit_words(exit_: WorkerExit) -> str:
    """How a process ended, as a person would say it."""
    code = exit_.exit_code
    if exit_.keeper_lost:
        return "was lost together with the keeper process"
    if code is None:
        return "ended, nobody knows how"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}"
    return f"exited with code {code}"


def end_words(worker: WorkerRecord, exit_: WorkerExit) -> str:
    """How a worker ended, and why where the pool wanted that."""
    return exit_words(exit_) + (f" ({worker.reason})" if worker.reason else "")


def start_words(worker: WorkerRecord, exit_: WorkerExit) -> str:
    """Why a worker never became ready, as a person would say it."""
    last_words = (exit_.story or exit_.stderr_tail).strip()[-500:]
    if worker.reason:
        words = f"a worker {worker.reason}"
    elif exit_.exit_code is None and not exit_.keeper_lost:
        words = "a worker could not be started"
    else:
        words = f"a worker {exit_words(exit_)} before it was ready"
    return words + (f": {last_words}" if last_words else "")


def _tail(exit_: WorkerExit) -> str:
    parts = []
    if exit_.story.strip():
        parts.append(f"\nThe interpreter's last report:\n{exit_.story.strip()}")
    if exit_.stderr_tail.strip():
        parts.append(f"\nThe last it wrote to standard error:\n{exit_.stderr_tail.strip()}")
    return "".join(parts)


def crashed(task: TaskRecord, worker: WorkerRecord, exit_: WorkerExit) -> WorkerCrashedError:
    """The worker died under a task that had begun; `worker.reason` is set where the pool itself killed it."""
    verdict = (
        "It is not run again, because it had begun; where running it twice is harmless, allow that with "
        "pool.options(retry=3)."
        if task.spec.policy is None
        else f"Attempt {task.attempts}; its retry policy decides."
    )
    return _crash(WorkerKilledError if worker.is_ordered else WorkerCrashedError, task, worker, exit_, verdict)


def quarantined(task: TaskRecord, worker: WorkerRecord, exit_: WorkerExit) -> QuarantinedError:
    """The task killed too many workers."""
    verdict = f"It killed {task.kills} workers by now, and is not run again, whatever its retry policy says."
    return _crash(QuarantinedError, task, worker, exit_, verdict)


def _crash(cls: type[C], task: TaskRecord, worker: WorkerRecord, exit_: WorkerExit, verdict: str) -> C:
    peak = max(task.peak_rss_bytes, worker.rss_bytes)
    how = f"was stopped ({worker.reason})" if worker.reason else exit_words(exit_)
    return cls(
        f"the worker (pid {worker.pid}) {how} while it ran {_task_words(task)}; "
        f"peak memory {peak / MB:.0f} MB. Other tasks are not affected. {verdict}{_tail(exit_)}",
        exit_code=exit_.exit_code,
        peak_rss_bytes=peak,
        stderr_tail=exit_.stderr_tail,
        worker_pid=worker.pid,
    )


_SESSION_ENDS: Final = {
    "memory": ("memory", "was recycled, as it was over its memory limit after a task; allow it more with "
                         "options(memory_limit_mb=...)"),
    "session idle": ("idle", "was not used for longer than its idle_timeout"),
    "task stopped": ("stopped", "had to go with a task that was stopped"),
}


def _session_words(session: SessionRecord) -> str:
    return f"session {session.id}" + (f" ({session.key})" if session.key else "")


_NEW_SESSION: Final = "What its tasks had left there is gone: open a new one"


def session_retired(session: SessionRecord, worker: WorkerRecord, why: str) -> SessionLostError:
    """The session's worker was told to end before the session was closed."""
    reason, words = _SESSION_ENDS.get(why, ("recycled", f"was recycled ({why})"))
    who = "it" if reason == "idle" else f"its worker (pid {worker.pid})"
    timeout = f" of {session.idle_timeout:g} s" if reason == "idle" else ""
    return SessionLostError(f"{_session_words(session)} is lost: {who} {words}{timeout}. {_NEW_SESSION}",
                            key=session.key, reason=reason, worker_pid=worker.pid)


def session_crashed(session: SessionRecord, worker: WorkerRecord, exit_: WorkerExit) -> SessionLostError:
    """The session's worker is gone."""
    task = worker.running
    reason = "killed" if worker.is_ordered else "stopped" if task is not None and task.stop is not None else "crashed"
    how = f"was stopped ({worker.reason})" if worker.reason else exit_words(exit_)
    return SessionLostError(
        f"{_session_words(session)} is lost: its worker (pid {worker.pid}) {how}. {_NEW_SESSION}{_tail(exit_)}",
        key=session.key, reason=reason, exit_code=exit_.exit_code, worker_pid=worker.pid,
    )


def task_timeout(task: TaskRecord, seconds: float) -> TaskTimeoutError:
    """The task ran too long. Its stack is added when the worker has told it."""
    return TaskTimeoutError(
        f"{_task_words(task)} ran longer than its timeout of {seconds:g} s and was stopped",
        timeout_seconds=seconds,
    )


def queue_timeout(task: TaskRecord, why: str = "") -> QueueTimeoutError:
    """The task waited too long. `why`: what for, where that was more than a free worker."""
    return QueueTimeoutError(
        f"{_task_words(task)} waited longer than its queue_timeout of {task.spec.queue_timeout or 0:g} s and was not "
        f"started{why or '; raise max_concurrent, or allow it to wait longer'}"
    )


def memory_awaited(expected_bytes: int, free_bytes: int | None, reserved_bytes: int) -> str:
    """Why a task still waits for memory, as the end of a sentence."""
    return (
        f"; it expects {expected_bytes / MB:.0f} MB (expected_memory_mb), and {max(0, free_bytes or 0) / MB:.0f} MB "
        f"can be promised, beside {reserved_bytes / MB:.0f} MB that are promised to tasks that run"
    )


def never_fits(task: TaskRecord, givable_bytes: int | None) -> MemoryReservationError:
    """The task expects more memory than there is."""
    expected = task.spec.expected_bytes or 0
    return MemoryReservationError(
        f"{_task_words(task)} expects {expected / MB:.0f} MB (expected_memory_mb), and this host or container has only "
        f"{(givable_bytes or 0) / MB:.0f} MB to give, all in all, less min_available_mb; expect less, or run it "
        "elsewhere",
        expected_bytes=expected,
        givable_bytes=givable_bytes or 0,
    )


def circuit_open(
    task: TaskRecord, waited_seconds: float, reason: str, *, is_forced: bool, seconds_left: float | None = None
) -> CircuitOpenError:
    """The task waited in vain for a pool that has no worker, and a breaker that lets none start.

    is_forced: that was ordered, for so many seconds from now on; None: until it is taken back.
    """
    if not is_forced:
        cure = "It recovers by itself when the cause is gone; pool.breaker.reset() closes it at once"
    elif seconds_left is None:
        cure = "It was opened by hand, and closes by hand: pool.breaker.reset()"
    else:
        cure = f"It was opened by hand for another {seconds_left:.3g} s; pool.breaker.reset() closes it at once"
    return CircuitOpenError(
        f"{_task_words(task)} waited {waited_seconds:.3g} s, the pool has no worker, and its circuit breaker starts "
        f"none: {reason}. {cure}"
    )


def shut_down_while_open(task: TaskRecord, reason: str) -> CircuitOpenError:
    """The pool shuts down, and waits for no breaker that somebody opened, or that starts which fail opened."""
    return CircuitOpenError(
        f"{_task_words(task)} was not run: its pool shuts down, has no worker for it, and its circuit breaker starts "
        f"none: {reason}. Where all that was accepted is to run, shut it down when the breaker is closed again: "
        "pool.breaker.reset() closes it at once"
    )


def memory_limit(task: TaskRecord, worker: WorkerRecord, limit_bytes: int, why: str = "") -> MemoryLimitError:
    """The task's process tree passed a limit."""
    samples = tuple(worker.samples)
    growth = ""
    if len(samples) > 1:
        (t0, b0), (t1, b1) = samples[0], samples[-1]
        growth = f", it grew by {(b1 - b0) / MB:.0f} MB in the last {t1 - t0:.2f} s"
    what = f"{why}, and it was the biggest" if why else f"it passed its hard memory limit of {limit_bytes / MB:.0f} MB"
    cure = "Raise critical_memory_mb" if why else "Allow it more with pool.options(hard_memory_limit_mb=...)"
    return MemoryLimitError(
        f"{_task_words(task)} was stopped: {what}; its process tree had {worker.rss_bytes / MB:.0f} MB{growth}. "
        f"{cure}, or run fewer tasks at once",
        limit_bytes=limit_bytes,
        peak_rss_bytes=max(task.peak_rss_bytes, worker.rss_bytes),
        samples=samples,
        is_pool_wide=bool(why),
    )
