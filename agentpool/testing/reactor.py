"""Stands for `agentpool.io.reactor.Reactor`: waits for the descriptors of a `Machine`, in virtual time."""

from __future__ import annotations

from collections.abc import Callable

from agentpool.testing.machine import Machine

__all__ = ["FakeReactor"]


class FakeReactor:
    """The same methods. Level-triggered, as epoll is: what was not taken is ready again the next time."""

    __slots__ = ("is_closed", "is_woken", "machine", "readers", "writers")

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.readers: dict[int, Callable[[], None]] = {}
        self.writers: dict[int, Callable[[], None]] = {}
        self.is_woken = False
        self.is_closed = False

    def watch(self, descriptor: int, on_readable: Callable[[], None]) -> None:
        """Call `on_readable` whenever there is something to read, or the other end is closed."""
        self.readers[descriptor] = on_readable

    def watch_writing(self, descriptor: int, on_writable: Callable[[], None]) -> None:
        """Call `on_writable` whenever there is room to write."""
        self.writers.setdefault(descriptor, on_writable)

    def unwatch_writing(self, descriptor: int) -> None:
        """No longer wait for room."""
        self.writers.pop(descriptor, None)

    def unwatch(self, descriptor: int) -> None:
        """Forget the descriptor."""
        self.readers.pop(descriptor, None)
        self.writers.pop(descriptor, None)

    def wake(self) -> None:
        """Make `wait` return."""
        self.is_woken = True

    @property
    def has_cause(self) -> bool:
        """Would `wait` return at once?"""
        machine = self.machine
        return (
            self.is_woken
            or not machine.readable.isdisjoint(self.readers)
            or not machine.writable.isdisjoint(self.writers)
        )

    def wait(self, seconds: float | None) -> list[Callable[[], None]]:
        """The callbacks of what is ready. The world goes on, through `machine.passing`, until it should return.

        `machine.order` is a number that decides which of them come, and how they are ordered: of two things that
        happened at the same time a real reactor returns either first, or one now and one with the next turn.
        """
        machine = self.machine
        if machine.passing is not None:
            machine.passing(seconds)
        elif seconds is not None and not self.has_cause:
            machine.clock.advance(max(0.0, seconds))
        self.is_woken = False
        readable, writable = machine.readable, machine.writable
        due = [callback for descriptor, callback in self.readers.items() if descriptor in readable]
        if self.writers:
            due += [callback for descriptor, callback in self.writers.items() if descriptor in writable]
        order, count = machine.order, len(due)
        if order and count > 1:
            machine.order = 0
            first = order % count
            due = due[first:] + due[:first]
            if order & 8:
                due.reverse()
            if order & 16:
                del due[1:]
        return due

    def close(self) -> None:
        """Wait no more."""
        self.is_closed = True
        self.readers.clear()
        self.writers.clear()
