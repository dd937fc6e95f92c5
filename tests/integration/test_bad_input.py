"""Bad input, each a clear error and nothing lost: what cannot be pickled, huge values, crashes, closed and flooded
streams, initializers that fail, tasks that write where they must not. After each the pool goes on."""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import os
import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle
import psutil
import pytest

from agentpool import (
    AgentPool,
    BreakerSettings,
    CircuitOpenError,
    InitializerError,
    ResultPicklingError,
    TaskPicklingError,
    TaskUnpicklingError,
    WorkerCrashedError,
)
from agentpool_worker import protocol

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
IsAlive = Callable[[int], bool]
MakePool = Callable[..., AgentPool]
LONG = 60.0
MB = 1024 * 1024


@pytest.fixture
def pool(make_pool: MakePool) -> Iterator[AgentPool]:
    """Whatever happened in it, it works afterwards."""
    pool = make_pool(max_workers=1)
    yield pool
    assert pool.submit(sum, [1, 2, 3]).result(LONG) == 6
    stats = pool.get_pool_stats()
    assert stats["status"] in ("ok", "degraded")
    assert stats["circuit_breaker"]["state"] == "closed"
    assert (stats["running"], stats["queue_length"]) == (0, 0)


def fail(message: str = "fails") -> NoReturn:
    raise ValueError(message)


# --- what cannot be pickled ---


class Client:
    def __init__(self) -> None:
        self.settings = {"nested": [1, {"lock": threading.Lock()}]}


class Slotted:
    __slots__ = ("connection", "name")

    def __init__(self) -> None:
        self.name = "x"
        self.connection = socket.socket()


class Method:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def run(self) -> None:
        """Cannot be sent, as its object cannot."""


class RefusesAlways:
    def __reduce__(self) -> NoReturn:
        raise RuntimeError("I stay here")


class ExitsAlways:
    def __reduce__(self) -> NoReturn:
        raise SystemExit(4)


def closure_over(value: object) -> Callable[[], object]:
    return lambda: value


@pytest.mark.parametrize(
    ("args", "kwargs", "path"),
    [
        ((threading.Lock(),), {}, "args[0] (a _thread.lock)"),
        ((1, [0, {"a": (threading.Lock(),)}]), {}, "args[1][1]['a'][0] (a _thread.lock)"),
        ((), {"client": Client()}, "client.settings['nested'][1]['lock'] (a _thread.lock)"),
        ((Method().run,), {}, "args[0].__self__.lock (a _thread.lock)"),
        ((functools.partial(print, threading.Lock()),), {}, "args[0].args[0] (a _thread.lock)"),
        ((closure_over(threading.Lock()),), {}, "args[0] closure variable value (a _thread.lock)"),
        (((n for n in range(3)),), {}, "args[0] (a builtins.generator)"),
        ((RefusesAlways(),), {}, "args[0]"),
        ((ExitsAlways(),), {}, "args[0]"),
        ((sys._getframe(),), {}, "args[0] (a builtins.frame)"),
    ],
    ids=["lock", "deep in lists", "keyword's attribute", "method", "partial", "closure", "generator", "refuses",
         "exits", "frame"],
)
def test_an_argument_that_cannot_be_pickled(
    pool: AgentPool, args: tuple[Any, ...], kwargs: dict[str, Any], path: str
) -> None:
    future = pool.submit(print, *args, **kwargs)
    with pytest.raises(TaskPicklingError) as caught:
        future.result(LONG)
    assert str(caught.value).startswith(f"{path}"), str(caught.value)
    assert "cannot be pickled, so it cannot be sent to a worker" in str(caught.value)
    assert "make such objects inside the task" in str(caught.value), "the cure"
    assert isinstance(caught.value, pickle.PicklingError)
    assert caught.value.__cause__ is not None
    assert pool.get_pool_stats()["counters"]["submitted"] == 0, "it never became a task"


def test_an_attribute_in_a_slot(pool: AgentPool) -> None:
    value = Slotted()
    try:
        error = pool.submit(print, value).exception(LONG)
        assert str(error).startswith("args[0].connection (a socket.socket) cannot be pickled")
    finally:
        value.connection.close()


def test_a_function_that_cannot_be_pickled(pool: AgentPool) -> None:
    lock = threading.Lock()

    def uses_lock() -> bool:
        return lock.locked()

    error = pool.submit(uses_lock).exception(LONG)
    assert isinstance(error, TaskPicklingError)
    assert str(error).startswith("the function closure variable lock (a _thread.lock) cannot be pickled")


def test_an_endless_structure_is_sent_as_it_is(pool: AgentPool) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    found = pool.submit(lambda value: value, loop).result(LONG)
    assert found[1] is found


def test_an_argument_nested_too_deeply(pool: AgentPool) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    error = pool.submit(len, deep).exception(LONG)
    assert isinstance(error, TaskPicklingError)
    assert "recursion" in str(error).lower() or "nested too deeply" in str(error)
    assert len(str(error)) < 1000
    while deep:
        deep = deep[0]


