"""Ends, and by when: what is below a process that died is gone within 2 s, what a task started within 1 s of its
worker's death, a script within 1 s of Ctrl-C. And ends at odd places: `__del__`, a defect of the pool itself."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool import AgentFuture, AgentPool, InternalError, WorkerCrashedError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
IsAlive = Callable[[int], bool]
MakePool = Callable[..., AgentPool]
LONG = 30
#: Where the machine is known to be slow, everything may take longer: see tests/conftest.py.
SLOWNESS = max(1.0, float(os.environ.get("AGENTPOOL_TEST_PATIENCE", "10")) / 10)

#: Prints its pid, is nobody's child any more, leads a session of its own, and takes no notice of a hang-up.
DAEMON = """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
print(os.getpid(), flush=True)
null = os.open(os.devnull, os.O_RDWR)
for descriptor in 0, 1, 2: os.dup2(null, descriptor)
time.sleep(600)
"""


def seconds_until(condition: Callable[[], object], what: str, wait_until: WaitUntil) -> float:
    started = time.monotonic()
    wait_until(condition, what)
    return time.monotonic() - started


# the process that has the pool dies

PARENT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from agentpool import AgentPool

DAEMON, METHOD, HOW, NOTE = sys.argv[1:]

def leave_a_daemon():
    child = subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE)
    return [os.getpid(), os.getppid(), int(child.stdout.readline()), child.wait()][:3]

def take_no_notice(name):
    pids = leave_a_daemon()
    Path(NOTE + ".new").write_text(json.dumps(pids))
    os.rename(NOTE + ".new", NOTE)
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

pool = AgentPool(2, METHOD)
if HOW.startswith("SIG"):  # an idle worker and a busy one, each with a daemon
    idle = pool.submit(leave_a_daemon).result()
    print(json.dumps(idle), flush=True)
    with pool:
        pool.submit(take_no_notice, "busy").result()
else:
    print(json.dumps(pool.submit(leave_a_daemon).result()), flush=True)
    if HOW == "raise":
        raise KeyError("nobody expects this")
    if HOW == "os._exit":
        pool.submit(take_no_notice, "busy")
        while not os.path.exists(NOTE):
            time.sleep(0.01)
        os._exit(5)
"""
ENDS = {"SIGKILL": -9, "SIGTERM": -15, "SIGINT": -2, "SIGSEGV": -11, "raise": 1, "os._exit": 5, "end": 0}


@pytest.mark.parametrize("how", ENDS)
def test_nothing_is_alive_two_seconds_after_the_parent(
    tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive, how: str
) -> None:
    """Workers, keeper, and daemons that tasks left: forked twice, with a session of their own, deaf to SIGHUP."""
    note = tmp_path / "busy"
    method = "spawn" if how in ("SIGTERM", "raise") else "fork"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, DAEMON, method, how, str(note)], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, start_new_session=True)
    assert parent.stdout is not None
    below = json.loads(parent.stdout.readline())
    if how.startswith("SIG"):
        wait_until(note.exists, "the second task did not begin")
        below += json.loads(note.read_text())
        assert all(map(is_alive, below))
        parent.send_signal(signal.Signals[how])
    try:
        assert parent.wait(LONG) == ENDS[how]
        if how == "os._exit":
            below += json.loads(note.read_text())
        seconds = seconds_until(lambda: not any(map(is_alive, below)), f"somebody outlived it: {below}", wait_until)
        assert seconds < 2 * SLOWNESS
    finally:
        parent.kill()
        parent.communicate()


# a worker dies


def leave_a_daemon_and_wait(here: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE)
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    assert child.stdout is not None
    here.with_suffix(".new").write_text(json.dumps([os.getpid(), int(child.stdout.readline()), sleeper.pid]))
    here.with_suffix(".new").rename(here)
    time.sleep(600)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT], ids=lambda number: number.name)
def test_descendants_are_gone_a_second_after_their_worker(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive, number: signal.Signals
) -> None:
    pool = make_pool(2, min_workers=2)
    other = pool.submit(os.getpid).result(LONG)
    future = pool.submit(leave_a_daemon_and_wait, tmp_path / "here")
    wait_until((tmp_path / "here").exists, "it did not begin")
    below = json.loads((tmp_path / "here").read_text())
    os.kill(below[0], number)
    assert seconds_until(lambda: not any(map(is_alive, below)), "they outlived it", wait_until) < SLOWNESS
    with pytest.raises(WorkerCrashedError, match=f"was killed by {number.name}"):
        future.result(LONG)
    if other != below[0]:
        assert is_alive(other), "another worker noticed"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_task_that_replaces_its_worker_by_another_program(make_pool: MakePool, tmp_path: Path, method: str) -> None:
    """exec: neither the pipes nor the death of what the worker became are mistaken for a result."""
    pool = make_pool(2, method)
    futures = [pool.submit(os.execv, "/bin/sh", ["sh", "-c", f"echo the words of a shell >&2; exit {code}"])
               for code in (3, 0)]
    others = [pool.submit(abs, -number) for number in range(10)]
    for code, future in zip((3, 0), futures, strict=True):
        with pytest.raises(WorkerCrashedError, match=f"exited with code {code} while it ran") as caught:
            future.result(LONG)
        assert caught.value.exit_code == code
        assert caught.value.stderr_tail == "the words of a shell\n"
        assert caught.value.peak_rss_bytes > 1 << 20
    assert [other.result(LONG) for other in others] == list(range(10))
    assert pool.get_pool_stats()["counters"]["crashed"] == 2


