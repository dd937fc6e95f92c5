"""The command itself: version, help, what is missing, and the health report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import agentpool

pytestmark = pytest.mark.timeout(60)
SCRIPT = str(Path(sys.executable).with_name("agentpool"))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentpool", *words], capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.parametrize("command", [[sys.executable, "-m", "agentpool"], [SCRIPT]])
def test_version_both_ways(command: list[str]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"agentpool {agentpool.__version__}\n", "")


@pytest.mark.parametrize("words", [[], ["orchestrate"], ["run"], ["health"]])
def test_help_has_examples_and_no_markup(words: list[str]) -> None:
    done = run(*words, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(" ".join(["Usage: agentpool", *words]))
    if words != ["health"]:
        assert "Examples:" in done.stdout
        assert "  agentpool " in done.stdout
    assert "\x1b" not in done.stdout
    assert "\b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 90


def test_an_unknown_command_is_a_usage_error() -> None:
    done = run("no-such-command")
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


def test_health_is_json_of_the_promised_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGENTPOOL_CONTROL_DIR", str(tmp_path / "none"))  # other pools of this user have their say too
    done = run("health")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["memory_stats"]["process_memory_mb"] > 0
    assert report["memory_stats"]["system_memory_available_mb"] > 0
    assert report["memory_stats"].keys() >= {"active_agents", "registered_agents"}
    assert report["circuit_breaker"] | {"state": "closed", "failure_count": 0} == report["circuit_breaker"]
    assert report["agent_pool"].keys() >= {"total_agents", "max_pool_size", "agents_by_status"}
    assert len(run("health", "--indent", "0").stdout.splitlines()) == 1
    assert run("health", "--indent", "4").stdout.startswith('{\n    "')


def test_output_to_a_reader_that_is_gone_is_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "agentpool", "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=50, check=False
    )
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode != 0


def test_without_typer_the_cure_is_named() -> None:
    # -S: no site-packages, so typer really is not there; agentpool is found by its path alone.
    places = {str(Path(str(spec.origin)).parents[1]) for name in ("agentpool", "agentpool_worker")
              if (spec := find_spec(name)) is not None}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "agentpool", "health"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "agentpool: the command line needs typer and rich, and typer is not installed.\n"
        "Install them with: pip install 'agentpool-runtime[cli]'\n"
    )
