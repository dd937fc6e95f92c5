"""Memory limits that are not the end: more memory, alone, a tool stopped instead, the kernel's own limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentpool import AgentPool, Escalate, MemoryLimitError

MB = 1024 * 1024
LONG = 60


def need(megabytes: int, log: Path, *, hold: float = 0.0) -> int:
    """Touch so much memory, keep it for a moment, say so in a file."""
    with open(log, "a") as file:
        print("begin", os.getpid(), time.monotonic(), file=file)
    block = bytearray(os.urandom(MB)) * megabytes
    deadline = time.monotonic() + hold
    while time.monotonic() < deadline:
        sum(block[::4096])
    with open(log, "a") as file:
        print("end", os.getpid(), time.monotonic(), file=file)
    return len(block)


def run_tool(megabytes: int) -> int:
    """Start a program that takes so much memory and keeps it; its exit code."""
    program = f"import time; block = bytearray(b'x') * ({megabytes} << 20); time.sleep(60)"
    return subprocess.run([sys.executable, "-c", program], check=False).returncode


def spans(log: Path) -> list[tuple[float, float]]:
    """When each process was in `need`, from its first beginning to its end."""
    found: dict[str, list[float]] = {}
    for line in log.read_text().splitlines():
        _, pid, at = line.split()
        found.setdefault(pid, []).append(float(at))
    return sorted((min(times), max(times)) for times in found.values())


def test_a_task_gets_more_memory_until_it_suffices(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with AgentPool(1) as pool:
        view = pool.options(hard_memory_limit_mb=120, memory_limit_mb=100, retry=Escalate(factor=3))
        future = view.submit(need, 200, log, hold=0.3)
        assert future.result(LONG) == 200 * MB
        assert future.attempts == 2
        assert pool.get_pool_stats()["counters"]["memory_killed"] == 1


def test_the_cap_is_the_end(tmp_path: Path) -> None:
    with AgentPool(1) as pool:
        policy = Escalate(factor=2, cap_mb=150, attempts=3)
        future = pool.options(hard_memory_limit_mb=100, memory_limit_mb=90, retry=policy).submit(
            need, 400, tmp_path / "log", hold=5
        )
        with pytest.raises(MemoryLimitError, match="150 MB") as caught:
            future.result(LONG)
        assert caught.value.limit_bytes == 150 * MB
        assert future.attempts == 3


def test_a_task_that_is_run_alone_is_alone(tmp_path: Path) -> None:
    greedy, others = tmp_path / "greedy", tmp_path / "others"
    with AgentPool(3) as pool:
        policy = Escalate(factor=4, alone=True)
        view = pool.options(hard_memory_limit_mb=120, memory_limit_mb=100, retry=policy)
        future = view.submit(need, 200, greedy, hold=0.5)
        small = [pool.submit(need, 1, others, hold=0.05) for _ in range(30)]
        assert future.result(LONG) == 200 * MB
        assert all(task.result(LONG) for task in small)
    begin, end = spans(greedy)[-1]
    lines = others.read_text().splitlines()
    times = [float(line.split()[2]) for line in lines]
    assert not [at for at in times if begin < at < end], "something ran beside it"


def test_a_tool_is_stopped_and_its_task_goes_on() -> None:
    with AgentPool(1) as pool:
        view = pool.options(hard_memory_limit_mb=150, memory_limit_mb=100, victim="tool")
        future = view.submit(run_tool, 400)
        assert future.result(LONG) == -9
        assert future.attempts == 1
        counters = pool.get_pool_stats()["counters"]
        assert counters["tools_stopped"] >= 1
        assert counters["memory_killed"] == 0
        assert pool.submit(abs, -1).result(LONG) == 1


def test_a_task_without_tools_is_stopped_itself(tmp_path: Path) -> None:
    with AgentPool(1) as pool:
        view = pool.options(hard_memory_limit_mb=120, memory_limit_mb=100, victim="tool")
        with pytest.raises(MemoryLimitError):
            view.submit(need, 400, tmp_path / "log", hold=5).result(LONG)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_kernel_holds_the_second_line(method: str, tmp_path: Path) -> None:
    """Not one byte more than the limit is ever there: the allocation itself fails, and the worker lives on."""
    with AgentPool(1, mp_context=method, data_limit_mb=300) as pool:
        before = pool.submit(os.getpid).result(LONG)
        with pytest.raises(MemoryError) as caught:
            pool.submit(need, 500, tmp_path / "log").result(LONG)
        assert not isinstance(caught.value, MemoryLimitError)
        assert pool.submit(os.getpid).result(LONG) == before


def test_a_gigabyte_a_second_is_stopped_in_time() -> None:
    """The limit is 300 MB; sampling speeds up as it comes near."""
    def grow() -> None:
        blocks = []
        start = time.monotonic()
        while True:
            blocks.append(bytearray(b"x") * (8 * MB))
            ahead = len(blocks) * 8 / 1024 - (time.monotonic() - start)
            if ahead > 0:
                time.sleep(ahead)

    with AgentPool(1, memory_limit_mb=100) as pool:
        with pytest.raises(MemoryLimitError) as caught:
            pool.options(hard_memory_limit_mb=300).submit(grow).result(LONG)
        assert caught.value.limit_bytes == 300 * MB
        assert caught.value.peak_rss_bytes < 450 * MB
        assert len(caught.value.samples) > 1
