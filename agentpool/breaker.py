"""The circuit breaker as users hold it: a handle on that of one pool. The deciding is in `agentpool.core.breaker`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from agentpool.errors import SettingsError

if TYPE_CHECKING:
    from agentpool.pool import AgentPool

__all__ = ["ResourceCircuitBreaker"]

_LONGEST_SECONDS: Final = 366 * 86400.0


class ResourceCircuitBreaker:
    """The breaker in front of a pool's spawn path. Without a pool: that of `get_agent_pool()`.

    It forbids only to start processes: running workers go on, tasks wait.
    """

    def __init__(self, pool: AgentPool | None = None) -> None:
        if pool is None:
            from agentpool.pool import get_agent_pool

            pool = get_agent_pool()
        self._manager = pool._manager

    def get_state(self) -> str:
        """ "closed" (starts are allowed), "open", "half_open" (one is tried) or "forced_open"."""
        return self._manager.core.breaker.state.label

    @property
    def state(self) -> str:
        """See `get_state`."""
        return self.get_state()

    @property
    def failure_count(self) -> int:
        """Failed starts within the window (60 s by default)."""
        with self._manager.lock:
            return self._manager.core.breaker.failure_count(time.monotonic())

    @property
    def reason(self) -> str:
        """Why it is not closed, in words; "" while it is."""
        return self._manager.core.breaker.reason

    def as_dict(self) -> dict[str, Any]:
        """State, failure count and reason, for reports."""
        return {"state": self.state, "failure_count": self.failure_count, "reason": self.reason}

    @property
    def seconds_left(self) -> float | None:
        """For how long it is still forced open or held closed; None: no such time was given."""
        until = self._manager.core.breaker.by_hand_until
        return None if until is None else max(0.0, until - time.monotonic())

    @property
    def is_held_closed(self) -> bool:
        """Is it closed because `hold_closed` said so?"""
        return self._manager.core.breaker.is_held_closed

    def force_open(self, reason: str = "forced open by hand", seconds: float | None = None) -> None:
        """Forbid to start any process until `reset`, or for so many seconds; then it is as after `reset`.

        Raises SettingsError where `seconds` is not above 0.
        """
        self._manager.force_open(reason, None if seconds is None else _checked(seconds))

    def hold_closed(self, seconds: float) -> None:
        """Close it for so many seconds, whatever fails and however little memory there is; then it judges anew.

        Raises SettingsError where `seconds` is not above 0.
        """
        self._manager.hold_closed(_checked(seconds))

    def reset(self) -> None:
        """Close it and forget the failures. Want of memory opens it again at the next reading."""
        self._manager.reset_breaker()

    def add_listener(self, listener: Callable[[str, str, str], None]) -> None:
        """Have `listener(old, new, reason)` called after each change, in the pool's manager thread: be quick."""
        self._manager.listeners.append(listener)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.state}{': ' + self.reason if self.reason else ''}>"


def _checked(seconds: float) -> float:
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds <= _LONGEST_SECONDS:
        raise SettingsError(f"seconds must be a number above 0, at most {_LONGEST_SECONDS:g} (a year), got {seconds!r}")
    return seconds
