"""The files that say what the host-wide budget is, `agentpool config`, and the commands that join it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)


class Place:
    """A home and a project, empty at first."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.project = folder / "project"
        self.work = self.project / "src" / "deep"
        self.work.mkdir(parents=True)
        self.users = self.home / ".config" / "agentpool" / "config.toml"
        self.users.parent.mkdir(parents=True)
        self.projects = self.project / "agentpool.toml"
        self.environment = {**os.environ, "HOME": str(self.home)}
        self.environment.pop("XDG_CONFIG_HOME", None)

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agentpool", *words], cwd=self.work, env={**self.environment, **more},
            capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL,
        )

    def values(self, **more: str) -> dict[str, dict[str, object]]:
        done = self.run("config", "--json", **more)
        assert done.returncode == 0, done.stderr
        values: dict[str, dict[str, object]] = json.loads(done.stdout)["values"]
        return values


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_without_files_all_is_default(place: Place) -> None:
    done = place.run("config")
    assert done.returncode == 0
    assert done.stdout.splitlines()[:3] == [
        "KEY               VALUE  FROM", "budget.agents     2      default", "budget.memory_mb  800.0  default",
    ]
    assert "No file says anything of the budget" in done.stdout


def test_the_project_wins_over_the_user_value_by_value(place: Place) -> None:
    place.users.write_text("[budget]\nagents = 5\nmemory_mb = 1000\n")
    place.projects.write_text("[budget]\nagents = 3\n")
    values = place.values()
    assert values["budget.agents"] == {"value": 3, "source": str(place.projects)}
    assert values["budget.memory_mb"] == {"value": 1000, "source": str(place.users)}
    assert values["hook.on_failure"] == {"value": "allow", "source": "default"}


def test_xdg_config_home_is_where_the_users_file_is(place: Place, tmp_path: Path) -> None:
    (tmp_path / "xdg" / "agentpool").mkdir(parents=True)
    (tmp_path / "xdg" / "agentpool" / "config.toml").write_text("[budget]\nagents = 7\n")
    assert place.values(XDG_CONFIG_HOME=str(tmp_path / "xdg"))["budget.agents"]["value"] == 7


@pytest.mark.parametrize(("text", "words"), [
    ("[budget]\nagents = two\n", "is not TOML"),
    ("[budget]\nagent = 2\n", "unknown key budget.agent; known are budget.agents, budget.memory_mb"),
    ("agents = 2\n", "unknown key agents; known are"),
    ("[budget]\nagents = 0\n", "agents of the host's budget must be greater than 0, got 0"),
    ("[budget]\nagents = \"2\"\n", "agents of the host's budget must be a whole number, got '2'"),
    ("[budget]\nmemory_mb = -5\n", "memory_mb of the host's budget must be greater than 0, got -5"),
    ("[hook]\non_failure = \"deny\"\n", "hook.on_failure is the user's own to say: put it into"),
    ("[budget]\ndirectory = \"/x\"\n", "budget.directory is the user's own to say: put it into"),
])
def test_a_wrong_file_is_named_with_the_cause(place: Place, text: str, words: str) -> None:
    place.projects.write_text(text)
    for command in (["config"], ["run", "echo", ":::", "a"]):
        done = place.run(*command)
        assert done.returncode == 2
        assert str(place.projects) in done.stderr
        assert words in done.stderr
        assert done.stdout == ""


def test_a_wrong_policy_of_the_hook_is_refused(place: Place) -> None:
    place.users.write_text("[hook]\non_failure = \"explode\"\n")
    done = place.run("config")
    assert done.returncode == 2
    assert "must be \"allow\" or \"deny\", got 'explode'" in done.stderr


def test_more_jobs_than_the_budget_say_so_and_run_in_turn(place: Place) -> None:
    place.users.write_text(f'[budget]\nagents = 1\nmemory_mb = 0\ndirectory = "{place.home}/budget"\n')
    journal = place.work / "journal"
    line = f"echo + >> {journal}; sleep 0.05; echo - >> {journal}; echo {{}}"
    done = place.run("run", "-j", "4", "--shell", "-k", "--", line, ":::", "a", "b", "c")
    assert (done.returncode, done.stdout.split()) == (0, ["a", "b", "c"])
    assert f"-j 4 is above the host-wide budget of 1 ({place.users}): no more than 1 run at once" in done.stderr
    assert journal.read_text().split() == ["+", "-"] * 3


def test_the_budget_is_joined_when_asked_for_and_left_when_not_wanted(place: Place) -> None:
    """Told by the message, and by the directory in which the pools meet."""
    place.users.write_text(f'[budget]\ndirectory = "{place.home}/budget"\n')
    assert place.run("run", "--no-budget", "-j", "4", "echo", ":::", "a").stderr == ""
    assert not (place.home / "budget").exists()
    assert "of 2 (the default)" in place.run("run", "-j", "4", "echo", ":::", "a").stderr
    assert (place.home / "budget" / "slots").exists()
    place.users.unlink()
    assert place.run("run", "-j", "4", "echo", ":::", "a").stderr == ""
    assert "of 2 (the default)" in place.run("run", "--budget", "-j", "4", "echo", ":::", "a").stderr


def test_runs_of_several_terminals_share_the_budget(place: Place) -> None:
    place.users.write_text(f'[budget]\nagents = 2\nmemory_mb = 0\ndirectory = "{place.home}/budget"\n')
    journal = place.work / "journal"
    line = f"echo 1 >> {journal}; sleep 0.05; echo -1 >> {journal}; : {{}}"
    words = [sys.executable, "-m", "agentpool", "run", "-j", "7", "--shell", line, ":::", *map(str, range(7))]
    running = [subprocess.Popen(words, cwd=place.work, env=place.environment, stderr=subprocess.DEVNULL,
                                stdin=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(timeout=100) for process in running] == [0, 0, 0]
    changes = list(map(int, journal.read_text().split()))
    at_once = [sum(changes[:end]) for end in range(len(changes) + 1)]
    assert len(changes) == 2 * 3 * 7
    assert max(at_once) == 2
