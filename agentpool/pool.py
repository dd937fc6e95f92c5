"""AgentPool: the `concurrent.futures.Executor` that users hold. A facade: it serializes calls and hands them on.

Any thread may use a pool. What it promises is decided in `agentpool.core` and done by `agentpool.runtime`.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeVar

from agentpool.breaker import ResourceCircuitBreaker
from agentpool.config import (
    DEFAULT_MAX_PENDING,
    IDEMPOTENT_ATTEMPTS,
    MB,
    PoolOptions,
    PoolSettings,
    TaskOptions,
    TaskOptionsDict,
)
from agentpool.core.records import TaskSpec
from agentpool.core.retry import compile_policy
from agentpool.errors import (
    AgentPoolError,
    SettingsError,
    TaskKilledError,
    TaskPicklingError,
    WorkerCrashedError,
)
from agentpool.futures import AgentFuture
from agentpool.runtime import lifecycle
from agentpool.runtime.manager import Manager
from agentpool.runtime.stats import pool_stats
from agentpool_worker import protocol

if TYPE_CHECKING:
    from typing import Self, Unpack

    from agentpool_worker.protocol import Payload

__all__ = ["AgentPool", "PoolView", "get_agent_pool", "get_circuit_breaker"]

P = ParamSpec("P")
T = TypeVar("T")

_pool_numbers = itertools.count(1)
#: Functions that are found by their names, and what stands for them in calls. Bounded by clearing.
_references: dict[FunctionType, bytes] = {}
_REMEMBERED: Final = 4096


class _Submitting(Executor):
    """What a pool and its views have in common: one way to make tasks, with the options of the view."""

    _manager: Manager
    _options: TaskOptions
    _spec: TaskSpec

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"an {type(self).__name__} cannot be sent to a worker or copied; make a pool inside the task")

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> AgentFuture[T]:
        """Run `fn(*args, **kwargs)` in a worker and return its future.

        Lambdas, closures and what `__main__` defines are sent by value, what other modules define by reference. An
        `async def` function is run to its end. What cannot be pickled fails the future with TaskPicklingError.
        Raises PoolClosedError after shutdown, the InitializerError of a broken pool, and QueueFullError (see `block`).
        """
        try:
            payload, buffers = _serialize(fn, args, kwargs)
        except KeyboardInterrupt:
            raise  # it is the submitter's
        except BaseException as error:  # a user's __reduce__; SystemExit in it must not end the submitter
            return self._refuse(_pickling_error(error, fn, args, kwargs))
        return self._accept(payload, buffers, self._spec, getattr(fn, "__code__", None) or type(fn))

    def _accept(
        self, payload: Payload, buffers: Sequence[memoryview], spec: TaskSpec, call_key: object
    ) -> AgentFuture[Any]:
        if buffers:
            # The caller may change its array once submit returns, and the call may wait, or be sent twice.
            buffers = [protocol.frozen(buffer) for buffer in buffers]
        manager = self._manager
        future: AgentFuture[Any] = AgentFuture(manager, payload, buffers)
        future._task = manager.submit(future, spec, call_key, block=self._options.block)
        return future

    def _refuse(self, error: TaskPicklingError) -> AgentFuture[Any]:
        self._manager.check_open()
        future: AgentFuture[Any] = AgentFuture()
        future.set_exception(error)
        return future

    def _submit_chunk(self, fn: Callable[..., Any], columns: Sequence[Sequence[Any]]) -> AgentFuture[Any]:
        """Several calls as one task. Without cloudpickle where plain pickle is known to do, as in `_serialize`."""
        if type(fn) is FunctionType and all(map(protocol.is_flat, columns)):
            reference = _references.get(fn) or _make_reference(fn)
            if reference and not _is_sent_by_value(fn.__module__):
                payload = protocol.call_by_name(_CHUNK, (fn, columns), {})
                return self._accept(payload, (), self._spec, protocol.run_chunk.__code__)
        return self.submit(protocol.run_chunk, fn, columns)

    def submit_agent(self, kind: str | type, prompt: str, /, **kwargs: Any) -> AgentFuture[Any]:
        """Run an agent: `kind(...).run(prompt, **kwargs)` in a worker that keeps the instance for the next task.

        kind: an agent class, the name of a stock agent ("security-analyst", "performance-auditor", "test-generator",
        "command"), or "module:Class". A kind that declares `idempotent` gets three attempts where its worker is lost,
        unless the view or pool says otherwise. Raises LookupError or TypeError for what is no agent, and what `submit`
        raises.
        """
        from dataclasses import replace

        from agentpool_worker.agents import base

        cls = base.resolve(kind)
        name = base.kind_name(kind)
        spec = replace(self._spec, kind=name, name=self._spec.name or name)
        if spec.policy is None and self._says_nothing_of_retry() and getattr(cls, "idempotent", False):
            spec = replace(spec, policy=compile_policy(IDEMPOTENT_ATTEMPTS))
        try:
            payload, buffers = protocol.dumps((protocol.run_agent, (kind, prompt, kwargs), {}))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return self._refuse(_pickling_error(error, cls, (prompt,), kwargs))
        return self._accept(payload, buffers, spec, name)

    def _says_nothing_of_retry(self) -> bool:
        return self._options.retry is None and self._manager.core.settings.retry is None

    def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """`map(fn, *iterables)` in the workers; results come in order.

        timeout: seconds from this call within which each `next` must have its result, or TimeoutError is raised.
        chunksize: calls that travel, run and return as one task. buffersize: read the input lazily, at most so many
        tasks ahead of what was consumed; None: read all of it now. An error of a call is raised by `next`, and what is
        left is cancelled.
        """
        if chunksize < 1:
            raise SettingsError("chunksize must be >= 1")
        if buffersize is not None and (not isinstance(buffersize, int) or isinstance(buffersize, bool)):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise SettingsError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        if chunksize == 1:
            calls = zip(*iterables, strict=False)
            futures: Iterator[Future[Any]] = (self.submit(fn, *arguments) for arguments in calls)
        else:
            futures = (self._submit_chunk(fn, columns) for columns in _columns(iterables, chunksize))
        waiting = deque(futures if buffersize is None else itertools.islice(futures, buffersize))
        results = _results_in_order(waiting, futures if buffersize is not None else None, deadline)
        return results if chunksize == 1 else itertools.chain.from_iterable(results)


#: Stands for `run_chunk` in calls.
_CHUNK: Final = protocol.reference(protocol.run_chunk)


def _columns(iterables: tuple[Iterable[Any], ...], length: int) -> Iterator[Sequence[Sequence[Any]]]:
    """The arguments of so many calls at a time: their first ones, their second ones, and so on."""
    if len(iterables) == 1:
        items = iter(iterables[0])
        while chunk := list(itertools.islice(items, length)):
            yield (chunk,)
    else:
        calls = zip(*iterables, strict=False)
        while rows := list(itertools.islice(calls, length)):
            yield tuple(zip(*rows, strict=True))


def _results_in_order(
    waiting: deque[Future[Any]], more: Iterator[Future[Any]] | None, deadline: float | None
) -> Iterator[Any]:
    try:
        while waiting:
            yield _next_result(waiting, more, deadline)  # kept in no variable: it is the consumer's alone
    finally:
        for future in waiting:
            future.cancel()


def _next_result(waiting: deque[Future[Any]], more: Iterator[Future[Any]] | None, deadline: float | None) -> Any:
    value = waiting[0].result(None if deadline is None else deadline - time.monotonic())
    waiting.popleft()  # only now: a call that failed or timed out is among those to cancel
    if more is not None:
        waiting.extend(itertools.islice(more, 1))
    return value


class AgentPool(_Submitting):
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
        self.settings = PoolSettings.make(max_workers, **given)
        self.name = name or f"pool-{next(_pool_numbers)}"
        self.created_at = time.monotonic()
        self._options = TaskOptions(
            timeout=self.settings.task_timeout, queue_timeout=self.settings.queue_timeout, retry=self.settings.retry
        )
        self._spec = _compile(self._options)
        try:
            init = protocol.dumps((initializer, tuple(initargs)))
        except Exception as error:
            raise _pickling_error(error, initializer, initargs, {}) from error
        self._manager = Manager(self.settings, init, self.name)
        self.breaker = ResourceCircuitBreaker(self)
        lifecycle.register(self, self._manager)
        if self.settings.min_workers:
            self._manager.start()

    def options(self, **options: Unpack[TaskOptionsDict]) -> PoolView:
        """A view of this pool whose tasks have these options; see `agentpool.config.TaskOptions`.

        `pool.options(timeout=30, priority=5).submit(task)`. Views are cheap, Executors themselves, and may be kept.
        """
        return PoolView(self, self._options.updated(options))

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


class PoolView(_Submitting):
    """A pool with other task options: an Executor of its own, sharing the pool's workers."""

    def __init__(self, pool: AgentPool, options: TaskOptions) -> None:
        self._pool = pool
        self._manager = pool._manager
        self._options = options
        self._spec = _compile(options)

    def options(self, **options: Unpack[TaskOptionsDict]) -> PoolView:
        """A view with some options replaced again."""
        return PoolView(self._pool, self._options.updated(options))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shuts down the pool itself."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def __repr__(self) -> str:
        given = {name: value for name, value in asdict(self._options).items() if value is not None}
        return f"<{type(self).__name__} of {self._pool.name} {given}>"


