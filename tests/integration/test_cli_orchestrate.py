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


# -- plans from files ------------------------------------------------------------------------------------------------

PLAN = """
prompt = "look at it"
path = "code"

[agents.first]
kind = "myagents:Good"

[agents.second]
kind = "myagents:Bad"
after = "first"
policy = "optional"
fallback = ["myagents:Bad", "myagents:Good"]

[agents.third]
kind = "command"
prompt = "echo I was told {results[first]}"
after = ["first", "second"]
"""


def planned(home: Path, text: str, name: str = "plan.toml") -> str:
    (home / name).write_text(text)
    return name


def test_a_plan_runs_from_its_own_place(home: Path, tmp_path: Path) -> None:
    planned(home, PLAN)
    (home / "elsewhere").mkdir()
    done = subprocess.run(
        [*AGENTPOOL, "orchestrate", "--plan", "../plan.toml", "--json"], cwd=home / "elsewhere",
        env=environment(home), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)["report"]
    first, second, third = report["agents"]
    assert first["result"] == {"prompt": "look at it", "path": str(home / "code")}
    assert [each["kind"] for each in second["tries"]] == ["myagents:Bad", "myagents:Bad", "myagents:Good"]
    assert "look at it" in third["result"]["stdout"]


def test_a_plans_progress_and_costs(home: Path) -> None:
    planned(home, PLAN + '[agents.fourth]\nkind = "myagents:Bad"\n[agents.fifth]\nkind = "command"\nafter = "fourth"\n')
    done = run(home, "--plan", "plan.toml")
    assert (done.returncode, done.stderr) == (1, "")
    assert "second: failed, falling back to myagents:Good\n" in done.stdout
    assert "fifth: skipped - it needs fourth, which failed\n" in done.stdout
    assert "fourth: FAILED" in done.stdout
    [row] = re.findall(r"^ second +succeeded +3 .*$", done.stdout, re.MULTILINE)
    assert row.endswith("fell back to myagents:Good")
    assert re.search(r"^ all together +FAILED +6 ", done.stdout, re.MULTILINE)


def test_a_command_that_fails_has_failed(home: Path) -> None:
    planned(home, 'prompt = "x"\n[agents.a]\nkind = "command"\nprompt = "false"\n'
                  '[agents.b]\nkind = "command"\nprompt = "false"\nkwargs = { check = false }\n')
    done = run(home, "--plan", "plan.toml", "--json")
    assert done.returncode == 1
    a, b = json.loads(done.stdout)["report"]["agents"]
    assert "CommandFailed: false exited with 1" in a["error"]
    assert b["ok"]


