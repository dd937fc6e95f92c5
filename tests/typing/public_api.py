"""The typed public API, as a type checker sees it: checked by `test_typing.py`, never run.

Each `type: ignore[code]` marks a call that must be refused with that code: mypy says where one is not needed.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any, assert_type

import tenacity

from agentpool import (
    AgentFuture,
    AgentPool,
    PoolSettings,
    ResourceCircuitBreaker,
    ResourceMonitor,
    RetryPolicy,
    __version__,
    get_agent_pool,
    get_circuit_breaker,
    get_resource_monitor,
)
from agentpool.errors import TaskTimeoutError, WorkerCrashedError


def length(text: str, *, times: int = 1) -> int:
    return len(text) * times


def join(text: str, number: int) -> str:
    return f"{text}{number}"


def results(pool: AgentPool) -> None:
    future = pool.submit(length, "abc", times=2)
    assert_type(future, AgentFuture[int])
    assert_type(future.result(timeout=1), int)
    assert_type(future.exception(), BaseException | None)
    assert_type(pool.submit(lambda: "text").result(), str)
    assert_type(pool.submit(dict[str, int]).result(), dict[str, int])
    assert_type(pool.map(length, ["a", "b"]), Iterator[int])
    assert_type(pool.map(join, ["a", "b"], [3, 4], timeout=5, chunksize=2, buffersize=10), Iterator[str])


def arguments(pool: AgentPool) -> None:
    pool.submit(length, 3)  # type: ignore[arg-type]
    pool.submit(length)  # type: ignore[call-arg]
    pool.submit(length, "abc", time=2)  # type: ignore[call-arg]
    pool.submit("not callable")  # type: ignore[arg-type]
    pool.map("not callable", [1, 2])  # type: ignore[arg-type]


def is_an_executor(pool: AgentPool) -> None:
    executor: Executor = pool
    future: Future[int] = pool.submit(length, "abc")
    executor.submit(length, "abc")
    future.add_done_callback(lambda done: print(done.result() + 1))
    AgentPool(2, multiprocessing.get_context("spawn"), length, ("abc",), max_tasks_per_child=3)


def attributes(future: AgentFuture[int]) -> None:
    assert_type(future.attempts, int)
    assert_type(future.peak_rss_bytes, int)
    assert_type(future.worker_pid, int | None)
    assert_type(future.kill(), bool)
    assert_type(future.cancel(), bool)
    snapshot = future.snapshot()
    assert_type(snapshot.attempts, int)
    assert_type(snapshot.elapsed_seconds, float)
    assert_type(snapshot.last_error, str | None)


def settings() -> None:
    AgentPool(max_workers=2, memory_limit_mb=200, idle_timeout=None, preload=("json",))
    AgentPool(max_workers=2, retry=3)
    AgentPool(max_workers=2, retry=RetryPolicy(retry=tenacity.retry_if_exception_type(OSError)))
    AgentPool(max_workers=2, retry=tenacity.Retrying(stop=tenacity.stop_after_attempt(3)))
    AgentPool(memory_limit="200")  # type: ignore[call-arg]
    AgentPool(idle_timeout="soon")  # type: ignore[arg-type]
    assert_type(AgentPool().settings, PoolSettings)


def options(pool: AgentPool) -> None:
    view = pool.options(timeout=30, queue_timeout=None, retry=3, priority=5, key="session-7", name="a", block=False)
    assert_type(view.submit(length, "abc"), AgentFuture[int])
    view.submit(length, 3)  # type: ignore[arg-type]
    executor: Executor = view
    executor.shutdown()
    pool.options(timeout="soon")  # type: ignore[arg-type]
    pool.options(timeouts=30)  # type: ignore[call-arg]


def closing() -> None:
    with AgentPool() as pool:
        assert_type(pool, AgentPool)
        pool.shutdown(wait=False, cancel_futures=True)
        assert_type(pool.closed, bool)


async def asynchronous() -> None:
    async with AgentPool() as pool:
        assert_type(pool, AgentPool)
        assert_type(await asyncio.wrap_future(pool.submit(length, "abc")), int)
        assert_type(await asyncio.get_running_loop().run_in_executor(pool, length, "abc"), int)


def old_names() -> None:
    assert_type(get_agent_pool(), AgentPool)
    assert_type(get_agent_pool().get_pool_stats(), dict[str, Any])
    assert_type(get_circuit_breaker(), ResourceCircuitBreaker)
    assert_type(get_resource_monitor(), ResourceMonitor)
    assert_type(get_resource_monitor().get_health_report(), dict[str, Any])
    assert_type(__version__, str)


def handlers(future: AgentFuture[int]) -> None:
    try:
        future.result()
    except TaskTimeoutError as error:
        assert_type(error.timeout_seconds, float)
    except WorkerCrashedError as error:
        assert_type(error.exit_code, int | None)
        assert_type(error.stderr_tail, str)