# -- helpers ---------------------------------------------------------------------------------------------------------


def _start_method(context: Any) -> str:
    method = context if isinstance(context, str) else getattr(context, "get_start_method", lambda: None)()
    if method not in ("fork", "forkserver", "spawn"):
        raise SettingsError(f"mp_context must be fork, forkserver, spawn or a context of these, got {context!r}")
    return "spawn" if method == "spawn" else "fork"


def _compile(options: TaskOptions) -> TaskSpec:
    return TaskSpec(
        timeout=options.timeout,
        queue_timeout=options.queue_timeout,
        policy=compile_policy(options.retry),
        priority=options.priority,
        key=options.key,
        name=options.name,
        spares_task=options.victim == "tool",
        soft_limit_bytes=None if options.memory_limit_mb is None else int(options.memory_limit_mb * MB),
        hard_limit_bytes=None if options.hard_memory_limit_mb is None else int(options.hard_memory_limit_mb * MB),
    )


def _serialize(fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Payload, Sequence[memoryview]]:
    """The call for a worker. Plain pickle where it is known to do: it takes a quarter of the time."""
    if type(fn) is FunctionType and protocol.is_simple(args) and (not kwargs or protocol.is_simple(kwargs)):
        reference = _references.get(fn) or _make_reference(fn)
        if reference and not _is_sent_by_value(fn.__module__):
            return protocol.call_by_name(reference, args, kwargs), ()
    return protocol.dumps((fn, args, kwargs))


