"""kill -9 at every instant of a worker's life: each accepted task is resolved exactly once, and the pool goes on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import Future

import pytest

from agentpool import AgentPool, BreakerSettings, WorkerCrashedError

KILLS = 500
BIG = 64 * 1024 * 1024
LONG = 120


def work(kind: str, number: int, payload: bytes = b"") -> tuple[int, int]:
    if kind == "nap":
        time.sleep(0.003)
    return number, len(payload)


def big_result(number: int) -> tuple[int, bytes]:
    return number, bytes(BIG)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_task_is_resolved_exactly_once() -> None:
    """Workers are starting, reading, running, writing 64 MiB and retiring (every fifth task) when they are killed."""
    rng = random.Random(20261123)
    resolved: Counter[int] = Counter()
    futures: list[Future[tuple[int, object]]] = []
    pool = AgentPool(
        3,
        max_tasks_per_child=5,
        memory_limit_mb=None,
        breaker=BreakerSettings(failure_threshold=1_000_000),
    )

    def submit() -> None:
        number = len(futures)
        draw = rng.random()
        future: Future[tuple[int, object]]
        if draw < 0.02:
            future = pool.submit(big_result, number)  # type: ignore[assignment]
        elif draw < 0.3:
            future = pool.submit(work, "nap", number, bytes(rng.randrange(200_000)))  # type: ignore[assignment]
        else:
            future = pool.submit(work, "noop", number)  # type: ignore[assignment]
        future.add_done_callback(lambda _, number=number: resolved.update([number]))
        futures.append(future)

    kills = 0
    states: Counter[str] = Counter()
    with pool:
        while kills < KILLS:
            while len(futures) - len(resolved) < 30:
                submit()
            # Each killed start makes the pool wait a little longer before the next: not too many of them.
            spared = "starting" if rng.random() < 0.8 else ""
            workers = [w for w in pool.get_pool_stats()["workers"] if w["pid"] and w["status"] != spared]
            if workers:
                worker = rng.choice(workers)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker["pid"], signal.SIGKILL)
                    kills += 1
                    states[worker["status"]] += 1
            with contextlib.suppress(TimeoutError, WorkerCrashedError):
                futures[-1].result(rng.random() * 0.01)  # some milliseconds, so that workers get on in between
        lost = 0
        for number, future in enumerate(futures):
            error = future.exception(LONG)
            if error is None:
                assert future.result()[0] == number
            else:
                assert isinstance(error, WorkerCrashedError), error
                lost += 1
        assert pool.submit(abs, -1).result(LONG) == 1
    assert resolved == Counter(range(len(futures))), "each future is resolved exactly once"
    assert lost <= kills, "no kill cost more than the task that ran"
    assert {"busy", "starting"} <= set(states), states
