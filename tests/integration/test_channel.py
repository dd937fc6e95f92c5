"""The channel over real pipes to a real worker process, without keeper, core or manager; and the reactor beside it."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool.io.channel import STDERR_TAIL, Channel
from agentpool.io.reactor import Reactor
from agentpool.io.stderr import Forwarder
from agentpool_worker import protocol
from agentpool_worker.protocol import Frame, ProtocolError

# The worker need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
LONG = 30.0
MB = 1024 * 1024

WORKER = """
import os, sys
calls, results, control, stderr, page = map(int, sys.argv[1:])
os.dup2(stderr, 2)
os.close(stderr)
from agentpool_worker import main
main.serve(5, calls, results, control, page)
"""


class Process:
    """A channel and a worker at its other end."""

    def __init__(self) -> None:
        self.channel = Channel()
        descriptors = self.channel.worker_fds()
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, descriptors)], pass_fds=descriptors, start_new_session=True
        )
        self.channel.handed_over()
        self.frames: list[Frame] = []
        self.is_ended = False

    def call(self, task_id: int, fn: Callable[..., Any], *args: Any) -> bool:
        self.channel.queue_call(task_id, *protocol.dumps((fn, args, {})))
        return self.channel.flush()

    def pump(self, seconds: float = 0.05) -> None:
        """Write what waits and read what is there, as the manager would."""
        channel = self.channel
        poll = select.poll()
        if not self.is_ended:
            poll.register(channel.results_fd, select.POLLIN)
        if channel.calls_fd >= 0 and channel._outgoing:
            poll.register(channel.calls_fd, select.POLLOUT)
        for descriptor, _ in poll.poll(seconds * 1000):
            if descriptor == channel.results_fd:
                frames, self.is_ended = channel.read_results()
                self.frames += frames
            else:
                channel.flush()

    def result(self, task_id: int) -> Any:
        deadline = time.monotonic() + LONG
        while True:
            for frame in self.frames:
                if frame.task_id == task_id and frame.kind == protocol.VALUE:
                    self.channel.finished(task_id)
                    return protocol.loads(frame.payload, buffers=frame.buffers)
            assert time.monotonic() < deadline, f"no result of {task_id}: {[frame[:3] for frame in self.frames]}"
            assert not self.is_ended, "the worker is gone"
            self.pump()

    def kinds(self) -> list[tuple[int, int]]:
        return [(frame.kind, frame.task_id) for frame in self.frames]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()


@pytest.fixture
def worker() -> Iterator[Process]:
    worker = Process()
    yield worker
    worker.close()


@pytest.fixture
def lone() -> Iterator[Channel]:
    """A channel without a worker: both ends are here."""
    channel = Channel()
    yield channel
    channel.close()


def double(value: Any) -> Any:
    return value * 2


def wait_for(path: Path, value: object = None) -> object:
    path.with_suffix(".began").touch()
    while not path.exists():
        time.sleep(0.002)
    return value


class Buffer:
    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, version: Any) -> tuple[Any, ...]:
        return Buffer, (pickle.PickleBuffer(self.data),)


# --- calls and results ---


def test_calls_and_results(worker: Process) -> None:
    assert worker.call(1, double, 21)
    assert worker.result(1) == 42
    for task_id in range(2, 12):
        worker.call(task_id, double, task_id)
    assert [worker.result(task_id) for task_id in range(2, 12)] == [2 * task_id for task_id in range(2, 12)]


def test_the_initializer_goes_first(worker: Process) -> None:
    def prepare(word: str) -> None:
        import builtins

        builtins.word = word  # type: ignore[attr-defined]

    def look() -> str:
        import builtins

        return builtins.word  # type: ignore[attr-defined,no-any-return]

    worker.channel.send_init(*protocol.dumps((prepare, ("ready",))))
    worker.call(1, look)
    assert worker.result(1) == "ready"
    ready = worker.frames[0]
    assert (ready.kind, ready.task_id) == (protocol.READY, worker.process.pid)


def test_full_pipes_in_both_directions(worker: Process) -> None:
    """Each side has megabytes for the other, at the same time: neither waits for the other for ever."""
    size = 3 * MB
    for task_id in range(1, 7):
        worker.call(task_id, double, bytes([task_id]) * size)
    assert worker.channel._outgoing, "the pipe took 18 MB at once?"
    for task_id in range(1, 7):
        assert worker.result(task_id) == bytes([task_id]) * size * 2
    assert worker.channel.flush()


def test_writing_never_blocks(worker: Process, tmp_path: Path) -> None:
    worker.call(1, wait_for, tmp_path / "go")
    started = time.monotonic()
    answers = [worker.call(task_id, double, b"x" * 20_000) for task_id in range(2, 202)]
    assert answers[0]
    assert not answers[-1], "it says that there was no room"
    assert not worker.channel.flush()
    assert time.monotonic() - started < LONG / 2
    (tmp_path / "go").touch()
    assert worker.result(201) == b"x" * 40_000
    assert [frame.task_id for frame in worker.frames] == list(range(1, 202)), "order is kept"


def test_out_of_band_buffers(worker: Process) -> None:
    data = bytearray(os.urandom(2 * MB))
    assert not worker.call(1, lambda buffer: Buffer(bytearray(buffer.data)[::-1]), Buffer(data))
    assert bytes(worker.result(1).data) == bytes(data[::-1])
    gc.collect()


def test_collect(worker: Process, wait_until: WaitUntil) -> None:
    worker.channel.send_collect()
    worker.call(1, double, 1)
    assert worker.result(1) == 2
    assert worker.kinds()[0][0] == protocol.COLLECTED
    assert worker.frames[0].x * 1024 > MB


def test_the_end_of_calls_ends_the_worker(worker: Process) -> None:
    worker.call(1, double, 1)
    worker.call(2, double, 2)
    worker.channel.end_calls()
    assert worker.channel.calls_fd == -1
    assert worker.process.wait(LONG) == 0
    assert (worker.result(1), worker.result(2)) == (2, 4)
    worker.pump()
    assert worker.is_ended
    assert worker.call(3, double, 3), "nobody is there to take it; its death tells"


def test_a_dead_worker_is_no_error(worker: Process) -> None:
    worker.process.kill()
    worker.process.wait()
    assert worker.call(1, double, 1)
    assert worker.call(2, double, b"x" * 10 * MB)
    assert worker.channel.flush()
    worker.channel.ask_to_stop(1, wants_stack=True)
    worker.pump()
    assert worker.is_ended
    assert worker.channel.read_stderr() == b""
    assert not worker.channel.began(1)
    assert worker.channel.unsent_results() == []


def test_the_worker_ends_when_this_side_is_gone(worker: Process, tmp_path: Path, wait_until: WaitUntil) -> None:
    """Even while it runs a task: its second thread sees the end of the control pipe."""
    worker.call(1, wait_for, tmp_path / "never")
    wait_until((tmp_path / "never.began").exists, "it did not begin")
    worker.channel.close()
    assert worker.process.wait(LONG) == -signal.SIGKILL


# --- the page: began, revoke, the outbox ---


def test_began(worker: Process, tmp_path: Path, wait_until: WaitUntil) -> None:
    worker.call(1, wait_for, tmp_path / "go")
    worker.call(2, double, 1)
    wait_until(lambda: worker.channel.began(1), "it did not begin")
    assert not worker.channel.began(2)
    assert not worker.channel.began(99)
    (tmp_path / "go").touch()
    worker.result(2)
    assert not worker.channel.began(2), "it is over: its slot is free"


def test_revoke(worker: Process, tmp_path: Path, wait_until: WaitUntil) -> None:
    worker.call(1, wait_for, tmp_path / "go", "first")
    for task_id in (2, 3, 4):
        worker.call(task_id, wait_for, tmp_path / "go", task_id)
    wait_until(lambda: worker.channel.began(1), "it did not begin")
    assert not worker.channel.revoke(1), "it has begun"
    assert worker.channel.revoke(3)
    assert not worker.channel.revoke(3), "it is not there any more"
    assert not worker.channel.revoke(99)
    (tmp_path / "go").touch()
    assert [worker.result(task_id) for task_id in (1, 2, 4)] == ["first", 2, 4]
    assert (protocol.SKIPPED, 3) in worker.kinds()
    (skipped,) = [frame for frame in worker.frames if frame.kind == protocol.SKIPPED]
    assert not worker.channel.is_current(3, skipped.x)


def test_a_revoked_call_that_is_sent_again(worker: Process, tmp_path: Path, wait_until: WaitUntil) -> None:
    """What the worker says of the first dispatch can be told from what it says of the second."""
    worker.call(1, wait_for, tmp_path / "go")
    worker.call(2, double, 1)
    wait_until(lambda: worker.channel.began(1), "it did not begin")
    assert worker.channel.revoke(2)
    worker.call(2, double, 50)
    (tmp_path / "go").touch()
    assert worker.result(2) == 100
    (skipped,) = [frame for frame in worker.frames if frame.kind == protocol.SKIPPED]
    assert skipped.task_id == 2


def test_slots_come_round(worker: Process) -> None:
    for task_id in range(1, 2 * protocol.SLOTS + 10):
        worker.call(task_id, double, task_id)
        if task_id % 50 == 0:
            assert worker.result(task_id) == 2 * task_id
            worker.frames.clear()
    assert worker.result(2 * protocol.SLOTS + 9)


def test_revoke_races_the_worker(worker: Process) -> None:
    """Whoever is first: a call that was taken back did not run, and one that was not has run, or says skipped."""

    def ran(task_id: int) -> int:
        import builtins

        if not hasattr(builtins, "ran"):
            builtins.ran = []  # type: ignore[attr-defined]
        builtins.ran.append(task_id)  # type: ignore[attr-defined]
        return task_id

    worker.call(10_000, ran, 10_000)
    worker.result(10_000)  # now it is awake
    taken_back = set()
    for task_id in range(1, 3001):
        worker.call(task_id, ran, task_id)
        if worker.channel.revoke(task_id):
            taken_back.add(task_id)
        if task_id % 500 == 0:  # as in a pool, never as many under way as there are slots
            worker.call(20_000 + task_id, double, task_id)
            worker.result(20_000 + task_id)

    def all_that_ran() -> list[int]:
        import builtins

        return builtins.ran[1:]  # type: ignore[attr-defined,no-any-return]

    worker.call(9999, all_that_ran)
    found = worker.result(9999)
    skipped = {frame.task_id for frame in worker.frames if frame.kind == protocol.SKIPPED}
    assert len(found) == len(set(found))
    assert not taken_back & set(found), "a call that was taken back ran"
    assert taken_back | skipped | set(found) == set(range(1, 3001)), "a call vanished"
    assert not skipped & set(found)


def test_results_that_were_never_written(worker: Process, tmp_path: Path, wait_until: WaitUntil) -> None:
    """They lie in the page while the worker is busy, and when it is dead."""
    channel = worker.channel
    for task_id in (1, 2, 3):
        channel.queue_call(task_id, *protocol.dumps((double, (task_id,), {})))
    channel.flush()
    worker.result(3)
    worker.frames.clear()
    # In one write, so that the worker reads them together and holds the results back.
    for task_id, fn, argument in ((4, double, 2), (5, double, 3), (6, wait_for, tmp_path / "never")):
        channel.queue_call(task_id, *protocol.dumps((fn, (argument,), {})))
    channel.flush()
    wait_until(lambda: channel.began(6), "it did not begin")
    worker.pump(0)
    unsent = {frame.task_id: protocol.loads(frame.payload) for frame in channel.unsent_results()}
    seen = {frame.task_id: protocol.loads(frame.payload) for frame in worker.frames}
    assert unsent | seen == {4: 4, 5: 6}
    worker.process.kill()
    worker.process.wait()
    assert {frame.task_id: protocol.loads(frame.payload) for frame in channel.unsent_results()} == unsent


def test_an_outbox_that_changes_while_it_is_read_is_not_believed(lone: Channel) -> None:
    data = b"".join(bytes(part) for part in protocol.encode(protocol.VALUE, 8, b"payload"))
    page = lone._page
    page[protocol.OUTBOX_DATA : protocol.OUTBOX_DATA + len(data)] = data
    protocol.OUTBOX_HEADER.pack_into(page, protocol.OUTBOX, 3, len(data))
    assert [frame.task_id for frame in lone.unsent_results()] == [8]
    protocol.OUTBOX_HEADER.pack_into(page, protocol.OUTBOX, 3, 0)
    assert lone.unsent_results() == []
    protocol.OUTBOX_HEADER.pack_into(page, protocol.OUTBOX, 3, 0xFFFFFFFF)
    with contextlib.suppress(ProtocolError):  # the page is shared with a process that may write anything
        lone.unsent_results()


# --- stopping, reports, standard error ---


def test_ask_to_stop(worker: Process, tmp_path: Path, wait_until: WaitUntil) -> None:
    worker.call(7, wait_for, tmp_path / "never")
    wait_until((tmp_path / "never.began").exists, "it did not begin")
    worker.channel.ask_to_stop(7, wants_stack=True)
    deadline = time.monotonic() + LONG
    while (protocol.ERROR, 7) not in worker.kinds():
        assert time.monotonic() < deadline
        worker.pump()
    assert worker.kinds() == [(protocol.STOPPING, 7), (protocol.ERROR, 7)]
    assert "in wait_for" in worker.channel.report()
    worker.call(8, double, 4)
    assert worker.result(8) == 8


def test_a_stop_for_another_task_is_nothing(worker: Process, tmp_path: Path, wait_until: WaitUntil) -> None:
    worker.call(7, wait_for, tmp_path / "go", "undisturbed")
    wait_until((tmp_path / "go.began").exists, "it did not begin")
    worker.channel.ask_to_stop(6, wants_stack=False)
    while (protocol.STOPPING, 6) not in worker.kinds():
        worker.pump()
    (tmp_path / "go").touch()
    assert worker.result(7) == "undisturbed"
    assert worker.channel.report() == ""


def test_so_many_wishes_that_the_pipe_is_full(worker: Process, wait_until: WaitUntil) -> None:
    os.kill(worker.process.pid, signal.SIGSTOP)
    for _ in range(5000):
        worker.channel.ask_to_stop(1, wants_stack=False)  # must not block
    os.kill(worker.process.pid, signal.SIGCONT)


def test_the_stack_of_a_worker_that_holds_the_gil(worker: Process, tmp_path: Path, wait_until: WaitUntil) -> None:
    def hold() -> None:
        import re

        (tmp_path / "began").touch()
        re.match(r"(a+)+$", "a" * 64 + "b")

    worker.call(1, hold)
    wait_until((tmp_path / "began").exists, "it did not begin")
    os.kill(worker.process.pid, signal.SIGUSR1)
    wait_until(lambda: "in hold" in worker.channel.report(), "no stack was written")


def test_the_report_of_a_crash(worker: Process) -> None:
    def crash() -> None:
        import ctypes

        ctypes.string_at(0)

    worker.call(1, crash)
    assert worker.process.wait(LONG) == -signal.SIGSEGV
    assert "Segmentation fault" in worker.channel.report()
    assert "in crash" in worker.channel.report()
    assert worker.channel.began(1)


def test_standard_error_and_its_tail(worker: Process, wait_until: WaitUntil) -> None:
    def talk() -> None:
        for number in range(3000):
            print("line", number, file=sys.stderr)

    worker.call(1, talk)
    collected = b""

    def read() -> bool:
        nonlocal collected
        collected += worker.channel.read_stderr()
        return collected.endswith(b"line 2999\n")

    wait_until(read, "not all of it came")
    assert len(collected.splitlines()) == 3000
    assert worker.channel.stderr_tail == collected[-STDERR_TAIL:]
    assert worker.channel.read_stderr() == b""


# --- descriptors ---


def test_close_gives_back_all_descriptors() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(50):
        channel = Channel()
        channel.close()
        channel.close()
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


def test_no_descriptors_left() -> None:
    """A channel that cannot be made whole gives back what it had."""
    import resource

    before = set(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, before))
    made = 0
    limits = range(4, highest + 20)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            with contextlib.suppress(OSError):
                Channel().close()
                made += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert set(os.listdir("/proc/self/fd")) == before, limit
    assert 0 < made < len(limits), "it was not tried with too few, or never with enough"


def test_ours_do_not_reach_programs(lone: Channel) -> None:
    program = "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, close_fds=False, check=True)
    ours = {lone.calls_fd, lone.results_fd, lone.stderr_fd, *lone.worker_fds()}
    assert not ours & set(eval(done.stdout))


# --- the reactor and the forwarder ---


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_reactor_calls_what_is_due(reactor: Reactor, pipe: tuple[int, int]) -> None:
    called: list[str] = []
    reactor.watch(pipe[0], lambda: called.append("read"))
    assert reactor.wait(0) == []
    os.write(pipe[1], b"x")
    for callback in reactor.wait(LONG):
        callback()
    assert called == ["read"]
    reactor.watch_writing(pipe[1], lambda: called.append("write"))
    reactor.watch_writing(pipe[1], lambda: called.append("again"))
    for callback in reactor.wait(LONG):
        callback()
    assert sorted(called) == ["read", "read", "write"]
    reactor.unwatch_writing(pipe[1])
    reactor.unwatch_writing(pipe[1])
    reactor.unwatch(pipe[0])
    reactor.unwatch(pipe[0])
    assert reactor.wait(0) == []


def test_reactor_wakes_from_any_thread(reactor: Reactor) -> None:
    thread = threading.Thread(target=lambda: [reactor.wake() for _ in range(1000)])
    thread.start()
    started = time.monotonic()
    reactor.wait(LONG)
    assert time.monotonic() - started < LONG
    thread.join()
    reactor.wait(0)
    assert reactor.wait(0) == [], "many wishes, one awakening"
    reactor.wake()
    reactor.wait(LONG)


@pytest.mark.parametrize("seconds", [3e6, 1e10, 1e300])
def test_reactor_waits_for_ever_so_long(reactor: Reactor, seconds: float) -> None:
    """The kernel takes no more than 24.8 days at once."""
    reactor.wake()
    assert reactor.wait(seconds) == []


def test_reactor_may_be_woken_when_it_is_closed() -> None:
    reactor = Reactor()
    reactor.close()
    reactor.wake()


def test_forwarder_passes_on_and_never_blocks(pipe: tuple[int, int]) -> None:
    forwarder = Forwarder(pipe[1])
    forwarder.push(b"words\n")
    assert os.read(pipe[0], 100) == b"words\n"
    assert not forwarder.is_waiting
    sent = b""
    while not forwarder.is_full:
        sent += b"%06d" % len(sent) * 100 + b"\n"
        forwarder.push(sent[-601:])
    assert forwarder.is_waiting
    os.set_blocking(pipe[0], False)
    collected = b""
    while forwarder.is_waiting:
        collected += os.read(pipe[0], 65536)
        forwarder.push()
    assert not forwarder.is_full
    with contextlib.suppress(BlockingIOError):
        while data := os.read(pipe[0], 65536):
            collected += data
    assert collected == sent


def test_forwarder_to_nobody() -> None:
    read_end, write_end = os.pipe()
    forwarder = Forwarder(write_end)
    os.close(read_end)
    forwarder.push(b"x" * 100_000)
    assert not forwarder.is_waiting
    os.close(write_end)
    forwarder.push(b"y")
    assert not forwarder.is_waiting