# Ctrl-C

SCRIPT = """
import os, sys, time
from agentpool import AgentPool

NOTE, HOW = sys.argv[1:]

def work(number):
    open(f"{NOTE}/{number}", "w").close()
    while True:
        try:
            time.sleep(600)
        except BaseException:
            if HOW != "stubborn":
                raise

if HOW == "no with":
    pool = AgentPool(2)
    futures = [pool.submit(work, number) for number in range(6)]
    futures[0].result()
with AgentPool(2) as pool:
    if HOW == "map":
        list(pool.map(work, range(6)))
    futures = [pool.submit(work, number) for number in range(6)]
    if HOW != "leaving":
        futures[0].result()
"""


def start_script(folder: Path, how: str, wait_until: WaitUntil) -> subprocess.Popen[bytes]:
    """In a session of its own, as if it had a terminal of its own; returns when both of its workers are busy."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), how],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_until(lambda: len(os.listdir(folder)) == 2, "its tasks did not begin")
    return process


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """As a terminal does: its whole group."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("how", ["waiting", "map", "leaving", "stubborn", "no with"])
def test_ctrl_c_ends_a_script_within_a_second(tmp_path: Path, wait_until: WaitUntil, how: str) -> None:
    """Its own traceback and no other; what was queued never runs."""
    process = start_script(tmp_path, how, wait_until)
    started = time.monotonic()
    interrupt(process)
    try:
        _, errors = process.communicate(timeout=5 * SLOWNESS)
    finally:
        process.kill()
        process.communicate()
    assert time.monotonic() - started < SLOWNESS
    assert process.returncode == -signal.SIGINT
    assert errors.count(b"Traceback") == 1, errors.decode()
    assert errors.rstrip().endswith(b"KeyboardInterrupt"), errors.decode()
    assert sorted(os.listdir(tmp_path)) == ["0", "1"], "what was queued ran"


def test_a_second_ctrl_c_never_hangs(tmp_path: Path, wait_until: WaitUntil) -> None:
    """At any moment after the first, while the pool ends."""
    generator = random.Random(4)
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start_script(folder, ["waiting", "stubborn"][number % 2], wait_until)
        interrupt(process)
        again = time.monotonic() + generator.uniform(0, 0.06)
        wait_until(lambda again=again: time.monotonic() >= again, "time does not pass")
        try:
            if process.poll() is None:
                interrupt(process)
            process.communicate(timeout=5 * SLOWNESS)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGINT


# odd places


class Owner:
    """Closes its pool when nobody needs it any more."""

    def __init__(self) -> None:
        self.pool = AgentPool(max_workers=1)

    def __del__(self) -> None:
        self.pool.shutdown()


def test_shutdown_in_del(wait_until: WaitUntil, is_alive: IsAlive) -> None:
    """Wherever the last reference goes: in the thread that lets go of it, in a garbage collection, in a callback."""
    owner = Owner()
    worker = owner.pool.submit(os.getpid).result(LONG)
    del owner
    assert not is_alive(worker), "shutdown returns when all is gone"

    owner = Owner()
    owner.me = owner  # type: ignore[attr-defined]
    worker = owner.pool.submit(os.getpid).result(LONG)
    del owner
    gc.collect()
    assert not is_alive(worker)

    owners = [Owner()]
    ended = threading.Event()
    pool = owners[0].pool
    gate = threading.Event()
    future = pool.submit(os.getpid)
    future.add_done_callback(lambda _: (gate.wait(LONG), owners.clear(), ended.set()))
    gate.set()
    wait_until(ended.is_set, "shutdown hangs in the manager thread")
    wait_until(lambda: not is_alive(future.result(LONG)), "its worker lives on")
    pool.shutdown()


def test_a_defect_of_the_pool_itself(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive, caplog: pytest.LogCaptureFixture
) -> None:
    """The last resort: everybody is told, nothing hangs, nothing stays; other pools take no notice."""

    def break_down(now: float) -> None:
        raise ZeroDivisionError("what a defect of the core would raise")

    other = make_pool(1)
    bystander = other.submit(os.getpid).result(LONG)
    pool = make_pool(2)
    running: list[AgentFuture[Any]] = [
        pool.submit(leave_a_daemon_and_wait, tmp_path / name) for name in ("one", "two")
    ]
    queued = [pool.submit(abs, -number) for number in range(5)]
    wait_until(lambda: all((tmp_path / name).exists() for name in ("one", "two")), "they did not begin")
    below = [pid for name in ("one", "two") for pid in json.loads((tmp_path / name).read_text())]
    caplog.set_level(logging.CRITICAL, logger="agentpool")
    with pool._manager.lock:
        pool._manager.core.timers.add(0.0, break_down)
    with contextlib.suppress(InternalError):  # it is that quick
        queued.append(pool.submit(abs, -1))
    for future in (*running, *queued):
        with pytest.raises(InternalError, match="This is a defect: please report it") as caught:
            future.result(LONG)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert "<worker 1 " in caught.value.story, "the core's recent history"
    pool.shutdown()
    assert pool.closed
    assert not any(map(is_alive, below))
    with pytest.raises(InternalError):
        pool.submit(abs, 1)
    [record] = [each for each in caplog.records if "manager thread" in each.getMessage()]
    assert "ready" in record.getMessage(), "the log says nothing of the core's recent history"
    assert other.submit(os.getpid).result(LONG) == bystander
