"""The same cases against the real keeper and its workers, and against the imagined ones."""

from __future__ import annotations

import multiprocessing.process
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agentpool.io import processes
from agentpool.io.channel import Channel
from agentpool.io.processes import KeeperClient
from agentpool.testing import FakeChannel, FakeKeeper, Machine

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the cases look at deaths through pidfds")
PATIENCE = 20.0


def setup(**other: Any) -> dict[str, Any]:
    return {"path": list(sys.path), "argv": [""], "preload": [], "method": "fork", "core_dumps": False,
            "data_limit": None, "authkey": bytes(multiprocessing.process.current_process().authkey), **other}


class Real:
    def __init__(self) -> None:
        self.keeper = KeeperClient(setup(), processes.environment(None, None), None)
        self._channels: list[Channel] = []
        self._pidfds: list[int] = []

    def spawn(self, worker_id: int) -> Channel:
        channel = Channel()
        self._channels.append(channel)
        assert self.keeper.spawn(worker_id, channel.worker_fds())
        channel.handed_over()
        return channel

    def messages(self, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            assert select.select([self.keeper.fileno()], [], [], PATIENCE)[0], f"only {found}"
            for message in self.keeper.messages():
                found.append(message)
                if message[3] is not None:
                    self._pidfds.append(message[3])
        return found

    def kill(self, pidfd: int, pid: int) -> None:
        processes.send(pidfd, pid, signal.SIGKILL)

    def has_ended(self, pidfd: int) -> bool:
        deadline = time.monotonic() + PATIENCE
        while not processes.has_ended(pidfd) and time.monotonic() < deadline:
            time.sleep(0.005)
        return processes.has_ended(pidfd)

    def lives(self, pidfd: int) -> bool:
        return not processes.has_ended(pidfd)

    def lose_keeper(self) -> None:
        self.keeper.kill()
        assert select.select([self.keeper.fileno()], [], [], PATIENCE)[0]

    def close(self) -> None:
        self.keeper.stop()
        for pidfd in self._pidfds:
            os.close(pidfd)
        for channel in self._channels:
            channel.close()


class Fake:
    def __init__(self) -> None:
        self.machine = Machine()
        self.keeper = FakeKeeper(self.machine, setup(), {}, None)

    def spawn(self, worker_id: int) -> Any:
        channel = FakeChannel(self.machine)
        assert self.keeper.spawn(worker_id, channel.worker_fds())
        channel.handed_over()
        return channel

    def messages(self, count: int) -> list[Any]:
        while self.keeper.fork() or self.keeper.reap():
            pass
        found = list(self.keeper.messages())
        assert len(found) == count
        return found

    def kill(self, pidfd: int, pid: int) -> None:
        self.machine.signal(pidfd, pid, signal.SIGKILL)
        for process in self.machine.living():
            process.obey()

    def has_ended(self, pidfd: int) -> bool:
        return self.machine.has_ended(pidfd)

    def lives(self, pidfd: int) -> bool:
        return not self.machine.has_ended(pidfd)

    def lose_keeper(self) -> None:
        self.keeper.kill()
        assert self.keeper.is_kill_pending
        self.keeper.die()
        assert self.keeper.fileno() in self.machine.readable

    def close(self) -> None:
        self.keeper.stop()


@pytest.fixture(params=[Real, Fake], ids=["real", "fake"])
def bed(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    yield made
    made.close()


def test_a_worker_is_forked(bed: Any) -> None:
    bed.spawn(7)
    ((what, worker_id, pid, pidfd),) = bed.messages(1)
    assert (what, worker_id) == ("spawned", 7)
    assert pid > 0
    assert bed.lives(pidfd)


def test_workers_are_forked_in_order(bed: Any) -> None:
    bed.spawn(1)
    bed.spawn(2)
    found = bed.messages(2)
    assert [message[:2] for message in found] == [("spawned", 1), ("spawned", 2)]
    assert found[0][2] != found[1][2]


def test_a_death_is_told_with_its_signal(bed: Any) -> None:
    bed.spawn(1)
    ((_, _, pid, pidfd),) = bed.messages(1)
    bed.kill(pidfd, pid)
    assert bed.has_ended(pidfd)
    assert bed.messages(1) == [("exited", 1, -signal.SIGKILL, None)]
    bed.kill(pidfd, pid)  # the dead do not mind


def test_the_keepers_death_takes_its_workers_along(bed: Any) -> None:
    bed.spawn(1)
    bed.spawn(2)
    pidfds = [message[3] for message in bed.messages(2)]
    bed.lose_keeper()
    with pytest.raises(EOFError):
        list(bed.keeper.messages())
    assert all(bed.has_ended(pidfd) for pidfd in pidfds)
    assert bed.keeper.flush(), "what is said to the dead comes to nothing"


def test_what_is_asked_of_a_dead_keeper_comes_to_nothing(bed: Any) -> None:
    bed.lose_keeper()
    channel = bed.spawn(1)
    with pytest.raises(EOFError):
        list(bed.keeper.messages())
    channel.close()
    channel.close()


def test_stopping_ends_all(bed: Any) -> None:
    bed.spawn(1)
    ((_, _, _, pidfd),) = bed.messages(1)
    assert bed.keeper.exit_code is None
    bed.keeper.stop()
    assert bed.has_ended(pidfd)
    assert bed.keeper.exit_code is not None


def test_the_fake_has_what_the_real_one_has() -> None:
    own = {name for name in vars(KeeperClient) if not name.startswith("_")}
    assert own <= {*vars(FakeKeeper), *vars(FakeKeeper(Machine(), {}, {}, None))}
