"""Other pools as executors, for `--executor`: those whose own interface is another one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pebble


class Pebble(Executor):
    """`pebble.ProcessPool`, with its time limits."""

    stress_features = ("timeout", "kill")

    def __init__(self, max_workers: int) -> None:
        self._pool = pebble.ProcessPool(max_workers=max_workers)
        self._timeout: float | None = None

    def options(self, timeout: float | None = None) -> _View:
        """An executor with a time limit."""
        return _View(self, timeout)

    def schedule(self, timeout: float | None, fn: Callable[..., Any], args: Any, kwargs: Any) -> Future[Any]:
        """See `submit`."""
        future: Future[Any] = self._pool.schedule(fn, args=args, kwargs=kwargs, timeout=timeout)
        return future

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As Executor says."""
        return self.schedule(None, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As Executor says."""
        self._pool.stop() if cancel_futures else self._pool.close()
        if wait:
            self._pool.join()


class _View:
    def __init__(self, owner: Pebble, timeout: float | None) -> None:
        self._owner = owner
        self._timeout = timeout

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._owner.schedule(self._timeout, fn, args, kwargs)
