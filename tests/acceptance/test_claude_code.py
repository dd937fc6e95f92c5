"""Claude Code as `agentpool install-claude` sets it up: the real program asks the hook and calls the MCP tools."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from agentpool import AgentPool, HostBudget

pytestmark = pytest.mark.timeout(240)
HELLO = "Hello from the local server."
#: What a sub-agent is asked; a request with these words shows that one was started.
ASKED = "say hello, sub-agent"
AGENTPOOL = Path(sys.executable).with_name("agentpool")

SETTINGS = '{\n  "includeCoAuthoredBy": false,\n  "hooks": {"PreToolUse": [{"matcher": "Bash", "hooks": []}]}\n}\n'
SERVERS = '{"mcpServers": {}}'
FLAWED = "import subprocess\nsubprocess.call('ls ' + input(), shell=True)\n"

ENDLESS = """
import os, time

class Endless:
    def run(self, prompt, path=None):
        with open(prompt, "w") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(600)
"""
STOPPED = """
import os, sys, time
from agentpool import AgentPool

pool = AgentPool(1, control=sys.argv[1])
pool.submit(os.getpid).result()
pool.breaker.force_open("night shift")
time.sleep(600)
"""

MakePool = Callable[..., AgentPool]
WaitUntil = Callable[..., None]


@dataclass
class Result:
    """What a tool said to the model."""

    text: str
    is_error: bool


class ClaudeCode:
    """A project and a home, in which the real claude is started as its user does."""

    def __init__(self, program: str, surroundings: dict[str, str], folder: Path) -> None:
        self.program = program
        self.folder = folder / "project"
        self.settings = self.folder / ".claude" / "settings.json"
        self.servers = self.folder / ".mcp.json"
        self.budget = str(folder / "budget")
        self.control = str(folder / "agentpool")
        self.environment = {
            **surroundings, "PATH": os.environ["PATH"],
            "AGENTPOOL_CONTROL_DIR": self.control,  # other programs have pools too
            "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",  # else the first answer comes while sub-agents run
        }
        folder.chmod(0o700)
        self.settings.parent.mkdir(parents=True)
        self.settings.write_text(SETTINGS)
        self.servers.write_text(SERVERS)
        (self.folder / "flawed.py").write_text(FLAWED)
        configuration = Path(surroundings["HOME"]) / ".config" / "agentpool"
        configuration.mkdir(parents=True)
        (configuration / "config.toml").write_text(
            f'[budget]\nagents = 2\nmemory_mb = 0\ndirectory = "{self.budget}"\n')

    def files(self) -> dict[str, str]:
        return {str(path.relative_to(self.folder)): path.read_text() for path in sorted(self.folder.rglob("*"))
                if path.is_file()}

    def agentpool(self, *words: str) -> str:
        """What it printed."""
        done = subprocess.run([AGENTPOOL, *words], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def command(self, prompt: str) -> list[str]:
        return [self.program, "-p", prompt, "--output-format", "stream-json", "--verbose",
                "--permission-mode", "bypassPermissions"]

    def say(self, prompt: str) -> list[Result]:
        """What the tools said that the model called for this prompt, which is a script for the local API."""
        done = subprocess.run(self.command(prompt), cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        messages = [json.loads(line) for line in done.stdout.splitlines()]
        blocks = [block for message in messages if message["type"] == "user" and not message["parent_tool_use_id"]
                  for block in message["message"]["content"] if block["type"] == "tool_result"]
        return [Result(_text(block["content"]), bool(block.get("is_error"))) for block in blocks]

    def spawn(self, number: int) -> list[Result]:
        """What the model was told of so many sub-agents at once."""
        return self.say(f"SPAWN {number} {ASKED}")

    def call(self, tool: str, **given: Any) -> Any:
        """What this tool of the MCP server answered to claude."""
        (result,) = self.say(f"CALL mcp__agentpool__{tool} {json.dumps(given)}")
        assert not result.is_error, result.text
        return json.loads(result.text)

    def server(self) -> StdioServerParameters:
        """The MCP server as `install-claude` wrote it down."""
        entry = json.loads(self.servers.read_text())["mcpServers"]["agentpool"]
        return StdioServerParameters(command=entry["command"], args=entry["args"], cwd=self.folder,
                                     env={"HOME": self.environment["HOME"]})


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@pytest.fixture
def code(program: Callable[[str], str], surroundings: dict[str, str], tmp_path: Path) -> ClaudeCode:
    return ClaudeCode(program("claude"), surroundings, tmp_path)


@pytest.fixture
def pool(make_pool: MakePool, code: ClaudeCode, wait_until: WaitUntil) -> AgentPool:
    """One that the hook and the MCP server find."""
    made = make_pool(2, name="guard", control=code.control, budget=HostBudget(agents=2, directory=code.budget))
    made.submit(os.getpid).result(20)
    wait_until(lambda: list(Path(code.control).glob("[0-9]*.sock")), "there is no control socket")
    return made


# -- the hook --------------------------------------------------------------------------------------------------------


def open_breaker(pool: AgentPool, code: ClaudeCode, wait_until: WaitUntil) -> None:
    pool.breaker.force_open("night shift")
    wait_until(lambda: list(Path(code.control).glob("[0-9]*.breaker")), "it does not say so")


def test_the_hook_denies_while_a_breaker_is_open_and_allows_when_it_is_closed(
    code: ClaudeCode, pool: AgentPool, api: Any, wait_until: WaitUntil
) -> None:
    code.agentpool("install-claude", "--yes")
    open_breaker(pool, code, wait_until)
    for denied in code.spawn(2):
        assert denied.is_error
        assert "the circuit breaker of pool guard is forced open: night shift" in denied.text
    assert ASKED not in api.requests, "a sub-agent was started"
    pool.breaker.reset()
    wait_until(lambda: not list(Path(code.control).glob("*.breaker")), "it is still there")
    allowed = code.spawn(2)
    assert [HELLO in result.text for result in allowed] == [True, True]
    assert api.requests.count(ASKED) == 2


def test_the_hook_denies_while_the_budget_is_spent(
    code: ClaudeCode, pool: AgentPool, api: Any, wait_until: WaitUntil
) -> None:
    code.agentpool("install-claude", "--yes")
    futures = [pool.submit(time.sleep, 600) for _ in range(2)]
    wait_until(lambda: all(future.running() for future in futures), "they do not run")
    (denied,) = code.spawn(1)
    assert denied.is_error
    assert "the host-wide budget is spent: 2 of 2 agents run now" in denied.text
    assert ASKED not in api.requests
    futures[0].kill()
    wait_until(lambda: pool.get_pool_stats()["host_budget"]["slots"] == 1, "its slot is not free")
    (allowed,) = code.spawn(1)
    assert HELLO in allowed.text


@pytest.mark.parametrize(("policy", "is_allowed"), [("allow", True), ("deny", False)])
def test_where_the_hook_cannot_tell_the_policy_decides(code: ClaudeCode, policy: str, is_allowed: bool) -> None:
    Path(code.budget).touch(0o600)  # it was to be a directory
    code.agentpool("install-claude", "--yes", "--on-failure", policy)
    (result,) = code.spawn(1)
    assert (HELLO in result.text) == is_allowed
    assert ("agentpool cannot tell whether there is room" in result.text) != is_allowed


def test_the_breaker_of_a_pool_that_is_stopped_denies_and_that_of_a_killed_one_does_not(
    code: ClaudeCode, wait_until: WaitUntil
) -> None:
    code.agentpool("install-claude", "--yes")
    holder = subprocess.Popen([sys.executable, "-c", STOPPED, code.control])
    try:
        wait_until(lambda: list(Path(code.control).glob("[0-9]*.breaker")), "the breaker is not open")
        os.kill(holder.pid, signal.SIGSTOP)
        (denied,) = code.spawn(1)
    finally:
        holder.kill()
        holder.wait()
    assert "night shift" in denied.text
    (allowed,) = code.spawn(1)
    assert HELLO in allowed.text


def test_with_deny_a_hook_that_cannot_be_started_denies(code: ClaudeCode, api: Any) -> None:
    code.agentpool("install-claude", "--yes", "--on-failure", "deny")
    settings = json.loads(code.settings.read_text())
    settings["hooks"]["PreToolUse"][1]["hooks"][0]["command"] = "/no/such/place/agentpool-hook"
    code.settings.write_text(json.dumps(settings))
    (denied,) = code.spawn(1)
    assert denied.is_error
    assert ASKED not in api.requests


def test_uninstalled_there_is_no_hook_and_the_files_are_as_they_were(
    code: ClaudeCode, pool: AgentPool, wait_until: WaitUntil
) -> None:
    before = code.files()
    code.agentpool("install-claude", "--yes")
    assert code.files() != before
    code.agentpool("uninstall-claude", "--yes")
    assert code.files() == before
    open_breaker(pool, code, wait_until)
    (allowed,) = code.spawn(1)
    assert HELLO in allowed.text
    (missing,) = code.say("CALL mcp__agentpool__pool_status {}")
    assert missing.is_error


# -- the MCP server --------------------------------------------------------------------------------------------------


def test_claude_calls_the_mcp_servers_tools(code: ClaudeCode, pool: AgentPool) -> None:
    code.agentpool("install-claude", "--yes")
    status = code.call("pool_status")
    assert status["budget"] | {"memory_used_mb": 0} == {
        "agents": 2, "running": 0, "free": 2, "waiting_pools": 0, "memory_mb": None, "memory_used_mb": 0}
    assert [found["name"] for found in status["pools"]] == ["guard"]
    found = code.call("run_agent", agent="security-analyst", prompt="look for injections")
    assert found["ok"]
    assert "flawed.py" in found["report"]
    code.call("breaker", action="open", pool="guard", reason="said claude")
    assert pool.breaker.get_state() == "forced_open"


def test_an_agent_ends_with_the_claude_that_waits_for_it(
    code: ClaudeCode, wait_until: WaitUntil, is_alive: Callable[[int], bool]
) -> None:
    code.agentpool("install-claude", "--yes")
    servers = json.loads(code.servers.read_text())
    servers["mcpServers"]["agentpool"]["args"] += ["--agent", "endless:Endless"]
    code.servers.write_text(json.dumps(servers))
    (code.folder / "endless.py").write_text(ENDLESS)
    mark = code.folder / "mark"
    asked = json.dumps({"agent": "endless:Endless", "prompt": str(mark)})
    process = subprocess.Popen(code.command(f"CALL mcp__agentpool__run_agent {asked}"), cwd=code.folder,
                               env={**code.environment, "PYTHONPATH": str(code.folder)}, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"), "the agent does not run", 60)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not is_alive(int(mark.read_text())), "the agent goes on", 30)


def test_for_a_user_it_is_in_each_project(code: ClaudeCode, pool: AgentPool, wait_until: WaitUntil) -> None:
    before = code.files()
    code.agentpool("install-claude", "--yes", "--user")
    assert code.files() == before
    assert [found["name"] for found in code.call("pool_status")["pools"]] == ["guard"]
    open_breaker(pool, code, wait_until)
    (denied,) = code.spawn(1)
    assert "night shift" in denied.text
    code.agentpool("uninstall-claude", "--yes", "--user")
    (allowed,) = code.spawn(1)
    assert HELLO in allowed.text


def test_a_real_mcp_client_drives_what_was_installed(code: ClaudeCode, pool: AgentPool) -> None:
    code.agentpool("install-claude", "--yes")
    notes: list[tuple[float, float | None, str | None]] = []

    async def progress(done: float, total: float | None, words: str | None) -> None:
        notes.append((done, total, words))

    async def conversation() -> None:
        async with Client(code.server()) as client:
            listed = await client.list_tools()
            assert {tool.name for tool in listed.tools} == {"run_agent", "run_agents", "pool_status", "breaker"}
            tasks = [{"agent": agent, "prompt": "review"} for agent in ("security-analyst", "performance-auditor")]
            answer = await client.call_tool("run_agents", {"tasks": tasks}, progress_callback=progress)
            assert answer.structured_content["ok"], answer
            assert "flawed.py" in answer.structured_content["agents"][0]["report"]
            opened = await client.call_tool("breaker", {"action": "open", "pool": "guard"})
            assert not opened.is_error

    asyncio.run(asyncio.wait_for(conversation(), 120))
    assert [done for done, _, _ in notes] == sorted({done for done, _, _ in notes}), "progress has to grow"
    assert notes[-1][2] == "2 of 2 done, 0 running"
    assert pool.breaker.get_state() == "forced_open"


# -- looking ---------------------------------------------------------------------------------------------------------


def test_ps_tells_what_a_session_of_claude_is(code: ClaudeCode, wait_until: WaitUntil) -> None:
    code.environment["PATH"] = f"{Path(code.program).parent}:{code.environment['PATH']}"

    def sessions() -> list[dict[str, str]]:
        found = json.loads(code.agentpool("ps", "--json"))["foreign_agents"]["processes"]
        return [each["session"] for each in found if each["pid"] == process.pid]

    process = subprocess.Popen([code.program, "-p", "HANG"], cwd=code.folder, env=code.environment,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: [session.get("status") for session in sessions()] == ["busy"], "it is not known", 60)
        assert [session["cwd"] for session in sessions()] == [str(code.folder)]
    finally:
        process.kill()
        process.wait()
