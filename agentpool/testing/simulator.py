"""Schedules: made from a seed, played on an imaginary machine, and the account of what was found.

A schedule is settings and a list of steps, each a name and two numbers. It replays exactly, whole or in part, on every
machine. One thread; nothing here depends on time, on hash order, or on what was played before.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from random import Random
from typing import Any

from agentpool.config import BreakerSettings, PoolSettings
from agentpool.core.scheduler import Scheduler
from agentpool.errors import InternalError
from agentpool.testing.oracle import Violation
from agentpool.testing.palette import DEFAULT, Palette
from agentpool.testing.stage import Stage
from agentpool.testing.watch import watched
from agentpool.testing.world import World

__all__ = ["Failure", "Report", "Schedule", "Simulator", "simulate"]

Step = tuple[str, int, int]

#: Of so many schedules one is looked at by the rules themselves instead of `quickcheck`.
_THOROUGH_EVERY = 64
#: Tenacity leaves tracebacks in circles: collected after so many schedules.
_COLLECT_EVERY = 5000


@dataclass(frozen=True)
class Schedule:
    """What happens, in order. `seed` is the core's own, and that of strategies that draw at random."""

    seed: int
    settings: PoolSettings
    steps: tuple[Step, ...]

    @classmethod
    def drawn(cls, seed: int, number: int, palette: Palette = DEFAULT) -> Schedule:
        """The schedule of this number in the run of this seed."""
        # Two whole numbers make one, so that runs of neighbouring seeds have no schedule in common.
        rng = Random((seed << 40) + number)
        settings = palette.all_settings
        chosen = settings[rng.randrange(len(settings))]
        profile = palette.profiles[rng.randrange(len(palette.profiles))]
        names = rng.choices(profile.names, cum_weights=profile.sums, k=rng.randint(*palette.lengths))
        bits = rng.getrandbits(16 * len(names))
        steps = [*profile.opening]
        for name in names:
            steps.append((name, bits & 255, bits >> 8 & 255))
            bits >>= 16
        return cls(number, chosen, tuple(steps))

    def as_json(self) -> dict[str, Any]:
        """Plain data. Settings are written out where they are not the default; tasks' options are not."""
        plain = PoolSettings()
        changed = {
            f.name: getattr(self.settings, f.name) for f in fields(plain)
            if getattr(self.settings, f.name) != getattr(plain, f.name)
        }
        if "breaker" in changed:
            breaker = self.settings.breaker
            changed["breaker"] = {f.name: getattr(breaker, f.name) for f in fields(breaker)}
        return {"seed": self.seed, "settings": changed, "steps": [list(step) for step in self.steps]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """What `as_json` made."""
        given = dict(data["settings"])
        if "breaker" in given:
            given["breaker"] = BreakerSettings(**given["breaker"])
        return cls(data["seed"], PoolSettings(**given), tuple((name, a, b) for name, a, b in data["steps"]))


@dataclass(frozen=True)
class Failure:
    """A schedule that broke a rule."""

    rule: str
    message: str
    schedule: Schedule
    #: the present state and the last events, and the task concerned, when the rule was broken
    story: str

    def __str__(self) -> str:
        steps = "\n".join(f"  {name} {a} {b}" for name, a, b in self.schedule.steps)
        count = len(self.schedule.steps)
        return f"{self.message}\n\nthe schedule ({count} steps):\n{steps}\n\nthe story:\n{self.story}"


@dataclass
class Report:
    """What a run came to."""

    schedules: int = 0
    #: events that the core was told, and settled tasks
    events: int = 0
    tasks: int = 0
    #: how those tasks ended: "resolved", "cancelled", or the name of the error
    ends: Counter[str] = field(default_factory=Counter)
    #: times that `quickcheck` saw a broken rule and the rules did not: it is to be brought up to date
    disagreements: int = 0
    failures: list[Failure] = field(default_factory=list)


class Simulator:
    """Plays schedules on one kind of scheduler: the real one, or one that is broken on purpose."""

    def __init__(self, scheduler: type[Scheduler] = Scheduler, palette: Palette = DEFAULT) -> None:
        self.palette = palette
        self._stage = Stage(watched(scheduler))

    def play(self, schedule: Schedule, *, is_thorough: bool = False) -> Failure | None:
        """Play one schedule; None: every promise was kept."""
        return self._play(schedule, is_thorough)[0]

    def _play(self, schedule: Schedule, is_thorough: bool) -> tuple[Failure | None, World]:
        # tenacity's wait strategies draw from the module's own generator.
        random.seed(schedule.seed)
        world = World(self._stage, schedule.settings, self.palette.all_specs, schedule.seed)
        world.core.is_thorough = is_thorough  # type: ignore[attr-defined]  # of watched()
        try:
            world.play(schedule.steps)
        except Exception as error:
            return _failure(schedule, world, error), world
        return None, world

    def run(
        self,
        numbers: Iterable[int],
        seed: int = 0,
        *,
        on_progress: Callable[[Report], None] | None = None,
        stop_after: int = 1,
    ) -> Report:
        """Play the schedules of these numbers; stops after so many failures."""
        report = Report()
        state, collects = random.getstate(), gc.isenabled()  # the caller's
        gc.disable()  # `release` leaves next to nothing to collect
        try:
            for number in numbers:
                schedule = Schedule.drawn(seed, number, self.palette)
                failure, world = self._play(schedule, number % _THOROUGH_EVERY == 0)
                report.schedules += 1
                report.tasks += world.oracle.settlements
                report.ends.update(world.oracle.ends)
                report.disagreements += world.core.disagreements  # type: ignore[attr-defined]  # of watched()
                report.events += world.core.events  # type: ignore[attr-defined]  # of watched()
                world.release()
                if failure is not None:
                    report.failures.append(failure)
                    if len(report.failures) >= stop_after:
                        break
                if report.schedules % _COLLECT_EVERY == 0:
                    gc.collect()
                if on_progress is not None and report.schedules % 250 == 0:
                    on_progress(report)
        finally:
            random.setstate(state)
            if collects:
                gc.enable()
        return report


def _failure(schedule: Schedule, world: World, error: Exception) -> Failure:
    message = str(error) or repr(error)
    rule = error.rule if isinstance(error, Violation) else message.partition(":")[0]
    if not isinstance(error, (Violation, InternalError)):
        rule = type(error).__name__  # the manager or the core failed of it
        message = f"{rule}: {message}"
    story = error.story if isinstance(error, InternalError) and error.story else world.core.story()
    number = error.number if isinstance(error, Violation) else 0
    if number and (future := world.oracle.futures.get(number)) is not None:
        story = f"{story}\n{future.story()}"
    return Failure(rule, message, schedule, story)


def simulate(
    schedules: int = 1000,
    *,
    seed: int = 0,
    settings: Sequence[PoolSettings] | None = None,
    specs: Sequence[Any] | None = None,
) -> Report:
    """Play so many schedules with these settings and task options (`TaskSpec`, policies included), or the kit's own.

    For a test of your own policy:

        report = simulate(2000, specs=[TaskSpec(policy=compile_policy(mine)), TaskSpec()])
        assert not report.failures, report.failures[0]
    """
    return Simulator(palette=Palette(settings=settings, specs=specs)).run(range(schedules), seed)
