"""The pools that are measured, behind one face. Packages are imported by `load()`, as the time of that is measured.

To add one, derive from Contender, set `self.submit` in `start`, implement `shutdown`, name it in `all_contenders`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from stress.bench import tasks

BASELINE = "ppe-fork"
OURS = "agentpool"
Handle = Any


class UnsupportedError(Exception):
    """The contender has no such feature."""


class Contender:
    """Start, submit, result, gather, burst, map, shutdown."""

    name: ClassVar[str]
    #: Modules whose absence skips the contender; the first of them is its distribution.
    needs: ClassVar[tuple[str, ...]] = ()
    #: Names of the cases that it can run; None for all.
    cases: ClassVar[tuple[str, ...] | None] = None
    #: It retires workers after a number of tasks.
    recycles: ClassVar[bool] = False
    #: It can hold a thousand workers.
    crowds: ClassVar[bool] = False
    #: It is no pool, but a bound of what a pool could reach.
    floor: ClassVar[bool] = False
    #: Hands over one call, and returns a handle for `result`. Set by `start`: no layer that would be measured with it.
    submit: Callable[..., Handle]

    def load(self) -> None:
        """Import the package."""

    def start(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        timeouts: bool = False,
        tasks_per_child: int | None = None,
    ) -> None:
        """Make the pool. What it does not know of these it ignores."""
        raise NotImplementedError

    def result(self, handle: Handle, timeout: float | None = None) -> Any:
        """Wait for the result of a handle, and return or raise it."""
        return handle.result(timeout)

    def gather(self, handles: Sequence[Handle]) -> list[Any]:
        """Wait for many."""
        return [self.result(handle) for handle in handles]

    def done(self, handles: Sequence[Handle]) -> int:
        """How many have their result."""
        return sum(handle.done() for handle in handles)

    def burst(self, function: Callable[..., Any], count: int) -> None:
        """Submit calls one by one, then wait for them all."""
        self.gather([self.submit(function) for _ in range(count)])

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int) -> list[Any]:
        """Run the function over the items; return all results."""
        raise UnsupportedError

    def best_chunk(self, items: int, workers: int) -> int:
        """The chunk size that its documentation would have one use."""
        return max(1, items // (4 * workers))

    def call_with_timeout(self, function: Callable[..., Any], seconds: float, *args: Any) -> Any:
        """Run one call under the pool's own time limit; raises when it strikes."""
        raise UnsupportedError

    def restart(self, workers: int) -> None:
        """A working pool after a breakdown."""
        self.shutdown()
        self.start(workers)

    def shutdown(self) -> None:
        """End the pool."""
        raise NotImplementedError

    def pids(
        self, workers: int, limit_seconds: float = 10.0, meet: Callable[[str, int, float], int] = tasks.meet
    ) -> set[int]:
        """Of all workers, once all have answered."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            return set(self.gather([self.submit(meet, folder, workers, limit_seconds) for _ in range(workers)]))


class PPEFork(Contender):
    """concurrent.futures.ProcessPoolExecutor, fork: what the ratios are to"""

    name = BASELINE
    method = "fork"
    pool: Any

    def load(self) -> None:
        import concurrent.futures.process  # noqa: F401
        import multiprocessing  # noqa: F401

    def start(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        timeouts: bool = False,
        tasks_per_child: int | None = None,
    ) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context(self.method))
        self.submit = self.pool.submit

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int) -> list[Any]:
        return list(self.pool.map(function, items, chunksize=chunksize))

    def shutdown(self) -> None:
        self.pool.shutdown()


class PPEForkserver(PPEFork):
    """concurrent.futures.ProcessPoolExecutor, forkserver"""

    name = "ppe-forkserver"
    method = "forkserver"


class MPPool(Contender):
    """multiprocessing.Pool, fork (it has no futures)"""

    name = "mp-pool"
    recycles = True
    module: Any
    pool: Any

    def load(self) -> None:
        import multiprocessing
        import multiprocessing.pool

        self.module = multiprocessing

    def start(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        timeouts: bool = False,
        tasks_per_child: int | None = None,
    ) -> None:
        self.pool = self.module.Pool(workers, maxtasksperchild=tasks_per_child)
        self.submit = self._apply

    def _apply(self, function: Callable[..., Any], *args: Any) -> Handle:
        return self.pool.apply_async(function, args)

    def result(self, handle: Handle, timeout: float | None = None) -> Any:
        return handle.get(timeout)

    def done(self, handles: Sequence[Handle]) -> int:
        return sum(handle.ready() for handle in handles)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int) -> list[Any]:
        results: list[Any] = self.pool.map(function, items, chunksize)
        return results

    def shutdown(self) -> None:
        self.pool.terminate()
        self.pool.join()


class Billiard(MPPool):
    """billiard.pool.Pool, fork: Celery's version of multiprocessing.Pool"""

    name = "billiard"
    needs = ("billiard",)

    def load(self) -> None:
        import billiard.pool

        self.module = billiard.pool

    def start(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        timeouts: bool = False,
        tasks_per_child: int | None = None,
    ) -> None:
        limit_kib = memory_limit_bytes and memory_limit_bytes // 1024
        self.pool = self.module.Pool(
            workers, max_memory_per_child=limit_kib, enable_timeouts=timeouts, maxtasksperchild=tasks_per_child
        )
        self.submit = self._apply

    def call_with_timeout(self, function: Callable[..., Any], seconds: float, *args: Any) -> Any:
        return self.pool.apply_async(function, args, timeout=seconds).get(20)


