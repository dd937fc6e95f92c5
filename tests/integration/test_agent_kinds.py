"""Kinds of agents in a real pool, with the scripted agent program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from agentpool import Agent, AgentKind, AgentPool, AgentRegistry, TaskTimeoutError
from agentpool.agents import AgentRejectedError, AgentTimeoutError, AgentUnavailableError, agent_retry
from agentpool.agents.registry import default_registry

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

MakePool = Callable[..., AgentPool]
pytestmark = pytest.mark.timeout(90)


class Counting(Agent):
    def __init__(self, start: int = 0) -> None:
        self.count = start

    def run(self, prompt: str, *args: Any, **kwargs: Any) -> tuple[str, int, int]:
        self.count += 1
        return prompt, self.count, os.getpid()


@pytest.fixture
def claude(program: str) -> Callable[..., AgentKind]:
    def make(config: dict[str, Any] | None = None, **settings: Any) -> AgentKind:
        settings.setdefault("retry", agent_retry(3, initial=0.05))
        return AgentKind(name="claude", agent="claude", config={"command": program, **(config or {})}, **settings)

    return make


def test_a_kind_is_made_with_its_configuration_and_kept(make_pool: MakePool) -> None:
    pool = make_pool(1)
    ten = AgentKind(name="ten", agent=Counting, config={"start": 10})
    twenty = AgentKind(name="twenty", agent=Counting, config={"start": 20})
    counts = [pool.submit_agent(kind, "x").result(30)[1] for kind in (ten, twenty, ten, twenty)]
    assert counts == [11, 21, 12, 22]


def test_a_kind_that_was_changed_is_made_anew(make_pool: MakePool) -> None:
    pool = make_pool(1)
    for start in (10, 20):
        kind = AgentKind(name="changing", agent=Counting, config={"start": start})
        assert pool.submit_agent(kind, "x").result(30)[1] == start + 1


def test_what_the_decorator_registered_is_found_by_name_and_class(make_pool: MakePool) -> None:
    default_registry.agent("counting-for-this-test", timeout=0.01, priority=7)(Counting)
    try:
        pool = make_pool(1)
        for kind in (Counting, "counting-for-this-test"):
            future = pool.options(timeout=30).submit_agent(kind, "x")
            assert future.result(30)[0] == "x"
            assert future._task is not None
            spec = future._task.spec
            assert (spec.timeout, spec.priority) == (30, 7), "the view's, then the kind's"
    finally:
        default_registry._kinds.clear()
        default_registry._by_class.clear()


def test_a_kinds_timeout_holds_where_the_view_says_nothing(make_pool: MakePool) -> None:
    import time

    class Slow(Agent):
        def run(self, prompt: str, *args: Any, **kwargs: Any) -> None:
            time.sleep(60)

    with pytest.raises(TaskTimeoutError):
        make_pool(1).submit_agent(AgentKind(name="slow", agent=Slow, timeout=0.2), "x").result(30)


def test_an_overloaded_api_is_asked_again_and_a_refusal_is_final(
    make_pool: MakePool, claude: Callable[..., AgentKind], tmp_path: Path
) -> None:
    pool = make_pool(1)
    again = pool.submit_agent(claude(), f"ERR 529 {tmp_path / 'failed-once'}")
    assert again.result(30)["answer"].startswith("You said: ERR 529")
    assert again.attempts == 2
    refused = pool.submit_agent(claude(), "ERR 401")
    with pytest.raises(AgentRejectedError):
        refused.result(30)
    assert refused.attempts == 1
    busy = pool.submit_agent(claude(), "ERR 503")
    with pytest.raises(AgentUnavailableError) as caught:
        busy.result(30)
    assert (busy.attempts, caught.value.status) == (3, 503)


def test_agent_programs_are_asked_again_without_being_told(
    make_pool: MakePool, program: str, tmp_path: Path
) -> None:
    kind = AgentKind(name="claude", agent="claude", config={"command": program})
    future = make_pool(1).submit_agent(kind, f"ERR 529 {tmp_path / 'failed-once'}")
    assert future.result(30)["answer"]
    assert future.attempts == 2


def test_a_timeout_of_its_own_costs_no_worker(make_pool: MakePool, claude: Callable[..., AgentKind]) -> None:
    pool = make_pool(1)
    kind = claude({"session": True}, timeout=0.5)
    first = pool.submit_agent(kind, "hello")
    first.result(30)
    with pytest.raises(AgentTimeoutError):
        pool.submit_agent(kind, "CHATTER").result(30)
    after = pool.submit_agent(kind, "hello")
    assert after.result(30)["is_warm"]
    assert after.result()["session_id"] == first.result()["session_id"]
    assert after.worker_pid == first.worker_pid


def test_the_pools_timeout_reaches_an_agent_program(
    make_pool: MakePool, claude: Callable[..., AgentKind], tmp_path: Path, is_alive: Callable[[int], bool],
    wait_until: Callable[..., None],
) -> None:
    file = tmp_path / "pid"
    with pytest.raises(TaskTimeoutError):
        make_pool(1).options(timeout=2).submit_agent(claude({"session": True}), f"TOOL {file}").result(30)
    wait_until(lambda: not is_alive(int(file.read_text())), "its tool lives")


def test_what_a_program_says_becomes_the_events_of_its_task(
    make_pool: MakePool, claude: Callable[..., AgentKind], tmp_path: Path
) -> None:
    pool = make_pool(1)
    failed = pool.submit_agent(claude(retry=1), "ERR 529")
    kinds = {type(event).__name__ for event in failed.events()}
    assert "Retry" in kinds
    future = pool.submit_agent(claude(), "hello")
    events = list(future.events())
    texts = [event.text for event in events if type(event).__name__ == "Text"]
    assert texts == ["You said: hello (1)"]
    usage = [event for event in events if type(event).__name__ == "Usage"]
    assert usage[0].input_tokens == 10


def test_a_session_that_grew_is_recycled_with_its_worker(
    make_pool: MakePool, claude: Any, wait_until: Callable[..., None]
) -> None:
    pool = make_pool(1, memory_limit_mb=400)
    kind = claude({"session": True}, memory_limit_mb=120)
    first = pool.submit_agent(kind, "hello")
    assert first.result(30)["answer"]
    assert pool.submit_agent(kind, "GROW 150").result(30)["session_id"] == first.result()["session_id"]
    wait_until(lambda: pool.get_pool_stats()["counters"]["recycled"].get("memory") == 1, "it was not recycled")
    second = pool.submit_agent(kind, "hello")
    assert second.result(30)["answer"] == "You said: hello (1)"
    assert second.result()["session_id"] != first.result()["session_id"]


def test_growth_counts_from_the_warm_session(
    make_pool: MakePool, claude: Any, wait_until: Callable[..., None]
) -> None:
    pool = make_pool(1)
    kind = claude({"session": True}, memory_growth_mb=60)
    first = pool.submit_agent(kind, "hello").result(30)
    for _ in range(3):
        assert pool.submit_agent(kind, "hello").result(30)["session_id"] == first["session_id"]
    assert pool.submit_agent(kind, "GROW 100").result(30)["session_id"] == first["session_id"]
    wait_until(lambda: pool.get_pool_stats()["counters"]["recycled"].get("memory") == 1, "it was not recycled")
    assert pool.submit_agent(kind, "hello").result(30)["session_id"] != first["session_id"]


def test_no_more_of_a_kind_run_at_once_than_it_says(make_pool: MakePool, tmp_path: Path) -> None:
    class Exclusive(Agent):
        def run(self, prompt: str, *args: Any, **kwargs: Any) -> bool:
            import time

            try:
                os.mkdir(prompt)
            except FileExistsError:
                return False
            time.sleep(0.05)
            os.rmdir(prompt)
            return True

    pool = make_pool(3)
    kind = AgentKind(name="exclusive", agent=Exclusive, concurrency=1)
    futures = [pool.submit_agent(kind, str(tmp_path / "inside")) for _ in range(9)]
    assert all(future.result(30) for future in futures)


def test_six_prompts_two_at_a_time(make_pool: MakePool, claude: Callable[..., AgentKind]) -> None:
    pool = make_pool(4)
    kind = claude({"session": True}, concurrency=2)
    futures = [pool.submit_agent(kind, f"SLOW 0.2 number {number}") for number in range(6)]
    answers = [future.result(60)["answer"] for future in futures]
    assert answers == [f"You said: SLOW 0.2 number {number} (1)" for number in range(6)]
    runs = [attempt for future in futures for attempt in future.history]
    # An end is noted a little after the next one's start.
    assert max(sum(run.started_at <= at < (run.ended_at or at) - 0.1 for run in runs)
               for at in (run.started_at for run in runs)) == 2


KILLED = """
import json, sys
from agentpool import AgentKind, AgentPool

