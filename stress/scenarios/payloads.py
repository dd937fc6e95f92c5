"""Arguments and results from nothing to 256 MiB, both ways: each arrives whole, and is the right one."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final

from stress import work
from stress.scenarios import Scenario

if TYPE_CHECKING:
    from stress.harness import Run

MIB: Final = 1024 * 1024
SIZES: Final = (0, 1, 100, 4095, 4096, 65_535, 65_536, 65_537, 1 * MIB, 8 * MIB, 64 * MIB, 256 * MIB)
#: Tasks open at once: the largest are made, kept and compared in this process.
OPEN: Final = 3


def play(run: Run) -> None:
    """All sizes by turns, small ones more often; given, taken, or both."""
    for number in run.budget():
        size = SIZES[number // 3 % len(SIZES)]
        way = number % 3
        if way == 0:
            _echo(run, size)
        elif way == 1:
            run.submit("give", work.give, size, expect=_given(run, size))
        else:
            _take(run, size)
        run.calm(OPEN)


def _echo(run: Run, size: int) -> None:
    data = work.payload(run.seed, -1, size)
    run.submit("echo", work.echo, data, expect=lambda right, value: bool(value == (right, data)))


def _take(run: Run, size: int) -> None:
    data = work.payload(run.seed, -2, size)
    checksum = zlib.crc32(data)
    run.submit("take", work.take, data, expect=lambda right, value: bool(value == (right, checksum)))


def _given(run: Run, size: int) -> Any:
    def is_right(right: int, value: Any) -> bool:
        if value[0] != right or len(value[1]) != size:
            return False
        number = next(number for number in range(10**9) if work.right_value(run.seed, number) == right)
        return bool(value[1] == work.payload(run.seed, number, size))

    return is_right


SCENARIO = Scenario(name="payloads", title="0 B to 256 MiB, both ways", play=play, tasks=144, brief=36, workers=2,
                    settings={"memory_limit_mb": 2000}, patience=120.0)
