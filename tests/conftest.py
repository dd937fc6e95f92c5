"""For all tests: Hypothesis' profiles, waiting for a condition, and the check that a test left nothing behind.

`wait_until` and `is_alive` are what a test uses instead of sleeping. `no_leaks` is the check: automatic for the
integration tests (`tests/integration/conftest.py`), by name elsewhere:

    pytestmark = pytest.mark.usefixtures("no_leaks")

It compares before and after; a pool of a wider scope than the function, which starts workers whenever it likes, would
be taken for a leak: give each test its own.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing.forkserver
import multiprocessing.process
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile("agentpool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A run that nobody watches must not fail by chance: the same examples each time, without a data base of old ones.
settings.register_profile("agentpool-ci", settings.get_profile("agentpool"), derandomize=True, database=None)
# Mutation testing only asks whether there is a failure, not for the smallest one: make mutants.
settings.register_profile("agentpool-mutants", settings.get_profile("agentpool-ci"), max_examples=40,
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile("agentpool-ci" if os.environ.get("CI") else "agentpool")

# A shell starts what runs in the background with SIGINT ignored, and children inherit that. The tests of Ctrl-C, and
# the programs that they start, need it as it is in a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup the same goes for SIGHUP: this process goes on without it, the programs that it starts have it.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

#: Seconds that a condition may take to come true: generous, as the machine may have other work.
PATIENCE = float(os.environ.get("AGENTPOOL_TEST_PATIENCE", "10"))
#: A zombie that this process adopted is collected when it is this old; before, its creator may still wait for it.
ZOMBIE_SECONDS = 0.5
PR_SET_CHILD_SUBREAPER = 36

_failed = pytest.StashKey[bool]()
_the_test_process = os.getpid()


def pytest_sessionstart() -> None:
    """`stress.mutants` forks a process for each mutant and calls this in it: that one has not escaped from anything."""
    global _the_test_process
    _the_test_process = os.getpid()


@pytest.fixture(scope="session", autouse=True)
def _sockets_of_their_own() -> Iterator[None]:
    """Commands that somebody gives to all of his pools meanwhile do not concern those of tests, nor the reverse."""
    with tempfile.TemporaryDirectory(prefix="agentpool-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if os.getpid() != _the_test_process:
        # A copy that a test forked has escaped from it, by an exception: it must not run the rest of the suite again.
        os.write(2, f"a forked copy of the test process escaped from {item.nodeid}\n".encode())
        os._exit(70)
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """`wait_until(condition, what, patience=10.0)`: returns once `condition()` is true, fails with `what` otherwise."""
    zombies = Zombies()

    def wait(condition: Callable[[], object], what: str = "it did not happen", patience: float = PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what} (waited {patience:g} s)")
            zombies.collect()
            time.sleep(0.01)

    return wait


@pytest.fixture
def is_alive() -> Callable[[int], bool]:
    """`is_alive(pid)`: it runs. A zombie does not: it ended, whoever forgot to collect it."""
    return lambda pid: (found := read_process(pid)) is not None and not found.is_zombie


# --- what this process holds ---


@dataclass(frozen=True)
class Process:
    pid: int
    start_ticks: int  # with the pid an identity that is not used again
    state: str
    parent: int

    @property
    def is_zombie(self) -> bool:
        return self.state in "ZX"

    def is_running(self) -> bool:
        """Now, whatever it was when it was read; another process with its pid is not it."""
        now = read_process(self.pid)
        return now is not None and now.start_ticks == self.start_ticks and not now.is_zombie

    def __str__(self) -> str:
        try:
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            command = ""
        return f"process {self.pid} (parent {self.parent}, {self.state}): {command.strip() or '[no command line]'}"


def read_process(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(stat[19]), stat[0].decode(), int(stat[1]))


def descendants() -> list[Process]:
    """Every process below this one, zombies too. As a child subreaper this process also gets back what daemonized."""
    children: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read_process(int(name))) is not None:
            children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return found


def descriptors() -> dict[int, str]:
    """Open file descriptors and what they lead to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def is_foreign(name: str) -> bool:
    """Whether a process that is none of ours has this file of /dev/shm mapped: another program here made it."""
    ours = {os.getpid(), *(process.pid for process in descendants())}
    needle = f"/dev/shm/{name}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in ours:
            continue
        try:
            if needle in Path(f"/proc/{entry}/maps").read_bytes():
                return True
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return False


