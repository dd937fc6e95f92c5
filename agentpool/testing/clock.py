"""Time that moves only when a test moves it."""

from __future__ import annotations

__all__ = ["VirtualClock"]


class VirtualClock:
    """Stands where the module `time` stands: `monotonic()` is all that a pool's runtime asks."""

    __slots__ = ("now",)

    def __init__(self, now: float = 1000.0) -> None:
        # Not 0: what takes 0 for "never" would pass unnoticed.
        self.now = now

    def monotonic(self) -> float:
        """The time now, in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass. A suspended machine shows as one large step; the clock never goes back."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock does not go back: {seconds!r}")
        self.now += seconds
