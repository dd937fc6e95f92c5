"""The command `python -m stress simulate`: what it prints, and what its exit codes mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from broken_schedulers import ChargesWhatNeverBegan

import stress.simulate
from agentpool.testing import Simulator
from stress.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress.simulate, "Simulator", lambda: Simulator(ChargesWhatNeverBegan))
    monkeypatch.setattr(stress.simulate, "_simulator", None)


def test_all_promises_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--schedules", "300", "--seed", "5", "--processes", "1"]) == 0
    shown = capsys.readouterr().out
    assert "300 schedules" in shown
    assert "STARTING -> IDLE" in shown
    assert "all promises kept" in shown


def test_two_processes_play_the_same_schedules_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    figures = []
    for processes in ("1", "2"):
        assert main(["simulate", "--schedules", "1200", "--processes", processes, "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    for name in ("schedules", "events", "tasks", "coverage", "ends"):
        assert figures[0][name] == figures[1][name]


@pytest.mark.usefixtures("broken")
def test_a_broken_promise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    assert main(["simulate", "--schedules", "300", "--processes", "1", "--save", str(seeds)]) == 1
    captured = capsys.readouterr()
    assert "A PROMISE WAS BROKEN by schedule" in captured.out
    assert "the story:" in captured.out
    (path,) = seeds.iterdir()
    assert f"recorded as {path}" in captured.err
    assert main(["simulate", "--replay", str(seeds)]) == 1
    number = json.loads(path.read_text())["seed"]
    assert main(["simulate", "--number", str(number)]) == 1


def test_a_replay_that_keeps_its_promises(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--replay", str(ROOT / "tests" / "simulation" / "seeds")]) == 0
    assert "recorded schedules" in capsys.readouterr().out


def test_a_transition_that_was_not_reached(monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stress.simulate, "ENOUGH", 10)
    assert main(["simulate", "--schedules", "10", "--processes", "1"]) == 3
    assert "NOT REACHED by any schedule" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--schedules", "0"], ["--replay", "/nowhere"], ["--schedules", "many"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_help_has_examples_and_exit_codes() -> None:
    shown = subprocess.run([sys.executable, "-m", "stress", "simulate", "--help"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout
    assert "examples:" in shown
    assert "exit code:" in shown