kind = AgentKind(name="claude", agent="claude", config={"command": sys.argv[1], "session": True})
AgentPool(1, cpu_threshold_percent=100).submit_agent(kind, "TOOL " + sys.argv[2]).result()
"""


def test_nothing_is_left_after_a_sigkill_of_the_pools_process(
    program: str, tmp_path: Path, wait_until: Callable[..., None], is_alive: Callable[[int], bool]
) -> None:
    """In the middle of a tool, which leads a session of its own."""
    file = tmp_path / "tool"
    parent = subprocess.Popen([sys.executable, "-c", KILLED, program, str(file)])
    try:
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"), "the tool did not start", 60)
        below = psutil.Process(parent.pid).children(recursive=True)
        assert int(file.read_text()) in {process.pid for process in below}
    finally:
        parent.kill()
        parent.wait()
    assert len(below) >= 4, "keeper, worker, program, tool"
    # Within 2 s, as the acceptance test measures; here other work may be on the machine.
    wait_until(lambda: not any(map(is_alive, (process.pid for process in below))), "something outlived it")


def test_the_files_of_a_directory_run(make_pool: MakePool, program: str, tmp_path: Path) -> None:
    folder = tmp_path / "agents"
    folder.mkdir()
    (folder / "brief.md").write_text("---\nname: brief\ndescription: Says little\n---\nBe brief.\n")
    registry = AgentRegistry.from_directory(folder, config={"command": program})
    future = make_pool(1).submit_agent(registry.get("brief"), "hello")
    assert future.result(30)["answer"] == "You said: hello (1)"
    assert future.name == "brief"
