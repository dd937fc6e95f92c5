"""A gigabyte each way at the same time: neither side waits for the other, and small tasks are not held up."""

from __future__ import annotations

import gc
import pickle
import sys
import time
from collections.abc import Iterator

import cloudpickle
import psutil
import pytest

from agentpool import AgentPool
from agentpool.config import MB

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

GIB = 1024 * MB
#: Of everything, in this process and two workers, at the peak, and room for others.
NEEDED = 10 * GIB
LONG = 100
#: Marks are put and looked for this far apart: in no frame of the protocol, read of a pipe or page at the same place.
STEP = 1_000_003

pytestmark = [
    pytest.mark.skipif(psutil.virtual_memory().available < NEEDED, reason="needs 10 GiB of available memory"),
    pytest.mark.timeout(300),
]


@pytest.fixture
def pool() -> Iterator[AgentPool]:
    with AgentPool(2, min_workers=2, memory_limit_mb=None, hard_memory_limit_mb=6 * 1024, critical_memory_mb=12 * 1024,
                   cpu_threshold_percent=100) as pool:
        yield pool
        pool.kill_workers()


def marks(seed: int) -> bytes:
    """One byte for each step through a GiB, which no shift by a page or a read leaves as it is."""
    return bytes((seed + number * number) % 251 for number in range(len(range(0, GIB, STEP))))


def marked(seed: int) -> bytearray:
    data = bytearray(GIB)
    data[::STEP] = marks(seed)
    return data


def is_marked(data: bytes | bytearray | memoryview, seed: int) -> bool:
    """Whole, and every mark where it was put."""
    return len(data) == GIB and bytes(data[::STEP]) == marks(seed)


def make(seed: int) -> bytearray:
    return marked(seed)


def turn(data: bytearray, seed: int, answer: int) -> tuple[bool, bytearray]:
    """Look at what came, and give it back with other marks."""
    is_right = is_marked(data, seed)
    data[::STEP] = marks(answer)
    return is_right, data


def test_an_argument_and_a_result_of_a_gib_at_once(pool: AgentPool) -> None:
    """Two tasks side by side: one is sent a GiB while the other one sends its own."""
    data = bytes(marked(1))
    result, argument = pool.submit(make, 2), pool.submit(is_marked, data, 1)
    del data
    assert argument.result(LONG) is True
    assert is_marked(result.result(LONG), 2)
    del result
    gc.collect()
    assert pool.get_pool_stats()["counters"]["crashed"] == 0


def test_a_task_that_takes_and_gives_a_gib(pool: AgentPool) -> None:
    """Out of band, as arrays travel. Small tasks beside it take no notice."""
    data = marked(3)
    future = pool.submit(turn, pickle.PickleBuffer(data), 3, 4)
    data[::STEP] = bytes(len(marks(3)))  # what was submitted is what counts
    del data
    slowest = 0.0
    while not future.done():
        started = time.monotonic()
        assert pool.submit(abs, -1).result(LONG) == 1
        slowest = max(slowest, time.monotonic() - started)
    is_right, back = future.result(LONG)
    assert is_right
    assert is_marked(back, 4)
    assert slowest < 5, "a small task waited for a large one"
