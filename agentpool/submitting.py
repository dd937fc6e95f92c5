"""How calls become tasks: what a pool, its views and its sessions have in common.

A call is serialized in its submitter's thread and handed on with the options of whoever it was submitted to. Decides
nothing about tasks. Any thread may call it.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeVar, cast

from agentpool.config import IDEMPOTENT_ATTEMPTS, MB, TaskOptions
from agentpool.core.records import TaskSpec
from agentpool.core.retry import compile_policy
from agentpool.errors import SettingsError, TaskPicklingError
from agentpool.futures import AgentFuture
from agentpool.runtime.manager import Manager
from agentpool_worker import protocol

if TYPE_CHECKING:
    from agentpool.agents.registry import AgentKind
    from agentpool.io.arena import Held
    from agentpool_worker.protocol import Payload

__all__ = ["Submitting", "pickling_error", "spec_of"]

P = ParamSpec("P")
T = TypeVar("T")
#: As `TaskOptions.captured` has it.
Captured = tuple[bool, int | None] | None

#: Functions that are found by their names, and what stands for them in calls. Bounded by clearing.
_references: dict[FunctionType, bytes] = {}
_REMEMBERED: Final = 4096


class Submitting(Executor):
    """What a pool and its views have in common: one way to make tasks, with the options of the view."""

    _manager: Manager
    _options: TaskOptions
    _spec: TaskSpec
    #: the options that the view was given, over those of the pool
    _given: frozenset[str] = frozenset()
    #: what tasks of an agent ask for, by kind or class; with the key itself, as equal kinds need not be the same
    _agent_specs: dict[Any, tuple[Any, TaskSpec, Captured]] | None = None
    #: what tasks write or log comes as events
    _captured: Captured = None

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"an {type(self).__name__} cannot be sent to a worker or copied; make a pool inside the task")

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> AgentFuture[T]:
        """Run `fn(*args, **kwargs)` in a worker and return its future.

        Lambdas, closures and what `__main__` defines are sent by value, what other modules define by reference. An
        `async def` function is run to its end. What cannot be pickled fails the future with TaskPicklingError.
        Raises PoolClosedError after shutdown, the InitializerError of a broken pool, and QueueFullError (see `block`).
        """
        try:
            if self._captured is not None:
                payload, buffers = _serialize_captured(self._captured, fn, args, kwargs)
            else:
                payload, buffers = _serialize(fn, args, kwargs)
        except KeyboardInterrupt:
            raise  # it is the submitter's
        except BaseException as error:  # a user's __reduce__; SystemExit in it must not end the submitter
            return self._refuse(pickling_error(error, fn, args, kwargs))
        return self._accept(payload, buffers, self._spec, getattr(fn, "__code__", None) or type(fn))

    def _accept(
        self, payload: Payload, buffers: Sequence[memoryview], spec: TaskSpec, call_key: object
    ) -> AgentFuture[Any]:
        manager = self._manager
        held: Held | None = None
        if buffers or type(payload) is tuple:
            # The caller may change its array once submit returns, and the call may wait, or be sent twice.
            held = manager.hold(payload, buffers)
            buffers = [] if held is not None else [protocol.frozen(buffer) for buffer in buffers]
        future: AgentFuture[Any] = AgentFuture(manager, held or payload, buffers)
        future._task = manager.submit(future, spec, call_key, block=self._options.block)
        return future

    def _refuse(self, error: TaskPicklingError) -> AgentFuture[Any]:
        self._manager.check_open()
        future: AgentFuture[Any] = AgentFuture()
        future.set_exception(error)
        return future

    def _submit_chunk(self, fn: Callable[..., Any], columns: Sequence[Sequence[Any]]) -> AgentFuture[Any]:
        """Several calls as one task. Without cloudpickle where plain pickle is known to do, as in `_serialize`."""
        if type(fn) is FunctionType and all(map(protocol.is_flat, columns)) and self._captured is None:
            reference = _references.get(fn) or _make_reference(fn)
            if reference and not _is_sent_by_value(fn.__module__):
                payload = protocol.call_by_name(_CHUNK, (fn, columns), {})
                return self._accept(payload, (), self._spec, protocol.run_chunk.__code__)
        return self.submit(protocol.run_chunk, fn, columns)

    def submit_agent(self, kind: str | type | AgentKind, prompt: str, /, **kwargs: Any) -> AgentFuture[Any]:
        """Run an agent: `kind(...).run(prompt, **kwargs)` in a worker that keeps the instance for the next task.

        kind: an agent class, the name of a stock agent ("security-analyst", "performance-auditor", "test-generator",
        "command", "claude", "codex", ...), "module:Class", or an `AgentKind`, also by the name or class that `@agent`
        registered it under. The options of a kind apply where the view does not say otherwise. A kind that declares
        `idempotent` gets three attempts where its worker is lost, an agent program three where its model's API is
        overloaded, unless the view, kind or pool says otherwise. Raises LookupError or TypeError for what is no agent,
        and what `submit` raises.
        """
        from agentpool_worker.agents import base

        registry = sys.modules.get("agentpool.agents.registry")  # not loaded: nobody has made a kind
        found: AgentKind | None = None if registry is None else registry.kind_of(kind)
        target = kind if found is None else found.target
        cls = base.resolve(cast(Any, target))
        name = base.kind_name(cast(Any, target))
        spec, captured = self._agent_spec(cls, name, found)
        try:
            if captured is not None:
                payload, buffers = _serialize_captured(captured, protocol.run_agent, (target, prompt, kwargs), {})
            else:
                payload, buffers = protocol.dumps((protocol.run_agent, (target, prompt, kwargs), {}))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return self._refuse(pickling_error(error, cls, (prompt,), kwargs))
        return self._accept(payload, buffers, spec, name)

    def _agent_spec(self, cls: type, name: str, kind: AgentKind | None) -> tuple[TaskSpec, Captured]:
        """What the tasks of an agent ask for: by the view, else the kind, else the class, else the pool."""
        key = cls if kind is None else kind
        if self._agent_specs is None or len(self._agent_specs) >= _REMEMBERED:
            self._agent_specs = {}
        known = self._agent_specs.get(key)
        if known is not None and known[0] is key:
            return known[1:]
        options = self._options
        if kind is not None:
            options = options.updated({what: value for what, value in kind.options.items() if what not in self._given})
        spec = replace(spec_of(options), kind=name, name=options.name or name, session=self._spec.session)
        if options.retry is None and self._manager.core.settings.retry is None and "retry" not in self._given:
            is_idempotent = getattr(cls, "idempotent", False) if kind is None else kind.is_idempotent
            if getattr(cls, "retries_transient_errors", False):
                from agentpool.agents.retry import agent_retry

                spec = replace(spec, policy=agent_retry(lost_workers=is_idempotent))
            elif is_idempotent:
                spec = replace(spec, policy=compile_policy(IDEMPOTENT_ATTEMPTS))
        self._agent_specs[key] = (key, spec, options.captured)
        return spec, options.captured

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


# -- helpers ---------------------------------------------------------------------------------------------------------


def spec_of(options: TaskOptions) -> TaskSpec:
    """The options as the core wants them."""
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
        growth_limit_bytes=None if options.memory_growth_mb is None else int(options.memory_growth_mb * MB),
        expected_bytes=None if options.expected_memory_mb is None else int(options.expected_memory_mb * MB),
        group=options.group,
        group_limit=options.group_limit,
    )


def _serialize(fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Payload, Sequence[memoryview]]:
    """The call for a worker. Plain pickle where it is known to do: it takes a quarter of the time."""
    if type(fn) is FunctionType and protocol.is_simple(args) and (not kwargs or protocol.is_simple(kwargs)):
        reference = _references.get(fn) or _make_reference(fn)
        if reference and not _is_sent_by_value(fn.__module__):
            return protocol.call_by_name(reference, args, kwargs), ()
    return protocol.dumps((fn, args, kwargs))


def _serialize_captured(
    captured: tuple[bool, int | None], fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Payload, Sequence[memoryview]]:
    """The call, in another one that has its worker pass on what it writes and logs."""
    from agentpool_worker import capture

    return protocol.dumps((capture.run, (*captured, fn, args, kwargs), {}))


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


def pickling_error(
    error: BaseException, fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TaskPicklingError:
    """What a future gets whose call cannot be pickled: names the part that cannot."""
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
