"""The same cases against the real channel, with a real worker process at its other end, and against the fake."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentpool.io.channel import Channel
from agentpool.testing import FakeChannel, FakeProcess, How, Machine
from agentpool_worker import protocol
from agentpool_worker.protocol import Frame

WORKER = """
import os, sys
calls, results, control, stderr, page = map(int, sys.argv[1:6])
os.dup2(stderr, 2)
os.close(stderr)
from agentpool_worker import main
main.serve(5, calls, results, control, page)
"""
PATIENCE = 20.0


class Real:
    """A worker process whose calls wait for a byte from this test."""

    def __init__(self) -> None:
        self.channel = Channel()
        gate, self._open_gate = os.pipe()
        self._wait = (os.read, (gate, 1), {})
        descriptors = self.channel.worker_fds()
        self._process = subprocess.Popen([sys.executable, "-c", WORKER, *map(str, descriptors)],
                                         pass_fds=[*descriptors, gate], start_new_session=True)
        os.close(gate)
        self.channel.handed_over()
        self.channel.send_init(*protocol.dumps((None, ())))

    def _until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.002)

    def call(self, task_id: int) -> None:
        self.channel.queue_call(task_id, *protocol.dumps(self._wait))
        assert self.channel.flush()

    def has_begun(self, task_id: int) -> None:
        self._until(lambda: self.channel.began(task_id), f"{task_id} did not begin")

    def end(self) -> None:
        os.write(self._open_gate, b"x")

    def complain(self, text: bytes) -> None:
        self.channel.queue_call(77, *protocol.dumps((os.write, (2, text), {})))
        self.channel.flush()
        self._until(lambda: self.channel.read_stderr() or self.channel.stderr_tail, "nothing on standard error")

    def frames(self, count: int) -> list[Frame]:
        found: list[Frame] = []
        while len(found) < count:
            assert select.select([self.channel.results_fd], [], [], PATIENCE)[0], f"only {found}"
            frames, is_ended = self.channel.read_results()
            found += frames
            assert not is_ended or len(found) >= count
        return found

    def settle(self) -> None:
        """Nothing to do: the process runs by itself."""

    def die(self) -> None:
        self._process.kill()
        self._process.wait()

    def has_ended(self) -> None:
        self._process.wait(PATIENCE)

    def close(self) -> None:
        self.die()
        os.close(self._open_gate)
        self.channel.close()


class Fake:
    """An imagined worker, moved on as a real one moves by itself."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.channel: Any = FakeChannel(self.machine)
        self._process = FakeProcess(self.machine, 5, self.channel, None)
        self.channel.handed_over()
        self.channel.send_init(b"", ())
        self.settle()

    def settle(self) -> None:
        """As far as it goes without leave: to the middle of the next call."""
        while self._process.current is None and self._process.move():
            pass

    def call(self, task_id: int) -> None:
        self.channel.queue_call(task_id, b"", ())
        assert self.channel.flush()
        self.settle()

    def has_begun(self, task_id: int) -> None:
        self.settle()
        assert self.channel.began(task_id)

    def end(self) -> None:
        self._process.move(How.VALUE, is_held=True)
        self.settle()

    def complain(self, text: bytes) -> None:
        self._process.complain(text)
        self.channel.read_stderr()

    def frames(self, count: int) -> list[Frame]:
        while self._process.acknowledge():
            pass
        self.settle()
        frames, _ = self.channel.read_results()
        assert len(frames) >= count
        return list(frames)

    def die(self) -> None:
        self._process.die(-9)

    def has_ended(self) -> None:
        self.settle()
        assert self._process.is_dead

    def close(self) -> None:
        self.channel.close()


