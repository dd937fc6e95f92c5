"""AgentPool: the `concurrent.futures.Executor` that users hold. A facade.

Any thread may use a pool. What it promises is decided in `agentpool.core` and done by `agentpool.runtime`.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agentpool.breaker import ResourceCircuitBreaker
from agentpool.config import (
    DEFAULT_MAX_PENDING,
    DEFAULT_SESSION_IDLE_TIMEOUT,
    PoolOptions,
    PoolSettings,
    TaskOptions,
    TaskOptionsDict,
)
from agentpool.errors import AgentPoolError, SettingsError, TaskKilledError, WorkerCrashedError
from agentpool.operating import Operating
from agentpool.runtime import lifecycle
from agentpool.runtime.manager import Manager
from agentpool.runtime.stats import pool_stats
from agentpool.sessions import Session, Sessions
from agentpool.submitting import Submitting, pickling_error, spec_of
from agentpool_worker import protocol

if TYPE_CHECKING:
    from typing import Self, Unpack

    from agentpool.control.server import Operator
    from agentpool.runtime.door import Control

__all__ = ["AgentPool", "PoolView", "get_agent_pool", "get_circuit_breaker"]

_pool_numbers = itertools.count(1)
#: Tell the pools of one process apart, whatever their names.
_serials = itertools.count(1)


class AgentPool(Submitting, Operating):
    """Runs agents and functions, each in a pooled process of its own, and keeps the machine alive meanwhile.

    A drop-in for `concurrent.futures.ProcessPoolExecutor`; the first five parameters are its own.

    max_workers: worker processes at most (default 4, of which 2 run tasks at once; given, all of them do).
    mp_context: a multiprocessing context or start method. "fork" and "forkserver" mean: forked by the pool's keeper,
        which is also the default; "spawn": a fresh interpreter for each worker. This process is never forked.
    initializer, initargs: called in each worker before its first task. If it raises, the pool is broken.
    max_tasks_per_child: recycle a worker after so many tasks.
    settings: all other keywords, see `agentpool.config.PoolSettings`, which has meaning, units and defaults.

    Leaving a `with` block waits for all tasks; left by KeyboardInterrupt or SystemExit it stops them.
    Raises SettingsError (a ValueError) for settings that are out of range or contradict each other.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        name: str | None = None,
        **settings: Unpack[PoolOptions],
    ) -> None:
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if name is not None and not isinstance(name, str):
            raise SettingsError(f"name must be a string, got {name!r}")
        given: dict[str, Any] = {**settings}
        if mp_context is not None:
            given["start_method"] = _start_method(mp_context)
        if max_tasks_per_child is not None:
            given["max_tasks_per_child"] = max_tasks_per_child
        settings_ = PoolSettings.make(max_workers, **given)
        self.name = name or f"pool-{next(_pool_numbers)}"
        self.created_at = time.monotonic()
        self._options = TaskOptions(
            timeout=settings_.task_timeout, queue_timeout=settings_.queue_timeout, retry=settings_.retry
        )
        self._spec = spec_of(self._options)
        try:
            init = protocol.dumps((initializer, tuple(initargs)))
        except Exception as error:
            raise pickling_error(error, initializer, initargs, {}) from error
        self._manager = Manager(settings_, init, self.name)
        self._sessions = Sessions()
        self.breaker = ResourceCircuitBreaker(self)
        if self.settings.control:
            self._manager.door.opener = partial(
                _open_control, weakref.ref(self), self.settings.control, next(_serials)
            )
        lifecycle.register(self, self._manager)
        if settings_.min_workers:
            self._manager.start()

    @property
    def settings(self) -> PoolSettings:
        """The pool's settings, sizes as `resize` left them."""
        return self._manager.core.settings

    def options(self, **options: Unpack[TaskOptionsDict]) -> PoolView:
        """A view of this pool whose tasks have these options; see `agentpool.config.TaskOptions`.

        `pool.options(timeout=30, priority=5).submit(task)`. Views are cheap, Executors themselves, and may be kept.
        """
        return PoolView(self, self._options.updated(options), frozenset(options))

    def session(
        self, key: str | None = None, *, idle_timeout: float | None = DEFAULT_SESSION_IDLE_TIMEOUT
    ) -> Session:
        """An Executor whose tasks run in one worker, in order, one at a time, with what they leave there kept.

        key: names it in reports; while a session of that key is open, this returns it. idle_timeout: seconds without a
        task after which it is lost and its worker retired; None: never. It gets its worker with its first task, which
        waits while all are taken; closing it, or leaving its `with` block, retires that worker.
        Raises SettingsError, and PoolClosedError after shutdown.
        """
        return self._sessions.open(self, key, idle_timeout)

    # -- the end -------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """No more tasks are accepted."""
        return self._manager.core.is_closing or self._manager.is_finished

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks; finish those accepted (`cancel_futures`: only the running ones), then end all workers.

        wait: return when that is done. Returns at once when called from a callback. May be called again.
        """
        self._manager.shutdown(wait=wait, cancel_futures=cancel_futures)

    def kill_workers(self) -> None:
        """Kill all workers now and shut down; running tasks fail with WorkerCrashedError, queued ones are cancelled."""
        self._stop("pool.kill_workers() was called", WorkerCrashedError("the task was running when its pool's workers "
                                                                         "were killed by pool.kill_workers()"))

    def terminate_workers(self) -> None:
        """As `kill_workers`: a worker ignores no signal for the sake of a task that should end."""
        self.kill_workers()

    def emergency_stop(self, reason: str) -> dict[str, int]:
        """Kill all workers now and close the pool; returns how many workers and tasks that concerned.

        Running tasks fail with TaskKilledError, queued ones are cancelled; `submit` raises and names the reason.
        """
        return self._stop(f"emergency shutdown: {reason}", TaskKilledError(f"emergency shutdown: {reason}"))

    def _stop(self, reason: str, error: AgentPoolError) -> dict[str, int]:
        workers, cancelled, stopped = self._manager.stop_all(error, reason, wait=True)
        return {"workers_stopped": workers, "tasks_cancelled": cancelled, "tasks_stopped": stopped}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is None or isinstance(error, Exception):
            self.shutdown(wait=True)
        else:
            self._stop(f"interrupted by {type(error).__name__}", TaskKilledError(f"the pool was left by {error!r}"))
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # In a thread, so that the loop goes on; when the loop is cancelled, what is queued is given up.
        is_cancelled = error is not None and not isinstance(error, Exception)
        import asyncio  # 17 ms, and known already to whoever comes here

        self.shutdown(wait=False, cancel_futures=is_cancelled)
        await asyncio.to_thread(self.shutdown)

    # -- looking -------------------------------------------------------------------------------------------------

    def get_pool_stats(self) -> dict[str, Any]:
        """How the pool stands, as plain data for JSON; docs/reference.md has the keys. Memory in MB (1024 x 1024)."""
        return pool_stats(self._manager)

    def __repr__(self) -> str:
        core = self._manager.core
        return (f"<{type(self).__name__} {self.name} {'closed' if self.closed else 'open'}: {core.live} workers, "
                f"{core.active} running, {core.queue_length + self._manager.left} queued>")


class PoolView(Submitting):
    """A pool with other task options: an Executor of its own, sharing the pool's workers."""

    def __init__(self, pool: AgentPool, options: TaskOptions, given: frozenset[str]) -> None:
        self._pool = pool
        self._given = given
        self._manager = pool._manager
        self._options = options
        self._spec = spec_of(options)
        self._captured = options.captured

    def options(self, **options: Unpack[TaskOptionsDict]) -> PoolView:
        """A view with some options replaced again."""
        return PoolView(self._pool, self._options.updated(options), self._given | options.keys())

    def session(
        self, key: str | None = None, *, idle_timeout: float | None = DEFAULT_SESSION_IDLE_TIMEOUT
    ) -> Session:
        """As `AgentPool.session`, with this view's options for its tasks."""
        return self._pool._sessions.open(self, key, idle_timeout)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shuts down the pool itself."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def __repr__(self) -> str:
        given = {name: value for name, value in asdict(self._options).items() if value is not None}
        return f"<{type(self).__name__} of {self._pool.name} {given}>"


