"""Readings of real processes and of the real host."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from agentpool.io import sampler as sampler_module
from agentpool.io.host import cgroup_levels
from agentpool.io.sampler import HostSampler, TreeReading, TreeSampler, descendants, tree_pss_bytes

MIB = 1024 * 1024
#: Start times, by which a reused process id is noticed, are known to 10 ms.
TICK_SECONDS = 0.01
WaitUntil = Callable[..., None]
#: Says that it is ready, and ends when its standard input is closed.
WAIT = "\nimport sys; print('ready', flush=True); sys.stdin.read()\n"


@contextlib.contextmanager
def running(code: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that has run `code` and waits; its whole tree is gone when the block is left."""
    process = subprocess.Popen([sys.executable, "-c", code + WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


def nested(depth: int) -> str:
    """Code that starts a process, which starts a process, `depth` of them; all wait for their standard input's end."""
    return "" if depth == 0 else f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {nested(depth - 1) + WAIT!r}], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
child.stdout.readline()
"""


def must_read(sampler: TreeSampler) -> TreeReading:
    reading = sampler.read()
    assert reading is not None
    return reading


def test_a_lone_process_is_read_as_psutil_reads_it() -> None:
    with running("data = bytearray(40 * 1024 * 1024)") as process:
        reading = must_read(TreeSampler(process.pid))
        assert reading.rss_bytes == reading.root_rss_bytes == psutil.Process(process.pid).memory_info().rss
        assert 40 * MIB < reading.rss_bytes < 200 * MIB
        assert reading.processes == 1
        assert 0 < reading.cpu_seconds < 60


def test_a_tree_is_summed_over_all_generations() -> None:
    with running(nested(3)) as process:
        reading = must_read(TreeSampler(process.pid))
        below = descendants(process.pid)
        assert len(below) == 3
        assert [psutil.Process(pid).ppid() for pid in below] == [process.pid, *below[:2]], "nearest first"
        assert reading.processes == 4
        every = [psutil.Process(pid).memory_info().rss for pid in (process.pid, *below)]
        assert reading.root_rss_bytes == every[0]
        assert reading.rss_bytes == sum(every)


def test_children_of_other_threads_than_the_main_one_are_found() -> None:
    code = """
import subprocess, sys, threading
started, stop = threading.Event(), threading.Event()
def start():
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    started.set(); stop.wait()
threading.Thread(target=start, daemon=True).start()
started.wait()
"""
    with running(code) as process:
        assert len(descendants(process.pid)) == 1
        assert must_read(TreeSampler(process.pid)).processes == 2


def test_a_kernel_without_lists_of_children_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(nested(2)) as process:
        expected = descendants(process.pid)
        monkeypatch.setattr(sampler_module, "_has_children_files", lambda: False)
        assert sorted(descendants(process.pid)) == sorted(expected)
        assert len(expected) == 2
    assert descendants(process.pid) == []


def test_a_killed_process_is_gone_before_and_after_it_is_reaped(wait_until: WaitUntil) -> None:
    with running() as process:
        sampler = TreeSampler(process.pid)
        must_read(sampler)
        process.kill()
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        assert sampler.read() is None
        process.wait()
        assert sampler.read() is None
        assert descendants(process.pid) == []
        assert TreeSampler(process.pid).read() is None
        assert tree_pss_bytes(process.pid) is None


def test_a_closed_sampler_reads_nothing() -> None:
    sampler = TreeSampler(os.getpid())
    must_read(sampler)
    sampler.close()
    assert sampler.read() is None
    sampler.close()


def test_a_reused_process_id_reads_as_gone(wait_until: WaitUntil) -> None:
    last_pid = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last_pid, os.W_OK):
        pytest.skip("choosing a process id needs CAP_SYS_ADMIN and a writable ns_last_pid")
    with running() as first:
        started = time.monotonic()
        sampler = TreeSampler(first.pid)
        must_read(sampler)
        wait_until(lambda: time.monotonic() > started + 2 * TICK_SECONDS)
        first.kill()
        first.wait()
        for _ in range(200):
            last_pid.write_text(str(first.pid - 1))
            with running() as second:
                if second.pid == first.pid:
                    assert sampler.read() is None
                    assert must_read(TreeSampler(second.pid)).processes == 1
                    return
    pytest.skip("others on this host took the process id each time")


def test_reading_goes_on_while_processes_come_and_go(wait_until: WaitUntil) -> None:
    code = """
import subprocess, threading
def churn():
    while True:
        for child in [subprocess.Popen(["true"]) for _ in range(3)]:
            child.wait()
for _ in range(2):
    threading.Thread(target=churn, daemon=True).start()
"""
    with running(code) as process:
        sampler = TreeSampler(process.pid)
        counts = set()
        seconds = 0.0

        def has_seen_enough() -> bool:
            nonlocal seconds
            reading = must_read(sampler)
            assert reading.rss_bytes >= reading.root_rss_bytes > 0
            counts.add(reading.processes)
            seconds = max(seconds, reading.cpu_seconds)
            return len(counts) >= 3 and seconds > 0.5

        wait_until(has_seen_enough)
        os.killpg(process.pid, signal.SIGKILL)
        wait_until(lambda: sampler.read() is None)


def test_cpu_time_of_children_that_have_ended_remains() -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    with running(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])") as process:
        reading = must_read(TreeSampler(process.pid))
        assert reading.processes == 1
        assert reading.cpu_seconds >= 0.35


def test_cpu_time_grows_with_work_in_a_descendant(wait_until: WaitUntil) -> None:
    code = """
import os
if os.fork() == 0:
    while True: pass
"""
    with running(code) as process:
        sampler = TreeSampler(process.pid)
        first = must_read(sampler)
        assert first.processes == 2
        wait_until(lambda: must_read(sampler).cpu_seconds > first.cpu_seconds + 0.2)


def test_pss_divides_what_is_shared(wait_until: WaitUntil) -> None:
    code = """
import os
data = bytearray(os.urandom(1)) * (30 * 1024 * 1024)
for _ in range(3):
    if os.fork() == 0:
        os.read(os.pipe()[0], 1)
"""
    with running(code) as process:
        # The copies may still share every page, or have touched a few: the data is counted once, not four times.
        wait_until(lambda: len(descendants(process.pid)) == 3)
        pss = tree_pss_bytes(process.pid)
        assert pss is not None
        assert 30 * MIB < pss < 60 * MIB
        assert must_read(TreeSampler(process.pid)).rss_bytes > 110 * MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_pss_of_a_tree_that_may_not_be_looked_into_is_unknown() -> None:
    become_nobody = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    probe = f"""
import sys
from agentpool.io.sampler import TreeSampler, descendants, tree_pss_bytes
{become_nobody}
root, child = int(sys.argv[1]), int(sys.argv[2])
print(descendants(root) == [child], tree_pss_bytes(root), TreeSampler(root).read().processes)
"""
    # The child remains root's. The parent runs a new program as nobody, or else nobody might not look into it either.
    code = f"""
import os
if os.fork() == 0:
    os.read(os.pipe()[0], 1)
{become_nobody}
os.execv("/bin/sh", ["sh", "-c", "echo ready; read line"])
"""
    with running(code) as process:
        child, = descendants(process.pid)
        answer = subprocess.run([sys.executable, "-c", probe, str(process.pid), str(child)],
                                capture_output=True, text=True, check=True)
        assert answer.stdout.split() == ["True", "None", "2"]


def test_reading_leaks_no_descriptor() -> None:
    with running(nested(1)) as process:
        sampler, host = TreeSampler(process.pid), HostSampler()
        must_read(sampler)
        host.read()
        before = os.listdir("/proc/self/fd")
        for _ in range(20):
            must_read(sampler)
            host.read()
            tree_pss_bytes(process.pid)
        assert os.listdir("/proc/self/fd") == before


def test_the_host_is_read() -> None:
    sampler = HostSampler()
    first = sampler.read()
    memory = psutil.virtual_memory()
    assert 0 < first.available_bytes <= first.total_bytes <= memory.total
    assert first.cpu_percent == 0.0
    if os.path.exists("/proc/pressure/memory"):
        assert first.pressure_some_avg10 is None or 0.0 <= first.pressure_some_avg10 <= 100.0
    if first.limit_source != "host":
        assert first.limit_source.startswith("cgroup v")


def test_cpu_percent_covers_the_time_since_the_previous_reading_of_that_sampler() -> None:
    sampler, other = HostSampler(), HostSampler()
    sampler.read()
    burn_until = time.monotonic() + 0.5
    while time.monotonic() < burn_until:
        other.read()  # another sampler's readings, and other threads, take nothing away
    thread = threading.Thread(target=other.read)
    thread.start()
    thread.join()
    # One CPU was busy all the time; others' work on the host can only add to that, a stolen CPU counts as busy.
    one_cpu = 100.0 / (os.cpu_count() or 1)
    assert 0.7 * one_cpu < sampler.read().cpu_percent <= 100.0


def test_a_reading_too_soon_after_another_repeats_its_cpu_percent() -> None:
    sampler = HostSampler()
    sampler.read()
    assert sampler.read().cpu_percent == 0.0, "too short a span to say anything"


def test_a_real_limit_of_a_cgroup_is_seen_from_inside() -> None:
    """Where this may be done (root, memory controller at hand): a process under a limit of 96 MiB reads that limit."""
    limit = 96 * MIB
    with limited_cgroup(limit) as (folder, version):
        code = f"""
import os
open({str(folder / 'cgroup.procs')!r}, "w").write(str(os.getpid()))
from agentpool.io.sampler import HostSampler
reading = HostSampler().read()
print(reading.total_bytes, reading.available_bytes, reading.limit_source)
"""
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, available, source = answer.stdout.split(maxsplit=2)
    assert int(total) == limit
    assert 0 < int(available) < limit
    assert source.strip().startswith(f"cgroup {version} /")
    assert source.strip().endswith(folder.name)


@contextlib.contextmanager
def limited_cgroup(limit_bytes: int) -> Iterator[tuple[Path, str]]:
    """A cgroup below our own with a memory limit, empty at first; skips where it cannot be made."""
    name = f"agentpool-test-{os.getpid()}"
    for level in cgroup_levels("/proc", "/sys/fs/cgroup"):
        folder, file = Path(level.folder, name), "memory.max" if level.version == 2 else "memory.limit_in_bytes"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / file).exists():
                (folder / file).write_text(str(limit_bytes))
                yield folder, f"v{level.version}"
                return
        finally:
            folder.rmdir()
    pytest.skip("no cgroup with a memory limit can be made here")
