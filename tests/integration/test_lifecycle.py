"""What happens around a pool: scripts without a guard, interpreter exit, garbage collection, forks, sudden deaths.

Most tests run a program of their own, as a user would, and look at what it prints and leaves.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool import (
    AgentFuture,
    AgentPool,
    ForkedPoolError,
    PoolClosedError,
    TaskKilledError,
    TaskPicklingError,
    WorkerCrashedError,
    get_agent_pool,
)
from agentpool.runtime.lifecycle import live_pools

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
IsAlive = Callable[[int], bool]
MakePool = Callable[..., AgentPool]
LONG = 60.0


def run(source: str, how: str, folder: Path, *options: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a program the way that a user may: `-c`, as a file, from standard input, as a module."""
    source = textwrap.dedent(source)
    command = [sys.executable, "-W", "error", *options]
    stdin = None
    if how == "-c":
        command += ["-c", source]
    elif how == "stdin":
        stdin = source
        command += ["-"]
    elif how == "file":
        (folder / "script.py").write_text(source)
        command += [str(folder / "script.py")]
    else:
        (folder / "package").mkdir()
        (folder / "package" / "__main__.py").write_text(source)
        command += ["-m", "package"]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=LONG, cwd=folder, **kwargs)


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def fork(in_child: Callable[[], object]) -> int:
    """Run a function in a fork of this process; its exit code is 0 where it returned true."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = 0 if in_child() else 1
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


# --- what __main__ defines ---

MAIN = """
    import enum, os
    from dataclasses import dataclass
    from agentpool import AgentPool

    limit = 10

    class Color(enum.Enum):
        RED = 1

    @dataclass
    class Point:
        x: int
        def moved(self, by):
            return Point(self.x + by)

    class Trouble(Exception):
        def __init__(self, point):
            super().__init__(point)
            self.point = point

    def below(number):
        return number < limit

    def fact(number):
        return 1 if number < 2 else number * fact(number - 1)

    def raises(point):
        raise Trouble(point)

    def outer(base):
        def inner(number):
            return base + number + limit
        return inner

    with AgentPool({arguments}) as pool:
        print(pool.submit(lambda: limit + 1).result())
        print(pool.submit(outer(5), 1).result())
        print(pool.submit(fact, 6).result())
        print(list(pool.map(below, [9, 10])))
        point = pool.submit(Point(1).moved, 2).result()
        print(point, type(point) is Point, point == Point(3))
        print(pool.submit(lambda color: color is Color.RED, Color.RED).result())
        print(pool.submit(lambda: Color.RED).result() is Color.RED)
        try:
            pool.submit(raises, Point(7)).result()
        except Trouble as error:
            print(type(error) is Trouble, error.point)
        print(pool.submit(os.getpid).result() != os.getpid())
    print("once")
