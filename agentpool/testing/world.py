"""One schedule's world: a pool's manager, its users, and the imaginary machine below it; who goes on when.

The manager's thread takes its turns here. While it sleeps the steps of the schedule are done, and when none is left
everybody behaves, until the pool is closed. What the steps can be stands in `moves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from agentpool.config import PoolSettings
from agentpool.core.records import TaskSpec
from agentpool.core.transitions import BreakerState
from agentpool.testing.moves import Moves
from agentpool.testing.oracle import Oracle, Violation
from agentpool.testing.process import FRESH_BYTES
from agentpool.testing.reactor import FakeReactor
from agentpool.testing.stage import Stage

__all__ = ["World"]

#: Turns that the manager may take, at the end, without anything coming of them.
_PATIENCE: Final = 600
#: After so many of them it is late by this, in seconds: of the readings during a long wait not each needs its own turn.
_DULL: Final = 6
_LATE: Final = 0.25


class World(Moves):
    """One schedule's world. `play` is what `simulator` calls; the moves may be called by hand as well."""

    def __init__(self, stage: Stage, settings: PoolSettings, specs: Sequence[TaskSpec], seed: int = 0) -> None:
        super().__init__(stage, settings, specs, Oracle(self), seed)
        self.machine.passing = self._passing
        stage.between = self._between
        #: what `play` has still to do, last first
        self._steps: list[tuple[str, int, int]] = []
        #: turns since something came of one, at the end
        self._idle_turns = 0

    @property
    def is_locked(self) -> bool:
        """Somebody has the pool's lock."""
        return bool(self.pool.lock.is_held)  # type: ignore[attr-defined]  # the stage's lock

    @property
    def _reactor(self) -> FakeReactor:
        return self.pool._reactor  # type: ignore[return-value]  # the stage's

    # -- playing -------------------------------------------------------------------------------------------------

    def play(self, steps: Sequence[tuple[str, int, int]]) -> None:
        """Do all of it, then let everybody behave until the pool is closed. Raises `Violation` or `InternalError`."""
        self._steps = list(reversed(steps))
        pool, stage = self.pool, self.stage
        reached = all_turns = 0
        while not pool.is_finished:
            if not stage.is_started:
                self._without_a_thread()
                continue
            stage.turn(pool)
            if self.is_ending:
                self._idle_turns += 1
                all_turns += 1
                progress = self.oracle.settlements + self.oracle.begins
                if progress != reached:
                    self._idle_turns, reached = 0, progress
                if self._idle_turns > _PATIENCE or all_turns > 10 * _PATIENCE:
                    raise Violation("everything_ends", f"nothing comes of {self._idle_turns} turns of {all_turns}",
                                    self._stuck())
        self._look_back()

    def _without_a_thread(self) -> None:
        """The pool was not used yet: it has no manager thread, and nobody waits."""
        if self._steps:
            self._apply(self._steps.pop())
        else:
            self.pool.shutdown(wait=False, cancel_futures=False)

    def _look_back(self) -> None:
        if self.oracle.open:
            raise Violation("accepted_is_settled", f"never settled: {list(self.oracle.open)}", self._stuck())
        machine = self.machine
        if living := machine.living():
            raise Violation("nobody_outlives_the_pool", f"{living} live")
        if machine.channels or machine.pidfds:
            raise Violation("nothing_is_leaked", f"open: channels {list(machine.channels.values())}, pidfds "
                            f"{list(machine.pidfds)}")
        if self.stage.log.failures:
            raise Violation("the_manager_does_not_fail", "; ".join(self.stage.log.failures))

    def release(self) -> None:
        """Let go of everything, so that no collector is needed: a world is one large cycle, and there are millions."""
        pool, machine = self.pool, self.machine
        self.stage.between = machine.passing = None
        machine.release()
        for owner in (self.oracle, pool._reception, pool._staff, self.core, pool, self):
            owner.__dict__.clear()

    def _stuck(self) -> int:
        return next(iter(self.oracle.open), 0)

    def _apply(self, step: tuple[str, int, int]) -> None:
        name, a, b = step
        getattr(self, "do_" + name)(a, b)

    def _passing(self, seconds: float | None) -> None:
        """The manager's thread sleeps, for so many seconds at most: the others go on."""
        self.retry_blocked()
        if seconds is not None and seconds <= 0:
            return
        until = None if seconds is None else self.machine.clock.now + seconds
        with self.stage.as_user():
            self._others_go_on(until)

    def _others_go_on(self, until: float | None) -> None:
        steps = self._steps
        while steps:
            step = steps.pop()
            if step[0] == "turn":
                if self._sleep(until):
                    self.machine.order = step[1]
                    return
            elif step[0] == "behave":
                self.be_kind()
                if self._sleep(until):
                    return
            else:
                self._apply(step)
        self._end(until)

    def _sleep(self, until: float | None) -> bool:
        """The manager's thread is let go on. False: it would sleep for ever."""
        if self._reactor.has_cause:
            return True
        if until is None:
            return False
        clock = self.machine.clock
        end = self.next_end()
        clock.now = max(clock.now, until if end is None else min(until, end))
        deadline = self.core.next_deadline()
        if deadline is not None and deadline < clock.now and deadline < until:
            raise Violation("deadlines_are_kept", f"the manager sleeps until {until}, the core wants to be told at "
                            f"{deadline}")
        return True

    def _between(self) -> None:
        """Another thread takes the lock before the manager does."""
        if self._steps and self._steps[-1][0] not in ("turn", "behave", "race"):
            self._apply(self._steps.pop())

    # -- the end -------------------------------------------------------------------------------------------------

    def _end(self, until: float | None) -> None:
        """Nothing is left to do: everybody behaves, until the pool has nothing more to do and is closed."""
        if not self.is_ending:
            self.is_ending = True
            self._make_well()
        while self.be_kind():
            if self._reactor.has_cause:
                return
        if self._reactor.has_cause:
            return
        core, pool = self.core, self.pool
        if core.breaker.state is BreakerState.FORCED_OPEN and not core.is_closing:
            pool.reset_breaker()
        elif core.is_paused:
            self.do_resume(0, 0)
        elif not self.oracle.open and not core.is_closing:
            if self.blocked:
                raise Violation("room_is_announced", f"{len(self.blocked)} wait for room, and there is nothing queued")
            pool.shutdown(wait=False, cancel_futures=False)
        elif until is None and (end := self.next_end()) is not None and end > self.machine.clock.now:
            self.machine.clock.now = end
        elif not self._sleep(until):
            raise Violation("everything_ends", "the manager sleeps for ever", self._stuck())
        elif self._idle_turns > _DULL and not self._reactor.has_cause:
            self.machine.clock.now += _LATE

    def _make_well(self) -> None:
        machine = self.machine
        machine.is_exhausted = False
        machine.available_bytes, machine.cpu_percent, machine.pressure_percent = machine.total_bytes // 2, 5.0, None
        for process in machine.processes.values():
            process.rss_bytes = FRESH_BYTES
            process.tools.clear()
        self.stage.countdown = 0
        self.close_sessions()
