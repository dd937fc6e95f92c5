"""What tasks write and log, captured per task: by descriptor, so that C code and other processes are heard too."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

from agentpool import AgentFuture, AgentKind, AgentPool, SettingsError, WorkerCrashedError
from agentpool.events import Event, Log, Output, Progress

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MakePool = Callable[..., AgentPool]
LONG = 60.0
WRITE = "import sys; sys.stdout.write('out of ' + sys.argv[1]); sys.stderr.write('err of ' + sys.argv[1])"


@pytest.fixture(params=["fork", "spawn"])
def pool(make_pool: MakePool, request: pytest.FixtureRequest) -> AgentPool:
    return make_pool(1, request.param)


def text(future: AgentFuture[object], stream: str = "stdout") -> str:
    return "".join(event.text for event in future.events() if isinstance(event, Output) and event.stream == stream)


def logged(future: AgentFuture[object]) -> list[tuple[str, str, str]]:
    return [(event.level_name, event.logger, event.message) for event in future.events() if isinstance(event, Log)]


def speak(words: str) -> None:
    print(words)
    print(words.upper(), file=sys.stderr)


class TestOutput:
    def test_of_python_c_and_other_processes(self, pool: AgentPool) -> None:
        def task(program: str) -> int:
            import ctypes
            import subprocess

            print("from print")
            os.write(1, b"from write\n")
            ctypes.CDLL(None).puts(b"from C")
            ctypes.CDLL(None).fflush(None)
            subprocess.run([sys.executable, "-c", program, "a child"], check=True)
            subprocess.run("echo from a shell > /dev/stdout; echo warned > /dev/stderr", shell=True, check=True)
            print("no end of line", end="")
            return 1

        future = pool.options(capture_output=True).submit(task, WRITE)
        assert future.result(LONG) == 1
        assert text(future) == "from print\nfrom write\nfrom C\nout of a childfrom a shell\nno end of line"
        assert text(future, "stderr") == "err of a childwarned\n"

    def test_what_the_c_library_holds_back_is_the_tasks_that_printed_it(self, make_pool: MakePool) -> None:
        def task(words: bytes) -> None:
            import ctypes

            ctypes.CDLL(None).printf(words)

        captured = make_pool(max_workers=1).options(capture_output=True)
        futures = [captured.submit(task, words) for words in (b"one", b"two", b"three")]
        assert [text(future) for future in futures] == ["one", "two", "three"]

    def test_each_task_has_its_own(self, make_pool: MakePool, capfd: pytest.CaptureFixture[str]) -> None:
        pool = make_pool(max_workers=1)
        captured = pool.options(capture_output=True)
        futures = [view.submit(speak, f"words {number}")
                   for number, view in enumerate([pool, captured, captured, pool, captured])]
        for future in futures:
            future.result(LONG)
        assert [text(future) for future in futures] == ["", "words 1\n", "words 2\n", "", "words 4\n"]
        assert [text(future, "stderr") for future in futures] == ["", "WORDS 1\n", "WORDS 2\n", "", "WORDS 4\n"]
        pool.shutdown()
        out, err = capfd.readouterr()
        assert sorted(out.split("\n")) == ["", "words 0", "words 3"]
        assert err == "WORDS 0\nWORDS 3\n"

    def test_it_is_seen_while_the_task_runs_in_order_with_what_else_it_says(
        self, make_pool: MakePool, tmp_path: Path
    ) -> None:
        def task(gate: str) -> None:
            import pathlib
            import time

            from agentpool_worker import context

            print("first")
            context.current().progress(1)
            while not pathlib.Path(gate).exists():
                time.sleep(0.005)
            print("second")
            context.current().progress(2)

        future = make_pool().options(capture_output=True).submit(task, str(tmp_path / "gate"))
        events = future.events()
        heard: list[Event] = []
        while not heard or heard[-1].kind != "progress":
            heard.append(next(events))
        assert not future.done()
        (tmp_path / "gate").touch()
        heard += events
        words = [event.text if isinstance(event, Output) else f"<{event.kind}>" for event in heard]
        assert "".join(words) == "first\n<progress>second\n<progress>"

    def test_text_is_not_cut_within_a_character(self, make_pool: MakePool) -> None:
        def task() -> None:
            for byte in "Grüße, 世界".encode():
                os.write(1, bytes([byte]))
            os.write(1, b"\xff\xe4")

        captured = make_pool(1).options(capture_output=True)
        said = {text(captured.submit(task)) for _ in range(30)}  # whether the pipes' ends are seen is a race
        assert said == {"Grüße, 世界\ufffd\ufffd"}

    def test_c_code_that_holds_the_interpreter_and_fills_a_pipe_does_not_hang(self, make_pool: MakePool) -> None:
        def task() -> int:
            import ctypes

            return int(ctypes.PyDLL(None).puts(b"x" * 3_000_000) >= 0)  # PyDLL: the GIL is kept meanwhile

        future = make_pool().options(capture_output=True).submit(task)
        assert future.result(LONG) == 1
        assert len(text(future)) == 3_000_001

    def test_a_flood_of_it_keeps_the_newest(self, make_pool: MakePool) -> None:
        def task() -> None:
            for number in range(200_000):
                print(f"line {number:060}")

        future = make_pool().options(capture_output=True).submit(task)
        future.result(LONG)
        assert text(future).endswith(f"line {199_999:060}\n")
        assert future.events_dropped > 0
        assert sum(len(event.text) for event in future.events() if isinstance(event, Output)) <= 4 * 1024 * 1024

    def test_an_error_a_crash_and_a_kill_keep_it(self, make_pool: MakePool) -> None:
        def fail() -> None:
            print("before")
            raise ValueError("after")

        def crash() -> None:
            print("before")
            os.write(2, b"last words")
            os.kill(os.getpid(), signal.SIGKILL)

        def hang() -> None:
            os.write(1, b"before\n")  # at once: an unbuffered stream writes the line's end apart
            threading.Event().wait()

        pool = make_pool(max_workers=1, kill_grace=5)
        captured = pool.options(capture_output=True)
        failed, crashed = captured.submit(fail), captured.submit(crash)
        assert isinstance(failed.exception(LONG), ValueError)
        assert text(failed) == "before\n"
        error = crashed.exception(LONG)
        assert isinstance(error, WorkerCrashedError)
        assert text(crashed) == "before\n"
        assert text(crashed, "stderr") == "last words"
        assert error.stderr_tail.endswith("last words")  # its report has them as ever
        hanging = captured.submit(hang)
        assert isinstance(next(hanging.events()), Output)
        assert hanging.kill()
        assert text(hanging) == "before\n"
        assert text(captured.submit(speak, "again")) == "again\n"

    def test_a_task_that_closes_or_replaces_its_descriptors_harms_itself_alone(
        self, make_pool: MakePool, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def close() -> None:
            os.close(1)
            os.close(2)

        def replace() -> None:
            import io

            sys.stdout = io.StringIO()
            print("lost")
            sys.stdout = sys.__stdout__

        pool = make_pool(max_workers=1)
        captured = pool.options(capture_output=True)
        for harm in (close, replace):
            captured.submit(harm).result(LONG)
            assert text(captured.submit(speak, "captured")) == "captured\n"
            pool.submit(speak, "not captured").result(LONG)
        pool.shutdown()
        assert capfd.readouterr().out == "not captured\n" * 2

    def test_a_process_that_outlives_its_task_is_not_heard_with_the_next(self, make_pool: MakePool) -> None:
        def leave() -> int:
            import subprocess

            return subprocess.Popen(["sh", "-c", "echo begun; trap '' PIPE; while :; do echo still here; sleep 0.01; "
                                     "done"], stderr=subprocess.DEVNULL).pid

        captured = make_pool(max_workers=1).options(capture_output=True)
        captured.submit(leave).result(LONG)
        futures = [captured.submit(speak, f"next {number}") for number in range(20)]
        assert [text(future) for future in futures] == [f"next {number}\n" for number in range(20)]

    def test_attempts_are_told_apart(self, make_pool: MakePool, tmp_path: Path) -> None:
        def task(mark: str) -> None:
            if os.path.exists(mark):
                print("again")
            else:
                open(mark, "w").close()
                print("at first")
                os.kill(os.getpid(), signal.SIGKILL)

        future = make_pool().options(capture_output=True, retry=2).submit(task, str(tmp_path / "mark"))
        future.result(LONG)
        said = {1: "", 2: ""}
        for event in future.events():  # an unbuffered stream writes a line and its end apart
            if isinstance(event, Output):
                said[event.attempt] += event.text
        assert said == {1: "at first\n", 2: "again\n"}

    def test_agents_coroutines_and_chunks(self, make_pool: MakePool) -> None:
        class Talker:
            def run(self, prompt: str) -> str:
                print(f"thinking of {prompt}")
                return prompt

        async def coroutine() -> int:
            print("from a coroutine")
            return 3

        captured = make_pool().options(capture_output=True)
        agent = captured.submit_agent(Talker, "rain")
        assert (agent.result(LONG), text(agent)) == ("rain", "thinking of rain\n")
        future = captured.submit(coroutine)
        assert (future.result(LONG), text(future)) == (3, "from a coroutine\n")  # type: ignore[comparison-overlap]
        assert list(captured.map(abs, [-1, -2, -3], chunksize=2)) == [1, 2, 3]

    def test_where_a_kind_of_agents_asks_for_it_and_the_view_says_nothing(self, make_pool: MakePool) -> None:
        class Talker:
            def run(self, prompt: str) -> str:
                print(f"thinking of {prompt}")
                logging.getLogger("talker").info("thought")
                return prompt

        kind = AgentKind(name="talker", agent=Talker, capture_output=True, capture_logging="INFO")
        pool = make_pool(1)
        future = pool.submit_agent(kind, "rain")
        assert (future.result(LONG), text(future)) == ("rain", "thinking of rain\n")
        assert logged(future) == [("INFO", "talker", "thought")]
        assert logged(pool.options(capture_logging=None).submit_agent(kind, "rain")) == []
        quiet = pool.options(capture_output=True).submit_agent(kind.updated(capture_output=False), "rain")
        assert text(quiet) == "thinking of rain\n"
        loud = kind.updated(capture_output=False, capture_logging="ERROR")
        assert list(pool.submit_agent(loud, "rain").events()) == []

    def test_of_the_tasks_of_a_session(self, make_pool: MakePool) -> None:
        with make_pool().options(capture_output=True, capture_logging="INFO").session("talk") as session:
            future = session.submit(speak, "in a session")
            assert text(future) == "in a session\n"
            assert logged(session.submit(lambda: logging.getLogger("s").info("kept"))) == [("INFO", "s", "kept")]

    def test_many_tasks_leave_no_descriptor(self, make_pool: MakePool) -> None:
        pool = make_pool(max_workers=2)
        captured = pool.options(capture_output=True)
        captured.submit(speak, "warm").result(LONG)
        before = len(os.listdir("/proc/self/fd"))
        futures = [captured.submit(speak, f"{number}") for number in range(500)]
        assert [text(future) for future in futures] == [f"{number}\n" for number in range(500)]
        theirs = captured.submit(lambda: len(os.listdir("/proc/self/fd"))).result(LONG)
        assert theirs < 20
        assert len(os.listdir("/proc/self/fd")) <= before + 16  # one more worker


class TestLogging:
    def test_records_of_all_threads_arrive_at_their_level(self, pool: AgentPool) -> None:
        def task() -> int:
            import logging

            root_level = logging.getLogger().level
            log = logging.getLogger("agent.search")
            log.debug("not asked for")
            log.info("looked at %d pages", 3)
            thread = threading.Thread(target=log.warning, args=("slow",), name="loader")
            thread.start()
            thread.join()
            try:
                raise KeyError("page")
            except KeyError:
                log.exception("failed")
            return root_level

        future = pool.options(capture_logging="INFO").submit(task)
        assert future.result(LONG) == logging.INFO
        assert logged(future) == [
            ("INFO", "agent.search", "looked at 3 pages"), ("WARNING", "agent.search", "slow"),
            ("ERROR", "agent.search", "failed"),
        ]
        _, slow, failed = (event for event in future.events() if isinstance(event, Log))
        assert slow.thread == "loader"
        assert failed.traceback.startswith("Traceback (most recent call last):")
        assert failed.traceback.endswith("KeyError: 'page'")

    def test_the_next_task_has_logging_as_it_was(self, make_pool: MakePool) -> None:
        def task() -> tuple[int, int]:
            import logging

            logging.getLogger("x").warning("said")
            return logging.getLogger().level, len(logging.getLogger().handlers)

        pool = make_pool(max_workers=1)
        before = pool.submit(task).result(LONG)
        captured = pool.options(capture_logging=logging.DEBUG).submit(task)
        after = pool.submit(task)
        assert captured.result(LONG) == (logging.DEBUG, before[1] + 1)
        assert after.result(LONG) == before == (logging.WARNING, 0)
        assert logged(captured) == [("WARNING", "x", "said")]
        assert logged(after) == []

    def test_a_level_that_the_task_sets_stays_and_a_record_that_cannot_be_made_is_its_own_affair(
        self, make_pool: MakePool
    ) -> None:
        def task() -> None:
            import logging

            logging.getLogger().setLevel(logging.ERROR)
            logging.error("%d", "no number")
            logging.error("fine")

        def level() -> int:
            import logging

            return logging.getLogger().level

        pool = make_pool(max_workers=1)
        future = pool.options(capture_logging="WARNING").submit(task)
        future.result(LONG)
        assert logged(future) == [("ERROR", "root", "fine")]
        assert pool.submit(level).result(LONG) == logging.ERROR

    def test_together_with_output(self, make_pool: MakePool) -> None:
        def task() -> None:
            import logging

            from agentpool_worker import context

            print("printed")
            logging.getLogger("a").info("logged")
            context.current().progress(1)
            raise ValueError("and raised")

        future = make_pool().options(capture_output=True, capture_logging="INFO").submit(task)
        assert isinstance(future.exception(LONG), ValueError)
        assert list(dict.fromkeys(type(event) for event in future.events())) == [Output, Log, Progress]  # it may be cut


class TestWhatItCosts:
    def test_a_worker_that_captures_nothing_loads_nothing_for_it(self, make_pool: MakePool) -> None:
        def loaded() -> list[str]:
            names = ("agentpool_worker.streaming", "agentpool_worker.capture", "logging", "termios")
            return [name for name in names if name in sys.modules]

        from agentpool_worker import protocol

        pool = make_pool(max_workers=1)
        assert pool.submit(abs, -1).result(LONG) == 1
        found = pool.submit(loaded).result(LONG)
        assert "agentpool_worker.streaming" not in found
        assert "agentpool_worker.capture" not in found
        assert protocol.EVENTS < protocol.OUTPUT


@pytest.mark.parametrize(("option", "message"), [
    ({"capture_output": 1}, "capture_output must be True or False, got 1"),
    ({"capture_logging": "LOUD"}, "capture_logging must be None, a level's number or one of DEBUG, INFO, WARNING, "
                                  "ERROR, CRITICAL, got 'LOUD'"),
    ({"capture_logging": True}, "got True"),
    ({"capture_logging": -1}, "got -1"),
])
def test_bad_options(make_pool: MakePool, option: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_pool().options(**option)
