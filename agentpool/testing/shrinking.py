"""Cuts a schedule that fails down to the steps that it fails by: delta debugging, after Zeller.

Any part of a schedule is a schedule (see `world`), so steps are left out, half of them, a quarter, single ones, as long
as the same rule is broken; then numbers are made 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from agentpool.config import PoolSettings
from agentpool.testing.simulator import Failure, Schedule, Simulator

__all__ = ["shrunken"]

#: Schedules that are tried at most.
_TRIES = 3000


class _Shrinker:
    def __init__(self, play: Callable[[Schedule], Failure | None], failure: Failure) -> None:
        self._play = play
        self.best = failure
        self._tries = 0

    def accept(self, schedule: Schedule) -> bool:
        """Does this smaller one break the same rule? Then it is the best."""
        if self._tries >= _TRIES:
            return False
        self._tries += 1
        found = self._play(schedule)
        if found is None or found.rule != self.best.rule:
            return False
        self.best = found
        return True

    def cut(self) -> None:
        """Leave out steps."""
        size = max(1, len(self.best.schedule.steps) // 2)
        while True:
            start = 0
            has_cut = False
            while start < len(self.best.schedule.steps):
                steps = self.best.schedule.steps
                if self.accept(replace(self.best.schedule, steps=steps[:start] + steps[start + size:])):
                    has_cut = True
                else:
                    start += size
            if size == 1 and not has_cut:
                return
            size = max(1, size // 2) if not has_cut or size > 1 else 1

    def simplify(self) -> None:
        """Make numbers small."""
        for index in range(len(self.best.schedule.steps)):
            name, a, b = self.best.schedule.steps[index]
            for simpler in ((name, 0, 0), (name, 0, b), (name, a, 0), (name, a & 7, b & 7), (name, a & 31, b & 31)):
                steps = self.best.schedule.steps
                if simpler != steps[index] and self.accept(
                    replace(self.best.schedule, steps=(*steps[:index], simpler, *steps[index + 1:]))
                ):
                    break

    def plain_settings(self) -> None:
        """Put the defaults where they do."""
        plain = PoolSettings()
        for name in [f.name for f in fields(plain)]:
            settings = self.best.schedule.settings
            value = getattr(plain, name)
            if getattr(settings, name) == value:
                continue
            try:
                changed = replace(settings, **{name: value})
            except ValueError:  # it does not go with the others
                continue
            self.accept(replace(self.best.schedule, settings=changed))


def shrunken(simulator: Simulator, failure: Failure) -> Failure:
    """The smallest schedule that is found to break the same rule."""
    shrinker = _Shrinker(simulator.play, failure)
    shrinker.cut()
    shrinker.simplify()
    shrinker.plain_settings()
    shrinker.cut()
    return shrinker.best