def test_one_bad_call_among_good_ones(pool: AgentPool) -> None:
    futures = [pool.submit(repr, threading.Lock() if n == 5 else n) for n in range(10)]
    outcomes = [future.exception(LONG) for future in futures]
    assert [n for n, error in enumerate(outcomes) if error] == [5]


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (threading.Lock, "result (a _thread.lock)"),
        (Client, "result.settings['nested'][1]['lock'] (a _thread.lock)"),
        (lambda: (n for n in ()), "result (a builtins.generator)"),
        (lambda: {"connection": sqlite3.connect(":memory:")}, "result['connection'] (a sqlite3.Connection)"),
        (RefusesAlways, "result"),
    ],
    ids=["lock", "attribute", "generator", "connection", "refuses"],
)
def test_a_result_that_cannot_be_pickled(pool: AgentPool, make: Callable[[], object], path: str) -> None:
    future = pool.submit(make)
    with pytest.raises(ResultPicklingError) as caught:
        future.result(LONG)
    assert str(caught.value).startswith(f"the task returned, but {path}"), str(caught.value)
    assert "cannot be pickled, so it cannot be sent back" in str(caught.value)
    assert "Return plain data" in str(caught.value), "the cure"
    assert caught.value.__cause__ is not None
    assert future.attempts == 1


def test_a_result_nested_too_deeply(pool: AgentPool) -> None:
    def nest() -> list[Any]:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        return deep

    error = pool.submit(nest).exception(LONG)
    assert isinstance(error, ResultPicklingError)
    assert "recursion" in str(error).lower() or "nested too deeply" in str(error)


def test_a_call_that_cannot_be_rebuilt_in_the_worker(pool: AgentPool) -> None:
    class Poison:
        def __reduce__(self) -> tuple[Any, ...]:
            return fail, ("not in this process",)

    error = pool.submit(print, Poison()).exception(LONG)
    assert isinstance(error, TaskUnpicklingError)
    assert isinstance(error, BrokenProcessPool)
    assert "ValueError: not in this process" in str(error)
    assert "not in this process" in "".join(traceback.format_exception(error))


