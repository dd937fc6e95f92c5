"""`agentpool sweep`: what a dead pool left is listed and ended, and what lives is not touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentpool import AgentPool
from agentpool.agents import find_leftovers

WaitUntil = Callable[..., None]
IsAlive = Callable[[int], bool]

#: Ignores SIGTERM and has a child in a session of its own, as a tool of an agent.
LEFT = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def sweep(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "agentpool", "sweep", *words], capture_output=True, text=True,
                          timeout=60)


def dead_pid() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def left() -> Iterator[tuple[int, int]]:
    """Two processes as a pool leaves them that was killed with its keeper: their pids."""
    mark = f"{dead_pid()}-{os.urandom(8).hex()}"
    process = subprocess.Popen([sys.executable, "-c", LEFT], stdout=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "AGENTPOOL_KEEPER": mark, "AGENTPOOL_WORKER": "3"})
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process.pid, child
    for pid in (process.pid, child):
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()
    process.wait()
    process.stdout.close()


def test_a_dry_run_lists_and_ends_nothing(left: tuple[int, int], is_alive: IsAlive) -> None:
    ended = sweep("--dry-run", "--json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    found = {entry["pid"]: entry for entry in report["found"]}
    assert set(left) <= set(found)
    assert found[left[0]]["worker_id"] == 3
    assert report["dry_run"] is True
    assert all(is_alive(pid) for pid in left)
    table = sweep("-n").stdout
    assert "COMMAND" in table
    assert str(left[1]) in table
    assert "`agentpool sweep` ends them" in table


def test_a_sweep_ends_them_deaf_ones_too(left: tuple[int, int], wait_until: WaitUntil, is_alive: IsAlive) -> None:
    ended = sweep("--grace", "0.2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "of dead pools ended." in ended.stdout
    wait_until(lambda: not any(is_alive(pid) for pid in left), "they live")
    assert not [found for found in find_leftovers() if found.pid in left]


def test_a_pool_that_lives_is_not_touched(make_pool: Callable[..., AgentPool], left: tuple[int, int]) -> None:
    pool = make_pool(1)
    pid = pool.submit(os.getpid).result(30)
    found = {leftover.pid for leftover in find_leftovers()}
    assert left[0] in found
    assert pid not in found
    assert sweep().returncode == 0
    assert pool.submit(os.getpid).result(30) == pid


def test_a_pid_that_was_given_away_does_not_make_a_pool_live(
    monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    """The mark names the pid of a process that is younger than what bears the mark, and not its parent."""
    newer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    older = subprocess.Popen(["sleep", "600"], env={**os.environ, "AGENTPOOL_KEEPER": f"{newer.pid}-aa"})
    try:
        wait_until(lambda: older.pid in {leftover.pid for leftover in find_leftovers()}, "it was not found")
    finally:
        for process in (newer, older):
            process.kill()
            process.wait()


def test_nothing_is_said_to_be_nothing(tmp_path: Path) -> None:
    report: dict[str, Any] = json.loads(sweep("--json").stdout)
    assert report["not_ended"] == []
