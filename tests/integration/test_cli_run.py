"""`agentpool run` as a user runs it: a process of its own, real commands, real signals."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)

PYTHON = sys.executable
AGENTPOOL = (PYTHON, "-m", "agentpool")
#: A command that shows its arguments so that nothing can hide.
SHOW = (PYTHON, "-S", "-c", "import os, sys; print([os.fsencode(a) for a in sys.argv[1:]])")

Result = subprocess.CompletedProcess[bytes]
Wait = Callable[..., None]
IsAlive = Callable[[int], bool]


class CommandLine:
    """Runs `agentpool run` in an empty home, in a directory of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "HOME": str(home)}

    def __call__(self, *words: str | bytes, input_: bytes = b"", **changes: str) -> Result:
        return subprocess.run(
            [*AGENTPOOL, "run", *words], input=input_, cwd=self.home, env=self.environment | changes,
            capture_output=True, timeout=100, check=False,
        )  # fmt: skip

    @contextmanager
    def started(self, *words: str, **streams: int) -> Iterator[subprocess.Popen[bytes]]:
        """A run that goes on while the block does, and ends with it."""
        process = subprocess.Popen(
            [*AGENTPOOL, "run", *words], cwd=self.home, env=self.environment,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
            # As in a terminal's foreground, even where the tests run in the background with signals ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def log(self, name: str = "log") -> list[list[str]]:
        header, *lines = (self.home / name).read_text().splitlines()
        assert header.startswith("Seq\tHost\tStarttime")
        return [line.split("\t") for line in lines]


@pytest.fixture
def run(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


def ok(result: Result) -> bytes:
    """The output of a run in which everything went well."""
    assert (result.returncode, result.stderr) == (0, b""), result
    return result.stdout


# --- arguments -------------------------------------------------------------------------------------------------------


ODD = [b"a b", b"", b"it's \"quoted\"", b"$(touch canary)", b"`touch canary`", b"; touch canary", b"*", b"-n",
       b"--help", b"two\nlines", b"\xff\xfe", "ä€".encode(), b"{}", b"{1}", b"\\", b"%s", b"~", b"a\tb"]  # fmt: skip


def test_arguments_arrive_as_they_are_and_reach_no_shell(run: CommandLine) -> None:
    output = ok(run("-k", "--", *SHOW, "{}", "x{}y", ":::", *ODD))
    assert output.decode().splitlines() == [repr([value, b"x" + value + b"y"]) for value in ODD]
    assert not (run.home / "canary").exists()


def test_lines_of_input_arrive_as_they_are(run: CommandLine) -> None:
    lines = [value for value in ODD if b"\n" not in value]
    output = ok(run("-k", *SHOW, input_=b"\n".join(lines)))
    assert output.decode().splitlines() == [repr([value]) for value in lines]
    output = ok(run("-k", "-0", *SHOW, input_=b"".join(value + b"\0" for value in ODD)))
    assert output.decode().splitlines() == [repr([value]) for value in ODD]
    assert not (run.home / "canary").exists()


def test_with_a_shell_the_line_is_the_users_and_values_are_quoted(run: CommandLine) -> None:
    line = f"{shlex.join(SHOW)} {{}} x{{}} | cat"
    output = ok(run("-k", "--shell", line, ":::", *ODD))
    assert output.decode().splitlines() == [repr([value, b"x" + value]) for value in ODD]
    assert not (run.home / "canary").exists()
    assert ok(run("--shell", "echo", "{}", "|", "wc", "-c", ":::", "abc")).strip() == b"4"


@pytest.mark.parametrize("line", ['echo "{}"', "sh -c 'echo {}'", "echo `echo {}`", "echo \\{}"])
def test_a_shell_line_that_would_run_a_value_is_refused(run: CommandLine, line: str) -> None:
    result = run("--shell", line, ":::", "$(touch canary)")
    assert result.returncode == 2
    assert b"quoted already" in result.stderr
    assert not (run.home / "canary").exists()


def test_the_commands_own_options_are_its_own(run: CommandLine) -> None:
    assert ok(run("printf", "%s|", "-k", "--json", "--", "-j", ":::", "--version")) == b"-k|--json|--|-j|--version|"
    assert ok(run("-j1", "--", "printf", "%s|", "--help", ":::", "-a")) == b"--help|-a|"


def test_sources_combine(run: CommandLine) -> None:
    (run.home / "f").write_text("x\ny\n")
    assert ok(run("-k", "echo", "{2}-{1}", ":::", "a", "b", ":::", "1", "2")) == b"1-a\n2-a\n1-b\n2-b\n"
    assert ok(run("-k", "-a", "f", "echo", ":::", "1", "2")) == b"x 1\nx 2\ny 1\ny 2\n"
    assert ok(run("-k", "echo", ":::", "1", "::::", "f")) == b"1 x\n1 y\n"
    assert ok(run("-k", "-a", "-", "echo", "{#}", input_=b"x\ny\n")) == b"1\n2\n"
    assert ok(run("-k", "echo", "{/.}", ":::", "d/e.x", "f.tar.gz")) == b"e\nf.tar\n"
    assert ok(run("echo")) == b""
    assert ok(run("echo", ":::")) == b""


def test_json_lines_fill_fields(run: CommandLine) -> None:
    lines = [{"name": "a b", "at": {"n": 1}}, {"name": "$(x)", "at": {"n": 2.5}}]
    given = "\n".join(map(json.dumps, lines)).encode()
    assert ok(run("-k", "--jsonl", "printf", "%s|%s\n", "{name}", "n={at.n}", input_=given)) == b"a b|n=1\n$(x)|n=2.5\n"


def test_a_broken_json_line_fails_alone(run: CommandLine) -> None:
    lines = b'{"name": 1}\n{"name\n{"x": 2}\n{"name": 4}\n'
    result = run("-k", "--joblog", "log", "--jsonl", "echo", "{name}", input_=lines)
    assert result.stdout == b"1\n4\n"
    assert result.returncode == 2
    assert b"job 2" in result.stderr
    assert b"not JSON" in result.stderr
    assert b"no field 'name'" in result.stderr
    assert [(line[0], line[6]) for line in run.log()] == [("1", "0"), ("2", "255"), ("3", "255"), ("4", "0")]


def test_a_job_has_no_input_of_ours_but_our_directory_and_environment(run: CommandLine) -> None:
    line = 'cat; echo "$(pwd) $MARK" {}'
    output = ok(run("--shell", line, input_=b"only\n", MARK="set"))
    assert output.decode() == f"{run.home} set only\n"


# --- output ----------------------------------------------------------------------------------------------------------


def test_output_comes_as_jobs_end_or_in_order_of_input(run: CommandLine) -> None:
    # The first job ends after the second one.
    line = "if [ {} = 1 ]; then while [ ! -e go ]; do sleep 0.02; done; rm go; else touch go; fi; echo {}"
    assert ok(run("--shell", line, ":::", "1", "2")) == b"2\n1\n"
    assert ok(run("-k", "--shell", line, ":::", "1", "2")) == b"1\n2\n"


def test_output_of_jobs_is_never_mixed_and_streams_stay_apart(run: CommandLine) -> None:
    line = "for i in $(seq 200); do echo {} $i; echo error {} $i >&2; done"
    result = run("-j", "4", "--shell", line, ":::", "a", "b", "c", "d")
    assert result.returncode == 0
    for stream, word in ((result.stdout, ""), (result.stderr, "error ")):
        blocks = [stream.decode().splitlines()[start : start + 200] for start in range(0, 800, 200)]
        assert sorted(blocks) == [[f"{word}{name} {i}" for i in range(1, 201)] for name in "abcd"]


def test_large_binary_output_is_whole(run: CommandLine) -> None:
    data = os.urandom(5_000_000)
    (run.home / "data").write_bytes(data)
    assert ok(run("cat", ":::", "data", "data")) == data * 2


def test_json_output_is_one_object_a_line(run: CommandLine) -> None:
    line = "echo out {}; echo err >&2; [ {} = good ]"
    result = run("-k", "--json", "--shell", line, ":::", "good", "bad")
    good, bad = map(json.loads, result.stdout.splitlines())
    assert result.returncode == 1
    assert result.stderr == b""
    assert (good["seq"], good["arguments"], good["exit_code"], good["signal"]) == (1, ["good"], 0, 0)
    assert (good["stdout"], good["stderr"], good["error"]) == ("out good\n", "err\n", None)
    assert good["command"] == "echo out good; echo err >&2; [ good = good ]"
    assert good["attempts"] == 1
    assert good["seconds"] >= 0
    assert bad["exit_code"] == 1
    (raw,) = map(json.loads, run("--json", "--", "printf", r"\377", ":::", "x").stdout.splitlines())
    assert raw["stdout_base64"] == "/w=="


# --- ends, the job log, resume ---------------------------------------------------------------------------------------


def test_the_exit_code_counts_failed_jobs(run: CommandLine) -> None:
    assert run("--shell", "exit {}", ":::", "0", "3", "0", "1", "255").returncode == 3
    assert run("--shell", "kill -9 $$ {}", ":::", "0").returncode == 1


def test_more_than_100_failures_are_101(run: CommandLine) -> None:
    assert run("false", ":::", *map(str, range(103))).returncode == 101


def test_a_command_that_is_not_there(run: CommandLine) -> None:
    result = run("--joblog", "log", "no-such-command-zz", ":::", "a")
    assert result.returncode == 1
    assert b"cannot start 'no-such-command-zz'" in result.stderr
    assert run.log()[0][6] == "127"


def test_the_job_log_is_gnu_parallels(run: CommandLine) -> None:
    line = "printf 12345; case {} in signal) kill -9 $$;; bad) exit 7;; esac"
    assert run("-j1", "--joblog", "log", "--shell", line, ":::", "good", "bad", "signal").returncode == 2
    log = run.log()
    assert [(row[0], row[1], row[4], row[5], row[6], row[7]) for row in log] == [
        ("1", ":", "0", "5", "0", "0"),
        ("2", ":", "0", "5", "7", "0"),
        ("3", ":", "0", "5", "0", "9"),
    ]
    assert log[0][8] == line.replace("{}", "good")
    assert all(float(row[2]) > 1_700_000_000 and 0 <= float(row[3]) < 60 for row in log)


def test_resume_runs_what_has_not_succeeded(run: CommandLine) -> None:
    line = "echo ran {}; [ -e fixed ] || [ {} != bad ]"
    arguments = (":::", "good", "bad", "new")
    assert run("-k", "--joblog", "log", "--shell", line, *arguments[:3]).stdout == b"ran good\nran bad\n"
    (run.home / "fixed").touch()
    assert ok(run("-k", "--joblog", "log", "--resume", "--shell", line, *arguments)) == b"ran bad\nran new\n"
    assert [(row[0], row[6]) for row in run.log()] == [("1", "0"), ("2", "1"), ("2", "0"), ("3", "0")]
    assert ok(run("-k", "--joblog", "log", "--resume-failed", "--shell", line, *arguments)) == b""
    assert len(run.log()) == 4
    # Another command is another job, whatever its number.
    assert ok(run("-k", "--joblog", "log", "--resume", "echo", *arguments)) == b"good\nbad\nnew\n"


def test_a_log_starts_anew_unless_asked(run: CommandLine) -> None:
    ok(run("--joblog", "log", "true", ":::", "1", "2"))
    ok(run("--joblog", "log", "true", ":::", "1"))
    assert len(run.log()) == 1
    ok(run("--joblog", "+log", "true", ":::", "1"))
    assert len(run.log()) == 2


def test_resume_after_sigkill_in_the_middle(run: CommandLine, wait_until: Wait) -> None:
    line = "echo {}; [ {} -le 3 ] || [ -e go ] || sleep 60"
    with run.started("-j1", "--joblog", "log", "--shell", line, ":::", *"12345") as process:
        wait_until(lambda: (run.home / "log").exists() and len(run.log()) == 3)
        process.kill()
        process.wait()
    abandoned = list(Path(tempfile.gettempdir()).glob("agentpool-run-*"))
    assert len(abandoned) == 1
    (run.home / "go").touch()
    assert ok(run("-k", "--joblog", "log", "--resume", "--shell", line, ":::", *"12345")) == b"4\n5\n"
    assert not abandoned[0].exists()


def test_an_empty_folder_of_a_killed_run_goes_after_a_minute(run: CommandLine, tmp_path: Path) -> None:
    old, young, locked, strange = (tmp_path / name for name in (
        "agentpool-run-old", "agentpool-run-young", "agentpool-run-locked", "another"))
    for path in (old, young, locked, strange):
        path.mkdir()
        if path != young:
            os.utime(path, (0, 0))
    lock = os.open(locked, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ok(run("true", ":::", "1", TMPDIR=str(tmp_path)))
    finally:
        os.close(lock)
    assert sorted(tmp_path.glob("a*")) == sorted([young, locked, strange])


def test_halt(run: CommandLine) -> None:
    line = "echo {}; exit {}"
    arguments = (":::", "0", "7", "3", "0")
    result = run("-j1", "--halt", "now,fail=1", "--shell", line, *arguments)
    assert (result.returncode, result.stdout) == (7, b"0\n7\n")
    result = run("-j1", "--halt", "soon,fail=2", "--shell", line, *arguments)
    assert (result.returncode, result.stdout) == (2, b"0\n7\n3\n")
    result = run("-j1", "--halt", "now,success=1", "--shell", line, ":::", "5", "0", "1")
    assert (result.returncode, result.stdout) == (0, b"5\n0\n")


def test_halt_leaves_no_gap_that_is_waited_for(run: CommandLine) -> None:
    lines = b'{"x": 1}\n{"x": 0}\n{"x": 0}\nbroken\n' + b'{"x": 0}\n' * 2000
    for when in ("soon", "now"):
        result = run("-k", "--halt", f"{when},fail=1", "--jsonl", "--shell", "sleep 0.1; exit {x}", input_=lines)
        assert result.returncode in (1, 255)


def test_halt_now_stops_what_runs_and_soon_lets_it_end(run: CommandLine) -> None:
    line = "if [ {} = 1 ]; then while [ ! -e begun ]; do sleep 0.02; done; exit 1; fi; touch begun; sleep {}; echo {}"
    assert run("--halt", "now,fail=1", "--shell", line, ":::", "1", "90").stdout == b""
    (run.home / "begun").unlink()
    assert run("--halt", "soon,fail=1", "--shell", line, ":::", "1", "0.5", "2").stdout == b"0.5\n"


# --- limits and retries ----------------------------------------------------------------------------------------------


def test_a_job_that_takes_too_long_is_stopped_with_its_output_shown(run: CommandLine) -> None:
    line = "echo begun {}; sleep {}; echo ended"
    result = run("-k", "--timeout", "1", "--joblog", "log", "--shell", line, ":::", "90", "0")
    assert result.stdout == b"begun 90\nbegun 0\nended\n"
    assert result.returncode == 1
    assert b"job 1 was stopped after 1 s" in result.stderr
    assert [(row[0], row[5], row[6], row[7]) for row in run.log()] == [("1", "9", "-1", "15"), ("2", "14", "0", "0")]
    assert 0.9 < float(run.log()[0][3]) < 60


def test_a_job_is_asked_before_it_is_killed(run: CommandLine) -> None:
    line = "trap 'echo told; exit' TERM; sleep {} & wait"
    assert run("--timeout", "0.5", "--shell", line, ":::", "300").stdout == b"told\n"


def test_a_memory_limit_holds_for_the_whole_tree_of_a_job(run: CommandLine) -> None:
    program = "import sys, time; size = int(sys.argv[1]); x = bytearray(size << 20); print(size); time.sleep(1.5)"
    hungry = f"{shlex.join([PYTHON, '-S', '-c', program])} {{}} & wait"
    result = run("-k", "--memory-limit", "200", "--joblog", "log", "--shell", hungry, ":::", "400", "10")
    assert result.returncode == 1, result
    assert result.stdout.endswith(b"10\n")
    assert b"job 1 was stopped: its processes used" in result.stderr
    assert b"the limit is 200 MB" in result.stderr
    assert [(row[0], row[6], row[7]) for row in run.log()] == [("1", "-1", "9"), ("2", "0", "0")]


FLAKY = "n=$(cat tries-{} 2>/dev/null || echo 0); n=$((n + 1)); echo $n > tries-{}; echo try $n; [ $n -ge {} ]"


def test_a_job_that_fails_is_tried_again(run: CommandLine) -> None:
    result = run("-k", "--retries", "2", "--json", "--joblog", "log", "--shell", FLAKY, ":::", "1", "3", "4")
    assert result.returncode == 1
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(record["attempts"], record["exit_code"], record["stdout"]) for record in records] == [
        (1, 0, "try 1\n"),
        (3, 0, "try 3\n"),
        (3, 1, "try 3\n"),
    ]
    assert [row[6] for row in run.log()] == ["0", "0", "1"]


def test_without_retries_a_failed_job_is_final(run: CommandLine) -> None:
    assert run("--shell", FLAKY, ":::", "2").returncode == 1
    assert (run.home / "tries-2").read_text() == "1\n"


def test_a_lost_worker_fails_its_job_alone_and_is_retried_where_asked(run: CommandLine) -> None:
    # The parent of the command is the worker.
    line = "if [ ! -e lost ]; then touch lost; kill -9 $PPID; sleep 60; fi; echo {}"
    result = run("-j1", "--joblog", "log", "--shell", line, ":::", "a", "b")
    assert result.stdout == b"b\n"
    assert result.returncode == 1
    assert b"job 1 was lost with its worker" in result.stderr
    assert run.log()[0][6:8] == ["-1", "9"]
    (run.home / "lost").unlink()
    assert ok(run("-j1", "--retries", "1", "--shell", line, ":::", "a")) == b"a\n"


# --- input without end -----------------------------------------------------------------------------------------------


def test_input_is_read_no_further_than_jobs_are_dealt_with(run: CommandLine, wait_until: Wait) -> None:
    line = b"x" * 199 + b"\n"
    job = "while [ ! -e go ]; do sleep 0.05; done; [ ! -e stop ] && echo {} >> ran"
    with run.started("-j2", "--halt", "now,fail=1", "--shell", job, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        written = calm = 0

        def write() -> int:
            nonlocal written
            before = written
            with contextlib.suppress(BlockingIOError):
                while written < 20_000 * len(line):
                    written += os.write(process.stdin.fileno(), (line * 300)[written % len(line) :])
            return written - before

        def has_settled() -> bool:
            nonlocal calm
            calm = 0 if write() else calm + 1
            return calm >= 50 and written > 500 * len(line)

        wait_until(has_settled, "the reader neither reads on nor stops", 60)
        # 1000 jobs, what one read takes in, and what the pipe holds.
        assert written < 1_000 * len(line) + 3 * 65_536
        (run.home / "go").touch()
        wait_until(write, "the reader does not go on", 60)
        (run.home / "stop").touch()
        assert process.wait(60) == 1


@pytest.mark.slow
def test_20000_lines(run: CommandLine) -> None:
    lines = b"".join(b"%d\n" % number for number in range(20_000))
    result = run("-k", "-j2", "--joblog", "log", "echo", input_=lines)
    assert ok(result) == lines
    assert len(run.log()) == 20_000


# --- ended from outside ----------------------------------------------------------------------------------------------

SLEEPER = "echo $$ > pid-{}; sleep 300 & echo $! > child-{}; wait"


def pids_of(run: CommandLine, wait_until: Wait) -> list[int]:
    """The processes of the two jobs that run."""
    def files() -> list[Path]:
        return [path for path in run.home.glob("*-*") if path.read_text().endswith("\n")]

    wait_until(lambda: len(files()) == 4, "the jobs did not start", 30)
    return [int(path.read_text()) for path in files()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_everything(
    run: CommandLine, wait_until: Wait, is_alive: IsAlive, number: int, code: int
) -> None:
    with run.started("--joblog", "log", "--shell", SLEEPER, ":::", *"123456") as process:
        pids = pids_of(run, wait_until)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, output, errors) == (code, b"", b"")
        assert not any(is_alive(pid) for pid in pids)
        assert len(list(run.home.glob("pid-*"))) == 2  # nothing more was started
        assert run.log() == []  # what was stopped runs again on --resume


def test_a_second_signal_does_not_wait_for_the_stubborn(run: CommandLine, wait_until: Wait, is_alive: IsAlive) -> None:
    stubborn = "trap '' TERM INT; echo $$ > pid-{}; sleep 300 & echo $! > child-{}; wait; wait"
    with run.started("--shell", stubborn, ":::", *"123456") as process:
        pids = pids_of(run, wait_until)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert not any(is_alive(pid) for pid in pids)


def test_a_signal_ends_a_run_that_waits_for_input(run: CommandLine, wait_until: Wait) -> None:
    with run.started("--shell", "touch ran {}", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"x\n")
        process.stdin.flush()
        wait_until(lambda: (run.home / "ran").exists(), "the job did not run", 30)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_reader_that_goes_away_ends_the_run_quietly(run: CommandLine, wait_until: Wait, is_alive: IsAlive) -> None:
    line = "if [ {} -gt 20 ]; then echo $$ > pid; exec sleep 300; fi; echo {}"
    with run.started("-k", "--shell", line, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"1\n30\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"1\n"
        wait_until(lambda: (run.home / "pid").exists() and (run.home / "pid").read_text(), "the job did not start", 30)
        process.stdout.close()
        process.stdin.write(b"2\n" * 5)
        process.stdin.close()
        os.kill(int((run.home / "pid").read_text()), signal.SIGKILL)
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


# --- a terminal ------------------------------------------------------------------------------------------------------


def on_terminal(run: CommandLine, *words: str) -> bytes:
    """What a run writes to standard error, which is a terminal. Its standard output is another file."""
    leader, follower = pty.openpty()
    with run.started(*words, stdin=follower, stdout=subprocess.DEVNULL, stderr=follower) as process:
        os.close(follower)
        chunks = []
        with contextlib.suppress(OSError):  # Linux: the other end is closed
            while chunk := os.read(leader, 65536):
                chunks.append(chunk)
        os.close(leader)
        assert process.wait(30) == 0
    return b"".join(chunks)


def test_progress_is_drawn_on_a_terminal_where_asked(run: CommandLine) -> None:
    words = ("-j1", "--shell", "sleep 0.4; echo {}", ":::", "a", "b")
    shown = on_terminal(run, "--bar", *words)
    assert b"0 done, 1 running, 1 waiting, " in shown
    assert b"1 done, 1 running, 0 waiting, " in shown
    assert shown.endswith(b"\r\x1b[K")  # the line is cleared at the end
    assert on_terminal(run, *words) == b""
    assert ok(run("--bar", *words)) == b"a\nb\n"


def test_reading_from_a_terminal_is_said(run: CommandLine) -> None:
    leader, follower = pty.openpty()
    with run.started("-k", "echo", stdin=follower) as process:
        os.close(follower)
        os.write(leader, b"typed\n\x04")
        output, errors = process.communicate(timeout=30)
    os.close(leader)
    assert (process.returncode, output) == (0, b"typed\n")
    assert b"reading arguments from the terminal" in errors


# --- wrong command lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), b"no command"),
        ((":::", "a"), b"no command"),
        (("--resume", "true", ":::", "a"), b"--joblog"),
        (("-j", "0", "true", ":::", "a"), b"--jobs"),
        (("--timeout", "-1", "true", ":::", "a"), b"greater than 0"),
        (("--memory-limit", "0", "true", ":::", "a"), b"greater than 0"),
        (("--no-such-option", "true", ":::", "a"), b"No such option"),
        (("-a", "no-such-file", "true"), b"cannot read no-such-file"),
        (("-a", ".", "true"), b"cannot read .: Is a directory"),
        (("--joblog", "no/such/dir", "true", ":::", "a"), b"cannot write the job log"),
        (("--halt", "later", "true", ":::", "a"), b"--halt later"),
        (("echo", "{2}", ":::", "a"), b"only one"),
        (("echo", ":::", "a", ":::+", "b"), b":::+"),
        (("--jsonl", "echo", ":::", "{}", ":::", "{}"), b"one source"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(run: CommandLine, words: tuple[str, ...], said: bytes) -> None:
    result = run(*words)
    assert result.returncode == 2
    assert result.stdout == b""
    assert said in result.stderr
    assert b"Traceback" not in result.stderr