def test_a_module_that_only_the_parent_has(pool: AgentPool, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module = types.ModuleType("only_here")
    exec("def answer():\n    return 42\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    error = pool.submit(module.answer).exception(LONG)
    assert isinstance(error, TaskUnpicklingError)
    assert "only_here" in str(error)
    assert "cloudpickle.register_pickle_by_value(module)" in str(error), "the cure"
    cloudpickle.register_pickle_by_value(module)
    try:
        assert pool.submit(module.answer).result(LONG) == 42
    finally:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.parametrize("action", ["exit", "crash"])
def test_a_call_that_ends_the_worker_while_it_is_rebuilt(pool: AgentPool, action: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (sys.exit if action == "exit" else os._exit), (5,)

    error = pool.submit(print, Bomb()).exception(LONG)
    assert isinstance(error, TaskUnpicklingError if action == "exit" else WorkerCrashedError)


# --- huge values ---


class Buffer:
    """Sends its bytes out of band, as an array does."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, version: Any) -> tuple[Any, ...]:
        return Buffer, (pickle.PickleBuffer(self.data),)


def test_result_of_300_mb(make_pool: MakePool) -> None:
    with make_pool(max_workers=2, memory_limit_mb=None) as pool:
        big = pool.submit(bytes, 300 * MB)
        others = [pool.submit(abs, -n) for n in range(50)]
        assert [future.result(LONG) for future in others] == list(range(50))
        value = big.result(LONG)
        assert len(value) == 300 * MB
        assert value.count(b"\0") == 300 * MB
    del value


def test_argument_of_300_mb(make_pool: MakePool) -> None:
    with make_pool(max_workers=1, memory_limit_mb=None) as pool:
        data = b"\1" * (300 * MB)
        assert pool.submit(lambda data: (len(data), data.count(b"\1")), data).result(LONG) == (300 * MB, 300 * MB)
        assert pool.submit(abs, -1).result(LONG) == 1


def test_300_mb_both_ways_out_of_band(make_pool: MakePool) -> None:
    """Both pipes are full at once: nobody waits for anybody."""
    with make_pool(max_workers=2, memory_limit_mb=None) as pool:

        def turn(buffer: Buffer) -> Buffer:
            data = bytearray(buffer.data)
            data[0], data[-1] = data[-1], data[0]
            return Buffer(data)

        data = bytearray(b"a" + bytes(75 * MB - 2) + b"z")
        futures = [pool.submit(turn, Buffer(data)) for _ in range(4)]
        data[:] = bytes(len(data))  # what was submitted is what counts
        for future in futures:
            found = future.result(LONG).data
            assert (len(found), bytes(found[:1]), bytes(found[-1:])) == (75 * MB, b"z", b"a")
            del found
    gc.collect()


@pytest.mark.parametrize("size", [0, 10, 63 * 1024, 64 * 1024, 3 * MB])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_pickle_buffers_of_any_size(pool: AgentPool, size: int, kind: type) -> None:
    """In band or out of band: it is the same for the task, and what was submitted is what counts."""
    data = kind(os.urandom(size))
    expected = bytes(data)

    def look(plain: Any, buffer: Any, wrapped: Buffer) -> tuple[bool, Buffer]:
        is_same = bytes(plain) == bytes(buffer) == bytes(wrapped.data)
        return is_same and type(plain) is kind, Buffer(bytearray(buffer))

    future = pool.submit(look, data, pickle.PickleBuffer(data), Buffer(data))
    if kind is bytearray:
        data[:] = bytes(size)
    is_right, back = future.result(LONG)
    assert is_right
    assert bytes(back.data) == expected


def test_many_large_values_through_one_worker(pool: AgentPool) -> None:
    payload = os.urandom(2 * MB)
    futures = [pool.submit(lambda n, data: (n, data[::-1]), n, payload) for n in range(20)]
    for number, future in enumerate(futures):
        assert future.result(LONG) == (number, payload[::-1])


# --- tasks that end, or raise what ends others ---


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: os._exit(0), "exited with code 0"),
        (lambda: os._exit(3), "exited with code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "was killed by SIGTERM"),
        (lambda: os.abort(), "was killed by SIGABRT"),
    ],
    ids=["_exit 0", "_exit 3", "SIGKILL", "SIGTERM", "abort"],
)
def test_a_task_that_ends_its_worker(pool: AgentPool, action: Callable[[], None], words: str) -> None:
    with pytest.raises(WorkerCrashedError, match=words) as caught:
        pool.submit(action).result(LONG)
    assert "Other tasks are not affected" in str(caught.value)
    assert pool.get_pool_stats()["counters"]["crashed"] == 1


def test_a_segmentation_fault_shows_where(pool: AgentPool) -> None:
    def read_nowhere() -> None:
        import ctypes

        ctypes.string_at(0)

    with pytest.raises(WorkerCrashedError, match="was killed by SIGSEGV") as caught:
        pool.submit(read_nowhere).result(LONG)
    assert "Segmentation fault" in str(caught.value)
    assert "in read_nowhere" in str(caught.value)


def test_endless_recursion(pool: AgentPool) -> None:
    def down() -> None:
        down()

    assert isinstance(pool.submit(down).exception(LONG), RecursionError)


def test_recursion_that_overruns_the_stack(pool: AgentPool) -> None:
    def down() -> None:
        import threading

        def forever(value: object) -> object:
            return sorted([value], key=forever)

        sys.setrecursionlimit(10**9)
        threading.stack_size(256 * 1024)
        thread = threading.Thread(target=forever, args=(1,))
        thread.start()
        thread.join()

    error = pool.submit(down).exception(LONG)
    assert error is None or isinstance(error, (WorkerCrashedError, RecursionError))


@pytest.mark.parametrize("error", [SystemExit(3), SystemExit(), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_exceptions_that_end_programs(pool: AgentPool, error: BaseException) -> None:
    def raise_it() -> NoReturn:
        raise error

    found = pool.submit(raise_it).exception(LONG)
    assert type(found) is type(error)
    assert found.args == error.args
    assert pool.get_pool_stats()["counters"]["crashed"] == 0


def test_sys_exit(pool: AgentPool) -> None:
    with pytest.raises(SystemExit) as caught:
        pool.submit(sys.exit, 3).result(LONG)
    assert caught.value.code == 3


def test_interrupt_signals_in_a_task(pool: AgentPool) -> None:
    """SIGINT is what a stop uses; one that comes of itself is nothing."""

    def interrupt() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.0001)
        return "went on"

    assert pool.submit(interrupt).result(LONG) == "went on"


def test_a_task_that_takes_over_signal_handlers(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    """A stop still works, at the latest by the kill."""
    pool = make_pool(max_workers=1, kill_grace=0.2)
    note = tmp_path / "note"

    def take_over() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        note.touch()
        time.sleep(600)

    future = pool.submit(take_over)
    wait_until(note.exists, "it did not begin")
    assert future.kill()
    assert future.exception(LONG) is not None
    assert pool.submit(abs, -1).result(LONG) == 1


# --- streams and descriptors ---


def test_a_task_that_closes_its_standard_streams(pool: AgentPool) -> None:
    def close_all() -> int:
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        return os.getpid()

    pid = pool.submit(close_all).result(LONG)
    assert pool.submit(os.getpid).result(LONG) == pid, "it need not be replaced"
    assert pool.submit(lambda: [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]).result(LONG) == [0, 1, 2]
    error = pool.submit(fail, "with closed streams").exception(LONG)
    assert isinstance(error, ValueError)


def test_a_task_that_closes_the_stream_objects(pool: AgentPool) -> None:
    def close_objects() -> None:
        sys.stdin.close()
        sys.stdout.close()
        sys.stderr.close()

    assert pool.submit(close_objects).result(LONG) is None
    assert isinstance(pool.submit(fail).exception(LONG), ValueError)
    assert isinstance(pool.submit(print, "into nothing").exception(LONG), (ValueError, OSError))


class OnlyWrites:
    def write(self, text: str) -> None:
        """Cannot be flushed."""


class FailsToFlush:
    def write(self, text: str) -> None:
        """Nowhere."""

    def flush(self) -> NoReturn:
        raise RuntimeError("flush fails")


@pytest.mark.parametrize("cls", [OnlyWrites, FailsToFlush])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_streams_that_cannot_be_flushed(pool: AgentPool, name: str, cls: type) -> None:
    """A task left something else in place of sys.stdout: it is not its result that suffers."""

    def replace(how: str) -> str:
        setattr(sys, name, cls())
        time.sleep(0.005)  # so long that its streams are flushed
        return "fine" if how == "returns" else fail("its own error")

    assert pool.submit(replace, "returns").result(LONG) == "fine"
    assert isinstance(pool.submit(replace, "raises").exception(LONG), ValueError)
    assert pool.get_pool_stats()["counters"]["crashed"] == 0


@pytest.mark.parametrize("first", [3, 0])
def test_a_task_that_closes_every_descriptor(pool: AgentPool, first: int) -> None:
    """The result of this very task may be lost with the channel, but nothing hangs, and nobody else notices."""

    def close_all() -> str:
        os.closerange(first, 65536)
        return "closed"

    future = pool.submit(close_all)
    others = [pool.submit(abs, -n) for n in range(5)]
    error = future.exception(LONG)
    assert error is None or isinstance(error, WorkerCrashedError)
    if error is None:
        assert future.result(0) == "closed"
    assert [other.result(LONG) for other in others] == list(range(5))


def test_a_small_result_survives_closed_descriptors(pool: AgentPool) -> None:
    """It is in the page of shared memory before it is in the pipe."""

    def close_all() -> str:
        os.closerange(3, 65536)
        return "closed"

    assert pool.submit(close_all).result(LONG) == "closed"


def test_standard_input_is_empty(pool: AgentPool) -> None:
    assert pool.submit(lambda: (sys.stdin.read(), os.read(0, 10))).result(LONG) == ("", b"")


def test_low_descriptors_are_the_tasks_own(pool: AgentPool) -> None:
    def low() -> list[int]:
        return sorted(int(name) for name in os.listdir("/proc/self/fd"))

    found = pool.submit(low).result(LONG)
    assert [descriptor for descriptor in found if descriptor < 200][:3] == [0, 1, 2]
    # The listing's own, and the one that mmap makes of the page's.
    assert len([descriptor for descriptor in found if 3 <= descriptor < 200]) <= 2, found


def test_the_parents_descriptors_are_not_in_workers(pool: AgentPool, tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w") as file:
        os.set_inheritable(file.fileno(), True)

        def links() -> list[str]:
            names = []
            for name in os.listdir("/proc/self/fd"):
                try:
                    names.append(os.readlink(f"/proc/self/fd/{name}"))
                except FileNotFoundError:
                    continue
            return names

        with AgentPool(max_workers=1) as other:
            assert str(tmp_path / "secret") not in other.submit(links).result(LONG)


def test_programs_of_a_task_get_nothing_of_the_channel(pool: AgentPool) -> None:
    def of_a_program() -> str:
        program = "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, close_fds=False).stdout

    found = eval(pool.submit(of_a_program).result(LONG))
    assert max(found) < 200, found


def run_script(source: str, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, timeout=LONG, **kwargs)


def test_output_of_a_task_reaches_the_parents_streams() -> None:
    done = run_script("""
import subprocess, sys
from agentpool import AgentPool
def talk():
    print("to stdout")
    print("to stderr", file=sys.stderr)
    sys.stdout.flush()
    subprocess.run("echo a program; echo its errors >&2", shell=True)
with AgentPool() as pool:
    pool.submit(talk).result()
    pool.submit(print, "unflushed, short").result()
""")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [b"a program", b"to stdout", b"unflushed, short"]
    assert sorted(done.stderr.splitlines()) == [b"its errors", b"to stderr"]


def test_floods_of_10_mb_on_both_streams() -> None:
    done = run_script("""
import os, sys
from agentpool import AgentPool
def flood():
    line = b"x" * 1023 + b"\\n"
    for _ in range(10 * 1024):
        os.write(1, line)
        os.write(2, line)
    return "flooded"
with AgentPool() as pool:
    futures = [pool.submit(flood), pool.submit(abs, -1)]
    assert futures[0].result(50) == "flooded"
    assert futures[1].result(50) == 1
    assert pool.submit(abs, -2).result(50) == 2
""")
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(done.stdout) == 10 * MB
    assert len(done.stderr) == 10 * MB


def test_a_flood_that_nobody_reads() -> None:
    """The parent's own standard error is a full pipe: the writer waits, as it would without a pool. Others do not."""
    source = """
import os, sys, time
from agentpool import AgentPool
def flood():
    for number in range(3 * 1024):
        os.write(2, b"%04d" % number + b"x" * 1019 + b"\\n")
    return "flooded"
with AgentPool(2) as pool:
    future = pool.submit(flood)
    assert [pool.submit(abs, -number).result(50) for number in range(100)] == list(range(100))
    error = pool.submit(os._exit, 5).exception(50)
    print("done" if not future.done() else "it did not wait", error.exit_code, flush=True)
    print(future.result(50), flush=True)
"""
    read_end, write_end = os.pipe()
    process = None
    try:
        process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=write_end)
        os.close(write_end)
        write_end = -1
        assert process.stdout is not None
        assert process.stdout.readline() == b"done 5\n"
        with open(read_end, "rb", closefd=False) as file:
            lines = file.read().splitlines()
        assert [int(line[:4]) for line in lines] == list(range(3 * 1024)), "not a line is lost"
        assert process.stdout.read() == b"flooded\n"
        process.stdout.close()
        assert process.wait(timeout=LONG) == 0
    finally:
        if process is not None:
            process.kill()
            process.wait()
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


def test_a_program_without_standard_streams(tmp_path: Path) -> None:
    """As a daemon has it that closed 0, 1 and 2: agentpool's own descriptors must not get these numbers."""
    note = tmp_path / "note"
    source = f"""
import os, sys, traceback
from agentpool import AgentPool
def low():
    links = {{}}
    for number in range(3):
        try:
            links[number] = os.readlink(f"/proc/self/fd/{{number}}")
        except OSError:
            links[number] = "closed"
    return links
def flood():
    for _ in range(500):
        for descriptor in (1, 2):
            try:
                os.write(descriptor, b"x" * 1000)
            except OSError:
                pass
    print("words", flush=True)
    return "flooded"
try:
    seen = []
    for method in ("fork", "spawn"):
        with AgentPool(2, method) as pool:
            mine = low()
            seen.append(pool.submit(low).result(30))
            assert pool.submit(flood).result(30) == "flooded"
            assert [pool.submit(abs, -n).result(30) for n in range(20)] == list(range(20))
            assert pool.submit(os._exit, 3).exception(30).exit_code == 3
        seen.append(mine)
    text = repr(seen)
except BaseException:
    text = traceback.format_exc()
with open({str(note)!r}, "w") as file:
    file.write(text)
"""
    command = [sys.executable, "-c", source]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=True, timeout=LONG)
    text = note.read_text()
    assert text.startswith("[{"), text
    for links in eval(text)[::2]:
        assert "memfd" not in repr(links), "a task's words go into the page of the protocol"
        assert "socket" not in repr(links)
    assert "eventpoll" not in repr(eval(text)[1][2]), "workers' words are written into a descriptor of our own"


def test_few_descriptors() -> None:
    done = run_script("""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
from agentpool import AgentPool
for method in ("fork", "spawn"):
    with AgentPool(2, method) as pool:
        print(pool.options(queue_timeout=5).submit(abs, -1).result())
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"1\n1\n"


def test_words_that_are_not_quite_strings() -> None:
    """sys.argv and sys.path are the program's: workers get them, whatever is in them."""
    done = run_script("""
import pathlib, sys
class Word(str):
    pass
sys.argv += [Word("word"), "\\udcff", 5]
sys.path += [Word("/nonexistent"), pathlib.Path("/nonexistent")]
from agentpool import AgentPool
with AgentPool(1) as pool:
    print(pool.options(queue_timeout=5).submit(lambda: sys.argv[1:3] == ["word", "\\udcff"]).result())
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"True\n"


def test_a_very_long_command_line() -> None:
    done = run_script("""
import sys
sys.argv += ["x" * 100] * 5000
from agentpool import AgentPool
for method in ("fork", "spawn"):
    with AgentPool(1, method) as pool:
        print(pool.options(queue_timeout=5).submit(lambda: len(sys.argv)).result())
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"5001\n5001\n"


def test_callables_with_strange_attributes(pool: AgentPool) -> None:
    class Unhashable:
        __code__: dict[str, int] = {}  # noqa: RUF012

        def __call__(self) -> int:
            return 5

    class Unconnected:
        def __getattr__(self, name: str) -> NoReturn:
            raise RuntimeError("not connected")

        def __call__(self) -> int:
            return 6

    assert pool.submit(Unhashable()).result(LONG) == 5
    with contextlib.suppress(RuntimeError):  # its own
        assert pool.submit(Unconnected()).result(LONG) == 6


def test_the_last_words_are_in_the_error(pool: AgentPool) -> None:
    def speak_and_die() -> NoReturn:
        for number in range(2000):
            print(f"line {number}", file=sys.stderr)
        os._exit(1)

    with pytest.raises(WorkerCrashedError) as caught:
        pool.submit(speak_and_die).result(LONG)
    tail = caught.value.stderr_tail
    assert tail.endswith("line 1998\nline 1999\n")
    assert 1000 < len(tail) <= 4096
    assert tail.strip()[-100:] in str(caught.value)


def test_words_that_are_no_text(pool: AgentPool) -> None:
    def speak_and_die() -> NoReturn:
        os.write(2, b"\xff\xfe\0 broken \x80")
        os._exit(1)

    error = pool.submit(speak_and_die).exception(LONG)
    assert isinstance(error, WorkerCrashedError)
    assert "broken" in error.stderr_tail


# --- tasks that write where they must not ---


def protocol_descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) >= 200]


def write_into_results(data: bytes) -> None:
    """Write into every descriptor of the protocol that takes it; then wait to be found out."""
    for descriptor in protocol_descriptors():
        try:
            os.write(descriptor, data)
        except OSError:
            continue
    time.sleep(600)


def frame(kind: int, *, buffers: int = 0, length: int = 0, task_id: int = 1, body: bytes = b"") -> bytes:
    return protocol.HEADER.pack(protocol.MAGIC, kind, 0, buffers, task_id, length, 0, 0, 0) + body


@pytest.mark.parametrize(
    "data",
    [
        b"Hello, this is no frame, and longer than a header of 36 bytes.\n",
        frame(protocol.VALUE, length=protocol.MAX_FRAME + 1),
        frame(protocol.VALUE, buffers=5, length=4, body=b"four"),
        frame(protocol.ERROR, length=9, body=b"no pickle"),
        frame(protocol.INIT_FAILED, length=9, body=b"no pickle"),
        frame(protocol.ERROR, length=len(pickle.dumps(5)), body=pickle.dumps(5)),
    ],
    ids=["text", "oversized length", "buffers without room", "error that is no pickle",
         "initializer's error that is no pickle", "error of another shape"],
)
def test_garbage_in_the_channel_costs_its_own_worker_only(make_pool: MakePool, data: bytes) -> None:
    pool = make_pool(max_workers=2)
    liar = pool.submit(write_into_results, data)
    error = liar.exception(LONG)
    assert isinstance(error, WorkerCrashedError), error
    assert "corrupted" in str(error)
    assert [pool.submit(abs, -n).result(LONG) for n in range(5)] == list(range(5))


def test_a_length_that_is_only_claimed_costs_no_memory(make_pool: MakePool, wait_until: WaitUntil) -> None:
    """A header of a frame of 1 GiB, and nothing more: memory is not taken for it, and nobody waits for the rest."""
    pool = make_pool(max_workers=2)
    header = frame(protocol.VALUE, length=1024 * MB, body=b"the first bytes")
    readings = [psutil.Process().memory_info().rss]
    liar = pool.submit(write_into_results, header)
    wait_until(lambda: readings.append(psutil.Process().memory_info().rss) or liar.done(), "it is waited for")
    assert max(readings) - readings[0] < 200 * MB
    error = liar.exception(LONG)
    assert isinstance(error, WorkerCrashedError), error
    assert "corrupted" in str(error)
    assert [pool.submit(abs, -n).result(LONG) for n in range(5)] == list(range(5))


def test_a_forged_result_of_another_task_ends_the_forger(make_pool: MakePool, tmp_path: Path) -> None:
    """A well-formed frame in the name of a task that runs elsewhere, sent by one that goes on as if nothing were."""
    pool = make_pool(max_workers=2)

    def wait_for(path: Path) -> str:
        while not path.exists():
            time.sleep(0.01)
        return "own result"

    other = pool.submit(wait_for, tmp_path / "go")
    task_id = other.snapshot().task_id
    fake = pickle.dumps("fake")
    forger = pool.submit(write_into_results, frame(protocol.VALUE, task_id=task_id, length=len(fake), body=fake))
    error = forger.exception(LONG)
    assert isinstance(error, WorkerCrashedError)
    assert str(error).count("its results pipe was corrupted") == 1
    assert not other.done()
    (tmp_path / "go").touch()
    assert other.result(LONG) == "own result"


def test_what_began_beside_garbage_is_not_run_again(make_pool: MakePool, tmp_path: Path) -> None:
    """Short calls travel together: some had begun in the worker whose results are not believed any more."""
    pool = make_pool(max_workers=2)
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.close(log)

    def note(path: Path, number: int, is_liar: bool) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b"%d\n" % number)
        os.close(descriptor)
        if is_liar:
            for target in protocol_descriptors():
                with contextlib.suppress(OSError):
                    os.write(target, b"garbage")
        return number

    futures = [pool.submit(note, tmp_path / "log", number, number % 500 == 250) for number in range(3000)]
    lost = 0
    for number, future in enumerate(futures):
        error = future.exception(LONG)
        assert error is None or isinstance(error, WorkerCrashedError), error
        assert error is not None or future.result() == number
        lost += error is not None
    assert lost >= 6, "the liars at least"
    ran = Counter(map(int, (tmp_path / "log").read_text().split()))
    assert set(ran.values()) == {1}
    assert {number for number, future in enumerate(futures) if future.exception() is None} <= ran.keys()