def _standard_librarys_own() -> tuple[set[int], set[int]]:
    """Pids and descriptors of multiprocessing's helpers, which live as long as this process once they are needed."""
    tracker = multiprocessing.resource_tracker._resource_tracker
    server = multiprocessing.forkserver._forkserver
    pids = {tracker._pid, server._forkserver_pid}
    return {pid for pid in pids if pid}, {fd for fd in (tracker._fd, server._forkserver_alive_fd) if fd is not None}


class Zombies:
    """Collects zombies that came to this process as their subreaper, without stealing what somebody here waits for."""

    def __init__(self) -> None:
        self._first_seen: dict[Process, float] = {}

    def collect(self) -> None:
        ours = [process for process in descendants() if process.is_zombie and process.parent == os.getpid()]
        now = time.monotonic()
        self._first_seen = {process: self._first_seen.get(process, now) for process in ours}
        old = {process.pid for process, seen in self._first_seen.items() if now - seen >= ZOMBIE_SECONDS}
        for pid in old - waited_for() if old else ():
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # its creator was quicker
                continue


def waited_for() -> set[int]:
    """Children that an object of this process still wants the exit code of."""
    popens = [thing for thing in gc.get_objects() if issubclass(type(thing), subprocess.Popen)]
    pids = {popen.pid for popen in popens if popen.returncode is None and hasattr(popen, "pid")}
    return pids | {child._popen.pid for child in multiprocessing.process._children if child._popen is not None}


# --- before and after ---


class Before:
    """What was there before a test; `leaks()` says what has come since."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes = {(process.pid, process.start_ticks) for process in descendants()}
        self._descriptors = descriptors()
        self._threads = set(threading.enumerate())
        self._shared = shared_memory()

    def processes(self) -> list[Process]:
        helpers, _ = _standard_librarys_own()
        return [process for process in descendants()
                if (process.pid, process.start_ticks) not in self._processes and process.pid not in helpers]

    def _new_descriptors(self) -> Iterator[str]:
        # Compared by kind: that a pipe was closed and another one opened since is no leak.
        def kind(target: str) -> str:
            return re.sub(r":\[\d+\]$", "", target)

        _, helpers = _standard_librarys_own()
        now = {fd: target for fd, target in descriptors().items() if fd not in helpers}
        more = Counter(map(kind, now.values())) - Counter(map(kind, self._descriptors.values()))
        for fd, target in now.items():
            if kind(target) in more and self._descriptors.get(fd) != target:
                yield f"descriptor {fd}: {target}"

    def leaks(self) -> list[str]:
        return [
            *map(str, self.processes()),
            *self._new_descriptors(),
            *(f"thread {thread.name!r}" for thread in threading.enumerate() if thread not in self._threads),
            *(f"temporary file {path}" for path in sorted(self._folder.rglob("*"))),
            *(f"shared memory /dev/shm/{name}" for name in sorted(shared_memory() - self._shared)
              if not is_foreign(name)),
        ]


def await_no_leaks(before: Before) -> list[str]:
    """What is still there after PATIENCE seconds: usually nothing, at once."""
    zombies = Zombies()
    started = time.monotonic()
    collected = False
    while found := before.leaks():
        waited = time.monotonic() - started
        if waited > PATIENCE:
            return found
        if not collected and waited > 0.2:
            gc.collect()  # what only a reference cycle keeps is not leaked
            collected = True
        zombies.collect()
        time.sleep(0.01)
    return []


def end(processes: list[Process]) -> None:
    """Kill what a test left, so that the next one starts clean."""
    if not processes:
        return
    for process in processes:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while any(process.is_running() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    waited = waited_for()
    for process in descendants():
        if process.is_zombie and process.parent == os.getpid() and process.pid not in waited:
            os.waitpid(process.pid, os.WNOHANG)


@pytest.fixture(scope="session")
def _adopts_orphans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes this process a child subreaper: a daemon that a test's process leaves is then found below this one."""
    # Both are made on first use, below TMPDIR: not in one that a single test owns.
    tmp_path_factory.getbasetemp()
    multiprocessing.util.get_temp_dir()
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def no_leaks(request: pytest.FixtureRequest, _adopts_orphans: None) -> Iterator[None]:
    """After the test: no process, descriptor, thread, temporary file or shared memory more than before it."""
    if sys.platform != "linux":
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="agentpool-test-"))
    outer = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    before = Before(folder)
    try:
        yield
        # The traceback of a failed test keeps its frames, and all that they hold: one failure is enough to report.
        found = [] if _failed in request.node.stash else await_no_leaks(before)
    finally:
        end(before.processes())
        if outer is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = outer
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)
    if found:
        pytest.fail(f"the test left behind, {PATIENCE:g} s after it ended:\n  " + "\n  ".join(found), pytrace=False)
