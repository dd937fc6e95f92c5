"""Sixteen threads submit, cancel, kill, force the breaker, resize, pause, recycle, drain and shut down, all at once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from agentpool.errors import PoolClosedError
from stress import work
from stress.ledger import CANCELLED, VALUE
from stress.scenarios import Scenario
from stress.scenarios.crashy import CRASHED

if TYPE_CHECKING:
    from stress.harness import Run

THREADS: Final = 16
#: A task may come to nearly anything here; that it does so once, and keeps what was promised, is what is judged.
#: CircuitOpenError: a pool that is shut down does not wait for what cannot start.
ANY: Final = (VALUE, CANCELLED, "TaskKilledError", "CancelledError", "CircuitOpenError", *CRASHED)


#: What operators of a pool may order.
ORDERS: Final = ("resize", "pause", "recycle", "kill_worker", "drain")


def play(run: Run) -> None:
    """Until the budget is used up."""
    for order in ORDERS:
        if not hasattr(run.executor, order):
            run.skipped[order] = f"{run.target.label} has no {order}()"
    given: Counter[str] = Counter()
    run.facts["orders to the running pool"] = given
    threads = [threading.Thread(target=_pester, args=(run, given, number), name=f"stress-storm-{number}", daemon=True)
               for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    breaker = getattr(run.executor, "breaker", None)
    if breaker is not None:
        breaker.reset()


def _pester(run: Run, given: Counter[str], number: int) -> None:
    draw = random.Random(f"{run.seed}-{number}")
    mine: deque[Future[Any]] = deque(maxlen=30)
    for _ in run.budget():
        future = _submit(run, draw)
        while future is None and not run.is_over:  # the pool drains, or another thread has just shut it down
            time.sleep(0.005)
            future = _submit(run, draw)
        if future is not None:
            mine.append(future)
        if mine and draw.random() < 0.2:
            run.cancel(draw.choice(mine))
        if mine and draw.random() < 0.05:
            run.kill(draw.choice(mine))
        if draw.random() < 0.01:
            _flap(run, draw)
        if draw.random() < 0.02:
            _order(run, given, draw)
        if draw.random() < 0.002:
            _replace(run, draw)
        run.calm(400)


def _submit(run: Run, draw: random.Random) -> Future[Any] | None:
    choice = draw.random()
    if choice < 0.03:
        return run.submit("die", work.die, draw.choice(work.DEATHS), fates=ANY)
    if choice < 0.1:
        return run.submit("fail", work.fail, fates=(*ANY, "ValueError"))
    if choice < 0.2:
        return run.submit("urgent", work.nap, 0.001, fates=ANY, priority=draw.randint(-3, 3))
    return run.submit("nap", work.nap, draw.expovariate(200), fates=ANY)


def _flap(run: Run, draw: random.Random) -> None:
    breaker = getattr(run.executor, "breaker", None)
    if breaker is None:
        run.skipped["force_open"] = f"{run.target.label} has no breaker"
        return
    breaker.force_open("storm")
    time.sleep(draw.random() * 0.05)
    breaker.reset()


def _order(run: Run, given: Counter[str], draw: random.Random) -> None:
    """What an operator may do to a pool that runs; it may be shut down by another thread at that moment."""
    pool: Any = run.executor
    order = draw.choice(ORDERS)
    if order in run.skipped:
        return
    with suppress(PoolClosedError):
        if order == "resize":
            most = draw.randint(1, 8)
            pool.resize(most, draw.randint(1, most))
        elif order == "recycle":
            pool.recycle(_worker(pool, draw) if draw.random() < 0.7 else None)
        elif order == "kill_worker":
            if (worker := _worker(pool, draw)) is not None:
                pool.kill_worker(worker, "storm")
        else:
            try:
                pool.pause() if order == "pause" else pool.drain(draw.random() * 0.2)
                time.sleep(draw.random() * 0.02)
            finally:
                pool.resume()
        given[order] += 1


def _worker(pool: Any, draw: random.Random) -> int | None:
    workers = pool.get_pool_stats()["workers"]
    return draw.choice(workers)["id"] if workers else None


def _replace(run: Run, draw: random.Random) -> None:
    """End the present pool and go on with another one; what it had is finished, or cancelled, but never lost."""
    old = run.executor
    run.replace_executor(old)
    how = draw.choice(("finish", "cancel", "kill"))
    if how == "kill" and hasattr(old, "kill_workers"):
        old.kill_workers()
    else:
        old.shutdown(wait=draw.random() < 0.5, cancel_futures=how != "finish")


SCENARIO = Scenario(name="storm", play=play, tasks=20_000, brief=4000, settings={"kill_grace": 0.2},
                    title="16 threads submit, cancel, kill, resize, pause, drain, recycle and force open at random",
                    may_refuse=("PoolClosedError", "BrokenProcessPool", "RuntimeError", "TerminatedWorkerError",
                                "ShutdownExecutorError"))
