"""Tasks that allocate until they are stopped, beside others that must not notice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stress import work
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run

HARD_MB: Final = 200
#: What is allocated between two readings passes the limit: promised is 150 MB at 1 GB/s.
OVER_MB: Final = 150
SPEEDS: Final = (50, 200, 1000)


def play(run: Run) -> None:
    """One in four is greedy. It gives up at three times the limit, where nobody stops it: then it returns -1."""
    for number in run.budget():
        if number % 4 == 0:
            run.submit("race", work.race, run.random.choice(SPEEDS), 3 * HARD_MB, fates=("MemoryError",))
        elif number % 4 == 1:
            run.submit("hold", work.hold, 80, 0.05)
        else:
            run.submit("nap", work.nap, 0.02)
        run.calm(40)


SCENARIO = Scenario(name="greedy", title="allocation races to the hard limit", play=play, tasks=400, brief=60,
                    workers=3, needs=("memory",), worker_peak_mb=HARD_MB + OVER_MB,
                    settings={"hard_memory_limit_mb": HARD_MB, "memory_limit_mb": HARD_MB})