def _open_control(pool: weakref.ref[AgentPool], place: bool | str, serial: int) -> Control:
    """The pool's control socket, in the folder that was named or the first that can be had. Raises OSError."""
    from agentpool.control import folder
    from agentpool.control.server import ControlServer

    def make_operator() -> Operator:
        from agentpool.control.verbs import PoolOperator  # with the first client only

        return PoolOperator(pool, f"{os.getpid()}-{serial}")

    failure = OSError("no folder")
    for path in folder.usable() if place is True else [str(place)]:
        try:
            return ControlServer(path, serial, make_operator)
        except OSError as error:
            failure = error
    raise failure


# -- helpers ---------------------------------------------------------------------------------------------------------


def _start_method(context: Any) -> str:
    method = context if isinstance(context, str) else getattr(context, "get_start_method", lambda: None)()
    if method not in ("fork", "forkserver", "spawn"):
        raise SettingsError(f"mp_context must be fork, forkserver, spawn or a context of these, got {context!r}")
    return "spawn" if method == "spawn" else "fork"


# -- the process-wide pool -------------------------------------------------------------------------------------------

_shared: AgentPool | None = None
_shared_lock = threading.Lock()


def _forget_shared_pool() -> None:
    """In a forked child: the pool is the parent's, and its lock may have been held."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_shared_pool)


def get_agent_pool() -> AgentPool:
    """The pool of this process, with default settings and a queue bounded at 1,000; made anew if it was closed."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared.closed:
            _shared = AgentPool(name="shared", max_pending=DEFAULT_MAX_PENDING)
        return _shared


def get_circuit_breaker() -> ResourceCircuitBreaker:
    """The breaker of `get_agent_pool()`."""
    return get_agent_pool().breaker

