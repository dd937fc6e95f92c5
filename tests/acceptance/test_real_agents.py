"""Real agent programs through a real pool, against a local stand-in for their models' APIs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentpool import AgentPool, TaskTimeoutError
from agentpool.agents import AgentKind, AgentRegistry, AgentRejectedError, AgentStalledError, agent_retry

pytestmark = pytest.mark.timeout(240)
HELLO = "Hello from the local server."
#: A prompt that a careless template makes options of.
ODD = "--help me, please; $(id) 'and' so on"
#: More than Linux takes in one argument: 128 KiB.
LONG = f"What does this say? {'words and words and ' * 10_000} {ODD}"

MakePool = Callable[..., AgentPool]
Program = Callable[[str], str]
WaitUntil = Callable[..., None]


@pytest.fixture
def claude(program: Program) -> Callable[..., AgentKind]:
    """Makes kinds that run the real claude."""

    def make(*, config: dict[str, Any] | None = None, **settings: Any) -> AgentKind:
        settings.setdefault("memory_growth_mb", 400)
        return AgentKind(name="claude", agent="claude", config={"command": program("claude"), **(config or {})},
                         **settings)

    return make


# -- claude ----------------------------------------------------------------------------------------------------------


def test_six_prompts_two_at_a_time(claude: Any, make_pool: MakePool, api: Any) -> None:
    pool = make_pool(2)
    futures = [pool.submit_agent(claude(), f"SLOW 0.5 prompt {number}") for number in range(6)]
    answers = [future.result(120) for future in futures]
    assert [answer["answer"] for answer in answers] == [HELLO] * 6
    assert all(answer["usage"]["output_tokens"] == 5 for answer in answers)
    assert all(answer["version"] for answer in answers)
    assert len(api.requests) == 6
    assert api.peak == 2


def test_kept_sessions_are_faster_than_a_process_per_prompt(
    claude: Any, make_pool: MakePool, api: Any, record_property: Callable[[str, object], None]
) -> None:
    seconds = {}
    for name, session in (("a process per prompt", False), ("kept sessions", True)):
        pool = make_pool(2)
        kind = claude(config={"session": session})
        before = time.monotonic()
        futures = [pool.submit_agent(kind, f"prompt {number}") for number in range(12)]
        assert [future.result(120)["answer"] for future in futures] == [HELLO] * 12
        seconds[name] = time.monotonic() - before
        assert sum(future.result()["is_warm"] for future in futures) == (12 if session else 0)
        assert len({future.worker_pid for future in futures}) == 2
        pool.shutdown()
    print("\n12 prompts, 2 at a time: " + ", ".join(f"{name} {took:.2f} s" for name, took in seconds.items()))
    assert seconds["kept sessions"] < seconds["a process per prompt"]


def test_a_kept_session_remembers_nothing_of_the_prompt_before(claude: Any, make_pool: MakePool, api: Any) -> None:
    pool = make_pool(1)
    kind = claude(config={"session": True})
    for prompt in ("the secret is 4711", "what is the secret"):
        assert pool.submit_agent(kind, prompt).result(60)["answer"] == HELLO
    assert "4711" in json.dumps(api.bodies[0]["messages"])
    assert "4711" not in json.dumps(api.bodies[1]["messages"])


def test_a_hang_is_ended_by_the_stall_timeout_and_the_session_goes_on(claude: Any, make_pool: MakePool) -> None:
    pool = make_pool(1)
    kind = claude(config={"session": True, "stall_timeout": 2.0}, retry=1)
    first = pool.submit_agent(kind, "hello")
    assert first.result(60)["answer"] == HELLO
    began = time.monotonic()
    with pytest.raises(AgentStalledError):
        pool.submit_agent(kind, "HANG").result(60)
    assert 2.0 <= time.monotonic() - began < 2.0 + 2.0
    after = pool.submit_agent(kind, "hello")
    assert after.result(60)["is_warm"]
    assert after.worker_pid == first.worker_pid


def test_a_hang_is_ended_by_the_pools_timeout_too(claude: Any, make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(1)
    began = time.monotonic()
    with pytest.raises(TaskTimeoutError):
        pool.options(timeout=3).submit_agent(claude(), "HANG").result(60)
    assert time.monotonic() - began < 3 + 2 + 0.5
    assert pool.submit_agent(claude(), "hello").result(60)["answer"] == HELLO


def test_529_is_asked_again(claude: Any, make_pool: MakePool, api: Any) -> None:
    future = make_pool(1).submit_agent(claude(retry=agent_retry(3, initial=0.1)), "ERR 529 1 please")
    assert future.result(120)["answer"] == HELLO
    assert future.attempts == 2
    assert len(api.requests) == 2


def test_401_is_not(claude: Any, make_pool: MakePool, api: Any) -> None:
    future = make_pool(1).submit_agent(claude(), "ERR 401")
    with pytest.raises(AgentRejectedError) as caught:
        future.result(120)
    assert caught.value.status == 401
    assert future.attempts == 1


def test_a_session_that_grew_is_recycled_and_the_next_prompt_answered(claude: Any, make_pool: MakePool) -> None:
    pool = make_pool(1)
    kind = claude(config={"session": True}, memory_growth_mb=25)
    pids = set()
    for number in range(8):
        future = pool.submit_agent(kind, f"BIG 2000 number {number}")
        assert len(future.result(120)["answer"]) == 2000 * 1024
        pids.add(future.worker_pid)
    last = pool.submit_agent(kind, "hello")
    assert last.result(120)["answer"] == HELLO
    assert pool.get_pool_stats()["counters"]["recycled"].get("memory", 0) >= 1
    assert len(pids) > 1


def test_a_sub_agent_file_means_to_claude_what_it_says(
    claude: Any, program: Program, make_pool: MakePool, api: Any, tmp_path: Path
) -> None:
    (tmp_path / "reviewer.md").write_text(
        "---\nname: reviewer\ndescription: Reviews code\ntools: Read, Grep\nmodel: claude-local-7\n"
        "color: blue\nown_key: kept\n---\nYou review code, and say MARMALADE.\n"
    )
    registry = AgentRegistry.from_directory(tmp_path, config={"command": program("claude")}, memory_growth_mb=400)
    kind = registry.get("reviewer")
    assert kind.extra["own_key"] == "kept"
    assert make_pool(1).submit_agent(kind, "hello").result(60)["answer"] == HELLO
    body = api.bodies[-1]
    assert "MARMALADE" in json.dumps(body["system"])
    assert body["model"] == "claude-local-7"
    assert {tool["name"] for tool in body["tools"]} >= {"Read", "Grep"}
    assert "Bash" not in {tool["name"] for tool in body["tools"]}


KILLED = """
import json, sys
from agentpool import AgentPool
from agentpool.agents import AgentKind

