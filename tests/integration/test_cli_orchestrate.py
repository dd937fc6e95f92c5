"""`agentpool orchestrate` as a user runs it: real agents, real terminals, real signals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)

AGENTPOOL = (sys.executable, "-m", "agentpool")
Wait = Callable[..., None]
IsAlive = Callable[[int], bool]

CODE = """
def mean(values: list[float]) -> float:
    assert values
    return sum(values) / len(values)
"""
AGENTS = """
import os, subprocess, time

class Good:
    def run(self, prompt, *, path, out=None):
        return {"prompt": prompt, "path": path}

class Bad:
    def run(self, prompt, *, path, out=None):
        raise ValueError("no good [/red]")

class Slow:
    def run(self, prompt, *, path, out=None):
        child = subprocess.Popen(["sleep", "300"])
        with open("pids", "a") as file:
            file.write(f"{os.getpid()} {child.pid}\\n")
        time.sleep(300)

class Hungry:
    def run(self, prompt, *, path, out=None):
        block = bytearray(400 << 20)
        time.sleep(300)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "numbers_of.py").write_text(CODE)
    (tmp_path / "myagents.py").write_text(AGENTS)
    return tmp_path


def environment(home: Path, **changes: str) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), **changes}


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AGENTPOOL, "orchestrate", *words], cwd=home, env=environment(home), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_the_stock_agents_report_and_write_tests(home: Path) -> None:
    done = run(home, "Review this code", "--path", "code", "--out", "generated")
    assert (done.returncode, done.stderr) == (0, "")
    progress, report, health = re.split(r"\n\nReport on |\n\nHealth report\n", done.stdout)
    assert "security-analyst: running" in progress
    for name in ("security-analyst", "performance-auditor", "test-generator"):
        assert f"{name}: done in" in progress
        assert f"{name}: ok" in report
    assert "B101" in report
    assert json.loads(health)["agent_pool"]["counters"]["completed"] == 3
    assert list((home / "generated").glob("test_*.py"))


def test_json_is_one_document_and_nothing_else(home: Path) -> None:
    done = run(home, "Review", "--path", "code", "--agent", "security-analyst", "--agent", "myagents:Good", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document.keys() == {"report", "health"}
    assert document["report"]["ok"] is True
    assert "health" not in document["report"]
    assert [agent["ok"] for agent in document["report"]["agents"]] == [True, True]
    assert document["health"]["pools"][0]["max_concurrent"] == 2
    assert document["health"]["agent_pool"]["max_pool_size"] == 4
    assert not (home / "generated").exists()


def test_one_agent_that_fails_is_exit_code_1_and_the_others_are_reported(home: Path) -> None:
    done = run(home, "Review", "--path", "code", "--agent", "myagents:Bad", "--agent", "myagents:Good")
    assert (done.returncode, done.stderr) == (1, "")
    assert "myagents:Bad: failed in" in done.stdout
    assert "ValueError: no good [/red]" in done.stdout
    assert "myagents:Good: ok" in done.stdout


def test_limits_and_throttle_reach_the_pool(home: Path) -> None:
    done = run(
        home, "x", "--path", "code", "--agent", "myagents:Slow", "--agent", "myagents:Hungry", "--timeout", "3",
        "--memory-limit", "200", "--max-workers", "3", "--max-concurrent", "2", "--json",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    slow, hungry = document["report"]["agents"]
    assert "TaskTimeoutError" in slow["error"]
    assert "MemoryLimitError" in hungry["error"]
    thresholds = document["health"]["agent_pool"]["thresholds"]
    assert (thresholds["hard_memory_limit_mb"], thresholds["memory_limit_mb"]) == (200.0, 100.0)
    pool = document["health"]["agent_pool"]
    assert (pool["max_pool_size"], pool["max_concurrent"]) == (3, 2)


def test_max_workers_alone_sets_the_throttle_too(home: Path) -> None:
    done = run(home, "x", "--path", "code", "--agent", "myagents:Good", "--max-workers", "3", "--json")
    assert json.loads(done.stdout)["health"]["agent_pool"]["max_concurrent"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "PROMPT"),
        (("x", "--path", "no-such-place"), "no-such-place"),
        (("x", "--path", "code", "--agent", "no-such-agent"), "no-such-agent"),
        (("x", "--path", "code", "--agent", "no_such_module:Class"), "no_such_module"),
        (("x", "--path", "code", "--out", "myagents.py"), "myagents.py"),
        (("x", "--path", "code", "--max-workers", "1", "--max-concurrent", "2"), "max_concurrent (2) is above"),
        (("x", "--path", "code", "--timeout", "0"), "greater than 0"),
        (("x", "--path", "code", "--max-workers", "0"), "--max-workers"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(home: Path, words: tuple[str, ...], said: str) -> None:
    done = run(home, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything(home: Path, wait_until: Wait, is_alive: IsAlive, number: int, code: int) -> None:
    process = subprocess.Popen(
        [*AGENTPOOL, "orchestrate", "x", "--path", "code", "--agent", "myagents:Slow"], cwd=home,
        env=environment(home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        pids = home / "pids"
        wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"), "the agent did not start", 30)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in output + errors
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())


def test_a_reader_that_goes_away_ends_it_quietly(home: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*AGENTPOOL, "orchestrate", "x", "--path", "code", "--agent", "myagents:Good"], cwd=home,
        env=environment(home), stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writing)
    os.close(reading)
    with process:
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, b"")


def on_terminal(home: Path, *words: str, width: int = 100, **changes: str) -> tuple[int, str]:
    """Exit code and output of a run whose standard streams are a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*AGENTPOOL, "orchestrate", *words], cwd=home, stdin=follower, stdout=follower, stderr=follower,
        env=environment(home, **{"TERM": "xterm", "COLUMNS": str(width), "LINES": "40"} | changes),
    )  # fmt: skip
    os.close(follower)
    chunks = []
    with process:
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(leader)
    return process.returncode, b"".join(chunks).decode()


def test_a_terminal_gets_a_live_table(home: Path) -> None:
    code, output = on_terminal(
        home, "x", "--path", "code", "--agent", "myagents:Good", "--agent", "myagents:Bad", "--max-workers", "2"
    )
    assert code == 1
    for heading in ("Agent", "State", "Attempt", "Elapsed", "Memory", "Peak"):
        assert heading in output
    assert "2 of 2 ended" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # the cursor comes back
    assert "\x1b[1A" in output  # it was redrawn in place
    assert "no good [/red]" in output
    assert "Health report" in output


def test_a_dumb_terminal_gets_lines(home: Path) -> None:
    code, output = on_terminal(home, "x", "--path", "code", "--agent", "myagents:Good", TERM="dumb")
    assert code == 0
    assert "\x1b" not in output
    assert "myagents:Good: done in" in output