@pytest.mark.parametrize("end", ["returns", "raises", "exits"])
def test_a_task_that_forks(make_pool: MakePool, tmp_path: Path, end: str) -> None:
    """The child comes back into the worker's loop with a copy of the channel: it must do nothing there."""
    pool = make_pool(max_workers=1)

    def fork() -> tuple[str, int]:
        pid = os.fork()
        if pid == 0:
            (tmp_path / "child").write_text(str(os.getpid()))
            if end == "raises":
                fail("in the child")
            if end == "exits":
                os._exit(0)
            return "child", os.getpid()
        os.waitpid(pid, 0)
        return "parent", os.getpid()

    future = pool.submit(fork)
    assert future.result(LONG) == ("parent", future.worker_pid)
    for number in range(20):
        assert pool.submit(lambda number: (number, os.getpid()), number).result(LONG) == (number, future.worker_pid)


def test_a_task_that_leaves_a_forked_child_running(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    """It holds copies of the channel's descriptors; its worker's death is seen all the same, and it ends with it."""
    pool = make_pool(max_workers=1)

    def leave_child() -> int:
        pid = os.fork()
        if pid == 0:
            while True:
                time.sleep(60)
        return pid

    child = pool.submit(leave_child).result(LONG)
    assert is_alive(child)
    started = time.monotonic()
    with pytest.raises(WorkerCrashedError):
        pool.submit(os._exit, 5).result(LONG)
    assert time.monotonic() - started < 20
    wait_until(lambda: not is_alive(child), "it outlived its worker")
    assert pool.submit(abs, -1).result(LONG) == 1


def test_a_task_that_kills_its_process_group(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    """A worker leads a session of its own: nobody else is in the group."""
    pool = make_pool(max_workers=2)

    def wait_for_end() -> str:
        (tmp_path / "began").touch()
        while not (tmp_path / "end").exists():
            time.sleep(0.005)
        return "undisturbed"

    other = pool.submit(wait_for_end)
    wait_until((tmp_path / "began").exists, "it did not begin")
    with pytest.raises(WorkerCrashedError, match="SIGKILL"):
        pool.submit(os.killpg, 0, signal.SIGKILL).result(LONG)
    (tmp_path / "end").touch()
    assert other.result(LONG) == "undisturbed"
    assert pool.submit(abs, -1).result(LONG) == 1


def test_pools_and_futures_as_arguments(pool: AgentPool) -> None:
    """Everybody tries it once: the error says what it was."""
    for value in (pool, pool.options(name="x"), pool.submit(abs, -1)):
        error = pool.submit(print, value).exception(LONG)
        assert isinstance(error, TaskPicklingError)
        assert str(error).startswith("args[0]")
    error = pool.submit(lambda: pool.submit(abs, 1)).exception(LONG)
    assert isinstance(error, TaskPicklingError)
    assert "pool" in str(error)


def test_a_task_that_uses_multiprocessing(pool: AgentPool) -> None:
    def use() -> list[int]:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as inner:
            return inner.map(abs, [-1, -2, -3])

    assert pool.submit(use).result(LONG) == [1, 2, 3]


def test_a_task_that_leaves_threads(pool: AgentPool) -> None:
    def leave() -> str:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        return "left"

    assert pool.submit(leave).result(LONG) == "left"
    assert pool.submit(threading.active_count).result(LONG) == 2


def test_a_thread_that_ends_the_process(pool: AgentPool) -> None:
    def arm() -> NoReturn:
        threading.Timer(0.05, os._exit, (6,)).start()
        time.sleep(600)
        raise AssertionError

    with pytest.raises(WorkerCrashedError, match="exited with code 6"):
        pool.submit(arm).result(LONG)


def test_a_worker_that_dies_in_the_middle_of_a_large_result(make_pool: MakePool) -> None:
    """Half a frame is in the pipe: ProcessPoolExecutor waits for the rest for ever."""
    pool = make_pool(max_workers=2)

    def half_a_result() -> NoReturn:
        data = frame(protocol.VALUE, length=10 * MB, body=b"the first bytes of ten megabytes")
        for descriptor in protocol_descriptors():
            try:
                os.write(descriptor, data)
            except OSError:
                continue
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    futures = [pool.submit(half_a_result), *(pool.submit(abs, -n) for n in range(20))]
    with pytest.raises(WorkerCrashedError, match="was killed by SIGKILL"):
        futures[0].result(LONG)
    assert [future.result(LONG) for future in futures[1:]] == list(range(20))


# --- initializers ---


def test_an_initializer_that_raises_breaks_the_pool(make_pool: MakePool) -> None:
    pool = make_pool(2, initializer=fail, initargs=("no model here",))
    futures = [pool.submit(abs, -n) for n in range(5)]
    for future in futures:
        with pytest.raises(InitializerError) as caught:
            future.result(LONG)
        assert "the initializer raised builtins.ValueError: no model here" in str(caught.value)
        assert isinstance(caught.value, BrokenProcessPool)
        shown = "".join(traceback.format_exception(caught.value))
        assert "in fail" in shown
        assert 'raise ValueError(message)' in shown
        assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(BrokenExecutor, match="no model here"):
        pool.submit(abs, 1)
    stats = pool.get_pool_stats()
    assert stats["status"] == "broken"
    assert "no model here" in stats["reasons"][0]
    assert stats["counters"]["spawned"] <= 2, "it spawned again and again"
    pool.shutdown()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_initializer_that_exits(make_pool: MakePool, error: BaseException) -> None:
    def initialize() -> NoReturn:
        raise error

    pool = make_pool(1, initializer=initialize)
    assert isinstance(pool.submit(abs, 1).exception(LONG), InitializerError)


def test_an_initializer_with_the_wrong_arguments(make_pool: MakePool) -> None:
    pool = make_pool(1, initializer=len, initargs=(1, 2))
    with pytest.raises(InitializerError, match="TypeError: len"):
        pool.submit(abs, 1).result(LONG)


def test_an_initializer_that_fails_in_a_later_worker(make_pool: MakePool, tmp_path: Path) -> None:
    """The pool is broken then as well; nothing waits for ever."""
    flag = tmp_path / "flag"

    def initialize() -> None:
        if flag.exists():
            fail("the second time")

    pool = make_pool(1, initializer=initialize, max_tasks_per_child=1)
    assert pool.submit(flag.touch).result(LONG) is None
    assert isinstance(pool.submit(abs, 1).exception(LONG), InitializerError)
    with pytest.raises(InitializerError):
        pool.submit(abs, 1)


def quick_breaker(threshold: int = 2) -> BreakerSettings:
    return BreakerSettings(failure_threshold=threshold, open_seconds=3600, max_open_seconds=3600)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_initializer_that_crashes_opens_the_breaker(make_pool: MakePool, wait_until: WaitUntil, method: str) -> None:
    def crash() -> NoReturn:
        print("the GPU is gone", file=sys.stderr)
        os._exit(7)

    pool = make_pool(2, method, crash, breaker=quick_breaker(), queue_timeout=1.5)
    states: list[str] = []
    pool.breaker.add_listener(lambda old, new, reason: states.append(new))
    future = pool.submit(abs, -1)
    wait_until(lambda: pool.breaker.state == "open", "the breaker stays closed")
    assert "exited with code 7" in pool.breaker.reason
    assert "the GPU is gone" in pool.breaker.reason
    with pytest.raises(CircuitOpenError, match="the pool has no worker") as caught:
        future.result(LONG)
    assert "exited with code 7" in str(caught.value)
    assert "pool.breaker.reset()" in str(caught.value), "the cure"
    assert future.attempts == 0
    counters = pool.get_pool_stats()["counters"]
    assert counters["spawned"] <= 4, "it spawns for ever"
    assert counters["start_failures"] == counters["spawned"]
    assert states == ["open"]
    assert pool.breaker.failure_count == counters["start_failures"]


def test_an_initializer_that_hangs_is_ended(make_pool: MakePool, wait_until: WaitUntil, is_alive: IsAlive,
                                            tmp_path: Path) -> None:
    note = tmp_path / "pids"

    def hang() -> None:
        with note.open("a") as file:
            file.write(f"{os.getpid()}\n")
        while True:
            time.sleep(60)

    pool = make_pool(1, initializer=hang, start_timeout=0.3, breaker=quick_breaker(), queue_timeout=2)
    future = pool.submit(abs, -1)
    wait_until(lambda: pool.breaker.state == "open", "the breaker stays closed")
    assert "did not become ready within its start_timeout of 0.3 s" in pool.breaker.reason
    assert isinstance(future.exception(LONG), CircuitOpenError)
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) <= pool.get_pool_stats()["counters"]["spawned"] <= 3, "it spawns for ever"
    assert not any(map(is_alive, pids))


def test_the_breaker_lets_a_pool_recover_from_its_initializer(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    flag = tmp_path / "healthy"

    def initialize() -> None:
        if not flag.exists():
            os._exit(1)

    settings = BreakerSettings(failure_threshold=2, open_seconds=0.3, max_open_seconds=1)
    pool = make_pool(1, initializer=initialize, breaker=settings)
    states: list[str] = []
    pool.breaker.add_listener(lambda old, new, reason: states.append(new))
    future = pool.submit(abs, -1)
    wait_until(lambda: "open" in states, "the breaker stays closed")
    assert not future.done()
    flag.touch()
    assert future.result(LONG) == 1
    wait_until(lambda: states[-1] == "closed", "it stays open")
    assert states[:2] == ["open", "half_open"]


def test_an_unpicklable_initializer_is_refused_at_once() -> None:
    lock = threading.Lock()
    with pytest.raises(TaskPicklingError, match="the function closure variable lock"):
        AgentPool(initializer=lambda: lock.acquire())
    with pytest.raises(TaskPicklingError, match=r"args\[0\]"):
        AgentPool(initializer=len, initargs=(threading.Lock(),))


def test_an_initializer_that_floods_and_closes(make_pool: MakePool) -> None:
    def initialize() -> None:
        builtins.prepared = True  # type: ignore[attr-defined]
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    pool = make_pool(2, initializer=initialize)
    assert pool.submit(lambda: builtins.prepared).result(LONG) is True  # type: ignore[attr-defined]


def test_crashes_of_tasks_never_open_the_breaker(make_pool: MakePool) -> None:
    pool = make_pool(2, breaker=quick_breaker(2))
    errors = [future.exception(LONG) for future in [pool.submit(os._exit, 1) for _ in range(8)]]
    assert {type(error) for error in errors} == {WorkerCrashedError}
    assert pool.breaker.state == "closed"
    assert pool.breaker.failure_count == 0
    assert pool.submit(abs, -1).result(LONG) == 1
