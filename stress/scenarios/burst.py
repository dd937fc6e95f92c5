"""A hundred thousand no-ops at once: nothing is lost in the crowd, and the parent keeps its breath."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stress import work
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run


def play(run: Run) -> None:
    """All at once, and by the thousand where the run is by time."""
    for number in run.budget():
        run.submit("noop", work.noop)
        if run.plan.tasks is None and number % 1000 == 999:
            run.calm(1000)


SCENARIO = Scenario(name="burst", title="100,000 no-ops, submitted at once", play=play, tasks=100_000, brief=100_000,
                    workers=2)
