"""The scenarios of `python -m stress run`, one a file: each has a `SCENARIO` that says what it is and what it may do.

A scenario only submits, waits and pesters, by means of a `stress.harness.Run`. What must hold is the oracle's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from stress.harness import Run

NAMES: Final = ("burst", "agents", "leaky", "greedy", "crashy", "hangs", "payloads", "storm", "clog", "parent_kill",
                "soak")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """title: one line. tasks: by default; brief: for `make stress`; minutes: by default, instead of a number of tasks.

    workers, settings: of the executor (settings: of ours, or what makes them for a run). faults: see `stress.faults`,
    one every so many seconds. needs: features without which it makes no sense. worker_peak_mb: what a worker's tree may
    reach, None: anything. may_refuse: exceptions of `submit` that are part of it. patience: seconds without anything
    settled that are a hang.
    """

    name: str
    title: str
    play: Callable[[Run], None]
    tasks: int | None = None
    brief: int | None = None
    minutes: float | None = None
    brief_minutes: float | None = None
    workers: int = 4
    settings: Mapping[str, Any] | Callable[[Run], Mapping[str, Any]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    fault_every: float = 3.0
    needs: tuple[str, ...] = ()
    worker_peak_mb: float | None = None
    may_refuse: tuple[str, ...] = ()
    patience: float = 30.0


def load(name: str) -> Scenario:
    """By its name; `parent-kill` is `parent_kill`. Raises LookupError."""
    name = name.replace("-", "_")
    if name not in NAMES:
        raise LookupError(f"no such scenario: {name}; there are {', '.join(NAMES)}")
    found: Scenario = import_module(f"stress.scenarios.{name}").SCENARIO
    return found
