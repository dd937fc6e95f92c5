"""Two hundred agents at once, nearly all asleep, as agents are that wait for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stress import work
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run

CONCURRENT: Final = 200


def play(run: Run) -> None:
    """Each sleeps for 2 to 6 s, and then thinks for a moment."""
    for number in run.budget():
        if number % 5:
            run.submit("nap", work.nap, run.random.uniform(2, 6))
        else:
            run.submit("compute", work.compute, run.random.uniform(0.001, 0.02))
        run.calm(CONCURRENT + 50)


SCENARIO = Scenario(name="agents", title="200 concurrent long, mostly sleeping tasks", play=play, tasks=800, brief=250,
                    workers=CONCURRENT, worker_peak_mb=60)
