"""The keeper and its workers die, in all the ways that processes die; the pool goes on and nothing is left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from agentpool import AgentFuture, AgentPool, BreakerSettings, WorkerCrashedError
from agentpool.config import MB

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
IsAlive = Callable[[int], bool]


def keeper_of(worker: int) -> psutil.Process:
    keeper = psutil.Process(worker).parent()
    assert keeper is not None
    assert "agentpool_worker" in " ".join(keeper.cmdline())
    assert keeper.ppid() == os.getpid()
    return keeper


def pids(pool: AgentPool) -> set[int]:
    return {worker["pid"] for worker in pool.get_pool_stats()["workers"]}


def await_text(path: Path, wait_until: WaitUntil) -> str:
    wait_until(lambda: path.exists() and path.read_text(), f"{path.name} was not written")
    return path.read_text()


def most_unread() -> int:
    """Bytes that wait in the fullest pipe of this process."""
    most = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own, and what is no pipe
            if os.readlink(f"/proc/self/fd/{name}").startswith("pipe:"):
                waiting = fcntl.ioctl(int(name), termios.FIONREAD, b"\0" * 4)
                most = max(most, int.from_bytes(waiting, sys.byteorder))
    return most


def crash_error(future: AgentFuture[Any]) -> WorkerCrashedError:
    with pytest.raises(WorkerCrashedError) as info:
        future.result(30)
    return info.value


# what runs in the workers

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
#: Prints its pid and is nobody's child any more, in a session of its own.
DAEMON = """
import os, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
print(os.getpid(), flush=True)
os.close(1)
time.sleep(600)
"""


def write(path: Path, text: object) -> None:
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)


def send_all_through_the_pipe() -> None:
    from agentpool_worker import arena

    arena.SHARED_FROM = 1 << 60


def hold(here: Path, gate: Path) -> int:
    with open(here.with_suffix(".log"), "a") as log:
        log.write(f"{os.getpid()}\n")
    write(here, os.getpid())
    while not gate.exists():
        time.sleep(0.005)
    return os.getpid()


def start_descendants() -> list[int]:
    """A child, a child with a session of its own, a daemon, and the child of a child that ended."""
    child = subprocess.Popen(SLEEPER)
    leader = subprocess.Popen(SLEEPER, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    daemon = subprocess.run([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, check=True)
    orphan = subprocess.run(["/bin/sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", *SLEEPER],
                            stdout=subprocess.PIPE, check=True)
    keep = sys.modules["builtins"]
    keep.children = [child, leader]  # type: ignore[attr-defined]
    return [child.pid, leader.pid, int(daemon.stdout), int(orphan.stdout)]


def start_descendants_and_hold(here: Path, gate: Path) -> None:
    write(here, json.dumps(start_descendants()))
    hold(here.with_name("held"), gate)


def start_descendants_and_crash(here: Path) -> None:
    write(here, json.dumps(start_descendants()))
    os.kill(os.getpid(), signal.SIGKILL)


def start_a_tree(here: Path, gate: Path) -> None:
    """Each process starts the next one, which prints its pid."""
    program = ("import os, subprocess, sys, time\nn = int(sys.argv[1])\nprint(os.getpid(), flush=True)\n"
               "if n: subprocess.Popen([sys.executable, '-c', sys.argv[2], str(n - 1), sys.argv[2]],"
               " start_new_session=True)\ntime.sleep(600)")
    root = subprocess.Popen([sys.executable, "-c", program, "3", program], stdout=subprocess.PIPE)
    assert root.stdout is not None
    write(here, json.dumps([int(root.stdout.readline()) for _ in range(4)]))
    hold(here.with_name("held"), gate)


class Announced:
    """Bytes that say when they are about to be sent."""

    def __init__(self, here: Path, size: int) -> None:
        self.here = here
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        data = b"x" * self.size
        write(self.here, os.getpid())
        return bytes, (data,)


def send(here: Path, size: int) -> Announced:
    return Announced(here, size)


def orphan_the_pipe(here: Path) -> None:
    """A child that holds everything open that the worker has, outliving it if it can."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    write(here, child)
    os.kill(os.getpid(), signal.SIGKILL)


# the keeper is killed