@pytest.fixture(params=[Real, Fake], ids=["real", "fake"])
def bed(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    yield made
    made.close()


def kinds(frames: list[Frame]) -> list[tuple[int, int]]:
    return [(frame.kind, frame.task_id) for frame in frames]


def test_it_is_ready_after_its_initializer(bed: Any) -> None:
    (ready,) = bed.frames(1)
    assert ready.kind == protocol.READY
    assert ready.task_id > 0, "its process id"
    assert ready.x > 0, "its memory in KiB"


def test_results_come_in_order(bed: Any) -> None:
    bed.frames(1)
    for task_id in (1, 2, 3):
        bed.call(task_id)
    for task_id in (1, 2, 3):
        bed.has_begun(task_id)
        bed.end()
    assert kinds(bed.frames(3)) == [(protocol.VALUE, task_id) for task_id in (1, 2, 3)]


def test_what_began_is_seen(bed: Any) -> None:
    assert not bed.channel.began(1)
    bed.call(1)
    bed.call(2)
    bed.has_begun(1)
    assert not bed.channel.began(2)
    bed.channel.finished(1)
    assert not bed.channel.began(1), "the parent has done with it"


def test_what_waits_can_be_taken_back_and_what_runs_cannot(bed: Any) -> None:
    bed.frames(1)
    bed.call(1)
    bed.has_begun(1)
    bed.call(2)
    assert bed.channel.revoke(2)
    assert not bed.channel.revoke(2), "it is taken back already"
    assert not bed.channel.revoke(1)
    assert not bed.channel.revoke(3), "it was never sent"
    bed.end()
    value, skipped = bed.frames(2)
    assert kinds([value, skipped]) == [(protocol.VALUE, 1), (protocol.SKIPPED, 2)]
    assert not bed.channel.is_current(2, skipped.x)


def test_what_was_taken_back_may_be_sent_again(bed: Any) -> None:
    bed.frames(1)
    bed.call(1)
    bed.has_begun(1)
    bed.call(2)
    assert bed.channel.revoke(2)
    bed.call(2)
    bed.end()
    bed.has_begun(2)
    bed.end()
    _, skipped, value = bed.frames(3)
    assert (skipped.kind, value.kind) == (protocol.SKIPPED, protocol.VALUE)
    assert not bed.channel.is_current(2, skipped.x), "that was the first time"
    assert bed.channel.is_current(2, skipped.x + 1)


def test_a_result_before_the_call_that_runs_can_be_had(bed: Any) -> None:
    """It waits for company in the outbox of the page, or is in the pipe: never nowhere."""
    bed.frames(1)
    bed.call(1)
    bed.has_begun(1)
    bed.call(2)
    bed.end()
    bed.has_begun(2)
    frames, _ = bed.channel.read_results()
    assert (protocol.VALUE, 1) in kinds([*frames, *bed.channel.unsent_results()])


def test_death_in_a_call(bed: Any) -> None:
    bed.frames(1)
    bed.call(1)
    bed.call(2)
    bed.has_begun(1)
    bed.end()
    bed.has_begun(2)
    bed.call(3)
    bed.die()
    frames, is_ended = bed.channel.read_results(is_last=True)
    assert is_ended
    assert kinds([*frames, *bed.channel.unsent_results()])[-1] == (protocol.VALUE, 1), "its result outlives it"
    assert bed.channel.began(2)
    assert not bed.channel.began(3)


def test_writing_to_the_dead_comes_to_nothing(bed: Any) -> None:
    bed.frames(1)
    bed.die()
    bed.channel.queue_call(1, b"", ())
    assert bed.channel.flush()
    assert bed.channel.send_collect()
    bed.channel.ask_to_stop(1, wants_stack=False)
    assert not bed.channel.began(1)


def test_it_ends_when_no_more_calls_come(bed: Any) -> None:
    bed.frames(1)
    bed.call(1)
    bed.has_begun(1)
    bed.channel.end_calls()
    assert bed.channel.calls_fd == -1
    bed.end()
    bed.has_ended()
    frames, is_ended = bed.channel.read_results(is_last=True)
    assert kinds(frames) == [(protocol.VALUE, 1)]
    assert is_ended
    assert bed.channel.flush()


@pytest.mark.parametrize("wants_stack", [False, True])
def test_a_wish_to_stop_is_acknowledged(bed: Any, wants_stack: bool) -> None:
    bed.frames(1)
    bed.call(1)
    bed.has_begun(1)
    assert bed.channel.report() == ""
    bed.channel.ask_to_stop(1, wants_stack=wants_stack)
    assert (protocol.STOPPING, 1) in kinds(bed.frames(1))
    assert bool(bed.channel.report()) is wants_stack


def test_a_stopped_call_ends_with_an_error(bed: Any) -> None:
    bed.frames(1)
    bed.call(1)
    bed.has_begun(1)
    bed.channel.ask_to_stop(1, wants_stack=False)
    frames = bed.frames(1)
    if len(frames) == 1:
        bed.end()  # the real one is interrupted by itself
        frames += bed.frames(1)
    assert kinds(frames) == [(protocol.STOPPING, 1), (protocol.ERROR, 1)]


def test_garbage_is_collected(bed: Any) -> None:
    bed.frames(1)
    assert bed.channel.send_collect()
    bed.settle()
    assert kinds(bed.frames(1)) == [(protocol.COLLECTED, 0)]


def test_the_tail_of_standard_error_is_kept(bed: Any) -> None:
    bed.frames(1)
    bed.complain(b"x" * 5000 + b"the end")
    assert bed.channel.stderr_tail.endswith(b"the end")
    assert len(bed.channel.stderr_tail) == 4096


def test_descriptors_that_were_announced_and_did_not_come_are_refused(bed: Any) -> None:
    with pytest.raises(protocol.ProtocolError, match="descriptors were announced, and none came"):
        bed.channel.take_descriptors(2)


def test_closing_twice_does_no_harm(bed: Any) -> None:
    bed.channel.close()
    bed.channel.close()


def test_the_fake_has_what_the_real_one_has() -> None:
    own = {name for name in vars(Channel) if not name.startswith("_")}
    assert own <= set(vars(FakeChannel))
