"""`agentpool install-claude` in files as users have them: nothing else changes, and it can be undone."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)

SETTINGS = """{
    "model": "opus",   "env": {"A":"1"},
    "hooks": {
        "PreToolUse": [
            {"matcher": "Bash", "hooks": [{"type": "command", "command": "./check.sh"}]}
        ],
        "Stop": []
    }
}"""
SERVERS = '{\n\t"mcpServers": {"other": {"command": "x"}}\n}\n'
AGENT = "---\nname: lead\ndescription: leads\n---\n\nYou lead.\n"


class Project:
    """A project's folder, and a home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.home = folder / "home"
        self.settings = self.folder / ".claude" / "settings.json"
        self.servers = self.folder / ".mcp.json"
        self.agent = self.folder / ".claude" / "agents" / "agentpool-orchestrator.md"
        self.settings.parent.mkdir(parents=True)
        self.home.mkdir()

    def run(self, *words: str, code: int = 0, **changed: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLAUDE", "XDG"))}
        environment = {**kept, "HOME": str(self.home), **changed}
        done = subprocess.run([sys.executable, "-m", "agentpool", *words], cwd=self.folder, capture_output=True,
                              text=True, env=environment, stdin=subprocess.DEVNULL,
                              timeout=60, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def files(self) -> dict[str, str]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_bytes().decode() for path in found}

    def hooks(self) -> list[dict[str, Any]]:
        groups = json.loads(self.settings.read_text())["hooks"]["PreToolUse"]
        return [hook for group in groups if group["matcher"] == "Task|Agent" for hook in group["hooks"]]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def fill(project: Project) -> dict[str, str]:
    project.settings.write_text(SETTINGS)
    project.servers.write_text(SERVERS)
    return project.files()


def test_it_shows_a_diff_and_writes_what_it_showed(project: Project) -> None:
    before = fill(project)
    shown = project.run("install-claude", "--dry-run")
    assert project.files() == before
    assert shown == project.run("install-claude").replace(
        "agentpool: installed; Claude Code reads its files when a session starts\n", "")
    assert f"+++ {project.settings}" in shown
    (hook,) = project.hooks()
    assert hook == {"type": "command", "command": hook["command"], "timeout": 5}
    program, options, script = shlex.split(hook["command"])
    assert os.access(program, os.X_OK)
    assert Path(program).is_absolute()
    assert options == "-IS"
    assert Path(script).is_file()
    server = json.loads(project.servers.read_text())["mcpServers"]["agentpool"]
    assert server["args"][-1] == "mcp"
    assert os.access(server["command"], os.X_OK)
    assert "name: agentpool-orchestrator" in project.agent.read_text()


def test_without_the_extra_it_says_what_the_server_needs(project: Project, tmp_path: Path) -> None:
    (tmp_path / "mcp.py").write_text("")  # instead of the package
    assert "pip install 'agentpool-runtime[mcp]'" in project.run("install-claude", PYTHONPATH=str(tmp_path))
    assert project.hooks()
    assert project.run("install-claude") == "Nothing to change.\n"


def test_a_terminal_is_asked(project: Project) -> None:
    parent, child = os.openpty()
    with os.fdopen(parent, "r+b", buffering=0) as terminal:
        for answer, is_written in ((b"n\n", False), (b"y\n", True)):
            asking = subprocess.Popen([sys.executable, "-m", "agentpool", "install-claude"], cwd=project.folder,
                                      stdin=child, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                      env={**os.environ, "HOME": str(project.home)})
            terminal.write(answer)
            shown, _ = asking.communicate(timeout=60)
            assert b"Write this?" in shown
            assert asking.returncode == (0 if is_written else 1)
            assert project.settings.exists() == is_written
        os.close(child)


def test_a_file_that_changes_meanwhile_is_left_alone(project: Project) -> None:
    fill(project)
    parent, child = os.openpty()
    with os.fdopen(parent, "r+b", buffering=0) as terminal:
        asking = subprocess.Popen([sys.executable, "-m", "agentpool", "install-claude"], cwd=project.folder,
                                  stdin=child, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  env={**os.environ, "HOME": str(project.home)})
        os.close(child)
        assert asking.stdout is not None
        shown = b""
        while b"Write this?" not in shown:
            shown += asking.stdout.read1()
        project.servers.write_text('{"mine": 1}')
        terminal.write(b"y\n")
        _, said = asking.communicate(timeout=60)
    assert asking.returncode == 2
    assert f"{project.servers} was changed meanwhile; nothing was written" in said.decode()
    assert project.files() == {".claude/settings.json": SETTINGS, ".mcp.json": '{"mine": 1}'}


def test_everything_else_stays_character_by_character(project: Project) -> None:
    fill(project)
    project.run("install-claude")
    text = project.settings.read_text()
    head, _, tail = SETTINGS.partition('"./check.sh"}]}')
    assert text.startswith(head)
    assert text.endswith(tail)
    assert '"other": {"command": "x"}' in project.servers.read_text()


def test_a_second_time_changes_nothing(project: Project) -> None:
    fill(project)
    project.run("install-claude")
    before = project.files()
    assert project.run("install-claude") == "Nothing to change.\n"
    assert project.files() == before


@pytest.mark.parametrize(("settings", "servers"), [
    (SETTINGS, SERVERS),
    (None, None),
    ("", "{}"),
    ('{"hooks": {}}', '{"mcpServers": {}}\n'),
    ('{"hooks": {"PreToolUse": []}, "a": 1}', '{"a": [],\n  "mcpServers":{ }}'),
    ('{"hooks": {"PreToolUse": [{"matcher": "Task|Agent", "hooks": []}]}}', '\n{ }\n'),
    (SETTINGS.replace("\n", "\r\n"), SERVERS.replace("\n", "\r\n")),
])
def test_uninstall_restores_to_the_byte(project: Project, settings: str | None, servers: str | None) -> None:
    for path, text in ((project.settings, settings), (project.servers, servers)):
        if text is not None:
            path.write_bytes(text.encode())
    before = project.files()
    project.run("install-claude")
    assert project.hooks()
    project.run("install-claude", "--on-failure", "deny")
    project.run("uninstall-claude")
    assert project.files() == before
    assert project.run("uninstall-claude") == "Nothing to change.\n"
    assert project.settings.parent.exists() == (settings is not None), "an empty folder is left"


def test_the_line_ends_of_dos_stay(project: Project) -> None:
    project.settings.write_bytes(SETTINGS.replace("\n", "\r\n").encode())
    project.run("install-claude")
    text = project.settings.read_bytes()
    assert project.hooks()
    assert text.count(b"\n") == text.count(b"\r\n") > SETTINGS.count("\n")
    project.settings.write_bytes(text.replace(b"opus", b"haiku"))
    project.run("uninstall-claude")
    assert project.settings.read_bytes() == SETTINGS.replace("opus", "haiku").replace("\n", "\r\n").encode()


def test_a_copy_that_somebody_broke_is_not_restored(project: Project) -> None:
    fill(project)
    project.run("install-claude")
    project.settings.with_name("settings.json.before-agentpool").write_text("{")
    project.run("uninstall-claude")
    assert project.settings.read_text() == SETTINGS


def test_what_cannot_be_written_is_named_and_so_is_what_was(project: Project) -> None:
    project.settings.write_text(SETTINGS)
    project.servers.symlink_to("/proc/agentpool.json")  # where root cannot write either
    said = project.run("install-claude", code=2)
    assert f"{project.servers} cannot be written" in said
    assert f"written was {project.settings}" in said
    assert project.run("uninstall-claude")
    assert project.settings.read_text() == SETTINGS


def test_uninstall_keeps_what_others_changed_since(project: Project) -> None:
    fill(project)
    project.run("install-claude")
    project.settings.write_text(project.settings.read_text().replace('"opus"', '"haiku"'))
    project.run("uninstall-claude")
    assert project.settings.read_text() == SETTINGS.replace('"opus"', '"haiku"')


def test_the_folder_that_pools_are_in_is_passed_on(project: Project) -> None:
    project.run("install-claude", "--control-dir", "sockets")
    (hook,) = project.hooks()
    assert shlex.split(hook["command"])[-2:] == ["--control-dir", str(project.folder / "sockets")]
    server = json.loads(project.servers.read_text())["mcpServers"]["agentpool"]
    assert server["args"] == ["mcp", "--control-dir", str(project.folder / "sockets")]


def test_another_policy_changes_the_one_hook(project: Project) -> None:
    project.run("install-claude")
    project.run("install-claude", "--on-failure", "deny")
    (hook,) = project.hooks()
    assert hook["onFailure"] == "block"
    assert hook["command"].endswith("--on-failure deny")
    project.run("uninstall-claude")
    assert project.files() == {}


def test_an_orchestrator_of_the_users_own_gets_the_instructions(project: Project) -> None:
    mine = project.folder / "lead.md"
    mine.write_text(AGENT)
    project.run("install-claude", "--orchestrator", "lead.md")
    assert mine.read_text().startswith(AGENT)
    assert "## Delegating work" in mine.read_text()
    assert not project.agent.exists()
    project.run("uninstall-claude", "--orchestrator", "lead.md")
    assert mine.read_text() == AGENT


def test_for_the_user_it_is_in_the_home(project: Project) -> None:
    (project.home / ".claude.json").write_text('{"numStartups": 3}')
    os.chmod(project.home / ".claude.json", 0o600)
    project.run("install-claude", "--user")
    found = json.loads((project.home / ".claude.json").read_text())
    assert found["numStartups"] == 3
    assert found["mcpServers"]["agentpool"]
    assert stat.S_IMODE((project.home / ".claude.json").stat().st_mode) == 0o600
    assert "Task|Agent" in (project.home / ".claude" / "settings.json").read_text()
    assert project.files() == {}


def test_a_link_to_the_settings_stays_one(project: Project, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.json"
    real.write_text(SETTINGS)
    project.settings.symlink_to(real)
    project.run("install-claude")
    assert project.settings.is_symlink()
    assert "Task|Agent" in real.read_text()


@pytest.mark.parametrize(("text", "words"), [
    ("{ // a comment\n}", "it is not JSON"),
    ("[]", "it is not a JSON object"),
    ('{"hooks": []}', "its hooks have a form that is not known"),
    ('{"hooks": {"PreToolUse": {}}}', "its hooks have a form that is not known"),
])
def test_a_file_that_cannot_be_understood_stops_everything(project: Project, text: str, words: str) -> None:
    project.settings.write_text(text)
    said = project.run("install-claude", code=2)
    assert str(project.settings) in said
    assert words in said
    assert "nothing was written" in said
    assert project.files() == {".claude/settings.json": text}


def test_a_wrong_call_is_refused(project: Project) -> None:
    assert "must be allow or deny, got 'maybe'" in project.run("install-claude", "--on-failure", "maybe", code=2)
    assert "there is no such file" in project.run("install-claude", "--orchestrator", "none.md", code=2)