def test_idle_the_pool_gets_a_new_keeper(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(2)
    worker = pool.submit(os.getpid).result(30)
    keeper = keeper_of(worker)
    keeper.kill()
    wait_until(lambda: not is_alive(worker), "its worker lives on")
    wait_until(lambda: pool.get_pool_stats()["total_agents"] == 0, "its death goes unnoticed")
    following = pool.submit(os.getpid).result(30)
    assert keeper_of(following) != keeper
    assert [record.levelno for record in caplog.records if "keeper process died" in record.getMessage()] == [
        logging.ERROR]
    assert pool.breaker.state == "closed"


def test_running_tasks_are_lost_with_it_and_the_pool_goes_on(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(2)
    tasks = [pool.submit(hold, tmp_path / name, tmp_path / "gate") for name in ("one", "two")]
    workers = [int(await_text(tmp_path / name, wait_until)) for name in ("one", "two")]
    queued = [pool.submit(os.getpid) for _ in range(4)]
    keeper_of(workers[0]).kill()
    for task in tasks:
        assert "was lost together with the keeper process while it ran" in str(crash_error(task))
        assert task.attempts == 1
    assert all(task.result(30) not in workers for task in queued)
    assert not any(map(is_alive, workers))
    assert pool.get_pool_stats()["counters"]["crashed"] == 2


def test_tasks_that_may_be_run_again_are(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(2, retry=3)
    tasks = [pool.submit(hold, tmp_path / name, tmp_path / "gate") for name in ("one", "two")]
    workers = [int(await_text(tmp_path / name, wait_until)) for name in ("one", "two")]
    keeper_of(workers[0]).kill()
    for name in ("one", "two"):
        wait_until(lambda name=name: len((tmp_path / f"{name}.log").read_text().split()) == 2, "it is not run again")
    (tmp_path / "gate").touch()
    assert not {task.result(30) for task in tasks} & set(workers)
    assert [task.attempts for task in tasks] == [2, 2]


def test_a_task_is_not_to_blame_for_the_keepers_death(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    """Whatever killed it four times: the task is not quarantined after three."""
    pool = make_pool(1, retry=5)
    task = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    for time_ in range(1, 5):
        wait_until(lambda n=time_: (tmp_path / "here.log").exists()
                   and len((tmp_path / "here.log").read_text().split()) == n, "it is not run again")
        worker = int((tmp_path / "here.log").read_text().split()[-1])
        keeper_of(worker).kill()
    wait_until(lambda: len((tmp_path / "here.log").read_text().split()) == 5, "it is not run again")
    (tmp_path / "gate").touch()
    task.result(30)
    assert task.attempts == 5


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_nothing_that_tasks_started_outlives_the_keeper(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil, tmp_path: Path, method: str
) -> None:
    pool = make_pool(1, method)
    task = pool.submit(start_descendants_and_hold, tmp_path / "here", tmp_path / "gate")
    descendants = json.loads(await_text(tmp_path / "here", wait_until))
    worker = int(await_text(tmp_path / "held", wait_until))
    keeper_of(worker).kill()
    crash_error(task)
    wait_until(lambda: not any(map(is_alive, descendants)), "descendants outlived the keeper")
    assert pool.submit(os.getpid).result(30)


def test_nothing_that_an_idle_worker_keeps_outlives_the_keeper(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil
) -> None:
    pool = make_pool(1)
    task = pool.submit(start_descendants)
    descendants = task.result(30)
    assert task.worker_pid is not None
    keeper_of(task.worker_pid).kill()
    wait_until(lambda: not any(map(is_alive, descendants)), "descendants outlived the keeper")
    assert pool.submit(os.getpid).result(30) != task.worker_pid


def test_a_stopped_keeper_hangs_no_shutdown(make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil) -> None:
    pool = make_pool(1)
    worker = pool.submit(os.getpid).result(30)
    keeper = keeper_of(worker)
    keeper.suspend()
    closing = threading.Thread(target=pool.kill_workers, daemon=True)
    closing.start()
    try:
        wait_until(lambda: not closing.is_alive(), "shutdown hangs", 30)
    finally:
        if keeper.is_running():
            keeper.resume()
        closing.join(30)
    assert not is_alive(keeper.pid)
    assert not is_alive(worker)


def test_the_keeper_dies_while_workers_start(make_pool: MakePool, wait_until: WaitUntil) -> None:
    """Once for each state that a start may be in, with some luck; tasks that had begun are lost, no other."""
    pool = make_pool(4, breaker=BreakerSettings(failure_threshold=1000))
    outcomes = set()
    for _ in range(8):
        worker = pool.submit(os.getpid).result(30)
        keeper = keeper_of(worker)
        tasks = [pool.submit(abs, number) for number in range(8)]  # three more workers are on their way
        keeper.kill()
        outcomes |= {type(task.exception(30)) for task in tasks}
        wait_until(lambda worker=worker: worker not in pids(pool), "its death goes unnoticed")
    assert outcomes <= {type(None), WorkerCrashedError}
    assert pool.submit(os.getpid).result(30)


# workers are killed


def test_an_idle_worker_is_killed(make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil) -> None:
    pool = make_pool(2)
    worker = pool.submit(os.getpid).result(30)
    keeper = keeper_of(worker)
    os.kill(worker, signal.SIGKILL)
    following = pool.submit(os.getpid).result(30)
    assert following != worker
    assert keeper_of(following) == keeper
    wait_until(lambda: worker not in pids(pool), "it is still listed")
    assert pool.breaker.failure_count == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGHUP])
def test_a_signal_to_a_busy_worker_is_named(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path, number: signal.Signals
) -> None:
    pool = make_pool(1)
    task = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    os.kill(int(await_text(tmp_path / "here", wait_until)), number)
    error = crash_error(task)
    assert error.exit_code == -number
    assert f"was killed by {number.name}" in str(error)
    if number in (signal.SIGSEGV, signal.SIGABRT):
        assert "in hold" in str(error), "the interpreter's last report says where"
    assert pool.submit(os.getpid).result(30)


def test_an_interrupt_from_the_terminal_is_not_for_workers(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(1)
    task = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    worker = int(await_text(tmp_path / "here", wait_until))
    assert os.getsid(worker) == worker, "it leads a session of its own"
    assert os.getsid(keeper_of(worker).pid) != os.getsid(0)
    os.kill(worker, signal.SIGINT)
    (tmp_path / "gate").touch()
    assert task.result(30) == worker


@pytest.mark.parametrize("size", [4 * MB, 64 * MB])
@pytest.mark.parametrize("held_up", [True, False])
def test_a_worker_is_killed_in_the_middle_of_a_result(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil, tmp_path: Path, size: int, held_up: bool
) -> None:
    """Held up, nobody reads until it is dead: what is in the pipe is surely a part. Else it may be any part, or all."""
    pool = make_pool(2, initializer=send_all_through_the_pipe)
    pool.submit(os.getpid).result(30)
    gate = threading.Event()
    try:
        if held_up:
            blocker = pool.submit(hold, tmp_path / "blocker", tmp_path / "callback added")
            blocked = threading.Event()
            blocker.add_done_callback(lambda _: (blocked.set(), gate.wait(60)))
            (tmp_path / "callback added").touch()
            wait_until(blocked.is_set, "the callback is not called")
        task = pool.submit(send, tmp_path / "here", size)
        worker = int(await_text(tmp_path / "here", wait_until))
        if held_up:
            wait_until(lambda: most_unread() >= 60_000, "it does not send")
        os.kill(worker, signal.SIGKILL)
    finally:
        gate.set()
    if held_up:
        assert "was killed by SIGKILL" in str(crash_error(task))
    elif not isinstance(task.exception(30), WorkerCrashedError):
        assert task.result(30) == b"x" * size
    assert pool.submit(len, b"x" * size).result(30) == size
    assert pool.submit(send, tmp_path / "again", size).result(30) == b"x" * size


def test_a_stopped_worker_in_the_middle_of_a_result_stalls_nobody(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(2, initializer=send_all_through_the_pipe)
    task = pool.submit(send, tmp_path / "here", 64 * MB)
    worker = int(await_text(tmp_path / "here", wait_until))
    os.kill(worker, signal.SIGSTOP)
    if not task.done():
        assert [pool.submit(abs, -number).result(30) for number in range(50)] == list(range(50))
    os.kill(worker, signal.SIGCONT)
    assert task.result(30) == b"x" * 64 * MB


def test_a_child_that_holds_the_workers_pipes_open_hides_no_death(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(1)
    started = time.monotonic()
    crash_error(pool.submit(orphan_the_pipe, tmp_path / "here"))
    assert time.monotonic() - started < 10
    child = int((tmp_path / "here").read_text())
    wait_until(lambda: not is_alive(child), "the child lives on")


# descendants of workers


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_descendants_end_with_a_worker_that_crashes(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil, tmp_path: Path, method: str
) -> None:
    pool = make_pool(1, method)
    crash_error(pool.submit(start_descendants_and_crash, tmp_path / "here"))
    descendants = json.loads((tmp_path / "here").read_text())
    wait_until(lambda: not any(map(is_alive, descendants)), "descendants outlived their worker")


def test_descendants_end_with_a_worker_that_is_recycled(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil
) -> None:
    pool = make_pool(1, max_tasks_per_child=1)
    descendants = pool.submit(start_descendants).result(30)
    assert pool.submit(os.getpid).result(30)
    wait_until(lambda: not any(map(is_alive, descendants)), "descendants outlived their worker")


def test_descendants_end_with_the_pool(make_pool: MakePool, is_alive: IsAlive) -> None:
    with make_pool(1) as pool:
        descendants = pool.submit(start_descendants).result(30)
        assert all(map(is_alive, descendants)), "as long as their worker lives, so do they"
        assert pool.submit(os.getpid).result(30)
        assert all(map(is_alive, descendants))
    assert not any(map(is_alive, descendants)), "shutdown returns when all is gone"


def test_a_deep_tree_ends_with_its_worker(
    make_pool: MakePool, is_alive: IsAlive, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(1)
    task = pool.submit(start_a_tree, tmp_path / "here", tmp_path / "gate")
    tree = json.loads(await_text(tmp_path / "here", wait_until))
    worker = int(await_text(tmp_path / "held", wait_until))
    assert {process.pid for process in psutil.Process(worker).children(recursive=True)} >= set(tree)
    os.kill(worker, signal.SIGKILL)
    crash_error(task)
    wait_until(lambda: not any(map(is_alive, tree)), "descendants outlived their worker")


def test_deep_trees_end_with_the_pool(make_pool: MakePool, is_alive: IsAlive, tmp_path: Path) -> None:
    """Each process hands over the next one only when it dies."""
    trees = []
    for number in range(3):
        gate = tmp_path / f"{number}.gate"
        gate.touch()
        with make_pool(1) as pool:
            pool.submit(start_a_tree, tmp_path / f"{number}.tree", gate).result(30)
        trees += json.loads((tmp_path / f"{number}.tree").read_text())
        assert not any(map(is_alive, trees)), "shutdown returns when all is gone"


# the process that has the pool is killed

PARENT = """
import json, os, subprocess, sys, time
from pathlib import Path
from agentpool import AgentPool
here = Path(sys.argv[1])

def work(name):
    children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid]
    here.joinpath(name).write_text(json.dumps([os.getpid(), os.getppid(), *children]))
    here.joinpath(name + ".ready").touch()
    if name == "busy":
        10 ** 10 ** 8  # in C, with the interpreter's lock held
    time.sleep(600)

pool = AgentPool(2)
tasks = [pool.submit(work, name) for name in ("busy", "sleeping")]
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_process_that_has_the_pool(
    is_alive: IsAlive, wait_until: WaitUntil, tmp_path: Path, number: signal.Signals
) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        for name in ("busy", "sleeping"):
            wait_until((tmp_path / f"{name}.ready").exists, "it did not start", 30)
        below = [pid for name in ("busy", "sleeping") for pid in json.loads((tmp_path / name).read_text())]
        assert all(map(is_alive, below))
        if number == signal.SIGINT:
            # As with the standard library's pool, the work that was begun is waited for at exit, and the second
            # interrupt ends that.
            parent.send_signal(number)
            deadline = time.monotonic() + 20
            while parent.poll() is None and time.monotonic() < deadline:
                parent.send_signal(number)
                time.sleep(0.2)  # a person's second and third try
            if parent.poll() is None:
                pytest.fail("it cannot be interrupted")
        else:
            parent.send_signal(number)
        parent.wait(30)
        wait_until(lambda: not any(map(is_alive, below)), "something outlived it")
    finally:
        parent.kill()
        parent.wait()


def test_the_pools_descriptors_are_not_inherited_by_what_the_user_starts(make_pool: MakePool) -> None:
    """A pipe end that leaked into it would keep the pool's processes from seeing the end of this one."""
    code = "import os; print(len(os.listdir('/proc/self/fd')))"
    argv = [sys.executable, "-c", code]
    before = subprocess.run(argv, stdout=subprocess.PIPE, check=True, close_fds=False).stdout
    pool = make_pool(2)
    pool.submit(os.getpid).result(30)
    assert subprocess.run(argv, stdout=subprocess.PIPE, check=True, close_fds=False).stdout == before


def test_a_workers_descriptors_are_not_inherited_by_what_a_task_starts(make_pool: MakePool) -> None:
    code = "import os; print(sorted(int(fd) for fd in os.listdir('/proc/self/fd')))"
    listed = make_pool(1).submit(subprocess.check_output, [sys.executable, "-c", code], close_fds=False).result(30)
    assert len(json.loads(listed)) <= 4, "the standard three, and that of the listing itself"
