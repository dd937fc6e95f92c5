"""The original problem: 56 agents asked for at once, on a host with little memory to spare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stress import work
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run

AGENTS: Final = 56
AGENT_MB: Final = 60
WORKERS: Final = 4


def play(run: Run) -> None:
    """Each takes 60 MB, works for half a second and gives them back; nobody waits before the last is asked for."""
    for _ in run.budget():
        run.submit("agent", work.hold, AGENT_MB, 0.5)
    run.calm(1)
    run.facts["MB that all at once would take"] = AGENTS * AGENT_MB


SCENARIO = Scenario(name="clog", title="56 agents of 60 MB asked for at once", play=play, tasks=AGENTS, brief=AGENTS,
                    workers=WORKERS, worker_peak_mb=AGENT_MB + 40)
