"""Tasks that never end, by various means, each under a time limit; beside them tasks that do end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stress import work
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run


def hang(run: Run) -> None:
    """One that hangs: asleep, deaf to cancellation, busy, in C code, stopped, or waiting for a child."""
    run.submit("hang", work.hang, run.random.choice(work.HANGS), fates=("TimeoutError",),
               timeout=run.random.uniform(0.1, 0.5))


def play(run: Run) -> None:
    """One in eight."""
    for number in run.budget():
        if number % 8 == 0:
            hang(run)
        else:
            run.submit("nap", work.nap, 0.01, timeout=30.0)
        run.calm(40)


SCENARIO = Scenario(name="hangs", title="tasks that never end", play=play, tasks=800, brief=120, needs=("timeout",),
                    settings={"kill_grace": 0.3}, worker_peak_mb=100)
