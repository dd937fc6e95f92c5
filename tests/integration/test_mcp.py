"""`agentpool mcp`, driven by the client of the package mcp: what its tools do, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from agentpool import AgentPool, HostBudget

pytestmark = pytest.mark.timeout(180)

AGENTS = '''
import os, sys, time

class Quick:
    def run(self, prompt, path=None):
        print("this goes to standard output")
        return {"summary": prompt.upper(), "pid": os.getpid()}

class Slow:
    def run(self, prompt, path=None):
        descriptor = os.open(prompt, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b"+\\n")
        time.sleep(0.2)
        os.write(descriptor, b"-\\n")
        return {"summary": "slow"}

class Endless:
    def run(self, prompt, path=None):
        with open(prompt, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)

class Failing:
    def run(self, prompt, path=None):
        raise ValueError(f"cannot do {prompt}")
'''


class Session:
    """A folder of agents, and the server with them."""

    def __init__(self, folder: Path) -> None:
        (folder / "home" / ".config" / "agentpool").mkdir(parents=True)
        (folder / "home" / ".config" / "agentpool" / "config.toml").write_text(
            f'[budget]\nagents = 2\nmemory_mb = 0\ndirectory = "{folder}/budget"\n')
        (folder / "my_agents.py").write_text(AGENTS)
        folder.chmod(0o700)
        self.folder = folder
        words = ["-m", "agentpool", "mcp", "--max-workers", "4", "--control-dir", str(folder / "agentpool")]
        for name in ("Quick", "Slow", "Endless", "Failing"):
            words += ["--agent", f"my_agents:{name}"]
        self.parameters = StdioServerParameters(
            command=sys.executable, args=words,
            cwd=str(folder), env={"HOME": str(folder / "home"), "PYTHONPATH": str(folder)},
        )

    def talk(self, conversation: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Nothing that goes wrong in it is hidden in the server's standard error."""
        async def whole() -> Any:
            async with Client(stdio_client(self.parameters, errlog=said)) as client:
                return await conversation(client)

        with (self.folder / "stderr").open("w+") as said:
            result = asyncio.run(asyncio.wait_for(whole(), 120))
            said.seek(0)
            assert "ERROR" not in (text := said.read()), text
            assert "Traceback" not in text
            return result


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


def test_the_tools_and_what_one_agent_returns(session: Session) -> None:
    async def conversation(client: Any) -> None:
        listed = await client.list_tools()
        assert {tool.name for tool in listed.tools} == {"run_agent", "run_agents", "pool_status", "breaker"}
        notes: list[str] = []

        async def progress(done: float, total: float | None, words: str | None) -> None:
            notes.append(words or "")

        answer = await client.call_tool("run_agent", {"agent": "my_agents:Quick", "prompt": "hello"},
                                        progress_callback=progress)
        assert not answer.is_error
        found = answer.structured_content
        assert (found["ok"], found["report"], found["result"]["summary"]) == (True, "HELLO", "HELLO")
        assert notes[-1].startswith("1 of 1 done")

    session.talk(conversation)


def test_many_agents_keep_to_the_budget_and_one_that_fails_stops_nobody(session: Session) -> None:
    journal = session.folder / "journal"

    async def conversation(client: Any) -> Any:
        tasks = [{"agent": "my_agents:Slow", "prompt": str(journal)} for _ in range(6)]
        tasks.append({"agent": "my_agents:Failing", "prompt": "it"})
        return (await client.call_tool("run_agents", {"tasks": tasks})).structured_content

    found = session.talk(conversation)
    assert [outcome["ok"] for outcome in found["agents"]] == [True] * 6 + [False]
    assert "ValueError: cannot do it" in found["agents"][6]["error"]
    assert found["ok"] is False
    changes = [1 if line == "+" else -1 for line in journal.read_text().split()]
    assert max(sum(changes[:end]) for end in range(len(changes) + 1)) == 2


def test_who_waits_is_told_why_and_how_far_it_is(
    session: Session, make_pool: Callable[..., AgentPool], wait_until: Callable[..., None]
) -> None:
    pool = make_pool(2, budget=HostBudget(agents=2, directory=str(session.folder / "budget")), control=False)
    others = [pool.submit(time.sleep, 600) for _ in range(2)]
    wait_until(lambda: all(other.running() for other in others), "they do not run")
    notes: list[tuple[float, float | None, str | None]] = []

    async def progress(done: float, total: float | None, words: str | None) -> None:
        notes.append((done, total, words))
        if len(notes) == 3:
            for other in others:
                other.kill()

    async def conversation(client: Any) -> Any:
        return await client.call_tool("run_agent", {"agent": "my_agents:Quick", "prompt": "hello"},
                                      progress_callback=progress)

    assert session.talk(conversation).structured_content["ok"]
    assert [words for _, _, words in notes[:3]] == ["0 of 1 done, 0 running, waiting for a slot"] * 3
    assert notes[-1][2] == "1 of 1 done, 0 running"
    far = [done for done, _, _ in notes]
    assert far == sorted(set(far)), "progress has to grow"
    assert all(total == 2 and done < 2 for done, total, _ in notes)


