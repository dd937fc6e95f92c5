"""Sixteen threads submit, cancel, kill, force the breaker, shut down and make anew, all at random and at once."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

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


def play(run: Run) -> None:
    """Until the budget is used up."""
    if not hasattr(run.executor, "resize"):
        run.skipped["resize"] = f"{run.target.label} has no resize(); pools of other sizes are made instead"
    threads = [threading.Thread(target=_pester, args=(run, number), name=f"stress-storm-{number}", daemon=True)
               for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    breaker = getattr(run.executor, "breaker", None)
    if breaker is not None:
        breaker.reset()


def _pester(run: Run, number: int) -> None:
    draw = random.Random(f"{run.seed}-{number}")
    mine: deque[Future[Any]] = deque(maxlen=30)
    for _ in run.budget():
        future = _submit(run, draw)
        if future is not None:
            mine.append(future)
        if mine and draw.random() < 0.2:
            run.cancel(draw.choice(mine))
        if mine and draw.random() < 0.05:
            run.kill(draw.choice(mine))
        if draw.random() < 0.01:
            _flap(run, draw)
        if draw.random() < 0.002:
            _drain(run, draw)
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


def _drain(run: Run, draw: random.Random) -> None:
    """End the present pool and go on with another one; what it had is finished, or cancelled, but never lost."""
    old = run.executor
    run.replace_executor(old)
    how = draw.choice(("finish", "cancel", "kill"))
    if how == "kill" and hasattr(old, "kill_workers"):
        old.kill_workers()
    else:
        old.shutdown(wait=draw.random() < 0.5, cancel_futures=how != "finish")


SCENARIO = Scenario(name="storm", title="16 threads submit, cancel, kill, force the breaker open and drain at random",
                    play=play, tasks=20_000, brief=4000, settings={"kill_grace": 0.2},
                    may_refuse=("PoolClosedError", "BrokenProcessPool", "RuntimeError", "TerminatedWorkerError",
                                "ShutdownExecutorError"))
