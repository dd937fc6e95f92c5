"""Starts that fail because the machine refuses: no process, no thread, no descriptor, no memory. The breaker counts
them and says why, nothing loops hot, running workers go on, and the pool recovers by itself. What the user's own code
does to a start stands in test_breaker.py and test_bad_input.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import psutil
import pytest

from agentpool import AgentPool, BreakerSettings

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
QUICK = BreakerSettings(failure_threshold=2, open_seconds=0.2, max_open_seconds=0.4)
#: Starts in one second of QUICK: what was under way when it opened, and a probe each 0.2 to 0.4 s.
MOST_IN_A_SECOND = 7
LONG = 15

#: Imported by a process, makes it one whose number of processes can be limited, also where that is root's: it gets a
#: real user of its own, and loses what would exempt it. SIGUSR1 then forbids it to fork, SIGUSR2 allows it again.
FORKLESS = """
import ctypes, os, resource, signal

if os.getuid() == 0:
    os.setresuid(54321, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << 21 | 1 << 24)  # CAP_SYS_ADMIN, CAP_SYS_RESOURCE
    assert libc.capset(header, data) == 0
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]

def limit(count):
    resource.setrlimit(resource.RLIMIT_NPROC, (count, hard))

signal.signal(signal.SIGUSR1, lambda *_: limit(0))
signal.signal(signal.SIGUSR2, lambda *_: limit(hard))
"""


@pytest.fixture
def forkless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that is FORKLESS."""
    capabilities = next(int(line.split()[1], 16) for line in Path("/proc/self/status").read_text().splitlines()
                        if line.startswith("CapEff:"))
    if os.geteuid() == 0 and not capabilities & 1 << 7:  # CAP_SETUID
        pytest.skip("root that may not become another user is exempt from RLIMIT_NPROC")
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "forkless.py").write_text(FORKLESS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "forkless"


def may_fork(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line.split()[2] for line in lines if line.startswith("Max processes")) != "0"


def starts_in_a_second(pool: AgentPool, wait_until: WaitUntil) -> int:
    """For what must not happen: gives it the time to."""
    before = int(pool.get_pool_stats()["counters"]["spawned"])
    until = time.monotonic() + 1
    wait_until(lambda: time.monotonic() > until, "time does not pass")
    return int(pool.get_pool_stats()["counters"]["spawned"]) - before


def run(source: str) -> str:
    """What a program prints that ends well."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(source)], capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# no process


def test_a_fork_that_is_refused(make_pool: MakePool, wait_until: WaitUntil, forkless: str) -> None:
    """EAGAIN, as under `ulimit -u` or where a container's pids are used up."""
    pool = make_pool(2, preload=(forkless,), breaker=QUICK)
    worker = pool.submit(os.getpid).result(LONG)
    keeper = psutil.Process(worker).ppid()
    os.kill(keeper, signal.SIGUSR1)
    wait_until(lambda: not may_fork(keeper), "it is not limited")
    assert pool.submit(os.getpid).result(LONG) == worker, "what is there goes on"
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: pool.get_pool_stats()["total_agents"] == 0, "its death goes unnoticed")
    task = pool.submit(os.getpid)
    wait_until(lambda: "fork failed" in pool.breaker.reason, "the breaker does not say why")
    assert "[Errno 11] Resource temporarily unavailable" in pool.breaker.reason
    assert starts_in_a_second(pool, wait_until) <= MOST_IN_A_SECOND
    assert not task.done()
    os.kill(keeper, signal.SIGUSR2)
    assert task.result(LONG)
    assert task.attempts == 1
    wait_until(lambda: pool.breaker.state == "closed", "it does not recover")
    assert psutil.Process(task.result(0)).ppid() == keeper


def test_a_keeper_that_cannot_be_started(forkless: str) -> None:
    """This process itself may start none."""
    printed = run(f"""
        import os, signal, time
        import {forkless}
        from agentpool import AgentPool, BreakerSettings

        def until(condition):
            deadline = time.monotonic() + {LONG}
            while not condition():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        quick = BreakerSettings(failure_threshold=2, open_seconds=0.2, max_open_seconds=0.4)
        with AgentPool(2, breaker=quick, cpu_threshold_percent=100) as pool:
            keeper = pool.submit(os.getppid).result({LONG})
            {forkless}.limit(0)
            os.kill(keeper, signal.SIGKILL)
            until(lambda: pool.get_pool_stats()["total_agents"] == 0)
            task = pool.submit(os.getppid)
            until(lambda: pool.breaker.state == "open")
            print(pool.breaker.reason)
            before = pool.get_pool_stats()["counters"]["spawned"]
            end = time.monotonic() + 1
            until(lambda: time.monotonic() > end)
            print(pool.get_pool_stats()["counters"]["spawned"] - before <= {MOST_IN_A_SECOND}, task.done())
            {forkless}.limit({forkless}.hard)
            print(task.result({LONG}) not in (keeper, os.getpid()), task.attempts)
    """).splitlines()
    assert "BlockingIOError: [Errno 11] Resource temporarily unavailable" in printed[0]
    assert printed[1:] == ["True False", "True 1"]