def test_errors_tell_the_client_what_is_wrong(session: Session) -> None:
    async def conversation(client: Any) -> list[str]:
        calls = [
            ("run_agent", {"agent": "my_agents:Failing", "prompt": "it"}),
            ("run_agent", {"agent": "command", "prompt": "rm"}),
            ("run_agent", {"agent": "my_agents:Quick", "prompt": "x", "path": "/no/such/place"}),
            ("run_agents", {"tasks": [{"agent": "my_agents:Quick"}]}),
            ("run_agents", {"tasks": [{"agent": "my_agents:Quick", "prompt": "x", "model": "opus"}]}),
            ("run_agents", {"tasks": [{"agent": "my_agents:Endless", "prompt": mark}, {"agent": "no", "prompt": "x"}]}),
            ("breaker", {"action": "explode"}),
            ("breaker", {"action": "open", "pool": "nowhere"}),
        ]
        said = []
        for name, arguments in calls:
            answer = await client.call_tool(name, arguments)
            assert answer.is_error
            said.append(answer.content[0].text)
        return said

    mark = str(session.folder / "mark")
    failing, unknown, nowhere, half, more, second, explode, nobody = session.talk(conversation)
    assert "agent my_agents:Failing failed: ValueError: cannot do it" in failing
    assert "there is no agent 'command' here; there are: my_agents:Quick" in unknown
    assert "there is nothing at '/no/such/place'" in nowhere
    assert "tasks.0.prompt\n  Field required" in half
    assert "tasks.0.model\n  Extra inputs are not permitted" in more
    assert "there is no agent 'no' here" in second
    assert "Input should be 'show', 'open', 'close' or 'reset'" in explode
    assert "no pool 'nowhere' is running" in nobody


def test_a_call_that_is_cancelled_frees_its_worker(session: Session, is_alive: Callable[[int], bool],
                                                   wait_until: Callable[..., None]) -> None:
    mark = session.folder / "mark"

    async def conversation(client: Any) -> int:
        call = asyncio.ensure_future(client.call_tool("run_agent", {"agent": "my_agents:Endless", "prompt": str(mark)}))
        await asyncio.to_thread(wait_until, lambda: mark.exists() and mark.read_text(), "the agent does not run", 60)
        pid = int(mark.read_text())
        call.cancel()
        await asyncio.to_thread(wait_until, lambda: not is_alive(pid), "the agent goes on", 30)
        answer = await client.call_tool("run_agent", {"agent": "my_agents:Quick", "prompt": "again"})
        assert answer.structured_content["ok"]
        return pid

    assert session.talk(conversation)


def test_status_and_breaker_of_all_pools_of_the_user(
    session: Session, make_pool: Callable[..., AgentPool], wait_until: Callable[..., None]
) -> None:
    pool = make_pool(1, name="elsewhere", control=str(session.folder / "agentpool"))
    pool.submit(os.getpid).result(timeout=20)
    wait_until(lambda: list((session.folder / "agentpool").glob("[0-9]*.sock")), "there is no control socket")

    async def conversation(client: Any) -> tuple[Any, Any, Any]:
        status = (await client.call_tool("pool_status", {})).structured_content
        opened = await client.call_tool("breaker", {"action": "open", "pool": "elsewhere", "reason": "by the client"})
        shown = (await client.call_tool("breaker", {"pool": "elsewhere"})).structured_content
        return status, opened, shown

    status, opened, shown = session.talk(conversation)
    assert [found["name"] for found in status["pools"]] == ["elsewhere"], "to look makes no pool"
    assert (status["budget"]["agents"], status["budget"]["free"]) == (2, 2)
    assert not opened.is_error
    assert shown["elsewhere"]["state"] == "forced_open"
    assert pool.breaker.get_state() == "forced_open"


def test_nothing_is_left_when_the_client_is_killed(session: Session, is_alive: Callable[[int], bool],
                                                   wait_until: Callable[..., None]) -> None:
    mark = session.folder / "mark"
    server = subprocess.Popen([session.parameters.command, *session.parameters.args], cwd=session.folder,
                              env=session.parameters.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    for message in (
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call",
         "params": {"name": "run_agent", "arguments": {"agent": "my_agents:Endless", "prompt": str(mark)}}},
    ):
        server.stdin.write(json.dumps(message).encode() + b"\n")
        server.stdin.flush()
    wait_until(lambda: mark.exists() and mark.read_text(), "the agent does not run", 60)
    pid = int(mark.read_text())
    server.stdin.close()  # as the kernel does for a client that was killed
    server.wait(timeout=60)
    server.stdout.close()
    wait_until(lambda: not is_alive(pid), "the agent goes on")


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    block = tmp_path / "mcp.py"
    block.write_text("")
    done = subprocess.run([sys.executable, "-m", "agentpool", "mcp"], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "pip install 'agentpool-runtime[mcp]'" in done.stderr


def test_an_unknown_agent_ends_it_at_once() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "agentpool", "mcp", "--agent", "nobody"], capture_output=True,
                          text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "unknown agent 'nobody'; known are security-analyst" in done.stderr
    assert time.monotonic() - began < 30
