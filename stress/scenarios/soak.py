"""A mix of everything, for as long as one likes, while faults are injected."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from agentpool.config import BreakerSettings
from stress import work
from stress.ledger import CANCELLED, VALUE
from stress.scenarios import Scenario
from stress.scenarios.crashy import crash
from stress.scenarios.hangs import hang

if TYPE_CHECKING:
    from stress.harness import Run


def play(run: Run) -> None:
    """Weights are such that a second has some of each, and most are what most tasks are."""
    for _ in run.budget():
        _one(run, run.random.random())
        run.calm(64)


def _one(run: Run, draw: float) -> None:
    if draw < 0.55:
        run.submit("nap", work.nap, run.random.expovariate(100))
    elif draw < 0.70:
        run.submit("compute", work.compute, run.random.uniform(0.001, 0.01))
    elif draw < 0.76:
        run.submit("again", work.nap, 0.005, attempts=100, retry=100)
    elif draw < 0.80:
        run.submit("leak", work.leak, run.random.randint(1, 20))
    elif draw < 0.84:
        run.submit("scratch", work.scratch, 64, fates=(VALUE, "OSError"))
    elif draw < 0.87:
        _echo(run, run.random.choice((10, 10_000, 300_000, 2_000_000)))
    elif draw < 0.90:
        run.submit("fail", work.fail, fates=("ValueError",))
    elif draw < 0.92:
        run.submit("flood", work.flood, 8)
    elif draw < 0.935:
        crash(run)
    elif draw < 0.94:
        run.submit("daemon", work.leave_daemon)
    elif draw < 0.943 and not run.target.why_not(("timeout",)):
        hang(run)
    elif draw < 0.945 and not run.target.why_not(("memory",)):
        run.submit("race", work.race, 300, 900, fates=("MemoryError",))
    elif draw < 0.97:
        if (future := run.submit("cancelled", work.nap, 0.01, fates=(VALUE, CANCELLED))) is not None:
            run.cancel(future)
    elif (future := run.submit("killed", work.nap, 0.1, fates=(VALUE, CANCELLED))) is not None and draw < 0.975:
        run.kill(future)


def _echo(run: Run, size: int) -> None:
    data = work.payload(run.seed, size, size)
    checksum = zlib.crc32(data)
    run.submit("take", work.take, data, expect=lambda right, value: bool(value == (right, checksum)))


SCENARIO = Scenario(
    name="soak", title="a mix of all, with faults injected", play=play, minutes=20, brief_minutes=0.4, workers=6,
    settings={"memory_limit_mb": 100, "hard_memory_limit_mb": 200, "kill_grace": 0.3,
              "breaker": BreakerSettings(open_seconds=1, max_open_seconds=5)},
    faults=("kill_worker", "stop_worker", "kill_keeper", "fill_disk", "starve_descriptors", "load_cpu"),
    fault_every=2.0, worker_peak_mb=350)
