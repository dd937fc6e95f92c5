"""For the tests with real processes: each must leave nothing behind (see `no_leaks` in `tests/conftest.py`)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentpool import AgentPool


@pytest.fixture(autouse=True)
def _closed_by_a_leak_check(no_leaks: None) -> None:
    """First to be set up and so the last to be torn down: it sees what is left when all else is gone."""


@pytest.fixture
def make_pool() -> Iterator[Callable[..., AgentPool]]:
    """Makes pools that a failed test does not leave behind, whatever they are busy with."""
    pools: list[AgentPool] = []

    def make(*args: Any, **settings: Any) -> AgentPool:
        settings.setdefault("cpu_threshold_percent", 100)  # other work on this machine must not degrade a pool
        pools.append(AgentPool(*args, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.kill_workers()
    pools.clear()  # a traceback may hold this frame


@pytest.fixture
def program(tmp_path: Path) -> str:
    """The scripted agent program, run by the interpreter of the tests: its path."""
    path = tmp_path / "agent-program"
    script = Path(__file__).with_name("agent_program.py")
    path.write_text(f"#!{sys.executable} -I\n" + script.read_text().partition("\n")[2])
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stop(wait_until: Callable[..., None]) -> Callable[[int], None]:
    """Stops a process: SIGSTOP, and all of its threads have heard of it."""

    def is_stopped(pid: int) -> bool:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(pid), "it does not stop")

    return stop
