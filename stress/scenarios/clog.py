"""The original problem: 56 agents asked for at once, on a host with little memory to spare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from stress import procs, work
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run

AGENTS: Final = 56
AGENT_MB: Final = 60
#: With its interpreter, and a little more.
EXPECTED_MB: Final = 90
#: What the machine has to spare when the run begins, whatever it has: for four of them.
SPARE_MB: Final = 400


def play(run: Run) -> None:
    """Each takes 60 MB, works for half a second and gives them back; nobody waits before the last is asked for."""
    floor_mb = procs.available() / procs.MB - SPARE_MB
    run.recorder.spare_mb, run.recorder.floor_mb = SPARE_MB, floor_mb
    run.facts |= {"MB that all at once would take": AGENTS * AGENT_MB, "MB to spare": SPARE_MB,
                  "MB that must stay available": round(floor_mb)}
    for _ in run.budget():
        run.submit("agent", work.hold, AGENT_MB, 0.5, expected_memory_mb=EXPECTED_MB)
    run.calm(1)
    run.facts["MB that stayed available"] = round(run.recorder.least_available_mb)


def settings(run: Run) -> Mapping[str, Any]:
    """As many workers as agents: it is memory alone that bounds them."""
    return {"min_available_mb": run.recorder.floor_mb}


# Where another program takes what is to spare, nothing begins until it has given it back.
SCENARIO = Scenario(name="clog", title="56 agents of 60 MB asked for at once, 400 MB to spare", play=play,
                    tasks=AGENTS, brief=AGENTS, workers=AGENTS, settings=settings, worker_peak_mb=AGENT_MB + 40,
                    patience=120.0)
