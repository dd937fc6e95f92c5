"""Calls what users want called for each event, in a thread of its own: a slow one must not hold up others' results.

One per pool, and none where nobody asked for it. Jobs run one after the other, in order. Any thread may `post`; the
manager thread alone may `close`, when all futures are settled or about to be.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["Announcer"]

log = logging.getLogger("agentpool")


class Announcer:
    """Runs jobs. Raises RuntimeError where no thread can be had."""

    def __init__(self, pool_name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        #: guards `_is_closed` and the end of the queue
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"agentpool-events-{pool_name}", daemon=True)
        self._thread.start()

    @property
    def is_caller(self) -> bool:
        """Does the announcer's own thread ask?"""
        return threading.current_thread() is self._thread

    def post(self, job: Callable[[], None]) -> bool:
        """Have this run, after what was posted before. False: it was closed, as the pool is over."""
        with self._lock:
            if not self._is_closed:
                self._jobs.put(job)
            return not self._is_closed

    def close(self) -> None:
        """Run what was posted, and end."""
        with self._lock:
            self._is_closed = True
            self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:  # a defect of ours: users' callbacks are caught where they are called
                log.exception("what reports the events of a task failed")
