"""CommandAgent with real commands: what it captures, how it reports an end, and that a stop reaches the whole group."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentpool_worker.agents.base import resolve
from agentpool_worker.agents.command import CommandAgent, CommandFailed

PYTHON = sys.executable
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def agent() -> CommandAgent:
    return CommandAgent()


Wait = Callable[..., None]
IsAlive = Callable[[int], bool]


class StopAsked(BaseException):
    """Stands for whatever the worker raises in a task to stop it."""


@pytest.fixture
def stop_after_file(wait_until: Wait) -> Iterator[Callable[[Path], None]]:
    """Raises StopAsked in the main thread by signal, as soon as a file is there."""

    def raise_stop(number: int, frame: object) -> None:
        raise StopAsked

    previous = signal.signal(signal.SIGUSR1, raise_stop)
    threads: list[threading.Thread] = []

    def arm(path: Path) -> None:
        def watch() -> None:
            wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
            os.kill(os.getpid(), signal.SIGUSR1)

        threads.append(threading.Thread(target=watch))
        threads[-1].start()

    yield arm
    for thread in threads:
        thread.join()
    signal.signal(signal.SIGUSR1, previous)


def test_it_is_the_stock_agent_command() -> None:
    assert resolve("command") is CommandAgent
    assert CommandAgent.name == "command"
    assert not CommandAgent.idempotent


def test_an_argument_that_is_too_long_is_named_with_the_cure(agent: CommandAgent) -> None:
    result = agent.run("a label", argv=["true", "x" * 200_000])
    assert result["exit_code"] == 126
    assert b"cannot start 'true': Argument list too long: its argument 1, 'xxx" in result["stderr"]
    assert b"hand it over on standard input" in result["stderr"]


def test_captures_both_streams_apart_and_reports_the_exit_code(agent: CommandAgent) -> None:
    before = time.time()
    result = agent.run("a label", argv=["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result["exit_code"], result["signal"]) == (3, 0)
    assert (result["stdout"], result["stderr"]) == (b"out\n", b"err\n")
    assert result["argv"] == ["sh", "-c", "echo out; echo err >&2; exit 3"]
    assert before - 1 <= result["started_at"] <= time.time()
    assert 0 < result["seconds"] < 30
    assert result["stdout_bytes"] == 4
    assert result["stdout_file"] is None


def test_a_prompt_is_split_and_never_given_to_a_shell(agent: CommandAgent) -> None:
    assert agent.run("printf '%s|' 'a b' $(id) ; *")["stdout"] == b"a b|$(id)|;|*|"


def test_a_shell_line_runs_in_a_shell_where_asked(agent: CommandAgent) -> None:
    assert agent.run("echo $((1 + 2)) | tr 3 x", shell=True)["stdout"] == b"x\n"


def test_an_argument_arrives_as_it_is(agent: CommandAgent) -> None:
    odd = ["a b", "", "'\"", "$(touch /nonexistent)", "line\nline", "*", "-n", "\udcff"]
    result = agent.run(argv=[PYTHON, "-c", "import os,sys; sys.stdout.write(repr(sys.argv[1:]))", *odd])
    assert result["stdout"].decode() == repr(odd)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": ""}, ValueError),
        ({"prompt": "  ", "shell": True}, ValueError),
        ({"argv": []}, ValueError),
        ({"argv": "ls -l"}, TypeError),
        ({"argv": ["ls"], "shell": True}, ValueError),
        ({"prompt": "echo 'unbalanced"}, ValueError),
    ],
)
def test_no_command_is_a_clear_error(agent: CommandAgent, arguments: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        agent.run(**arguments)


def test_a_program_that_is_not_there_ends_with_127_as_in_a_shell(agent: CommandAgent) -> None:
    result = agent.run(argv=["no-such-program-zz"])
    assert result["exit_code"] == 127
    assert b"no-such-program-zz" in result["stderr"]


def test_a_file_that_cannot_be_started_ends_with_126(agent: CommandAgent, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    assert agent.run(argv=[str(plain)])["exit_code"] == 126
    assert agent.run(argv=["echo", "a\0b"])["exit_code"] == 126
    assert agent.run(argv=["echo", "x" * 3_000_000])["exit_code"] == 126


def test_a_missing_directory_is_named(agent: CommandAgent, tmp_path: Path) -> None:
    result = agent.run(argv=["echo"], cwd=tmp_path / "gone")
    assert result["exit_code"] == 127
    assert b"gone" in result["stderr"]


def test_an_end_by_signal_is_told_from_an_exit_code(agent: CommandAgent) -> None:
    result = agent.run("kill -9 $$", shell=True)
    assert (result["exit_code"], result["signal"]) == (-9, 9)


def test_check_raises_with_the_result_and_survives_pickle(agent: CommandAgent) -> None:
    with pytest.raises(CommandFailed, match=r"exited with 4; its standard error ends: broken") as caught:
        agent.run("echo broken >&2; exit 4", shell=True, check=True)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.result == caught.value.result
    assert str(copy) == str(caught.value)
    with pytest.raises(CommandFailed, match="was ended by SIGKILL"):
        agent.run("kill -9 $$", shell=True, check=True)
    assert agent.run("true", check=True)["exit_code"] == 0


def test_standard_input_is_empty_unless_given(agent: CommandAgent) -> None:
    assert agent.run("cat")["stdout"] == b""
    assert agent.run("cat", stdin="text\n")["stdout"] == b"text\n"
    assert agent.run("cat", stdin=b"")["stdout"] == b""


def test_a_large_input_and_output_do_not_block_each_other(agent: CommandAgent) -> None:
    data = os.urandom(3_000_000)
    assert agent.run("cat", stdin=data)["stdout"] == data


def test_a_command_need_not_read_its_input(agent: CommandAgent) -> None:
    assert agent.run("true", stdin=b"x" * 5_000_000)["exit_code"] == 0


def test_env_adds_and_cwd_changes(agent: CommandAgent, tmp_path: Path) -> None:
    result = agent.run('echo "$EXTRA ${HOME:+home} $(pwd)"', shell=True, env={"EXTRA": "1"}, cwd=tmp_path)
    assert result["stdout"].decode() == f"1 home {tmp_path}\n"


def test_output_above_the_limit_is_dropped_with_a_note(agent: CommandAgent) -> None:
    result = agent.run("yes | head -c 3000000", shell=True, output_limit_mb=1)
    assert result["exit_code"] == 0
    assert result["stdout_bytes"] == 3_000_000
    assert len(result["stdout"]) < 1_100_000
    assert b"1951424 more bytes were dropped" in result["stdout"][-100:]


def test_output_can_go_to_files_which_are_made_only_when_there_is_some(agent: CommandAgent, tmp_path: Path) -> None:
    prefix = str(tmp_path / "job")
    (tmp_path / "job.err").write_text("of an earlier attempt")
    result = agent.run("yes | head -c 3000000", shell=True, output_limit_mb=None, output_path=prefix)
    assert result["stdout"] == b""
    assert result["stdout_file"] == prefix + ".out"
    assert Path(prefix + ".out").read_bytes() == b"y\n" * 1_500_000
    assert result["stderr_file"] is None
    assert not Path(prefix + ".err").exists()


def test_the_end_of_a_large_error_file_is_quoted(agent: CommandAgent, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"(?s)ends: .*last words$"):
        agent.run(
            "yes | head -c 300000 >&2; echo last words >&2; false",
            shell=True, check=True, output_path=str(tmp_path / "job"),
        )


def test_output_that_cannot_be_written_is_an_error_and_stops_the_command(
    agent: CommandAgent, tmp_path: Path, is_alive: IsAlive
) -> None:
    with pytest.raises(OSError, match="missing"):
        agent.run(f"echo $$ > {tmp_path}/pid; echo x; exec sleep 60", shell=True,
                  output_path=str(tmp_path / "missing" / "job"))
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_what_a_command_leaves_in_its_group_is_stopped_and_not_waited_for(
    agent: CommandAgent, tmp_path: Path, is_alive: IsAlive
) -> None:
    result = agent.run(f"sleep 300 & echo $! > {tmp_path}/pid; yes & echo done", shell=True)
    assert result["exit_code"] == 0
    assert b"done" in result["stdout"]
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_request_to_stop_ends_the_whole_group(
    agent: CommandAgent, tmp_path: Path, stop_after_file: Callable[[Path], None], is_alive: IsAlive
) -> None:
    stop_after_file(tmp_path / "pids")
    script = f"sleep 300 & a=$!; trap 'echo told > {tmp_path}/told; exit' TERM; echo $a $$ > {tmp_path}/pids; wait"
    with pytest.raises(StopAsked):
        agent.run(script, shell=True)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert not any(is_alive(pid) for pid in pids)
    assert (tmp_path / "told").exists()  # it was asked before it was killed


def test_a_command_that_ignores_sigterm_is_killed_after_the_grace(
    agent: CommandAgent, tmp_path: Path, stop_after_file: Callable[[Path], None], is_alive: IsAlive
) -> None:
    stop_after_file(tmp_path / "pid")
    script = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); "
        f"open('{tmp_path}/pid', 'w').write(f'{{os.getpid()}}\\n'); time.sleep(300)"
    )
    began = time.monotonic()
    with pytest.raises(StopAsked):
        agent.run(argv=[PYTHON, "-c", script], stop_grace=0.2)
    assert time.monotonic() - began < 20
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_output_written_before_a_stop_is_in_the_file(
    agent: CommandAgent, tmp_path: Path, stop_after_file: Callable[[Path], None]
) -> None:
    stop_after_file(tmp_path / "job.out")
    with pytest.raises(StopAsked):
        agent.run("echo so far; exec sleep 300", shell=True, output_path=str(tmp_path / "job"))
    assert (tmp_path / "job.out").read_text() == "so far\n"


def test_what_a_command_says_when_it_is_stopped_is_captured(
    agent: CommandAgent, tmp_path: Path, stop_after_file: Callable[[Path], None]
) -> None:
    stop_after_file(tmp_path / "job.out")
    # More than a pipe holds.
    with pytest.raises(StopAsked):
        agent.run("trap 'yes | head -c 300000; exit' TERM; echo begun; sleep 300 & wait", shell=True,
                  output_path=str(tmp_path / "job"))
    assert (tmp_path / "job.out").read_bytes() == b"begun\n" + b"y\n" * 150_000


def test_nothing_of_a_run_stays_open(agent: CommandAgent) -> None:
    agent.run("true")
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(20):
        agent.run("cat", stdin="x")
        agent.run(argv=["no-such-program-zz"])
    assert sorted(os.listdir("/proc/self/fd")) == before
