"""Large calls and results in shared memory: whole, private to who has them, and gone when nobody has."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest

from agentpool import AgentPool, WorkerCrashedError
from agentpool.config import MB
from agentpool_worker.arena import SHARED_FROM
from agentpool_worker.protocol import KEPT_BLOCKS, LENT_BLOCKS

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

LONG = 60.0
LARGE = 3 * MB + 17
MakePool = Callable[..., AgentPool]


class Array:
    """Travels out of band, as arrays of NumPy do, and is as writable."""

    def __init__(self, data: Any) -> None:
        self.data = memoryview(data).cast("B")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Array, (pickle.PickleBuffer(self.data),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]


def pattern(seed: int, size: int = LARGE) -> Array:
    return Array(bytearray(bytes((seed * 31 + step) % 251 for step in range(4096)) * (size // 4096 + 1))[:size])


def echo(value: Any) -> Any:
    return value


def pages(pool: AgentPool) -> int:
    """Memory that the arena takes, in units of 512 bytes."""
    return os.fstat(pool._manager._staff.arena.descriptor).st_blocks


def is_in_arena(array: Array) -> bool:
    """Does the memory of this array lie in an arena?"""
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if first <= address < last:
                return "agentpool-arena" in line
    return False


@pytest.mark.parametrize("size", [SHARED_FROM - 4096, SHARED_FROM, SHARED_FROM + 1, MB, LARGE, 40 * MB])
def test_what_is_sent_and_returned_is_whole(make_pool: MakePool, size: int) -> None:
    with make_pool(2, memory_limit_mb=None) as pool:
        for seed in range(4):
            array, text = pattern(seed, size), bytes(pattern(seed, size).data)
            assert pool.submit(echo, array).result(LONG) == array
            assert pool.submit(echo, text).result(LONG) == text
            assert pool.submit(lambda a, b, c: (c, b, a), array, text, "x").result(LONG) == ("x", text, array)


def test_several_arrays_of_one_call_and_one_result(make_pool: MakePool) -> None:
    with make_pool(1) as pool:
        arrays = [pattern(seed, size) for seed, size in enumerate((100, SHARED_FROM, 70_001, LARGE))]
        assert pool.submit(echo, arrays).result(LONG) == arrays


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_large_result_lies_in_the_arena_however_the_worker_was_started(make_pool: MakePool, method: str) -> None:
    with make_pool(1, start_method=method) as pool:
        assert pool.submit(is_in_arena, pattern(1)).result(LONG)
        assert is_in_arena(pool.submit(pattern, 2).result(LONG))


def overwrite(array: Array, byte: int) -> bytes:
    before = bytes(array.data[:8])
    array.data[:] = bytes([byte]) * len(array.data)
    return before


def test_what_a_task_writes_to_its_arguments_nobody_else_sees(make_pool: MakePool) -> None:
    array = pattern(1)
    first = bytes(array.data[:8])
    with make_pool(1) as pool:
        for byte in range(6):  # the block is used again and again
            assert pool.submit(overwrite, array, byte).result(LONG) == first
        assert array == pattern(1)
        assert pool.submit(echo, array).result(LONG) == array


def test_what_is_written_to_a_result_nobody_else_sees(make_pool: MakePool) -> None:
    with make_pool(1) as pool:
        for seed in range(6):
            result = pool.submit(pattern, seed).result(LONG)
            assert result == pattern(seed)
            overwrite(result, 0xEE)
            del result


def test_results_that_are_kept_stay_as_they_are(make_pool: MakePool) -> None:
    with make_pool(2) as pool:
        kept = [pool.submit(pattern, seed).result(LONG) for seed in range(4 * KEPT_BLOCKS)]
        assert sum(map(is_in_arena, kept)) >= KEPT_BLOCKS  # the others came through the pipe
        assert kept == [pattern(seed) for seed in range(4 * KEPT_BLOCKS)]
    assert kept == [pattern(seed) for seed in range(4 * KEPT_BLOCKS)]  # after the pool as well


KEPT_ARGUMENTS: list[Array] = []


def keep(array: Array) -> int:
    import builtins

    kept = builtins.__dict__.setdefault("kept_arguments", [])
    kept.append(array)
    return len(kept)


def kept() -> list[Array]:
    import builtins

    return list(builtins.__dict__["kept_arguments"])


def test_arguments_that_a_worker_keeps_stay_as_they_are(make_pool: MakePool) -> None:
    count = 2 * LENT_BLOCKS
    with make_pool(1, memory_limit_mb=None) as pool:
        for seed in range(count):
            assert pool.submit(keep, pattern(seed)).result(LONG) == seed + 1
        assert pool.submit(kept).result(LONG) == [pattern(seed) for seed in range(count)]


def test_more_large_calls_wait_than_there_are_blocks(make_pool: MakePool) -> None:
    with make_pool(2, memory_limit_mb=None) as pool:
        futures = [pool.submit(echo, pattern(seed)) for seed in range(40)]
        for seed, future in enumerate(futures):
            assert future.result(LONG) == pattern(seed)


def test_memory_goes_back_to_the_system_when_it_is_not_used(make_pool: MakePool, wait_until: Any) -> None:
    with make_pool(2, memory_limit_mb=None) as pool:
        for seed in range(4):
            pool.submit(echo, pattern(seed)).result(LONG)
        wait_until(lambda: pages(pool) == 0, "the arena keeps memory that nobody uses")
        result = pool.submit(pattern, 1).result(LONG)
        assert pages(pool) >= LARGE // 512
        assert result == pattern(1)
        del result
        wait_until(lambda: pages(pool) == 0, "the arena keeps the memory of a result that nobody has")


def test_a_busy_worker_gives_the_memory_of_its_last_result_back(make_pool: MakePool, wait_until: Any) -> None:
    with make_pool(1) as pool:
        assert pool.submit(pattern, 1).result(LONG) == pattern(1)
        running = pool.submit(time.sleep, LONG)
        wait_until(lambda: pages(pool) == 0, "the arena keeps memory while a worker is busy")
        running.kill()


def die_with(array: Array, marker: str) -> Array:
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return array


def test_a_call_that_is_made_again_has_the_same_arguments(make_pool: MakePool, tmp_path: Any, wait_until: Any) -> None:
    array = pattern(3)
    with make_pool(1, retry=2) as pool:
        future = pool.submit(die_with, array, str(tmp_path / "marker"))
        overwrite(array, 7)  # the caller's again, once submit has returned
        assert future.result(LONG) == pattern(3)
        del future
        wait_until(lambda: pages(pool) == 0, "a worker that died keeps its blocks")


def test_a_worker_that_dies_takes_no_memory_with_it(make_pool: MakePool, wait_until: Any) -> None:
    with make_pool(2, memory_limit_mb=None) as pool:
        kept = [pool.submit(pattern, seed).result(LONG) for seed in range(2)]
        futures = [pool.submit(lambda _: os.kill(os.getpid(), signal.SIGKILL), pattern(seed)) for seed in range(6)]
        for future in futures:
            with pytest.raises(WorkerCrashedError):
                future.result(LONG)
        del futures, future
        gc.collect()  # the errors' tracebacks
        assert kept == [pattern(0), pattern(1)]
        wait_until(lambda: pages(pool) <= 2 * (LARGE // 512 + 8), "a worker that died keeps its blocks")
        assert kept == [pattern(0), pattern(1)]
        kept.clear()
        wait_until(lambda: pages(pool) == 0, "results of workers that died keep their memory")


def test_a_large_call_that_is_cancelled_gives_its_block_back(make_pool: MakePool, wait_until: Any) -> None:
    with make_pool(1) as pool:
        running = pool.submit(time.sleep, LONG)
        waiting = pool.submit(echo, pattern(1))
        assert pages(pool) > 0
        assert waiting.cancel()
        del waiting
        wait_until(lambda: pages(pool) == 0, "a cancelled call keeps its block")
        running.kill()


def fork_and_look(array: Array, answer: str) -> int:
    """A child that looks at the argument again when the block could long have been used for another call."""
    expected = bytes(array.data)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)  # until the worker closes it, or is told to
        while not os.path.exists(answer + ".go"):
            time.sleep(0.01)
        with open(answer + ".part", "w") as file:
            file.write("same" if bytes(array.data) == expected else "changed")
        os.rename(answer + ".part", answer)
        os._exit(0)
    os.close(reader)
    os.close(writer)
    return pid


def test_a_child_that_a_task_forked_sees_its_arguments_for_ever(
    make_pool: MakePool, tmp_path: Any, wait_until: Any
) -> None:
    answer = tmp_path / "answer"
    with make_pool(1, memory_limit_mb=None) as pool:
        pool.submit(fork_and_look, pattern(1), str(answer)).result(LONG)
        for seed in range(12):
            assert pool.submit(echo, pattern(seed)).result(LONG) == pattern(seed)
        (tmp_path / "answer.go").touch()
        wait_until(answer.exists, "the child did not answer")
        assert answer.read_text() == "same"


PARENT_FORKS = """
import os, sys
from agentpool import AgentPool

