"""Agents as a worker keeps them: made once, set up once, used again and again, closed as it retires."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool import Agent, AgentPool, TaskKilledError, TaskPicklingError, TaskTimeoutError, WorkerCrashedError
from agentpool.config import MB

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
IsAlive = Callable[[int], bool]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What agents note: a line for each call."""
    return tmp_path / "log"


def lines(log: Path, word: str) -> list[str]:
    if not log.exists():
        return []
    return [line for line in log.read_text().splitlines() if line.startswith(f"{word} ")]


# agents


def append(log: Path, *words: object) -> None:
    with open(log, "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


class Logs(Agent):
    """Notes what is done with it. Where to: it is told in its environment, as the worker makes it without arguments."""

    def __init__(self) -> None:
        self.log = Path(os.environ["AGENT_LOG"])
        self.runs = 0

    def setup(self) -> None:
        append(self.log, "setup", os.getpid())

    def run(self, prompt: str, **kwargs: Any) -> Any:
        self.runs += 1
        append(self.log, "run", os.getpid(), prompt)
        return {"pid": os.getpid(), "runs": self.runs, "prompt": prompt, **kwargs}

    def close(self) -> None:
        append(self.log, "close", os.getpid(), self.runs)


class Other(Logs):
    """Another kind."""


class Sleeps(Logs):
    def run(self, prompt: str, **kwargs: Any) -> Any:
        super().run(prompt)
        time.sleep(60)


class RaisesOnce(Logs):
    def run(self, prompt: str, **kwargs: Any) -> Any:
        result = super().run(prompt)
        if prompt == "raise":
            raise ValueError("not this one")
        return result


class SetUpFails(Logs):
    def setup(self) -> None:
        super().setup()
        if len(lines(self.log, "setup")) < 3:
            raise ConnectionError("no model server")


class CloseFails(Logs):
    def close(self) -> None:
        super().close()
        raise RuntimeError("it is stuck")


class Heavy(Logs):
    """Its model takes more than the worker's limit."""

    def setup(self) -> None:
        super().setup()
        self.model = b"x" * (120 * MB)


class Asynchronous(Logs):
    async def setup(self) -> None:  # type: ignore[override]
        self.loop = asyncio.get_running_loop()
        self.lock = asyncio.Lock()
        append(self.log, "setup", os.getpid())

    async def run(self, prompt: str, **kwargs: Any) -> Any:
        async with self.lock:
            return {"same loop": asyncio.get_running_loop() is self.loop, "pid": os.getpid()}

    async def close(self) -> None:  # type: ignore[override]
        append(self.log, "close", asyncio.get_running_loop() is self.loop)


class Plain:
    """No Agent by descent, but by what it has."""

    def run(self, prompt: str) -> str:
        return prompt.upper()


class NeedsArguments(Agent):
    def __init__(self, model: str) -> None:
        self.model = model

    def run(self, prompt: str) -> str:
        return self.model


class ReturnsALambda(Agent):
    def run(self, prompt: str) -> Any:
        return lambda: prompt


@pytest.fixture(autouse=True)
def _environment(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_LOG", str(log))


# warm instances


def test_an_agent_is_set_up_once_per_worker_and_closed_as_it_retires(make_pool: MakePool, log: Path) -> None:
    with make_pool(1) as pool:
        results = [pool.submit_agent(Logs, f"prompt {number}", extra=number).result(30) for number in range(4)]
        worker = results[0]["pid"]
        assert results == [{"pid": worker, "runs": number + 1, "prompt": f"prompt {number}", "extra": number}
                           for number in range(4)]
        assert lines(log, "setup") == [f"setup {worker}"]
        assert lines(log, "close") == []
    assert lines(log, "close") == [f"close {worker} 4"]
    assert log.read_text().splitlines()[-1] == f"close {worker} 4"


def test_each_worker_and_each_kind_has_an_instance_of_its_own(make_pool: MakePool, log: Path) -> None:
    with make_pool(2) as pool:
        tasks = [pool.submit_agent(kind, "work") for _ in range(10) for kind in (Logs, Other)]
        for task in tasks:
            task.result(30)
        workers = {task.worker_pid for task in tasks}
    assert 2 <= len(lines(log, "setup")) <= 2 * len(workers)
    assert len(lines(log, "close")) == len(lines(log, "setup"))
    assert sum(int(line.split()[2]) for line in lines(log, "close")) == 20, "each run was that of one that was closed"


def test_a_worker_that_has_an_instance_is_preferred(make_pool: MakePool, log: Path) -> None:
    with make_pool(3) as pool:
        for _ in range(3):
            pool.submit_agent(Logs, "work").result(30)
            pool.submit_agent(Other, "work").result(30)
            pool.submit(os.getpid).result(30)
            places = [pool.submit(time.sleep, 0.05) for _ in range(3)]  # all three have been used, in some order
            for place in places:
                place.result(30)
    assert len(lines(log, "setup")) == 2, "one for each kind"


def test_an_instance_is_closed_when_its_worker_is_recycled(
    make_pool: MakePool, log: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(1, max_tasks_per_child=2)
    workers = [pool.submit_agent(Logs, "work").result(30)["pid"] for _ in range(4)]
    wait_until(lambda: len(lines(log, "close")) == 2, "it was not closed")
    assert Counter(workers) == dict.fromkeys(workers, 2)
    assert lines(log, "close") == [f"close {pid} 2" for pid in dict.fromkeys(workers)]


def test_an_idle_workers_instance_is_closed(make_pool: MakePool, log: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(1, idle_timeout=0.1)
    worker = pool.submit_agent(Logs, "work").result(30)["pid"]
    wait_until(lambda: lines(log, "close") == [f"close {worker} 1"], "it was not closed")


def test_an_error_of_a_run_costs_no_instance(make_pool: MakePool, log: Path) -> None:
    pool = make_pool(1)
    pool.submit_agent(RaisesOnce, "work").result(30)
    with pytest.raises(ValueError, match="not this one"):
        pool.submit_agent(RaisesOnce, "raise").result(30)
    assert pool.submit_agent(RaisesOnce, "work").result(30)["runs"] == 3
    assert len(lines(log, "setup")) == 1


def test_an_error_of_a_setup_fails_its_task_and_the_next_one_tries_anew(make_pool: MakePool, log: Path) -> None:
    pool = make_pool(1)
    for _ in range(2):
        with pytest.raises(ConnectionError, match="no model server"):
            pool.submit_agent(SetUpFails, "work").result(30)
    assert [pool.submit_agent(SetUpFails, "work").result(30)["runs"] for _ in range(2)] == [1, 2]
    assert len(set(lines(log, "setup"))) == 1
    assert len(lines(log, "setup")) == 3


def test_an_error_of_a_close_is_reported_and_hinders_nothing(
    make_pool: MakePool, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with make_pool(1) as pool:
        pool.submit_agent(CloseFails, "work").result(30)
        pool.submit_agent(Logs, "work").result(30)
    assert len(lines(log, "close")) == 2
    errors = capfd.readouterr().err
    assert "CloseFails.close() failed while the worker retires" in errors
    assert "it is stuck" in errors


def test_an_agent_that_was_stopped_is_closed_if_it_lets_itself_be(make_pool: MakePool, log: Path) -> None:
    pool = make_pool(1)
    with pytest.raises(TaskTimeoutError) as info:
        pool.options(timeout=0.3).submit_agent(Sleeps, "work").result(30)
    assert "Sleeps" in str(info.value)
    assert len(lines(log, "close")) == 1
    assert pool.submit_agent(Logs, "work").result(30)["runs"] == 1


def test_what_an_agents_setup_takes_belongs_to_the_baseline(
    make_pool: MakePool, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(1)
    results = [pool.submit_agent(Heavy, "work").result(30) for _ in range(4)]
    assert [result["runs"] for result in results] == [1, 2, 3, 4]
    assert len(lines(log, "setup")) == 1
    assert pool.get_pool_stats()["counters"]["recycled"] == {}
    [warning] = [message for message in caplog.messages if "a fresh worker already uses" in message]
    assert "agent setup" in warning


def test_coroutine_agents_share_a_loop(make_pool: MakePool, log: Path) -> None:
    with make_pool(1) as pool:
        results = [pool.submit_agent(Asynchronous, "work").result(30) for _ in range(3)]
    assert [result["same loop"] for result in results] == [True] * 3
    assert len(lines(log, "setup")) == 1
    assert lines(log, "close") == ["close True"]


# kinds


def test_any_class_with_a_run_method_will_do(make_pool: MakePool) -> None:
    pool = make_pool(1)
    assert pool.submit_agent(Plain, "hello").result(30) == "HELLO"


def test_an_agent_by_the_name_of_its_module_and_class(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_agents.py").write_text(
        "class Echo:\n    idempotent = True\n    def run(self, prompt, times=1):\n        return prompt * times\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = make_pool(1)
    task = pool.submit_agent("my_agents:Echo", "ab", times=2)
    assert task.result(30) == "abab"
    assert task.name == task.snapshot().kind == "my_agents:Echo"
    assert pool.options(name="mine").submit_agent("my_agents:Echo", "ab").name == "mine"


def test_a_stock_agent(make_pool: MakePool) -> None:
    task = make_pool(1).submit_agent("command", f"{sys.executable} -c 'print(6 * 7)'")
    assert task.result(30)["stdout"].strip() == b"42"
    assert task.name == "command"


@pytest.mark.parametrize(("kind", "error", "words"), [
    ("no-such-agent", LookupError, "unknown agent 'no-such-agent'; known are aider, claude, codex, command,"),
    ("no_such_module:Agent", LookupError, "there is no module 'no_such_module'"),
    ("os:NoSuchClass", LookupError, "module 'os' has no 'NoSuchClass'"),
    ("os:getpid", TypeError, "is not a class"),
    ("pathlib:Path", TypeError, "it has no run(prompt, ...) method"),
    (Plain(), TypeError, "pass the class, not an instance"),
    (42, TypeError, "an agent is a class or a name"),
])
def test_what_is_no_agent_is_refused(make_pool: MakePool, kind: Any, error: type[Exception], words: str) -> None:
    pool = make_pool(1)
    with pytest.raises(error, match=re.escape(words)):
        pool.submit_agent(kind, "work")
    assert pool.get_pool_stats()["counters"]["submitted"] == 0


def test_an_agent_that_needs_arguments_says_so(make_pool: MakePool) -> None:
    with pytest.raises(TypeError) as info:
        make_pool(1).submit_agent(NeedsArguments, "work").result(30)
    assert any("without arguments" in note for note in info.value.__notes__)


def test_what_cannot_be_sent_to_an_agent_is_named(make_pool: MakePool) -> None:
    with pytest.raises(TaskPicklingError, match=r"handle\[1\]"):
        make_pool(1).submit_agent(Plain, "work", handle=[1, threading.Lock()]).result(30)


def test_a_result_may_be_anything_that_can_be_sent(make_pool: MakePool) -> None:
    assert make_pool(1).submit_agent(ReturnsALambda, "work").result(30)() == "work"


def test_two_classes_of_one_name_are_two_kinds(make_pool: MakePool) -> None:
    def make(answer: str) -> type[Any]:
        class Answers(Agent):
            def run(self, prompt: str) -> str:
                return answer

        return Answers

    pool = make_pool(1)
    one, two = make("one"), make("two")
    assert [pool.submit_agent(kind, "?").result(30) for kind in (one, two, one, two)] == ["one", "two"] * 2


# losing agents


def test_a_killed_agent_leaves_nothing(
    make_pool: MakePool, log: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(1, kill_grace=0.2)
    task = pool.submit_agent(Sleeps, "work")
    wait_until(lambda: lines(log, "run"), "it did not begin")
    task.kill()
    with pytest.raises(TaskKilledError):
        task.result(30)
    wait_until(lambda: not is_alive(task.worker_pid or 0), "its worker stays")


def test_an_agent_whose_worker_was_killed_is_set_up_in_the_next_one(
    make_pool: MakePool, log: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(1)
    first = pool.submit_agent(Logs, "work").result(30)
    os.kill(first["pid"], signal.SIGKILL)
    task = pool.submit_agent(Sleeps, "work")
    wait_until(lambda: lines(log, "run")[1:], "it did not begin")
    assert task.worker_pid is not None
    os.kill(task.worker_pid, signal.SIGKILL)
    with pytest.raises(WorkerCrashedError, match="killed by SIGKILL"):
        task.result(30)
    assert pool.submit_agent(Logs, "work").result(30)["runs"] == 1
    assert len(lines(log, "setup")) == 3
    assert lines(log, "close") == [], "close() is for a worker that ends as it should"


# __main__

SCRIPT = """
import os, signal, sys
from agentpool import Agent, AgentPool

class Mine(Agent):
    idempotent = True

    def setup(self):
        self.greeting = "hello"

    def run(self, prompt, *, log):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\\n")
        with open(log) as file:
            if len(file.readlines()) < 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return helper(self.greeting, prompt)

def helper(*words):
    return " ".join(words) + "!"

with AgentPool(2) as pool:
    task = pool.submit_agent(Mine, "world", log=sys.argv[1])
    print(task.result(30), task.attempts, task.name)
    print(pool.submit(lambda: helper("also", __name__)).result(30))
"""


@pytest.mark.parametrize("how", ["-c", "script", "stdin"])
def test_an_agent_class_of_main_needs_no_guard(tmp_path: Path, log: Path, how: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    argv = {"-c": ["-c", SCRIPT], "script": [str(script)], "stdin": ["-"]}[how]
    done = subprocess.run([sys.executable, "-W", "error", *argv, str(log)], input=SCRIPT if how == "stdin" else "",
                          capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["hello world! 2 __main__:Mine", "also __main__!"]
    assert done.returncode == 0
    assert len(log.read_text().splitlines()) == 2


REDEFINED = """
import sys
from agentpool import AgentPool

CELL = '''
class Mine:
    def run(self, prompt): return VERSION
    def close(self):
        with open(LOG, "a") as file: print("close VERSION", file=file)
'''
with AgentPool(1) as pool:
    for version in ("1", "2"):
        exec(CELL.replace("VERSION", version).replace("LOG", repr(sys.argv[1])))
        print([pool.submit_agent(Mine, "").result(30) for _ in range(2)], flush=True)
        with open(sys.argv[1], "a+") as file:
            file.seek(0)
            print(file.read().split(), flush=True)
"""


def test_a_class_that_is_defined_anew_replaces_its_predecessor(log: Path) -> None:
    """As in a notebook whose cell is run again."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", REDEFINED, str(log)], capture_output=True, text=True,
                          timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[1, 1]", "[]", "[2, 2]", "['close', '1']"]
    assert log.read_text() == "close 1\nclose 2\n"