"""
PRINTED = [
    "11", "16", "720", "[True, False]", "Point(x=3) True True", "True", "True", "True Point(x=7)", "True", "once",
]


@pytest.mark.parametrize("how", ["-c", "file", "stdin", "-m"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_program_without_a_guard(tmp_path: Path, how: str, method: str) -> None:
    """Its functions and classes reach the workers, and nobody runs it a second time."""
    done = run(MAIN.replace("{arguments}", f"2, {method!r}"), how, tmp_path)
    assert succeeds(done).splitlines() == PRINTED


@pytest.mark.parametrize("options", [("-I",), ("-O",), ("-X", "dev"), ("-S", "-I"), ("-u", "-B")], ids=" ".join)
def test_interpreter_options(tmp_path: Path, options: tuple[str, ...]) -> None:
    source = """
        import sys
        paths = {paths!r}
        sys.path += [path for path in paths if path not in sys.path]
        from agentpool import AgentPool
        with AgentPool(1, {method!r}) as pool:
            def flags():
                return sys.flags.optimize, sys.flags.isolated, sys.flags.dont_write_bytecode
            print(pool.submit(flags).result() == flags())
    """
    for method in ("fork", "spawn"):
        done = run(source.format(paths=sys.path, method=method), "-c", tmp_path, *options)
        assert succeeds(done) == "True\n"


def test_globals_of_main_have_a_home_in_each_worker(tmp_path: Path) -> None:
    """What an initializer or a task stores in a global of `__main__` is there for the next task."""
    done = run("""
        from agentpool import AgentPool
        model = None
        cache = {}
        def load(name):
            global model
            model = name.upper()
        def ask(question):
            cache[question] = cache.get(question, 0) + 1
            return model, cache[question]
        with AgentPool(1, initializer=load, initargs=("big",)) as pool:
            print([pool.submit(ask, "why").result() for _ in range(3)])
        print(model, cache)
    """, "file", tmp_path)
    assert succeeds(done).splitlines() == ["[('BIG', 1), ('BIG', 2), ('BIG', 3)]", "None {}"]


def test_a_global_that_the_parent_changes(tmp_path: Path) -> None:
    """A value that was changed here after the last call is the one that the next call sees."""
    done = run("""
        from agentpool import AgentPool
        level = 1
        def look():
            return level
        with AgentPool(1) as pool:
            seen = [pool.submit(look).result()]
            level = 2
            seen.append(pool.submit(look).result())
            def look():
                return level * 100
            seen.append(pool.submit(look).result())
            level = 1
            seen.append(pool.submit(look).result())
        print(seen)
    """, "-c", tmp_path)
    assert succeeds(done) == "[1, 2, 200, 100]\n"


def test_a_global_that_cannot_be_pickled(tmp_path: Path) -> None:
    """It matters only to functions that use it, and is named."""
    done = run("""
        import threading
        from agentpool import AgentPool
        lock = threading.Lock()
        def uses():
            return lock.locked()
        def uses_not():
            return 5
        with AgentPool(1) as pool:
            print(pool.submit(uses_not).result())
            print(pool.submit(uses).exception())
    """, "file", tmp_path)
    lines = succeeds(done).splitlines()
    assert lines[0] == "5"
    assert "lock (a _thread.lock) cannot be pickled" in lines[1], "it is not named"


def test_standard_input_stays_the_programs(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent("""
        import sys
        from agentpool import AgentPool
        with AgentPool(2) as pool:
            in_worker = pool.submit(lambda: sys.stdin.read()).result()
            print(repr(in_worker), repr(input()))
    """))
    done = subprocess.run([sys.executable, "script.py"], input="for the program\n", capture_output=True, text=True,
                          cwd=tmp_path, timeout=LONG)
    assert succeeds(done) == "'' 'for the program'\n"


def test_modules_beside_the_script(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    for how in ("file", "-c", "stdin"):
        done = run("""
            import helper
            from agentpool import AgentPool
            with AgentPool(1, "spawn") as pool:
                print(pool.submit(helper.twice, 4).result())
        """, how, tmp_path)
        assert succeeds(done) == "8\n", how


def test_a_file_of_the_working_directory_does_not_replace_the_standard_library(tmp_path: Path) -> None:
    for name in ("select", "signal", "socket", "marshal", "cloudpickle_", "agentpool_worker"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong file was imported')\n")
    done = run("""
        import sys
        from agentpool import AgentPool
        print(AgentPool(1).submit(abs, -3).result())
    """, "-c", tmp_path, "-P")
    assert succeeds(done) == "3\n"


# --- the end of the interpreter ---


def test_a_pool_that_is_not_shut_down_finishes_its_work(tmp_path: Path) -> None:
    done = run(f"""
        from agentpool import AgentPool
        pool = AgentPool(2)
        def note(number):
            import time
            time.sleep(0.02)
            open({str(tmp_path)!r} + f"/{{number}}", "w").close()
        futures = [pool.submit(note, number) for number in range(10)]
        futures[-1].add_done_callback(lambda _: print("told", flush=True))
        print("end of the script", flush=True)
    """, "-c", tmp_path)
    assert succeeds(done) == "end of the script\ntold\n"
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(10))


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("raise KeyError('end')", 1)])
def test_a_program_that_ends_badly_finishes_its_work(tmp_path: Path, end: str, code: int) -> None:
    done = run(f"""
        import sys
        from agentpool import AgentPool
        pool = AgentPool(1)
        pool.submit(lambda: open({str(tmp_path / "done")!r}, "w").close())
        {end}
    """, "-c", tmp_path)
    assert done.returncode == code
    assert (tmp_path / "done").exists()
    assert "agentpool" not in done.stderr.replace("import AgentPool", "")


def test_submit_while_the_interpreter_ends(tmp_path: Path) -> None:
    done = run("""
        import atexit
        from agentpool import AgentPool
        pool = AgentPool(1)
        pool.submit(abs, -1).result()
        @atexit.register
        def late():
            for try_it in (pool.submit, AgentPool(1).submit):
                try:
                    try_it(abs, 1)
                except RuntimeError as error:
                    print(error)
    """, "-c", tmp_path)
    assert succeeds(done).splitlines() == ["cannot schedule new futures after interpreter shutdown"] * 2


def test_a_thread_that_submits_until_the_end(tmp_path: Path) -> None:
    """It is told, and neither it nor the program hangs."""
    done = run("""
        import threading
        from agentpool import AgentPool
        pool = AgentPool(2)
        started = threading.Event()
        def work():
            count = 0
            try:
                while True:
                    assert pool.submit(abs, -count).result() == count
                    count += 1
                    if count == 20:
                        started.set()
            except RuntimeError as error:
                print(error)
        threading.Thread(target=work).start()
        started.wait()
    """, "-c", tmp_path)
    assert "cannot schedule new futures after" in succeeds(done)


def test_output_of_tasks_comes_before_the_programs_end(tmp_path: Path) -> None:
    done = run("""
        from agentpool import AgentPool
        pool = AgentPool(1)
        for number in range(5):
            pool.submit(print, "line", number)
    """, "-c", tmp_path)
    assert succeeds(done).splitlines() == [f"line {number}" for number in range(5)]


def test_exit_handlers_of_workers_run(tmp_path: Path) -> None:
    done = run("""
        import atexit
        from agentpool import AgentPool
        with AgentPool(2) as pool:
            pool.submit(lambda: atexit.register(print, "handler of a worker")).result()
    """, "-c", tmp_path)
    assert succeeds(done) == "handler of a worker\n"


def test_many_pools_that_nobody_closes(tmp_path: Path) -> None:
    done = run("""
        from agentpool import AgentPool
        pools = [AgentPool(1) for _ in range(8)]
        futures = [pool.submit(abs, -number) for number, pool in enumerate(pools)]
        print(sum(future.result() for future in futures))
        AgentPool(1).submit(abs, -1)
        AgentPool(1)
    """, "-c", tmp_path)
    assert succeeds(done) == "28\n"


# --- garbage collection ---


def manager_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("agentpool-manager")]


def test_a_dropped_pool_finishes_and_ends(wait_until: WaitUntil, is_alive: IsAlive) -> None:
    pool = AgentPool(max_workers=2)
    futures = [pool.submit(abs, -number) for number in range(200)]
    pid = pool.submit(os.getpid).result(LONG)
    reference = weakref.ref(pool)
    del pool
    gc.collect()
    assert reference() is None, "something keeps the pool"
    assert [future.result(LONG) for future in futures] == list(range(200))
    wait_until(lambda: not manager_threads() and not is_alive(pid), "it lives on")


def test_a_pool_dropped_with_work_in_the_queue(tmp_path: Path, wait_until: WaitUntil) -> None:
    def note(number: int) -> None:
        (tmp_path / str(number)).touch()

    AgentPool(max_workers=1).map(note, range(50))
    gc.collect()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 50, "accepted work was not done")
    wait_until(lambda: not manager_threads(), "its thread lives on")


def test_a_pool_in_a_reference_cycle(wait_until: WaitUntil) -> None:
    pool = AgentPool(max_workers=1)
    pool.me = pool  # type: ignore[attr-defined]
    future = pool.submit(abs, -1)
    del pool
    gc.collect()
    assert future.result(LONG) == 1
    wait_until(lambda: not manager_threads(), "its thread lives on")


def test_futures_do_not_keep_a_pool_open(wait_until: WaitUntil) -> None:
    future = AgentPool(max_workers=1).submit(abs, -1)
    gc.collect()
    assert future.result(LONG) == 1
    wait_until(lambda: not manager_threads(), "its thread lives on")
    assert not future.cancel()
    assert not future.kill()
    assert future.snapshot().state == "done"


def test_live_pools_and_the_process_wide_one() -> None:
    before = live_pools()
    shared = get_agent_pool()
    assert get_agent_pool() is shared
    with AgentPool(max_workers=1) as pool:
        assert [found for found in live_pools() if found not in before] == [shared, pool]
    assert pool not in live_pools()
    shared.shutdown()
    again = get_agent_pool()
    assert again is not shared
    assert again.submit(abs, -1).result(LONG) == 1
    again.shutdown()


# --- a fork of the parent ---


def test_a_forked_copy_is_inert_and_the_pool_goes_on(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(max_workers=2)
    pid = pool.submit(os.getpid).result(LONG)

    def wait_for_end() -> int:
        (tmp_path / "began").touch()
        while not (tmp_path / "end").exists():
            time.sleep(0.005)
        return os.getpid()

    running = [pool.submit(wait_for_end) for _ in range(2)]
    wait_until((tmp_path / "began").exists, "it did not begin")
    wait_until(lambda: all(future.running() for future in running), "they are not said to run")
    queued = pool.submit(abs, -7)

    def in_child() -> bool:
        view = pool.options(priority=1)
        for refused in (pool.submit, view.submit, pool.map, view.map):
            error = forked_error(refused)
            if "belongs to the process that made it" not in str(error) or "make a pool here" not in str(error):
                return False
        queued.cancel()
        running[0].kill()
        running[0].snapshot()
        pool.breaker.force_open("in the child")
        pool.breaker.reset()
        pool.get_pool_stats()
        pool.kill_workers()
        pool.emergency_stop("in the child")
        pool.shutdown()
        return pool.closed and not running[0].done()

    assert fork(in_child) == 0
    assert not any(future.done() for future in (*running, queued))
    assert pool.breaker.state == "closed"
    assert not pool.closed
    (tmp_path / "end").touch()
    assert pid in {future.result(LONG) for future in running}
    assert queued.result(LONG) == 7
    assert [pool.submit(abs, -number).result(LONG) for number in range(20)] == list(range(20))


def forked_error(call: Callable[..., object]) -> BaseException | None:
    try:
        call(abs, [1])
    except ForkedPoolError as error:
        return error
    return None


def test_a_forked_copy_may_make_a_pool_of_its_own(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=1)
    mine = pool.submit(os.getpid).result(LONG)

    def in_child() -> bool:
        with AgentPool(max_workers=1) as own:
            return own.submit(abs, -3).result(LONG) == 3 and own.submit(os.getpid).result(LONG) != mine

    assert fork(in_child) == 0
    assert pool.submit(os.getpid).result(LONG) == mine


def test_the_process_wide_pool_in_a_forked_copy() -> None:
    shared = get_agent_pool()
    assert shared.submit(abs, -1).result(LONG) == 1

    def in_child() -> bool:
        own = get_agent_pool()
        is_right = own is not shared and own.submit(abs, -2).result(LONG) == 2
        own.shutdown()
        return is_right

    assert fork(in_child) == 0
    assert get_agent_pool() is shared
    shared.shutdown()


def test_forks_while_the_pool_is_busy(make_pool: MakePool) -> None:
    """Its lock may be held, its thread may be anywhere: the child must not hang, nor disturb."""
    pool = make_pool(max_workers=2)
    futures = []
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            futures.extend(pool.submit(abs, -number) for number in range(20))
            futures[-1].result(LONG)

    threads = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert fork(lambda: isinstance(forked_error(pool.submit), ForkedPoolError)) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join(LONG)
    assert all(future.exception(LONG) is None for future in futures)


def test_a_fork_after_the_pool_ended_closes_nothing_of_others(tmp_path: Path) -> None:
    """The numbers of its descriptors belong to somebody else by then."""
    pool = AgentPool(max_workers=2)
    assert pool.submit(abs, -1).result(LONG) == 1
    pool.shutdown()
    (tmp_path / "file").write_text("content")
    files = [open(tmp_path / "file") for _ in range(40)]  # noqa: SIM115
    try:
        assert fork(lambda: all(file.read() == "content" for file in files)) == 0
        assert fork(lambda: len({os.fstat(file.fileno()).st_ino for file in files}) == 1) == 0
    finally:
        for file in files:
            file.close()
    assert pool.closed


def test_a_multiprocessing_child_by_fork(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=1)
    assert pool.submit(abs, -1).result(LONG) == 1
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(type(forked_error(pool.submit)).__name__))
    process.start()
    process.join(LONG)
    assert process.exitcode == 0
    assert queue.get() == "ForkedPoolError"
    queue.close()
    process.close()
    assert pool.submit(abs, -2).result(LONG) == 2


def test_a_forked_child_that_ends_as_programs_do(tmp_path: Path) -> None:
    """Its exit handlers run, and hang on nothing that only the parent has."""
    done = run("""
        import os, sys
        from agentpool import AgentPool
        pool = AgentPool(1)
        pool.submit(abs, -1).result()
        future = pool.submit(__import__("time").sleep, 0.3)
        pid = os.fork()
        if pid == 0:
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print(future.result(), pool.submit(abs, -2).result())
    """, "-c", tmp_path, "-W", "ignore::DeprecationWarning")
    assert succeeds(done) == "7\nNone 2\n"


def test_daemonizing_with_a_pool(tmp_path: Path, wait_until: WaitUntil) -> None:
    """The process that made the pool ends, its forked copy goes on: the pool ends with its maker."""
    note = tmp_path / "note"
    run(f"""
        import os, pathlib, time
        from agentpool import AgentFuture, AgentPool, ForkedPoolError
        pool = AgentPool(1)
        pid = pool.submit(os.getpid).result()
        if os.fork():
            os._exit(0)
        os.setsid()
        try:
            pool.submit(abs, 1)
        except ForkedPoolError:
            text = f"{{pid}} refused"
        with AgentPool(1) as own:
            text += f" {{own.submit(abs, -5).result()}}"
        pathlib.Path({str(tmp_path / "temporary")!r}).write_text(text)
        os.rename({str(tmp_path / "temporary")!r}, {str(note)!r})
    """, "-c", tmp_path, "-W", "ignore::DeprecationWarning")
    wait_until(note.exists, "the daemon did not end")
    pid, *words = note.read_text().split()
    assert words == ["refused", "5"]
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the worker of its first life lives on")


# --- sudden deaths ---

BUSY = """
    import os, subprocess, sys, threading, time
    from agentpool import AgentPool
    def work(number):
        # Unmoved by requests, with a daemon that has a session of its own.
        child = subprocess.Popen(["setsid", "nohup", "sleep", "1000"], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        with open(sys.argv[1], "a") as file:
            file.write(f"{os.getpid()} {child.pid} {os.getppid()}\\n")
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                pass
    pool = AgentPool(2, METHOD)
    futures = [pool.submit(work, number) for number in range(4)]
    futures[0].result()
"""


def start_busy(
    tmp_path: Path, wait_until: WaitUntil, method: str = "fork"
) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A program whose two workers are busy for ever; returns it, and the pids of all that is below it."""
    note = tmp_path / "pids"
    source = textwrap.dedent(BUSY).replace("METHOD", repr(method))
    process = subprocess.Popen([sys.executable, "-c", source, str(note)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    wait_until(lambda: note.exists() and note.read_text().count("\n") == 2, "its tasks did not begin")
    return process, sorted({int(word) for word in note.read_text().split()})


def read_rest(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """End of file on both: nobody below it holds its streams."""
    return process.communicate(timeout=LONG)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_nothing_outlives_the_parent(
    tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive, number: signal.Signals, method: str
) -> None:
    """Busy workers, and a daemon that a task started with setsid and nohup, die with the process that made the pool."""
    process, pids = start_busy(tmp_path, wait_until, method)
    assert all(map(is_alive, pids))
    process.send_signal(number)
    assert process.wait(LONG) == -number
    try:
        wait_until(lambda: not any(map(is_alive, pids)), f"somebody outlived it: {pids}")
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)
        read_rest(process)


def test_the_parents_death_is_seen_twice(tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive) -> None:
    """By end of file and by signal, in any order and at the same instant: the keeper still ends what is below it."""
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        process, pids = start_busy(tmp_path / str(number), wait_until)
        keeper = keeper_of(tmp_path / str(number))
        process.kill()
        for _ in range(300):
            if is_alive(keeper):
                os.kill(keeper, signal.SIGTERM)
        process.wait(LONG)
        wait_until(lambda pids=pids: not any(map(is_alive, pids)), "somebody outlived it")  # type: ignore[misc]
        _, errors = read_rest(process)
        assert errors == b""


def keeper_of(folder: Path) -> int:
    return int((folder / "pids").read_text().split()[2])


def test_a_parent_that_crashes(tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive) -> None:
    process, pids = start_busy(tmp_path, wait_until)
    process.send_signal(signal.SIGSEGV)
    process.wait(LONG)
    wait_until(lambda: not any(map(is_alive, pids)), "somebody outlived it")
    read_rest(process)


def test_ctrl_c_to_the_whole_group(tmp_path: Path, wait_until: WaitUntil) -> None:
    """As a terminal does it. One traceback, the program's own; workers say nothing."""
    note = tmp_path / "began"
    source = textwrap.dedent(f"""
        import time
        from agentpool import AgentPool
        with AgentPool(2) as pool:
            def work():
                open({str(note)!r}, "a").write("x")
                time.sleep(1000)
            futures = [pool.submit(work) for _ in range(3)]
            futures[0].result()
    """)
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    wait_until(lambda: note.exists() and note.read_text() == "xx", "its tasks did not begin")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=LONG)
    assert process.returncode == -signal.SIGINT
    assert errors.count(b"Traceback") == 1
    assert errors.rstrip().endswith(b"KeyboardInterrupt")


class Interrupter:
    """Sends this process a signal at a moment that the generator chooses, and again where Python lost it: an
    exception in a garbage collector's callback is printed and gone."""

    def __init__(self, number: signal.Signals, seconds: float) -> None:
        self._number = number
        self._seconds = seconds
        self._armed = threading.Event()
        self._caught = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        self._armed.wait()
        time.sleep(self._seconds)
        while not self._caught.is_set():
            os.kill(os.getpid(), self._number)
            self._caught.wait(1)

    def arm(self) -> None:
        self._armed.set()

    def caught(self) -> None:
        self._caught.set()

    def end(self) -> None:
        self._thread.join()


_may_lose = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@_may_lose
def test_ctrl_c_at_any_moment_of_submitting() -> None:
    """KeyboardInterrupt is raised between any two instructions: it is never lost, and the block ends, all settled."""
    generator = random.Random(1)
    with AgentPool(max_workers=2) as other:
        for _ in range(25):
            futures: list[AgentFuture[int]] = []
            interrupter = Interrupter(signal.SIGINT, generator.uniform(0, 0.015))
            with pytest.raises(KeyboardInterrupt), AgentPool(max_workers=2) as pool:
                pool.submit(abs, -1).result(LONG)
                deadline = time.monotonic() + LONG
                try:
                    interrupter.arm()
                    while time.monotonic() < deadline:
                        futures.append(pool.submit(abs, -len(futures)))
                finally:
                    interrupter.caught()
            interrupter.end()
            assert all(future.done() for future in futures)
            for number, future in enumerate(futures):
                if not future.cancelled():
                    error = future.exception(0)
                    assert error is None or isinstance(error, TaskKilledError)
                    assert error is not None or future.result(0) == number
        assert other.submit(abs, -1).result(LONG) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@_may_lose
def test_a_pool_lives_on_after_ctrl_c(make_pool: MakePool) -> None:
    """As in a notebook: the submitting is interrupted, the pool is used again, and ends as it should."""
    generator = random.Random(2)
    pool = make_pool(max_workers=2)
    pool.submit(abs, -1).result(LONG)
    futures: list[AgentFuture[int]] = []
    for _ in range(40):
        interrupter = Interrupter(signal.SIGINT, generator.uniform(0, 0.004))
        deadline = time.monotonic() + LONG
        with pytest.raises(KeyboardInterrupt):
            try:
                interrupter.arm()
                while time.monotonic() < deadline:
                    futures.append(pool.submit(abs, -3))
                    futures.append(pool.submit(abs, -3))
                    futures[-1].cancel()
            finally:
                interrupter.caught()
        interrupter.end()
    assert pool.submit(abs, -2).result(LONG) == 2
    for future in futures:
        assert future.cancelled() or future.result(LONG) == 3
    ended = threading.Thread(target=pool.shutdown, daemon=True)
    ended.start()
    ended.join(LONG)
    assert not ended.is_alive(), "shutdown waits for a task that nobody knows"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Alarm(Exception):
    """What a signal handler of the program raises."""


@_may_lose
def test_a_handler_of_the_programs_own_that_raises() -> None:
    """It may come at the worst moment: a pool that cannot go on then ends, says so, and loses nobody's future."""

    def ring(number: int, frame: object) -> None:
        raise Alarm

    generator = random.Random(3)
    before = signal.signal(signal.SIGUSR2, ring)  # (SIGALRM is the test runner's)
    ended = 0
    try:
        for _ in range(20):
            futures: list[AgentFuture[int]] = []
            interrupter = Interrupter(signal.SIGUSR2, generator.uniform(0, 0.01))
            with AgentPool(max_workers=2) as pool:
                pool.submit(abs, -1).result(LONG)
                deadline = time.monotonic() + 0.1
                with contextlib.suppress(Alarm):
                    interrupter.arm()
                    # Where it comes while a call is pickled it becomes that future's error, and the loop goes on.
                    while time.monotonic() < deadline:
                        futures.append(pool.submit(abs, -3))
                with contextlib.suppress(Alarm):  # one may be under way
                    interrupter.caught()
                    interrupter.end()
                interrupter.end()
                with contextlib.suppress(PoolClosedError, TaskKilledError):
                    ended += 1
                    assert pool.submit(abs, -2).result(LONG) == 2
                    ended -= 1
            for future in futures:
                assert future.done()
                expected = (type(None), TaskKilledError, TaskPicklingError, PoolClosedError)
                assert type(future.exception(0)) in expected
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert ended < 20
    with pytest.raises(KeyboardInterrupt):  # an exception at a bad moment once left Ctrl-C without effect
        signal.raise_signal(signal.SIGINT)


def test_a_parent_that_dies_while_workers_start(tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive) -> None:
    """The parent-death signal is not retroactive: whoever is forked at that moment must notice by itself."""
    note = tmp_path / "pids"
    source = textwrap.dedent(f"""
        import os, signal, time
        from agentpool import AgentPool
        def initialize():
            with open({str(note)!r}, "a") as file:
                file.write(f"{{os.getpid()}}\\n")
            time.sleep(1000)
        pool = AgentPool(8, initializer=initialize)
        for number in range(8):
            pool.submit(abs, number)
        while not os.path.exists({str(note)!r}):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    for _ in range(3):
        note.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-c", source], timeout=LONG)
        pids = [int(word) for word in note.read_text().split()]
        wait_until(lambda pids=pids: not any(map(is_alive, pids)), "a worker outlived it")  # type: ignore[misc]
        # Whoever was not forked yet when the note was read is found by the leak check.


def test_os_exit_of_the_parent(tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive) -> None:
    done = run("""
        import os, time
        from agentpool import AgentPool
        pool = AgentPool(1)
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 1000)
        os._exit(4)
    """, "-c", tmp_path)
    assert done.returncode == 4
    wait_until(lambda: not is_alive(int(done.stdout)), "the worker lives on")


# --- pools in pools, pools in threads ---


def test_a_pool_in_a_task(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=2)

    def inner(base: int) -> list[int]:
        from agentpool import AgentPool

        with AgentPool(max_workers=2) as nested:
            return [future.result(LONG) for future in [nested.submit(pow, base, n) for n in range(5)]]

    futures = [pool.submit(inner, base) for base in (2, 3)]
    assert [future.result(LONG) for future in futures] == [[1, 2, 4, 8, 16], [1, 3, 9, 27, 81]]


def test_three_levels_and_an_error_from_below(make_pool: MakePool) -> None:
    """An error of agentpool travels up through the pools with its attributes."""
    pool = make_pool(max_workers=1)

    def middle() -> object:
        from agentpool import AgentPool

        def bottom() -> None:
            import os

            os._exit(44)

        with AgentPool(max_workers=1) as nested:
            return nested.submit(bottom).result(LONG)

    with pytest.raises(WorkerCrashedError) as caught:
        pool.submit(middle).result(LONG)
    assert caught.value.exit_code == 44
    assert caught.value.worker_pid != pool.get_pool_stats()["workers"][0]["pid"]


def test_a_nested_pool_that_a_task_leaves_open(make_pool: MakePool, wait_until: WaitUntil, is_alive: IsAlive) -> None:
    """Its workers end with the worker that made it."""
    pool = make_pool(max_workers=1)

    def leave() -> int:
        import builtins

        from agentpool import AgentPool

        builtins.left = AgentPool(max_workers=1)  # type: ignore[attr-defined]
        return builtins.left.submit(os.getpid).result(LONG)  # type: ignore[attr-defined,no-any-return]

    pid = pool.submit(leave).result(LONG)
    assert is_alive(pid)
    pool.shutdown()
    wait_until(lambda: not is_alive(pid), "it lives on")


def test_killing_a_task_ends_the_pool_inside(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(max_workers=1, kill_grace=0.2)
    note = tmp_path / "pid"

    def outer() -> None:
        from agentpool import AgentPool

        def inner() -> None:
            note.with_suffix(".new").write_text(str(os.getpid()))
            note.with_suffix(".new").rename(note)
            time.sleep(1000)

        nested = AgentPool(max_workers=1)
        while True:
            try:
                nested.submit(inner).result()
            except BaseException:
                continue

    future = pool.submit(outer)
    wait_until(note.exists, "it did not begin")
    assert future.kill()
    assert isinstance(future.exception(LONG), TaskKilledError)
    wait_until(lambda: not is_alive(int(note.read_text())), "the inner worker lives on")


def test_a_pool_made_in_a_thread_that_ends(make_pool: MakePool) -> None:
    """The parent-death signal follows the thread that started a process, not the process."""
    made: list[AgentPool] = []

    def make() -> None:
        made.append(make_pool(max_workers=1))
        assert made[0].submit(abs, -1).result(LONG) == 1

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(LONG)
    (pool,) = made
    assert [pool.submit(abs, -number).result(LONG) for number in range(5)] == list(range(5))


def test_pools_one_after_the_other() -> None:
    """The leak check counts what twenty of them leave."""
    for number in range(20):
        with AgentPool(max_workers=1) as pool:
            assert pool.submit(abs, -number).result(LONG) == number


def test_pools_side_by_side(make_pool: MakePool) -> None:
    pools = [make_pool(max_workers=1) for _ in range(4)]
    futures = [(number, pool.submit(abs, -number)) for number in range(40) for pool in pools]
    assert all(future.result(LONG) == number for number, future in futures)
    assert len({future.worker_pid for _, future in futures}) == 4


def test_workers_inherit_environment_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOR_WORKERS", "yes")
    monkeypatch.chdir(tmp_path)
    for method in ("fork", "spawn"):
        with AgentPool(1, method) as pool:
            found = pool.submit(lambda: (os.environ["FOR_WORKERS"], os.getcwd())).result(LONG)
        assert found == ("yes", str(tmp_path))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_program_that_blocks_signals(tmp_path: Path, method: str) -> None:
    """For sigwait or a signalfd. All that it starts inherits its mask; deaths and stops are seen all the same."""
    done = run(f"""
        import os, signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        from agentpool import AgentPool
        def cleans_up():
            try:
                open({str(tmp_path / "began")!r}, "w").close()
                time.sleep(1000)
            finally:
                open({str(tmp_path / "cleaned up")!r}, "w").close()
        with AgentPool(1, {method!r}) as pool:
            error = pool.options(queue_timeout=20).submit(os._exit, 9).exception(20)
            print(type(error).__name__, error.exit_code)
            future = pool.submit(cleans_up)
            while not os.path.exists({str(tmp_path / "began")!r}):
                time.sleep(0.005)
            print(future.kill(), type(future.exception(20)).__name__)
            print(pool.submit(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [])).result(20))
    """, "-c", tmp_path)
    assert succeeds(done) == "WorkerCrashedError 9\nTrue TaskKilledError\nset()\n"
    assert (tmp_path / "cleaned up").exists()


def test_a_program_under_nohup(tmp_path: Path) -> None:
    source = "from agentpool import AgentPool\nwith AgentPool(1) as pool:\n    print(pool.submit(abs, -3).result())\n"
    done = subprocess.run(["nohup", sys.executable, "-c", source], capture_output=True, text=True, cwd=tmp_path,
                          timeout=LONG)
    assert (done.returncode, done.stdout) == (0, "3\n")


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    done = run("""
        import os, sys
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        from agentpool import AgentPool
        for method in ("fork", "spawn"):
            with AgentPool(1, method) as pool:
                print(pool.options(queue_timeout=10).submit(abs, -3).result())
    """, "-c", tmp_path)
    assert succeeds(done) == "3\n3\n"


def test_a_daemonic_child_of_multiprocessing_may_have_a_pool() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        with AgentPool(max_workers=1) as pool:
            queue.put(pool.submit(abs, -4).result(LONG))

    process = context.Process(target=child, daemon=True)
    process.start()
    process.join(LONG)
    assert process.exitcode == 0
    assert queue.get() == 4
    queue.close()
    process.close()


def test_pools_that_were_never_used(wait_until: WaitUntil) -> None:
    """Their descriptors are given back, shut down or not."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(30):
        pool = AgentPool(max_workers=1)
        if number % 2:
            pool.shutdown()
        del pool
    gc.collect()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "descriptors are left")