def test_the_command_line_wins_over_the_plan(home: Path) -> None:
    planned(home, 'prompt = "x"\npath = "nowhere"\nbudget_seconds = 5\n[agents.a]\nkind = "myagents:Good"\n')
    done = run(home, "mine", "--plan", "plan.toml", "--path", "code", "--budget-seconds", "60", "--budget-mb", "300",
               "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)["report"]
    assert report["agents"][0]["result"] == {"prompt": "mine", "path": str(home / "code")}
    assert (report["budget_seconds"], report["budget_mb"]) == (60, 300)


def test_a_dry_run_shows_the_order_and_runs_nothing(home: Path) -> None:
    planned(home, PLAN.replace("myagents:Bad", "myagents:Slow"))
    done = run(home, "--plan", "plan.toml", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["1", "first", "myagents:Good"], ["2", "second", "myagents:Slow"], ["3", "third", "command"]]  # fmt: skip
    document = json.loads(run(home, "Review", "--path", "code", "--dry-run", "--json").stdout)
    assert [agent["name"] for agent in document["agents"]] == [
        "security-analyst", "performance-auditor", "test-generator"]  # fmt: skip
    assert not (home / "pids").exists()


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (None, (), "No such file or directory: 'plan.toml'"),
        ("prompt = ", (), "plan.toml: Invalid value (at"),
        ("prompt = 'x'", (), "plan.toml: there are no agents"),
        ("[agents.a]\nkind = 'command'", (), "plan.toml: prompt is missing"),
        ("prompt = 'x'\nrunner = 'nobody'\n[agents.a]\nkind = 'command'", (), "plan.toml: runner must be 'auto'"),
        (PLAN, ("--runner", "nobody"), "plan.toml: runner must be 'auto', 'stock', None or a program"),
        ("prompt = 'x'\n[agents.a]\nkynd = 'command'", (), "plan.toml: agents.a.kynd is unknown (did you mean kind?)"),
        ("prompt = 'x'\n[agents.a]\nkind = 'nobody'", (), "plan.toml: agent 'a': unknown agent 'nobody'"),
        ("prompt = 'x'\n[agents.a]\nkind = 'nowhere:Class'", (), "there is no module 'nowhere'"),
        ("prompt = 'x'\n[agents.a]\nkind = 'command'\nafter = 'b'\n[agents.b]\nkind = 'command'\nafter = 'a'", (),
         "a -> b -> a"),
        ("prompt = 'x'\n[agents.a]\nkind = 'command'\n[agents.a]\nkind = 'command'", (), "plan.toml: Cannot declare"),
        (PLAN, ("--agent", "myagents:Good"), "--agent and --plan contradict each other"),
        (PLAN, ("--budget-seconds", "0"), "budget_seconds must be a number greater than 0"),
        (PLAN, ("--path", "nowhere"), "nowhere"),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_one_clear_error(home: Path, text: str | None, words: tuple[str, ...], said: str) -> None:
    if text is not None:
        planned(home, text)
    done = run(home, "--plan", "plan.toml", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


SLOW = 'prompt = "x"\n[agents.quick]\nkind = "myagents:Good"\n[agents.slow]\nkind = "myagents:Slow"\nafter = "quick"\n'


def test_a_budget_that_is_spent_is_exit_code_124_and_what_was_found_is_printed(home: Path, is_alive: IsAlive) -> None:
    planned(home, SLOW)
    done = run(home, "--plan", "plan.toml", "--budget-seconds", "6", "--json")
    assert (done.returncode, done.stderr) == (124, "")
    report = json.loads(done.stdout)["report"]
    assert [agent["state"] for agent in report["agents"]] == ["succeeded", "stopped"]
    assert report["ending"] == "budget_spent"
    assert not any(is_alive(int(pid)) for pid in (home / "pids").read_text().split())


def test_an_optional_agent_does_not_decide_the_exit_code(home: Path) -> None:
    planned(home, SLOW + 'policy = "optional"\n')
    assert run(home, "--plan", "plan.toml", "--budget-seconds", "6").returncode == 0


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_found_before_ctrl_c_is_printed(home: Path, wait_until: Wait, as_json: bool) -> None:
    planned(home, SLOW)
    process = subprocess.Popen(
        [*AGENTPOOL, "orchestrate", "--plan", "plan.toml", *(["--json"] if as_json else [])], cwd=home,
        env=environment(home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        pids = home / "pids"
        wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"), "the agent did not start", 30)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in output + errors
    if as_json:
        report = json.loads(output)["report"]
        assert report["ending"] == "interrupted"
        assert [agent["state"] for agent in report["agents"]] == ["succeeded", "stopped"]
    else:
        assert "1 of 2 agents succeeded" in output
        assert "Ended early: it was interrupted" in output
        assert "slow: STOPPED" in output


# -- agents of files -------------------------------------------------------------------------------------------------

CLAUDE = """#!/bin/sh
case "$*" in *--version*) echo '2.1.330 (Claude Code)'; exit;; esac
cat > /dev/null
echo '{"type": "result", "subtype": "success", "is_error": false, "result": "all is well", "total_cost_usd": 0.5,
       "usage": {"input_tokens": 1, "output_tokens": 2}}' | tr -d '\\n'
echo
"""


def test_agents_of_files_run_on_the_program_that_is_installed(home: Path) -> None:
    (home / ".claude" / "agents").mkdir(parents=True)
    (home / ".claude" / "agents" / "docs.md").write_text("---\nname: docs\ndescription: writes\n---\nWrite.\n")
    (home / "bin").mkdir()
    (home / "bin" / "claude").write_text(CLAUDE)
    (home / "bin" / "claude").chmod(0o700)
    path = f"{home / 'bin'}:{os.environ.get('PATH', os.defpath)}"

    def orchestrate(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*AGENTPOOL, "orchestrate", *words], cwd=home, env=environment(home, PATH=path),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip

    done = orchestrate("Review this", "--path", "code")
    assert (done.returncode, done.stderr) == (0, "")
    assert "docs: ok" in done.stdout
    assert "  all is well\n" in done.stdout
    assert re.search(r"^ docs +succeeded .* 1 / 2 +\$0\.5000$", done.stdout, re.MULTILINE)
    planned = json.loads(orchestrate("Review this", "--path", "code", "--dry-run", "--json").stdout)
    assert [agent["kind"] for agent in planned["agents"]] == ["docs (claude)"]
    planned = json.loads(orchestrate("Review this", "--path", "code", "--dry-run", "--json", "--runner=stock").stdout)
    assert len(planned["agents"]) == 3
