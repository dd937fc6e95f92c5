"""The same cases against the real samplers, and against those of imagined processes; and the reactors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentpool.config import MB
from agentpool.io.host import HostSampler
from agentpool.io.reactor import Reactor
from agentpool.io.sampler import TreeSampler
from agentpool.testing import (
    FakeChannel,
    FakeHostSampler,
    FakeProcess,
    FakeReactor,
    FakeTreeSampler,
    Machine,
)

#: Starts children with so many MB each when told to, and says when they are there.
PROGRAM = """
import subprocess, sys
child = "import sys; held = b'x' * (int(sys.argv[1]) << 20); print('there', flush=True); sys.stdin.read()"
children = []
print("there", flush=True)
for line in sys.stdin:
    started = subprocess.Popen([sys.executable, "-c", child, line], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    started.stdout.readline()
    children.append(started)
    print("there", flush=True)
"""


class Real:
    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        self._heard()
        self.sampler: Any = TreeSampler(self._process.pid)

    def _heard(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "there\n"

    def start_tool(self, mb: int) -> None:
        assert self._process.stdin is not None
        print(mb, file=self._process.stdin, flush=True)
        self._heard()

    def die(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.die()  # its children read the end of file then, and end
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


class Fake:
    def __init__(self) -> None:
        self._machine = Machine()
        self._process = FakeProcess(self._machine, 1, FakeChannel(self._machine), None)
        self.sampler: Any = FakeTreeSampler(self._machine, self._process.pid)

    def start_tool(self, mb: int) -> None:
        self._process.tools.append(mb * MB)

    def die(self) -> None:
        self._process.die(-9)

    def close(self) -> None:
        """Nothing was opened."""


@pytest.fixture(params=[Real, Fake], ids=["real", "fake"])
def bed(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    yield made
    made.close()


def test_a_lone_process(bed: Any) -> None:
    reading = bed.sampler.read()
    assert reading.rss_bytes == reading.root_rss_bytes > 0
    assert reading.processes == 1
    assert reading.cpu_seconds >= 0


def test_what_a_task_starts_counts(bed: Any) -> None:
    alone = bed.sampler.read()
    bed.start_tool(40)
    reading = bed.sampler.read()
    assert reading.processes == 2
    assert reading.rss_bytes >= alone.rss_bytes + 40 * MB
    assert reading.root_rss_bytes < reading.rss_bytes


def test_the_biggest_of_them_is_stopped_and_the_process_left(bed: Any, wait_until: Callable[..., None]) -> None:
    bed.start_tool(20)
    bed.start_tool(80)
    both = bed.sampler.read()
    assert both.processes == 3
    assert bed.sampler.kill_biggest_descendant() is not None
    wait_until(lambda: bed.sampler.read().rss_bytes <= both.rss_bytes - 60 * MB)
    assert bed.sampler.read() is not None


def test_there_is_nothing_to_stop_below_a_lone_process(bed: Any) -> None:
    assert bed.sampler.kill_biggest_descendant() is None
    assert bed.sampler.read() is not None


def test_the_dead_cannot_be_read(bed: Any) -> None:
    bed.sampler.read()
    bed.die()
    assert bed.sampler.read() is None
    assert bed.sampler.kill_biggest_descendant() is None


def test_a_closed_one_reads_nothing(bed: Any) -> None:
    bed.sampler.close()
    assert bed.sampler.read() is None


@pytest.mark.parametrize("make", [HostSampler, lambda: FakeHostSampler(Machine())], ids=["real", "fake"])
def test_the_host(make: Callable[[], Any]) -> None:
    reading = make().read()
    assert 0 < reading.available_bytes <= reading.total_bytes
    assert 0 <= reading.cpu_percent <= 100
    assert reading.limit_source
    assert reading.pressure_some_avg10 is None or 0 <= reading.pressure_some_avg10 <= 100


class RealReactor:
    def __init__(self) -> None:
        self.reactor: Any = Reactor()
        self.reading, self._writing = os.pipe()

    def make_readable(self) -> None:
        os.write(self._writing, b"x")

    def empty(self) -> None:
        os.read(self.reading, 10)

    def close(self) -> None:
        os.close(self.reading)
        os.close(self._writing)
        self.reactor.close()


class ImaginedReactor:
    def __init__(self) -> None:
        self._machine = Machine()
        self.reactor: Any = FakeReactor(self._machine)
        self.reading = self._machine.descriptors(1)

    def make_readable(self) -> None:
        self._machine.readable.add(self.reading)

    def empty(self) -> None:
        self._machine.readable.discard(self.reading)

    def close(self) -> None:
        self.reactor.close()


@pytest.fixture(params=[RealReactor, ImaginedReactor], ids=["real", "fake"])
def waiting(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    yield made
    made.close()


def test_what_can_be_read_is_told_until_it_is_read(waiting: Any) -> None:
    called: list[int] = []
    waiting.reactor.watch(waiting.reading, lambda: called.append(1))
    assert waiting.reactor.wait(0.01) == []
    waiting.make_readable()
    for _ in range(2):
        (callback,) = waiting.reactor.wait(None)
        callback()
    assert called == [1, 1]
    waiting.empty()
    assert waiting.reactor.wait(0.0) == []
    waiting.make_readable()
    waiting.reactor.unwatch(waiting.reading)
    waiting.reactor.unwatch(waiting.reading)  # harmless
    assert waiting.reactor.wait(0.0) == []


def test_a_wake_up_ends_one_wait(waiting: Any) -> None:
    waiting.reactor.wake()
    waiting.reactor.wake()
    assert waiting.reactor.wait(None) == []
    assert waiting.reactor.wait(0.0) == []


@pytest.mark.parametrize(("real", "fake"), [
    (TreeSampler, FakeTreeSampler), (HostSampler, FakeHostSampler), (Reactor, FakeReactor),
])
def test_the_fake_has_what_the_real_one_has(real: type, fake: type) -> None:
    assert {name for name in vars(real) if not name.startswith("_")} <= set(vars(fake))
