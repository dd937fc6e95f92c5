"""What a task may ask of its worker. Import it inside a task; outside of one `current()` raises.

Only the worker's main loop makes contexts.
"""

from __future__ import annotations

import threading


class TaskCancelled(BaseException):
    """Raised inside a task that is asked to stop: by a timeout, `future.kill()` or a shutdown.

    Not an Exception, so that `except Exception` does not swallow it. Clean up and let it pass: after the pool's
    `kill_grace` the worker is killed.
    """


class TaskContext:
    """The running task, as seen from inside."""

    __slots__ = ("_cancelled", "task_id", "worker_id")

    def __init__(self, task_id: int, worker_id: int, cancelled: threading.Event) -> None:
        self.task_id = task_id
        self.worker_id = worker_id
        self._cancelled = cancelled

    @property
    def is_cancelled(self) -> bool:
        """Has the task been asked to stop? For code in threads that the exception does not reach."""
        return self._cancelled.is_set()


_current: TaskContext | None = None


def current() -> TaskContext:
    """The context of the task that this worker runs. Raises RuntimeError outside of a worker's task."""
    if _current is None:
        raise RuntimeError("agentpool_worker.context.current() is for code that runs as a task of an AgentPool")
    return _current


def _enter(context: TaskContext | None) -> None:
    global _current
    _current = context
