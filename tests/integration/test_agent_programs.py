"""Agent programs with real processes: the scripted one beside this file, in all its moods."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentpool.orchestrator.reports import cost_of, usage_of
from agentpool_worker.agents import failures
from agentpool_worker.agents.cli import Claude, CliAgent
from agentpool_worker.agents.failures import (
    AgentAnswerError,
    AgentNotInstalledError,
    AgentProgramError,
    AgentRejectedError,
    AgentStalledError,
    AgentTimeoutError,
    AgentUnavailableError,
)

pytestmark = pytest.mark.timeout(90)

Make = Callable[..., CliAgent]
IsAlive = Callable[[int], bool]
WaitUntil = Callable[..., None]


@pytest.fixture
def claude(program: str) -> Iterator[Make]:
    made: list[CliAgent] = []

    def make(**config: Any) -> CliAgent:
        agent = Claude(command=program, **config)
        agent.setup()
        made.append(agent)
        return agent

    yield make
    for agent in made:
        agent.close()


def pid_in(file: Path) -> int:
    return int(file.read_text())


# -- a process per prompt --------------------------------------------------------------------------------------------


def test_an_answer_with_its_cost_and_usage(claude: Make) -> None:
    answer = claude().run("good morning")
    assert answer["answer"] == "You said: good morning (1)"
    assert answer["cost_usd"] == 0.25
    assert answer["usage"] == {"input_tokens": 10, "output_tokens": 5}
    assert (answer["turns"], answer["model"], answer["version"]) == (1, "scripted-1", "2.1.0")
    assert answer["session_id"]
    assert not answer["is_warm"]


@pytest.mark.parametrize(("form", "argv"), [
    ("text", ["--prompt={prompt}"]), ("text", []), ("json", ["--output-format", "json", "--prompt={prompt}"]),
])
def test_any_program_by_a_template_and_rules(program: str, form: str, argv: list[str]) -> None:
    rules = {"answer": "result", "cost_usd": "total_cost_usd", "failed": "is_error"} if form == "json" else {}
    agent = CliAgent(command=program, argv=argv, form=form, rules=rules)
    agent.setup()
    answer = agent.run("one; $(two)\nthree")
    assert answer["answer"] == "You said: one; $(two)\nthree (1)"
    assert answer["cost_usd"] == (0.25 if form == "json" else None)


def test_it_runs_where_it_is_to_look_and_is_told(claude: Make, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.touch()
    answer = claude().run("review", path=str(file), out=str(tmp_path))
    assert f"Look at: {file}" in answer["answer"]
    assert f"into the directory {tmp_path}" in answer["answer"]


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize(("status", "kind"), [
    (529, AgentUnavailableError), (429, AgentUnavailableError), (500, AgentUnavailableError),
    (401, AgentRejectedError), (400, AgentRejectedError),
])
def test_errors_are_classified(claude: Make, session: bool, status: int, kind: type[Exception]) -> None:
    """Its result says `subtype: success`, and is none."""
    with pytest.raises(kind) as caught:
        claude(session=session).run(f"ERR {status}")
    error = caught.value
    assert isinstance(error, failures.AgentError)
    assert (error.status, error.retry_after, error.program) == (status, 0.2, "claude")
    assert error.is_transient == (status in (529, 429, 500))


@pytest.mark.parametrize("session", [False, True])
def test_an_answer_that_is_marked_as_an_error_is_none(claude: Make, session: bool) -> None:
    with pytest.raises(AgentAnswerError, match=r"error_max_turns.*Reached the turn limit"):
        claude(session=session).run("LIMIT")


def test_an_error_says_what_it_cost_all_the_same(claude: Make) -> None:
    with pytest.raises(AgentAnswerError) as caught:
        claude().run("LIMIT")
    assert (caught.value.cost_usd, caught.value.usage) == (0.25, {"input_tokens": 10, "output_tokens": 0})
    assert cost_of(caught.value) == 0.25
    assert usage_of(caught.value) == {"input_tokens": 10, "output_tokens": 0}


#: More than Linux takes in one argument: 128 KiB.
LONG = "words and words and " * 10_000


def test_a_system_prompt_stands_before_the_prompt_where_there_is_no_option_for_it(program: str) -> None:
    agent = CliAgent(command=program, argv=[], system_prompt="Be brief.")
    agent.setup()
    assert agent.run("hello")["answer"] == "You said: Be brief.\n\nhello (1)"


@pytest.mark.parametrize("session", [False, True])
def test_a_long_prompt_goes_to_standard_input(claude: Make, session: bool) -> None:
    assert claude(session=session).run(LONG)["answer"] == f"You said: {LONG.strip()} (1)"


def test_a_directory_that_is_not_there_is_named(claude: Make) -> None:
    with pytest.raises(AgentProgramError, match=r"cannot start '.*' in directory /nonexistent: No such file"):
        claude().run("hello", cwd="/nonexistent")


def test_an_argument_that_is_too_long_is_named_with_the_cure(claude: Make, program: str) -> None:
    def made(agent: CliAgent) -> CliAgent:
        agent.setup()
        return agent

    words = r"Argument list too long: its argument %s, has [\d,]+ bytes, and the system takes 131,071 in one; .*input"
    with pytest.raises(AgentProgramError, match=words % r"1, '--prompt=words and .*"):
        made(CliAgent(command=program, argv=["--prompt={prompt}"])).run(LONG)
    with pytest.raises(AgentProgramError, match=words % r"6, 'words and .*"):
        claude(system_prompt=LONG).run("hello")
    many = made(CliAgent(command=program, argv=["{prompt}"] * 30))
    with pytest.raises(AgentProgramError, match=r"its arguments \([\d,]+ bytes\) and its environment are more than"):
        many.run(LONG[:120_000])


def test_a_program_that_dies_says_its_last_words(claude: Make) -> None:
    with pytest.raises(AgentProgramError, match="ended with 7: scripted death") as caught:
        claude().run("DIE 7")
    assert caught.value.stderr_tail == "scripted death"


def test_silence_is_not_slowness(claude: Make) -> None:
    """The stall timeout ends what is silent, the total one what goes on and on."""
    began = time.monotonic()
    with pytest.raises(AgentStalledError, match=r"wrote nothing for 0.4 s"):
        claude(stall_timeout=0.4, timeout=60).run("HANG")
    with pytest.raises(AgentTimeoutError, match=r"longer than its timeout of 0.6 s") as caught:
        claude(stall_timeout=30, timeout=0.6).run("CHATTER")
    assert not isinstance(caught.value, AgentStalledError)
    assert time.monotonic() - began < 20


def test_what_ignores_every_signal_is_killed(claude: Make) -> None:
    with pytest.raises(AgentStalledError):
        claude(stall_timeout=0.4, stop_grace=0.3).run("DEAF")


@pytest.mark.parametrize("session", [False, True])
def test_a_tool_in_a_session_of_its_own_ends_with_the_agent(
    claude: Make, tmp_path: Path, is_alive: IsAlive, session: bool
) -> None:
    file = tmp_path / "pid"
    agent = claude(stall_timeout=1.0, session=session)
    with pytest.raises(AgentStalledError):
        agent.run(f"TOOL {file}")
    assert not is_alive(pid_in(file))


@pytest.mark.parametrize("session", [False, True])
def test_a_daemon_without_environment_is_found(
    claude: Make, tmp_path: Path, is_alive: IsAlive, session: bool
) -> None:
    """It is in no process group, tree or environment that leads to it: only the subreaper has it."""
    file = tmp_path / "pid"
    assert claude(session=session).run(f"DETACH {file}")["answer"]
    assert not is_alive(pid_in(file))


# -- kept sessions ---------------------------------------------------------------------------------------------------


def test_a_kept_session_answers_again_and_remembers_nothing(claude: Make) -> None:
    agent = claude(session=True)
    answers = [agent.run("hello") for _ in range(3)]
    assert {answer["answer"] for answer in answers} == {"You said: hello (1)"}
    assert len({answer["session_id"] for answer in answers}) == 1, "one process"
    assert [answer["cost_usd"] for answer in answers] == [0.25] * 3
    assert all(answer["is_warm"] for answer in answers)


def test_a_silent_turn_is_interrupted_and_the_session_goes_on(claude: Make) -> None:
    agent = claude(session=True, stall_timeout=0.4)
    first = agent.run("hello")
    with pytest.raises(AgentStalledError):
        agent.run("HANG")
    second = agent.run("hello")
    assert second["answer"] == "You said: hello (1)"
    assert second["session_id"] == first["session_id"]


def test_a_session_that_hears_no_interrupt_is_replaced(claude: Make, is_alive: IsAlive) -> None:
    agent = claude(session=True, stall_timeout=0.4, interrupt_seconds=0.3, stop_grace=0.2)
    first = agent.run("hello")
    with pytest.raises(AgentStalledError):
        agent.run("DEAF")
    assert not is_alive(int(str(first["session_id"]).removeprefix("session-")))
    second = agent.run("hello")
    assert second["session_id"] != first["session_id"]
    assert not second["is_warm"]


def test_it_is_done_when_its_background_tasks_are(claude: Make) -> None:
    agent = claude(session=True)
    began = time.monotonic()
    assert agent.run("BACKGROUND 0.5")["answer"] == "It is done."
    assert time.monotonic() - began >= 0.5
    assert agent.run("hello")["answer"] == "You said: hello (1)", "nothing is left over for the next prompt"


def test_a_session_that_dies_fails_its_prompt_alone(claude: Make) -> None:
    agent = claude(session=True)
    with pytest.raises(AgentProgramError, match="ended in the middle of a turn; it ended with 3"):
        agent.run("DIE 3")
    assert agent.run("hello")["answer"] == "You said: hello (1)"


def test_a_session_moves_to_another_directory(claude: Make, tmp_path: Path) -> None:
    agent = claude(session=True)
    first, second = agent.run("hello"), agent.run("hello", cwd=str(tmp_path))
    assert first["session_id"] != second["session_id"]


# -- what is installed -----------------------------------------------------------------------------------------------


def test_a_program_that_is_missing_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(AgentNotInstalledError, match=r"'claude' needs the program 'claude'.*npm install -g @anthropic"):
        Claude().setup()


def test_a_program_that_is_too_old_says_so(program: str) -> None:
    with pytest.raises(AgentNotInstalledError, match=r"is claude 1\.9\.3; agentpool needs 2\.0 or later"):
        Claude(command=program, env={"AGENT_PROGRAM_VERSION": "1.9.3"}).setup()


def test_what_is_no_agent_program_says_so() -> None:
    with pytest.raises(AgentNotInstalledError, match="names no version"):
        Claude(command="/bin/sh").setup()


@pytest.mark.parametrize(("config", "words"), [
    ({"modell": "x"}, "no option modell; known are .*model"),
    ({"session": True, "kind": CliAgent}, "stream-json"),
    ({"kind": CliAgent}, "without a preset needs command"),
])
def test_a_wrong_configuration_is_refused(config: dict[str, Any], words: str) -> None:
    kind = config.pop("kind", Claude)
    more = {"command": "x", "argv": []} if config and kind is CliAgent else {}
    with pytest.raises(TypeError, match=words):
        kind(**config, **more)


class StopAsked(BaseException):
    """Stands for what the worker raises in a task that is to stop."""


def test_a_request_to_stop_ends_all_of_it(
    claude: Make, tmp_path: Path, is_alive: IsAlive, wait_until: WaitUntil
) -> None:
    import threading

    file = tmp_path / "pid"

    def stop(number: int, frame: object) -> None:
        raise StopAsked

    def watch() -> None:
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"))
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, stop)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with pytest.raises(StopAsked):
            claude().run(f"TOOL {file}")
        assert not is_alive(pid_in(file))
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, previous)
