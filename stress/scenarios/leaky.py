"""Tasks that leak 1 to 50 MB each: workers are recycled between tasks, and no task is lost for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stress import work
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run

LIMIT_MB: Final = 100
MOST_MB: Final = 50


def play(run: Run) -> None:
    """The limit is judged after a task, so a worker has at most the limit and one more leak."""
    for _ in run.budget():
        run.submit("leak", work.leak, run.random.randint(1, MOST_MB))
        run.calm(50)
    run.calm(1)
    stats = getattr(run.executor, "get_pool_stats", None)
    if stats is not None:
        run.facts["workers started"] = stats()["counters"]["spawned"]


SCENARIO = Scenario(name="leaky", title="tasks that leak 1 to 50 MB", play=play, tasks=2000, brief=150, workers=2,
                    settings={"memory_limit_mb": LIMIT_MB}, worker_peak_mb=LIMIT_MB + MOST_MB + 15)