def test_an_ignored_sigchld_in_the_program(tmp_path: Path) -> None:
    """It steals exit codes from whoever waits for children; the pool's deaths are seen all the same."""
    done = run("""
        import os, signal
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        from agentpool import AgentPool, WorkerCrashedError
        with AgentPool(1) as pool:
            error = pool.submit(os._exit, 9).exception()
            print(type(error).__name__, error.exit_code)
            print(pool.submit(abs, -1).result())
    """, "-c", tmp_path)
    assert succeeds(done) == "WorkerCrashedError 9\n1\n"


def test_a_program_that_reaps_everything(tmp_path: Path) -> None:
    """waitpid(-1) in another thread takes what is not its own."""
    done = run("""
        import os, threading, time
        from agentpool import AgentPool
        stop = threading.Event()
        def reap():
            while not stop.is_set():
                try:
                    os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    pass
                time.sleep(0.001)
        thread = threading.Thread(target=reap)
        thread.start()
        with AgentPool(1) as pool:
            error = pool.submit(os._exit, 9).exception()
            print(type(error).__name__, error.exit_code)
            print(pool.submit(abs, -1).result())
        stop.set()
        thread.join()
    """, "-c", tmp_path)
    assert succeeds(done) == "WorkerCrashedError 9\n1\n"