def make(byte):
    return Array(bytearray([byte]) * 1_000_003)

class Array:
    def __init__(self, data):
        self.data = memoryview(data).cast("B")
    def __reduce_ex__(self, protocol):
        import pickle
        return Array, (pickle.PickleBuffer(self.data),)

with AgentPool(1) as pool:
    result = pool.submit(make, 1).result(60)
    go_read, go_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go_write)
        os.read(go_read, 1)
        os._exit(0 if bytes(result.data) == b"\\x01" * 1_000_003 else 3)
    os.close(go_read)
    del result
    for byte in range(2, 20):
        assert bytes(pool.submit(make, byte).result(60).data) == bytes([byte]) * 1_000_003
    os.close(go_write)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_of_the_parent_sees_its_results_for_ever() -> None:
    assert subprocess.run([sys.executable, "-c", PARENT_FORKS], timeout=LONG, check=False).returncode == 0


SMALL_FILES = """
import resource, sys
from agentpool import AgentPool
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with AgentPool(1) as pool:
    data = bytes(5_000_000)
    assert pool.submit(len, data).result(60) == 5_000_000
    assert pool.submit(bytes, 5_000_000).result(60) == data
"""


def test_where_files_must_be_small_the_pipe_does() -> None:
    assert subprocess.run([sys.executable, "-c", SMALL_FILES], timeout=LONG, check=False).returncode == 0


def zeros(size: int) -> Array:
    return Array(bytearray(size))


def test_blocks_are_not_counted_as_the_workers_memory(make_pool: MakePool) -> None:
    with make_pool(1, memory_limit_mb=60, critical_memory_mb=10_000) as pool:
        pids = set()
        for _ in range(5):
            future = pool.submit(zeros, 55 * MB)
            assert len(future.result(LONG).data) == 55 * MB
            pids.add(future.worker_pid)
        assert pool.submit(echo, 1).result(LONG) == 1
        stats = pool.get_pool_stats()
    assert len(pids) == 1, stats


def test_many_results_of_short_lived_workers_take_few_descriptors(make_pool: MakePool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with make_pool(2, max_tasks_per_child=1) as pool:
        kept = [future.result(LONG) for future in [pool.submit(pattern, seed, SHARED_FROM) for seed in range(150)]]
        assert len(os.listdir("/proc/self/fd")) - before < 150
    assert kept == [pattern(seed, SHARED_FROM) for seed in range(150)]