def _make_reference(fn: FunctionType) -> bytes:
    """What to call this very function by, where a worker finds it in its module; else b""."""
    if fn.__module__ == "__main__":
        return b""
    found: object = sys.modules.get(fn.__module__ or "")
    for part in fn.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not fn:
        return b""
    if len(_references) >= _REMEMBERED:
        _references.clear()
    _references[fn] = reference = protocol.reference(fn)
    return reference


def _is_sent_by_value(module: str) -> bool:
    """Did the user say cloudpickle.register_pickle_by_value(module)?"""
    cloudpickle = sys.modules.get("cloudpickle")
    return cloudpickle is not None and module in cloudpickle.list_registry_pickle_by_value()


def _pickling_error(
    error: BaseException, fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TaskPicklingError:
    from agentpool_worker import unpicklable

    def attempt(value: object) -> object:
        return protocol.dumps(value)

    where = ""
    for name, value in (("the function", fn), *((f"args[{i}]", v) for i, v in enumerate(args)), *kwargs.items()):
        try:
            attempt(value)
        except KeyboardInterrupt:
            raise
        except BaseException:  # that is the one
            where = unpicklable.find(value, name, attempt) or name
            break
    what = f"{where} cannot be pickled" if where else "the call cannot be pickled"
    cure = (
        "Locks and queues of multiprocessing reach only children that multiprocessing itself starts: use those of a "
        "multiprocessing.Manager()"
        if "through inheritance" in str(error)
        else "Send plain data and make such objects inside the task, or once per worker in an initializer or an "
        "agent's setup()"
    )
    failure = TaskPicklingError(
        f"{what}, so it cannot be sent to a worker: {type(error).__name__}: {error}. {cure}"
    )
    failure.__cause__ = error
    return failure


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