def test_a_manager_thread_that_cannot_be_started(forkless: str) -> None:
    """A thread counts as a process there. `submit` says so, nothing is accepted, and the pool works once it can."""
    printed = run(f"""
        import {forkless}
        from agentpool import AgentPool

        with AgentPool(1) as pool, AgentPool(1) as unused:
            {forkless}.limit(0)
            for each in (pool, unused):
                try:
                    each.submit(abs, -1)
                except RuntimeError as error:
                    print(error)
            {forkless}.limit({forkless}.hard)
            print(pool.submit(abs, -2).result({LONG}))
    """)
    assert printed.splitlines() == ["can't start new thread"] * 2 + ["2"]


# no descriptor


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_program_without_a_free_descriptor(method: str) -> None:
    printed = run(f"""
        import os, resource, signal, time
        from agentpool import AgentPool, BreakerSettings

        def until(condition):
            deadline = time.monotonic() + {LONG}
            while not condition():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        quick = BreakerSettings(failure_threshold=2, open_seconds=0.2, max_open_seconds=0.4)
        with AgentPool(2, {method!r}, breaker=quick, cpu_threshold_percent=100) as pool:
            worker = pool.submit(os.getpid).result({LONG})
            pool.get_pool_stats()  # imports what it needs
            taken = []
            try:
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
            assert pool.submit(os.getpid).result({LONG}) == worker, "what is there goes on"
            os.kill(worker, signal.SIGKILL)
            until(lambda: pool.get_pool_stats()["total_agents"] == 0)
            try:
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))  # what the worker's channel gave back
            except OSError:
                pass
            task = pool.submit(os.getpid)
            until(lambda: pool.breaker.state == "open")
            print(pool.breaker.reason)
            before = pool.get_pool_stats()["counters"]["spawned"]
            end = time.monotonic() + 1
            until(lambda: time.monotonic() > end)
            print(pool.get_pool_stats()["counters"]["spawned"] - before <= {MOST_IN_A_SECOND}, task.done())
            for descriptor in taken:
                os.close(descriptor)
            print(task.result({LONG}) != worker, task.attempts)
    """).splitlines()
    assert "OSError: [Errno 24] Too many open files" in printed[0]
    assert printed[1:] == ["True False", "True 1"]


# modules to preload


def test_a_module_to_preload_that_is_mended(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the keeper imports it; with fresh interpreters see test_breaker.py."""
    module = tmp_path / "raises_at_first.py"
    module.write_text("raise RuntimeError('no licence for this')\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = make_pool(1, preload=("raises_at_first",), breaker=QUICK)
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    assert "no licence for this" in pool.breaker.reason
    assert starts_in_a_second(pool, wait_until) <= MOST_IN_A_SECOND
    module.write_text("a_licence = 'granted'\n")
    assert task.result(LONG), "the keeper goes on failing for what is mended"
    wait_until(lambda: pool.breaker.state == "closed", "it does not recover")


# no memory


def take_memory(megabytes: int, allowed: Path) -> None:
    """An initializer that takes memory, unless a file is there."""
    if allowed.exists():
        return
    taken = []
    for _ in range(0, megabytes, 10):
        taken.append(b"x" * (10 << 20))
        time.sleep(0.005)  # somebody must have the time to look
    time.sleep(600)


def be_killed(allowed: Path) -> None:
    """An initializer that ends as the kernel ends what took too much of it."""
    if not allowed.exists():
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_initializer_that_passes_the_hard_limit(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(1, initializer=take_memory, initargs=(400, tmp_path / "allowed"), hard_memory_limit_mb=150,
                     critical_memory_mb=4000, breaker=QUICK)  # the pool's own limit is not what is looked for
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "nobody stops it")
    assert "MB before it was ready, above hard_memory_limit_mb (150)" in pool.breaker.reason
    (tmp_path / "allowed").touch()
    assert task.result(LONG)
    wait_until(lambda: pool.breaker.state == "closed", "it does not recover")


def test_an_initializer_that_the_kernel_kills(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(1, initializer=be_killed, initargs=(tmp_path / "allowed",), breaker=QUICK)
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    assert "a worker was killed by SIGKILL before it was ready" in pool.breaker.reason
    assert starts_in_a_second(pool, wait_until) <= MOST_IN_A_SECOND
    (tmp_path / "allowed").touch()
    assert task.result(LONG)
    wait_until(lambda: pool.breaker.state == "closed", "it does not recover")


def test_an_initializer_that_the_kernels_limit_refuses_memory(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    """Any other error that it raises breaks the pool; memory may be there again."""
    pool = make_pool(1, initializer=take_memory, initargs=(400, tmp_path / "allowed"), data_limit_mb=200,
                     breaker=QUICK)
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    assert "MemoryError" in pool.breaker.reason
    assert starts_in_a_second(pool, wait_until) <= MOST_IN_A_SECOND
    (tmp_path / "allowed").touch()
    assert task.result(LONG)
    wait_until(lambda: pool.breaker.state == "closed", "it does not recover")
