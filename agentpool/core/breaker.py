"""The circuit breaker in front of the spawn path: may a worker process be started now, and if not, why.

It counts failed starts, and takes holds ("host has 312 MB available, needs 512") from the governor. It never stops
a running worker or task. Knows no clock; called only by the scheduler.
"""

from __future__ import annotations

import math
from collections import deque

from agentpool.config import BreakerSettings
from agentpool.core.transitions import BREAKER_TRANSITIONS, BreakerState, allowed_masks
from agentpool.errors import InternalError

__all__ = ["Breaker"]

_ALLOWED = allowed_masks(BREAKER_TRANSITIONS)
_CLOSED, _OPEN, _HALF_OPEN, _FORCED = BreakerState


class Breaker:
    """State, failures and holds.

    Rules: nothing starts while OPEN or FORCED_OPEN; HALF_OPEN admits one start, the probe, at a time; a hold keeps
    the breaker open until it is released, whatever the time; FORCED_OPEN ends with `reset` or with the time that it was
    ordered for, and so does being held closed. A probe stays the probe
    until it ended, whatever the breaker's state is by then: a hold that comes and goes admits no second one.
    """

    __slots__ = ("_failure_reason", "_failures", "_open_seconds", "by_hand_until", "changes", "holds",
                 "is_held_closed", "is_probing", "reason", "retry_at", "settings", "state")

    def __init__(self, settings: BreakerSettings) -> None:
        self.settings = settings
        self.state = _CLOSED
        #: why it is not closed, in words; "" while closed
        self.reason = ""
        #: name -> why, for every condition that forbids starts at present
        self.holds: dict[str, str] = {}
        #: a start that HALF_OPEN admitted is in flight
        self.is_probing = False
        #: when OPEN becomes HALF_OPEN, holds permitting; -inf while no failed starts keep it from being closed
        self.retry_at = -math.inf
        #: neither failed starts nor holds open it: somebody ordered so, for a time
        self.is_held_closed = False
        #: when what was ordered by hand is over; None: it lasts until `reset`, or there is nothing of that kind
        self.by_hand_until: float | None = None
        #: (old, new, reason), taken by the scheduler for the listeners
        self.changes: list[tuple[BreakerState, BreakerState, str]] = []
        self._failures: deque[float] = deque()
        self._failure_reason = ""
        self._open_seconds = settings.open_seconds

    def _move(self, state: BreakerState, reason: str) -> None:
        if not _ALLOWED[self.state] >> state & 1:
            raise InternalError(f"breaker cannot go from {self.state.name} to {state.name} ({reason})")
        self.changes.append((self.state, state, reason))
        self.state = state
        self.reason = reason

    def failure_count(self, now: float) -> int:
        """Failed starts within the window."""
        while self._failures and self._failures[0] <= now - self.settings.window_seconds:
            self._failures.popleft()
        return len(self._failures)

    def allows_start(self) -> bool:
        """May one worker be started now?"""
        return self.state is _CLOSED or (self.state is _HALF_OPEN and not self.is_probing)

    def start_began(self) -> bool:
        """A start is under way. True: it is the probe."""
        if self.state is not _HALF_OPEN:
            return False
        self.is_probing = True
        return True

    def start_succeeded(self, *, is_probe: bool) -> None:
        """A worker became ready."""
        if not is_probe:
            return
        self.is_probing = False
        if self.state is _HALF_OPEN:
            self._failures.clear()
            self.retry_at = -math.inf
            self._open_seconds = self.settings.open_seconds
            self._move(_CLOSED, "")

    def start_failed(self, now: float, why: str, *, is_probe: bool) -> None:
        """A worker failed to become ready, or died idle without a culprit."""
        self._failures.append(now)
        count = self.failure_count(now)
        if is_probe:
            self.is_probing = False
        if is_probe and self.state is _HALF_OPEN:
            self._open_seconds = min(self._open_seconds * 2, self.settings.max_open_seconds)
            self._open(now, f"the probe failed: {why}")
        elif self.state is _CLOSED and count >= self.settings.failure_threshold and not self.is_held_closed:
            self._open(now, f"{count} failed starts within {self.settings.window_seconds:g} s, last: {why}")

    def probe_abandoned(self) -> None:
        """The probe ended for no fault of its own (the pool stopped it)."""
        self.is_probing = False

    def _open(self, now: float, reason: str) -> None:
        self.retry_at = now + self._open_seconds
        self._failure_reason = reason
        self._move(_OPEN, reason)

    def hold(self, name: str, reason: str) -> None:
        """Forbid starts until `release(name)`. Nothing while it is held closed: what still applies comes again."""
        if self.is_held_closed:
            return
        is_new = self.holds.get(name) != reason
        self.holds[name] = reason
        if self.state in (_CLOSED, _HALF_OPEN):
            self._move(_OPEN, reason)
        elif self.state is _OPEN and is_new:
            self.reason = reason  # the figures in it are fresher

    def release(self, name: str, now: float) -> None:
        """The named condition is over. With the last one it closes, unless failed starts had opened it as well.

        A probe would prove nothing about memory: the readings that ended the hold did.
        """
        if self.holds.pop(name, None) is None or self.state is not _OPEN:
            return
        if self.holds:
            self.reason = next(iter(self.holds.values()))
        elif self.retry_at == -math.inf:
            self._move(_CLOSED, "")
        elif self.retry_at <= now:
            self._move(_HALF_OPEN, "memory suffices again, and one worker is tried")
        else:
            self.reason = self._failure_reason

    def tick(self, now: float) -> None:
        """OPEN becomes HALF_OPEN when its time is over and nothing holds it. What was ordered for a time ends."""
        if self.by_hand_until is not None and now >= self.by_hand_until:
            self.reset()
        if self.state is _OPEN and not self.holds and now >= self.retry_at:
            self._move(_HALF_OPEN, "waiting time is over, and one worker is tried")

    def deadline(self) -> float | None:
        """When `tick` would change something; None: not by time."""
        if self.by_hand_until is not None:
            return self.by_hand_until
        return self.retry_at if self.state is _OPEN and not self.holds else None

    def force_open(self, reason: str, until: float | None = None) -> None:
        """Forbid all starts until `reset`, or until that time, which does the same."""
        reason = reason or "forced open by hand"
        self.is_held_closed = False
        self.by_hand_until = until
        if self.state is _FORCED:
            self.reason = reason
        else:
            self._move(_FORCED, reason)

    def hold_closed(self, until: float) -> None:
        """Allow starts until that time, whatever fails and however little memory there is; then judge anew."""
        self.reset()
        self.is_held_closed = True
        self.by_hand_until = until

    def reset(self) -> None:
        """Close, forget all failures and what was ordered. Holds that still apply open it again at the next reading."""
        self._failures.clear()
        self.holds.clear()
        self.is_held_closed = False
        self.by_hand_until = None
        self.retry_at = -math.inf
        self._open_seconds = self.settings.open_seconds
        if self.state is not _CLOSED:
            self._move(_CLOSED, "")
