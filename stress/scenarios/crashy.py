"""One task in twenty dies, by random means: it fails, and nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from agentpool.config import BreakerSettings
from stress import work
from stress.ledger import VALUE
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run

#: Of a task whose process died: agentpool's, loky's and the standard library's error is the first, pebble's the second.
CRASHED: Final = ("BrokenProcessPool", "ProcessExpired")


def crash(run: Run) -> Any:
    """One that dies. It may be allowed a second and third try, of which it makes no better use."""
    how = run.random.choice(work.DEATHS)
    fates = (*CRASHED, VALUE) if how == "after-result" else CRASHED
    if run.target.is_ours and run.random.random() < 0.3:
        return run.submit("die-thrice", work.die, how, fates=fates, attempts=3, retry=3)
    return run.submit("die", work.die, how, fates=fates)


def play(run: Run) -> None:
    """Others sleep a little, compute, or raise."""
    for _ in run.budget():
        draw = run.random.random()
        if draw < 0.05:
            crash(run)
        elif draw < 0.10:
            run.submit("fail", work.fail, fates=("ValueError",))
        elif draw < 0.5:
            run.submit("compute", work.compute, 0.002)
        else:
            run.submit("nap", work.nap, run.random.uniform(0, 0.01))
        run.calm(200)


# A worker that dies between two tasks counts against the breaker, and rightly; the others are not to wait long for it.
SCENARIO = Scenario(name="crashy", title="5 % of the tasks die by random means", play=play, tasks=10_000, brief=1500,
                    settings={"breaker": BreakerSettings(open_seconds=1, max_open_seconds=5)}, worker_peak_mb=100,
                    patience=15.0)
