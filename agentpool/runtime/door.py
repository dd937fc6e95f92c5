"""The control socket's place in a pool: when it is opened, and that its first client is seen.

Knows nothing of what goes over it (`agentpool.control`, a floor above, hands in how to open it). The manager thread's,
but for `abandon`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

from agentpool.io.reactor import Reactor

__all__ = ["Control", "Door"]

log = logging.getLogger("agentpool")

#: From the first task to the opening, in seconds: nobody's first result waits for that.
_OPEN_AFTER: Final = 0.05


class Control(Protocol):
    """The pool's control socket. Its methods never wait for the manager thread."""

    def fileno(self) -> int:
        """Readable when the first client comes."""

    def start(self) -> None:
        """Serve clients, in a thread of its own. Raises OSError or RuntimeError where there is none to be had."""

    def show_breaker(self, pool: str, state: str, reason: str) -> None:
        """Have it seen without asking. Raises nothing."""

    def close(self) -> None:
        """Remove the socket."""

    def abandon(self) -> None:
        """In a forked copy of the process: let go of it."""


class Door:
    """See the module. `opener` is set by the pool before its first task, where it is to have a socket."""

    __slots__ = ("_breaker", "_control", "_due", "_name", "_reactor", "is_due", "opener")

    def __init__(self, name: str, reactor: Reactor) -> None:
        self._name = name
        self._reactor = reactor
        self._control: Control | None = None
        self._due = 0.0
        #: state and reason, where it ever changed
        self._breaker: tuple[str, str] | None = None
        self.opener: Callable[[], Control] | None = None
        #: it is to be opened: `wait_or_open` wants to be asked
        self.is_due = False

    @property
    def is_open(self) -> bool:
        """There is a socket."""
        return self._control is not None

    def open_soon(self) -> None:
        """The manager thread has begun."""
        if self.opener is not None:
            self._due = time.monotonic() + _OPEN_AFTER
            self.is_due = True

    def wait_or_open(self, seconds: float | None) -> float | None:
        """Open it when it is time. Returns how long to wait for events: `seconds`, or less, to open it then."""
        left = self._due - time.monotonic()
        if left > 0:
            return left if seconds is None else min(seconds, left)
        self.is_due = False
        opener, self.opener = self.opener, None
        assert opener is not None
        try:
            self._control = opener()
            self._reactor.watch(self._control.fileno(), self._first_client)
            if self._breaker is not None:
                self._control.show_breaker(self._name, *self._breaker)
        except OSError as error:
            log.info("pool %s has no control socket, and works without one: %s", self._name, error)
        return seconds

    def breaker_changed(self, state: str, reason: str) -> None:
        """Show it to whoever looks."""
        self._breaker = state, reason
        if self._control is not None:
            self._control.show_breaker(self._name, state, reason)

    def _first_client(self) -> None:
        assert self._control is not None
        self._reactor.unwatch(self._control.fileno())
        try:
            self._control.start()
        except (OSError, RuntimeError) as error:
            log.warning("pool %s cannot be operated from outside: %s", self._name, error)
            self.close()

    def close(self) -> None:
        """The pool is over. May be called twice."""
        control, self._control = self._control, None
        if control is not None:
            self._reactor.unwatch(control.fileno())
            control.close()

    def abandon(self) -> None:
        """In a forked copy of the process: touch nothing of the parent's."""
        self.is_due = False
        if self._control is not None:
            self._control.abandon()
