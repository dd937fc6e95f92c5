"""What imagined tasks do, whoever runs them: the troubles that a task brings along, as opposed to what befalls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from agentpool.config import MB
from agentpool.testing.process import FakeProcess, How

if TYPE_CHECKING:
    from agentpool.testing.oracle import FakeFuture

__all__ = ["FATES", "Fate", "move_on"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """kills: workers that die of it, before it returns. errors: attempts that raise, before it returns. seconds: how
    long it takes. hangs: it returns only when it is stopped. is_deaf: and it cannot be asked to. grows: memory that it
    takes as it begins; in_tool: in a process that it starts.
    """

    kills: int = 0
    exit_code: int = -11
    errors: int = 0
    seconds: float = 0.0
    hangs: bool = False
    is_deaf: bool = False
    grows: int = 0
    in_tool: bool = False
    how: How = How.VALUE


#: Recorded schedules name them by their place: add at the end only.
FATES: Final = (
    Fate(), Fate(), Fate(), Fate(), Fate(),
    Fate(kills=1),
    Fate(kills=9, exit_code=1),
    Fate(hangs=True),
    Fate(hangs=True, is_deaf=True),
    Fate(seconds=0.2),
    Fate(seconds=1.0),
    Fate(errors=1),
    Fate(errors=9),
    Fate(seconds=1.0, grows=420 * MB),
    Fate(seconds=1.0, grows=250 * MB, in_tool=True),
    Fate(grows=120 * MB),
    Fate(how=How.LARGE),
    Fate(how=How.AGAIN),
    Fate(seconds=0.2, kills=2),
)


def move_on(process: FakeProcess, future: FakeFuture | None, *, how: int = How.VALUE, is_held: bool = False,
            seconds: float | None = None, is_last: bool = False) -> bool:
    """The worker's next move, as the task that it runs (`future`) would have it. False: it makes none for now.

    `is_last`: nobody will interfere any more, so a hanging task that nothing stops gives in.
    """
    if future is None or process.current is None or process.half_written is not None:
        return process.move(how, is_held=is_held, seconds=seconds)
    if process.is_frozen or process.is_dead:
        return False
    fate = future.fate
    is_asked = process.stop_wanted == process.current.task_id and not fate.is_deaf
    if future.deaths < fate.kills and not is_asked:
        process.die(fate.exit_code)
        return True
    if fate.hangs and not is_asked and not (is_last and future.spec.timeout is None):
        return False
    if process.machine.clock.now < process.began_at + fate.seconds and not is_asked:
        return False
    if future.ended < fate.errors:
        how = How.ERROR
    elif how == How.VALUE:
        how = fate.how
    return process.move(how, is_held=is_held, seconds=None if fate.seconds else seconds)
