"""What schedules choose from: settings of pools, options of tasks, and how much of each kind of trouble there is.

`Palette(settings=..., specs=...)` with your own settings and policies is how you try those; see `simulate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from random import Random
from typing import Final

import tenacity

from agentpool.config import MB, BreakerSettings, PoolSettings
from agentpool.core.records import TaskSpec
from agentpool.core.retry import Escalate, RetryPolicy, compile_policy
from agentpool.errors import MemoryLimitError, TaskTimeoutError

__all__ = ["DEFAULT", "Palette", "Profile", "default_settings", "default_specs"]


def _faulty(state: tenacity.RetryCallState) -> bool:
    raise LookupError("a strategy with a fault")


def _wants_again(value: object) -> bool:
    return isinstance(value, tuple) and bool(value[-1])


@cache
def default_specs() -> tuple[TaskSpec, ...]:
    """Options of tasks. Recorded schedules name them by their place: add at the end only."""
    stop, wait = tenacity.stop_after_attempt, tenacity.wait_fixed
    anything = RetryPolicy(stop=stop(3), wait=tenacity.wait_none(), retry=tenacity.retry_if_exception_type())
    late = RetryPolicy(stop=tenacity.stop_after_delay(2.5), wait=wait(1),
                       retry=tenacity.retry_if_exception_type((TaskTimeoutError, MemoryLimitError)))
    again = RetryPolicy(stop=stop(2), wait=tenacity.wait_none(), retry=tenacity.retry_if_result(_wants_again))
    return (
        TaskSpec(),
        TaskSpec(timeout=0.05),
        TaskSpec(policy=compile_policy(3)),
        TaskSpec(queue_timeout=1.0),
        TaskSpec(policy=anything, timeout=0.5),
        TaskSpec(priority=5, key="k"),
        TaskSpec(policy=late, timeout=0.05, queue_timeout=20.0),
        TaskSpec(priority=-5, kind="a"),
        TaskSpec(policy=again),
        TaskSpec(policy=Escalate(factor=2, wait=tenacity.wait_none()), hard_limit_bytes=200 * MB, spares_task=True),
        TaskSpec(policy=Escalate(factor=1, alone=True, wait=tenacity.wait_none()), kind="b"),
        TaskSpec(policy=RetryPolicy(retry=_faulty), soft_limit_bytes=50 * MB),
        TaskSpec(policy=compile_policy(5), queue_timeout=0.5, key="l"),
        TaskSpec(hard_limit_bytes=200 * MB, spares_task=True, timeout=0.5),
    )


def _settings(rng: Random) -> PoolSettings:
    workers = rng.choice((1, 2, 2, 3, 3, 4))
    return PoolSettings(
        max_workers=workers,
        max_concurrent=rng.randint(1, workers),
        min_workers=rng.choice((0, 0, 0, 1, workers)),
        max_pending=rng.choice((None, None, 1, 3)),
        max_tasks_per_child=rng.choice((None, None, None, 1, 3, 20)),
        memory_limit_mb=rng.choice((100.0, 100.0, None)),
        memory_growth_mb=rng.choice((None, None, 30.0)),
        hard_memory_limit_mb=rng.choice((None, 300.0)),
        critical_memory_mb=rng.choice((None, None, 150.0, 500.0)),
        alert_memory_mb=rng.choice((None, 100.0)),
        cpu_policy=rng.choice(("report", "throttle")),
        idle_timeout=rng.choice((10.0, 10.0, None)),
        start_timeout=5.0,
        cleanup_interval=5.0,
        kill_grace=rng.choice((0.0, 0.1, 2.0)),
        breaker=BreakerSettings(
            failure_threshold=rng.choice((1, 2, 4)), window_seconds=20.0, open_seconds=3.0, max_open_seconds=10.0
        ),
    )


@cache
def default_settings() -> tuple[PoolSettings, ...]:
    """Settings of pools, 96 of them: drawn once, so that a schedule can name its own by a number."""
    rng = Random(20240)
    return tuple(_settings(rng) for _ in range(96))


@dataclass(frozen=True)
class Profile:
    """How often each kind of step comes in one kind of schedule. `opening`: steps that come first."""

    name: str
    weights: Mapping[str, int]
    opening: Sequence[tuple[str, int, int]] = ()
    names: tuple[str, ...] = field(init=False)
    sums: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.weights))
        object.__setattr__(self, "sums", tuple(accumulate(self.weights.values())))


_QUIET: Final = {"submit": 6, "work": 10, "fork": 4, "turn": 14, "behave": 5, "toil": 2, "acknowledge": 1, "reap": 2}
_USERS: Final = {"cancel": 3, "kill": 2, "race": 3, "shutdown": 1, "stop_all": 1, "drop": 1, "start": 1}
_DEATHS: Final = {"die": 4, "obey": 2, "freeze": 2, "keeper": 1, "corrupt": 1, "fail_to_start": 1, "complain": 1}
_MEMORY: Final = {"grow": 7, "host": 3, "advance": 4}
_CLOGS: Final = {"clog": 2, "collide": 2, "exhaust": 1, "race": 2}
_BREAKER: Final = {"force_open": 1, "reset": 2, "die": 3, "fork": 3, "host": 1, "advance": 2}
#: A worker that has proved to be quick, and more tasks than places: from now on calls travel ahead.
_BATCH: Final = (("submit", 0, 134), ("behave", 0, 0), ("behave", 0, 0), ("behave", 0, 0), ("submit", 0, 135),
                 ("submit", 0, 135), ("turn", 0, 0), ("work", 0, 0), ("work", 0, 0), ("turn", 0, 0))
#: Then a call that travelled ahead is taken back as it begins: the worker tells that it passed over it.
_BACK: Final = (*_BATCH, ("toil", 0, 0), ("cancel", 0, 1), ("behave", 0, 0))
#: A worker dies in a call with the results of those before it in its outbox.
_OUTBOX: Final = (*_BATCH, ("toil", 0, 18), ("die", 0, 2))
#: Two tasks that killed their workers, and may run again after a moment. (14 task options; the fate `kills=1`.)
_WAITS: Final = (("submit", 2 + 14 * 5, 1), ("behave", 0, 0), ("behave", 0, 0), ("behave", 0, 0))
#: A worker that is over its soft limit, and is asked to collect its garbage. (The fate `grows=120 MB`.)
_CHECKS: Final = (("submit", 14 * 15, 0), ("behave", 0, 0), ("behave", 0, 0), ("turn", 0, 0))
#: Starts that failed, the breaker's time over, and a probe on its way.
_PROBE: Final = (("submit", 0, 1), ("turn", 0, 0), ("turn", 0, 0), ("fork", 0, 15), ("fork", 0, 15), ("turn", 0, 0),
                 ("turn", 0, 0), ("advance", 6, 0), ("turn", 0, 0), ("turn", 0, 0), ("turn", 0, 0))
_OPERATORS: Final = {"resize": 3, "pause": 2, "resume": 3, "drain": 1, "recycle": 3, "kill_worker": 2}
_SESSIONS: Final = {"session": 8, "pause": 1, "resume": 1, "resize": 1, "kill_worker": 1, "recycle": 1}
_RATIONS: Final = {"submit_rationed": 6, "host": 1}
_FIRST: Final = (("submit", 0, 1),)
_WARM: Final = (("submit", 0, 1), ("behave", 0, 0), ("behave", 0, 0))
#: A call for a worker whose pipe is full: it must be written on when there is room.
_FULL: Final = (*_WARM, ("clog", 0, 0), ("submit", 0, 1))

PROFILES: Final = (
    Profile("quiet", {**_QUIET, "cancel": 1, "advance": 1}, _FIRST),
    Profile("users", {**_QUIET, **_USERS, "advance": 1}, _FIRST),
    Profile("deaths", {**_QUIET, **_DEATHS, "advance": 2}, _WARM),
    Profile("starts", {**_QUIET, "fail_to_start": 4, "fork": 8, "die": 2, "freeze": 2, "race": 2}, _FIRST),
    Profile("memory", {**_QUIET, **_MEMORY}, _WARM),
    Profile("breaker", {**_QUIET, **_BREAKER}, _FIRST),
    Profile("probe", {**_QUIET, **_BREAKER, "cancel": 2, "shutdown": 1}, _PROBE),
    Profile("clogs", {**_QUIET, **_CLOGS, "die": 1}, _FULL),
    Profile("ahead", {**_QUIET, "toil": 4, "collide": 2, "cancel": 4, "kill": 2, "advance": 3, "die": 1, "race": 2,
                      "shutdown": 1, "stop_all": 1, "keeper": 1}, _BATCH),
    Profile("back", {**_QUIET, "cancel": 4, "die": 2, "race": 2, "collide": 2}, _BACK),
    Profile("outbox", {**_QUIET, "toil": 6, "die": 4, "race": 2, "keeper": 1}, _OUTBOX),
    Profile("waits", {**_QUIET, "cancel": 4, "stop_all": 2, "shutdown": 2, "race": 2, "die": 2, "advance": 2,
                      "force_open": 1}, _WAITS),
    Profile("checks", {"stop_all": 2, "freeze": 3, "die": 3, "turn": 8, "work": 3, "advance": 2, "submit": 3, "grow": 3,
                       "fork": 1, "obey": 1}, _CHECKS),
    Profile("all", {**_QUIET, **_DEATHS, **_MEMORY, **_CLOGS, **_BREAKER, **_USERS, **_OPERATORS,
                    "submit_rationed": 3, "session": 3}, _WARM),
    Profile("operators", {**_QUIET, **_OPERATORS, "die": 1, "cancel": 1, "race": 2, "advance": 1}, _WARM),
    Profile("rations", {**_QUIET, **_RATIONS, "die": 1, "cancel": 1, "kill": 1, "race": 1, "advance": 2, "grow": 2},
            _WARM),
    Profile("sessions", {**_QUIET, **_SESSIONS, "die": 1, "cancel": 2, "kill": 1, "race": 1, "advance": 3, "grow": 2},
            _WARM),
    Profile("operators ahead", {**_QUIET, **_OPERATORS, "toil": 4, "race": 2, "collide": 1}, _BATCH),
)


@dataclass(frozen=True)
class Palette:
    """What schedules choose from. `None` in a field: the palette that comes with the kit."""

    settings: Sequence[PoolSettings] | None = None
    specs: Sequence[TaskSpec] | None = None
    profiles: Sequence[Profile] = PROFILES
    #: fewest and most steps after the opening
    lengths: tuple[int, int] = (4, 12)

    @property
    def all_settings(self) -> Sequence[PoolSettings]:
        """Settings of pools."""
        return default_settings() if self.settings is None else self.settings

    @property
    def all_specs(self) -> Sequence[TaskSpec]:
        """Options of tasks."""
        return default_specs() if self.specs is None else self.specs


DEFAULT: Final = Palette()