command, environment, tool = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
kind = AgentKind(name="claude", agent="claude", memory_growth_mb=400,
                 config={"command": command, "permission_mode": "bypassPermissions", "session": True})
pool = AgentPool(1, env=environment, env_allow=("PATH",), memory_limit_mb=600)
pool.submit_agent(kind, "BASH " + tool).result()
"""


def test_nothing_is_left_two_seconds_after_a_sigkill_of_the_pools_process(
    program: Program, surroundings: dict[str, str], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """In the middle of a shell tool, which leads a session of its own."""
    file = tmp_path / "tool"
    tool = (f"{sys.executable} -c 'import os, time; "
            f'open("{file}", "w").write(str(os.getpid()) + chr(10)); time.sleep(600)\'')
    words = [sys.executable, "-c", KILLED, program("claude"), json.dumps(surroundings), tool]
    parent = subprocess.Popen(words)
    try:
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"), "the tool did not start", 60)
        below = psutil.Process(parent.pid).children(recursive=True)
        assert int(file.read_text()) in {process.pid for process in below}
        assert len(below) >= 4, "keeper, worker, claude, tool"
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    gone, alive = psutil.wait_procs(below, timeout=2.0)
    assert not [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert gone


# -- the others ------------------------------------------------------------------------------------------------------


def test_codex(program: Program, make_pool: MakePool, api: Any, surroundings: dict[str, str]) -> None:
    provider = f'{{name="local",base_url="{api.url}/v1",wire_api="responses",request_max_retries=0}}'
    args = ["-c", "model_provider=local", "-c", f"model_providers.local={provider}"]
    kind = AgentKind(name="codex", agent="codex", config={
        "command": program("codex"), "model": "local", "system_prompt": "Say MARMALADE.",
        "argv": ["exec", "--json", "--skip-git-repo-check", *args, "-"],
    })
    pool = make_pool(2)
    futures = [pool.submit_agent(kind, f"{ODD} {number}") for number in range(4)]
    answers = [future.result(120) for future in futures]
    assert [answer["answer"] for answer in answers] == [HELLO] * 4
    assert answers[0]["usage"]["output_tokens"] == 5
    assert answers[0]["session_id"]
    assert all("MARMALADE" in said for said in api.requests)
    assert pool.submit_agent(kind, LONG).result(120)["answer"] == HELLO
    assert any(LONG in said for said in api.requests)
    refused = pool.submit_agent(kind, "ERR 401")
    with pytest.raises(AgentRejectedError):
        refused.result(120)
    assert refused.attempts == 1


def test_llm(program: Program, make_pool: MakePool, api: Any, surroundings: dict[str, str]) -> None:
    folder = Path(surroundings["HOME"]) / "llm"
    folder.mkdir()
    model = f"- model_id: local\n  model_name: local\n  api_base: {api.url}/v1\n"
    (folder / "extra-openai-models.yaml").write_text(model)
    kind = AgentKind(name="llm", agent="llm", config={
        "command": program("llm"), "model": "local", "system_prompt": "Say MARMALADE.",
        "env": {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "dummy"},
    }, retry=agent_retry(3, initial=0.1))
    pool = make_pool(1)
    assert pool.submit_agent(kind, ODD).result(60)["answer"] == HELLO
    assert "MARMALADE" in json.dumps(api.bodies[-1])
    assert ODD in api.requests
    assert pool.submit_agent(kind, LONG).result(60)["answer"] == HELLO
    assert LONG in api.requests
    with pytest.raises(AgentRejectedError):
        pool.submit_agent(kind, "ERR 401").result(60)


def test_gemini(program: Program, make_pool: MakePool, api: Any, surroundings: dict[str, str]) -> None:
    settings = Path(surroundings["HOME"]) / ".gemini" / "settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"security": {"auth": {"selectedType": "gemini-api-key"}}}))
    kind = AgentKind(name="gemini", agent="gemini", config={
        "command": program("gemini"), "model": "gemini-2.5-flash",
        "env": {"GEMINI_API_KEY": "dummy", "GOOGLE_GEMINI_BASE_URL": api.url, "GEMINI_CLI_TRUST_WORKSPACE": "true"},
    })
    pool = make_pool(1)
    answer = pool.submit_agent(kind, ODD).result(120)
    assert answer["answer"] == HELLO
    assert any(ODD in said for said in api.requests)
    assert pool.submit_agent(kind, LONG).result(120)["answer"] == HELLO
    assert any(LONG in said for said in api.requests)
    assert answer["usage"]


def test_opencode(program: Program, make_pool: MakePool, api: Any, surroundings: dict[str, str]) -> None:
    folder = Path(surroundings["HOME"])
    (folder / "opencode.json").write_text(json.dumps({"provider": {"local": {
        "npm": "@ai-sdk/openai-compatible", "name": "local", "models": {"local": {"name": "local"}},
        "options": {"baseURL": f"{api.url}/v1", "apiKey": "dummy"}}}}))
    kind = AgentKind(name="opencode", agent="opencode", config={
        "command": program("opencode"), "model": "local/local", "cwd": str(folder)})
    pool = make_pool(1)
    answer = pool.submit_agent(kind, ODD).result(120)
    assert answer["answer"] == HELLO
    assert any(ODD in said for said in api.requests)
    assert pool.submit_agent(kind, LONG).result(120)["answer"] == HELLO
    assert any(LONG in said for said in api.requests)


def test_copilot(program: Program, make_pool: MakePool, api: Any, surroundings: dict[str, str]) -> None:
    kind = AgentKind(name="copilot", agent="copilot", config={
        "command": program("copilot"), "model": "local",
        "env": {"COPILOT_PROVIDER_BASE_URL": f"{api.url}/v1", "COPILOT_PROVIDER_TYPE": "openai",
                "COPILOT_PROVIDER_API_KEY": "dummy", "COPILOT_OFFLINE": "true"}})
    pool = make_pool(1)
    answer = pool.submit_agent(kind, ODD).result(120)
    assert answer["answer"] == HELLO
    assert any(ODD in said for said in api.requests)
    assert pool.submit_agent(kind, LONG).result(120)["answer"] == HELLO
    assert any(LONG in said for said in api.requests)
