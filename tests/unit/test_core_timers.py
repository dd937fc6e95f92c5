from __future__ import annotations

from agentpool.core.timers import Timer, TimerQueue


class Named(TimerQueue):
    """Timers that note their names when they fire."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def add_named(self, when: float, name: str) -> Timer:
        return self.add(when, lambda now: self.names.append(name))

    def fired(self, now: float) -> list[str]:
        """What fires at `now`."""
        self.names.clear()
        self.fire_due(now)
        return list(self.names)


def test_timers_fire_when_due_soonest_first() -> None:
    timers = Named()
    timers.add_named(3.0, "late")
    timers.add_named(1.0, "soon")
    timers.add_named(2.0, "middle")
    assert timers.next_deadline() == 1.0
    assert timers.fired(0.9) == []
    assert timers.fired(2.0) == ["soon", "middle"]
    assert timers.next_deadline() == 3.0
    assert len(timers) == 1


def test_timers_of_one_moment_fire_in_the_order_in_which_they_were_set() -> None:
    timers = Named()
    for name in "abcdef":
        timers.add_named(1.0, name)
    assert timers.fired(1.0) == list("abcdef")


def test_the_handler_gets_the_present_time() -> None:
    seen: list[float] = []
    timers = Named()
    timers.add(1.0, seen.append)
    timers.fire_due(5.0)
    assert seen == [5.0]


def test_what_a_handler_sets_for_now_fires_in_the_same_pass() -> None:
    timers = Named()
    timers.add(1.0, lambda now: timers.names.append(timers.add_named(now, "second") and "first"))
    assert timers.fired(1.0) == ["first", "second"]


def test_a_cancelled_timer_does_not_fire_and_is_no_deadline() -> None:
    timers = Named()
    timer = timers.add_named(1.0, "cancelled")
    timers.add_named(2.0, "kept")
    timers.cancel(timer)
    assert timers.next_deadline() == 2.0
    assert timers.fired(5.0) == ["kept"]
    assert timers.next_deadline() is None
    assert len(timers) == 0


def test_to_cancel_nothing_or_twice_or_too_late_is_harmless() -> None:
    timers = Named()
    timer = timers.add_named(1.0, "x")
    timers.cancel(None)
    timers.fire_due(1.0)
    timers.cancel(timer)
    other = timers.add_named(2.0, "y")
    timers.cancel(other)
    timers.cancel(other)
    assert len(timers) == 0


def test_cancelled_timers_do_not_pile_up() -> None:
    timers = Named()
    kept = timers.add_named(1e6, "kept")
    for number in range(10_000):
        timers.cancel(timers.add_named(1e5 + number, "gone"))
    assert len(timers._heap) < 200
    assert timers.next_deadline() == kept.when


def test_what_was_cancelled_is_not_counted_when_it_was_swept_out() -> None:
    queue = TimerQueue()
    timers = [queue.add(float(number), print) for number in range(400)]
    for timer in timers[:300]:
        queue.cancel(timer)
    assert len(queue) == 100
    assert queue.next_deadline() == 300.0