class Loky(PPEFork):
    """loky.get_reusable_executor (a start method of its own)"""

    name = "loky"
    needs = ("loky",)

    def load(self) -> None:
        import loky  # noqa: F401

    def start(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        timeouts: bool = False,
        tasks_per_child: int | None = None,
    ) -> None:
        from loky import get_reusable_executor

        self.pool = get_reusable_executor(workers)
        self.submit = self.pool.submit

    def restart(self, workers: int) -> None:
        self.start(workers)


class Pebble(Contender):
    """pebble.ProcessPool, fork"""

    name = "pebble"
    needs = ("pebble",)
    recycles = True
    pool: Any

    def load(self) -> None:
        import pebble  # noqa: F401

    def start(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        timeouts: bool = False,
        tasks_per_child: int | None = None,
    ) -> None:
        from pebble import ProcessPool

        self.pool = ProcessPool(max_workers=workers, max_tasks=tasks_per_child or 0)
        self.submit = self._schedule

    def _schedule(self, function: Callable[..., Any], *args: Any) -> Handle:
        return self.pool.schedule(function, args=args)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int) -> list[Any]:
        return list(self.pool.map(function, items, chunksize=chunksize).result())

    def call_with_timeout(self, function: Callable[..., Any], seconds: float, *args: Any) -> Any:
        return self.pool.schedule(function, args=args, timeout=seconds).result(20)

    def shutdown(self) -> None:
        self.pool.stop()
        self.pool.join()


class Mpire(MPPool):
    """mpire.WorkerPool, fork"""

    name = "mpire"
    needs = ("mpire",)
    recycles = False

    def load(self) -> None:
        import mpire  # noqa: F401

    def start(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        timeouts: bool = False,
        tasks_per_child: int | None = None,
    ) -> None:
        from mpire import WorkerPool

        self.pool = WorkerPool(n_jobs=workers, keep_alive=True)
        self.submit = self._apply

    def best_chunk(self, items: int, workers: int) -> int:
        return max(1, items // (64 * workers))  # its default

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int) -> list[Any]:
        results: list[Any] = self.pool.map(function, items, chunk_size=chunksize, iterable_len=len(items))
        return results

    def call_with_timeout(self, function: Callable[..., Any], seconds: float, *args: Any) -> Any:
        return self.pool.apply_async(function, args, task_timeout=seconds).get(20)

    def shutdown(self) -> None:
        self.pool.terminate()


class AgentPool(PPEFork):
    """agentpool.AgentPool"""

    name = OURS
    needs = ("agentpool",)
    recycles = True
    crowds = True

    def load(self) -> None:
        import agentpool  # noqa: F401

    def start(
        self,
        workers: int,
        *,
        memory_limit_bytes: int | None = None,
        timeouts: bool = False,
        tasks_per_child: int | None = None,
    ) -> None:
        from agentpool import AgentPool as Pool

        settings: dict[str, Any] = {}
        if memory_limit_bytes:
            settings["memory_limit_mb"] = memory_limit_bytes >> 20
        if tasks_per_child:
            settings["max_tasks_per_child"] = tasks_per_child
        self.pool = Pool(max_workers=workers, **settings)
        self.submit = self.pool.submit

    def call_with_timeout(self, function: Callable[..., Any], seconds: float, *args: Any) -> Any:
        return self.pool.options(timeout=seconds).submit(function, *args).result(20)


def all_contenders() -> dict[str, type[Contender]]:
    """In the order of the tables."""
    from stress.bench import floors

    pools: list[type[Contender]] = [PPEFork, PPEForkserver, MPPool, Loky, Pebble, Billiard, Mpire, AgentPool]
    return {contender.name: contender for contender in [*pools, *floors.FLOORS]}


def why_not(contender: type[Contender]) -> str:
    """Empty, or why it must be skipped here."""
    missing = [module for module in contender.needs if importlib.util.find_spec(module) is None]
    return f"{missing[0]} is not installed" if missing else ""


def takes_part(contender: type[Contender], name: str, wants: str) -> bool:
    """Whether a contender can run a case."""
    return (contender.cases is None or name in contender.cases) and (not wants or getattr(contender, wants))


def hold(contender: Contender, workers: int, gate: str) -> list[Handle]:
    """Occupy all workers until the file `gate` is there; return the handles.

    A pool that picks the worker at submission (mpire) takes more than a call each.
    """
    import time

    handles: list[Handle] = []
    signs = gate + ".held"
    for _ in range(50 * workers):
        handles.append(contender.submit(tasks.wait_for_file, gate, signs, 60))
        end = time.monotonic() + 0.2
        while len(handles) >= workers and time.monotonic() < end:
            if os.path.exists(signs):
                with open(signs) as file:
                    if len({line.split()[-1] for line in file if line.endswith("\n")}) == workers:
                        return handles
            time.sleep(0.01)
    raise RuntimeError("could not occupy all workers")
