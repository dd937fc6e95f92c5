"""What the manager holds of each worker: its channel, its process, its sampler. And the keeper that forks them.

Only the manager thread makes and closes links; `Link.channel` is written to by whoever holds the pool's lock.
"""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agentpool.config import MB, MemoryMetric, PoolSettings
from agentpool.core.records import TaskRecord, TreeState, WorkerExit, WorkerRecord
from agentpool.io import processes
from agentpool.io.arena import Arena, Held
from agentpool.io.channel import Channel
from agentpool.io.processes import KeeperClient
from agentpool.io.reactor import Reactor

if TYPE_CHECKING:
    from agentpool.io.output import TaskOutput
    from agentpool.io.sampler import TreeSampler
    from agentpool_worker.protocol import Payload

__all__ = ["Link", "Staff"]


class Link:
    """One worker, as the manager sees it."""

    __slots__ = ("_metric", "channel", "exit_code", "is_distrusted", "is_kill_wanted", "keeper", "outputs", "pid",
                 "pidfd", "sampler", "wanted_values", "worker")

    def __init__(self, worker: WorkerRecord, channel: Channel, keeper: KeeperClient, metric: MemoryMetric) -> None:
        self._metric = metric
        self.worker = worker
        self.channel = channel
        self.keeper = keeper
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.sampler: TreeSampler | None = None
        self.is_kill_wanted = False
        self.exit_code: int | None = None
        #: tasks whose retry policy wants to see the value
        self.wanted_values: set[int] = set()
        #: task id -> what it writes, of those whose output is captured
        self.outputs: dict[int, TaskOutput] = {}
        #: somebody wrote into its pipe of results: nothing that comes from it is read any more
        self.is_distrusted = False

    def queue_call(self, task: TaskRecord, payload: Payload | Held, buffers: Sequence[memoryview]) -> None:
        """Under the lock: have a call sent with the channel's next flush."""
        if task.spec.policy is not None and task.spec.policy.sees_results:
            self.wanted_values.add(task.id)
        self.channel.queue_call(task.id, payload, buffers)

    def finished(self, task_id: int) -> None:
        """Under the lock: that call is over."""
        self.channel.finished(task_id)
        self.wanted_values.discard(task_id)

    def spawned(self, pid: int, pidfd: int | None) -> None:
        """The keeper has forked it."""
        self.pid, self.pidfd = pid, pidfd
        self._sampler_of(pid)
        if self.is_kill_wanted:
            self.kill()

    def kill(self) -> None:
        """SIGKILL it; the keeper kills what it leaves behind. A worker that is not forked yet dies when it is."""
        self.is_kill_wanted = True
        self.signal(signal.SIGKILL)

    def is_dead(self) -> bool:
        """Has the process ended, whatever its keeper says?"""
        return self.pidfd is not None and processes.has_ended(self.pidfd)

    def signal(self, number: int) -> None:
        """Signal the worker itself, if it lives."""
        if self.pid is not None:
            processes.send(self.pidfd, self.pid, number)

    def baseline_bytes(self, pid: int, own_bytes: int, *, is_alone: bool = False) -> int:
        """What the fresh worker uses, what its initializer or agent started included.

        `own_bytes` is its own word for its RSS, which does where it is alone and 0.15 ms sooner.
        """
        if is_alone and own_bytes and self._metric == "rss":
            return own_bytes
        reading = self._sampler_of(pid).read()
        return own_bytes if reading is None else reading.rss_bytes

    def _sampler_of(self, pid: int) -> TreeSampler:
        if self.sampler is None:
            from agentpool.io.sampler import TreeSampler

            self.sampler = TreeSampler(pid, self._metric)
        return self.sampler

    def stop_tool(self) -> None:
        """SIGKILL the biggest process below the worker, if there is one."""
        if self.sampler is not None:
            self.sampler.kill_biggest_descendant()

    def sample(self) -> TreeState | None:
        """Measure its tree; None: it is gone, or not there yet."""
        reading = self.sampler.read() if self.sampler is not None else None
        if reading is None:
            return None
        own_bytes = max(0, reading.rss_bytes - self.channel.shared_bytes)
        return TreeState(own_bytes, reading.processes, reading.cpu_seconds)

    def exit(self, *, keeper_lost: bool = False) -> WorkerExit:
        """How it ended, and whether the task at its head had begun."""
        head = self.worker.running
        return WorkerExit(
            exit_code=self.exit_code,
            began=head is not None and self.channel.began(head.id),
            begun=frozenset(task.id for task in self.worker.backlog if self.channel.began(task.id)),
            stderr_tail=self.channel.stderr_tail.decode(errors="replace"),
            story=self.channel.report(),
            keeper_lost=keeper_lost,
        )

    def close(self, reactor: Reactor | None) -> None:
        """Give back everything. `reactor` None: in a forked copy, which has none."""
        if reactor is not None:
            for descriptor in (self.channel.calls_fd, self.channel.results_fd, self.channel.stderr_fd, self.pidfd):
                if descriptor is not None:
                    reactor.unwatch(descriptor)
        for output in self.outputs.values():
            for descriptor in output.open.values():
                if reactor is not None:
                    reactor.unwatch(descriptor)
            output.close()
        self.channel.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        if self.sampler is not None:
            self.sampler.close()


class Staff:
    """The keeper and all links."""

    def __init__(self, settings: PoolSettings, reactor: Reactor, on_keeper: Callable[[], None]) -> None:
        self._settings = settings
        self._reactor = reactor
        self._on_keeper = on_keeper
        self._told: dict[str, object] = {}
        self._handing_over: list[Link] = []
        self.keeper: KeeperClient | None = None
        self.arena = Arena(2 * settings.max_workers)
        #: worker id -> link; changed under the pool's lock
        self.links: dict[int, Link] = {}

    def _setup(self) -> dict[str, object]:
        return {
            # marshal takes no subclasses of str
            "path": [str.__str__(entry) for entry in sys.path if isinstance(entry, str)],
            "argv": [str.__str__(word) for word in sys.argv if isinstance(word, str)],
            "preload": list(self._settings.preload),
            "method": self._settings.start_method,
            "core_dumps": self._settings.core_dumps,
            "data_limit": None if self._settings.data_limit_mb is None else int(self._settings.data_limit_mb * MB),
            "authkey": bytes(multiprocessing.process.current_process().authkey),
        }

    def keeper_for_spawn(self) -> KeeperClient:
        """The keeper, started where there is none, told of changes of sys.path. Raises OSError."""
        setup = self._setup()
        if self.keeper is None:
            settings = self._settings
            self.keeper = KeeperClient(setup, processes.environment(settings.env, settings.env_allow), settings.cwd)
            self._reactor.watch(self.keeper.fileno(), self._on_keeper)
        elif setup != self._told:
            self.keeper.set_up(setup)
        self._told = setup
        return self.keeper

    def hand_over(self, link: Link) -> None:
        """Have the keeper fork the worker of this link."""
        keeper = link.keeper
        self._handing_over.append(link)
        self._sent(keeper.spawn(link.worker.id, link.channel.worker_fds()))
        import agentpool.io.sampler  # noqa: F401  with psutil, which takes 7 ms the first time: the keeper starts meanwhile

    def trim(self) -> None:
        """Have memory given back that large calls and results took."""
        self.arena.trim()
        for link in self.links.values():
            if not link.channel.trim():
                self.arena.is_warm = True

    def keep_results(self) -> None:
        """Any thread, before a fork: the child may look at results that lie in the arena for ever."""
        self.arena.keep()
        for link in list(self.links.values()):
            link.channel.keep_results()

    def flush_keeper(self) -> None:
        """There is room for messages to the keeper again."""
        if self.keeper is not None:
            self._sent(self.keeper.flush())

    def _sent(self, is_all: bool) -> None:
        assert self.keeper is not None
        if is_all:
            self._reactor.unwatch_writing(self.keeper.fileno())
            for link in self._handing_over:
                link.channel.handed_over()
            self._handing_over.clear()
        else:
            self._reactor.watch_writing(self.keeper.fileno(), self.flush_keeper)

    def keeper_lost(self) -> Sequence[Link]:
        """The keeper died, and its workers are dying with it; returns their links."""
        keeper, self.keeper = self.keeper, None
        self._handing_over.clear()
        if keeper is None:
            return []
        self._reactor.unwatch(keeper.fileno())
        keeper.stop()
        lost = [link for link in self.links.values() if link.keeper is keeper]
        for link in lost:
            if link.sampler is not None:
                link.sampler.kill_remembered()
        keeper.kill_orphans()
        return lost

    def close(self) -> None:
        """End the keeper and whatever is left below it."""
        if self.keeper is not None:
            self._reactor.unwatch(self.keeper.fileno())
            self.keeper.stop()
            self.keeper = None
        for link in self.links.values():
            link.close(self._reactor)
        self.links.clear()
        self.arena.close()

    def abandon(self) -> None:
        """In a forked copy of the parent: let go of all descriptors, touch nobody."""
        if self.keeper is not None:
            self.keeper.abandon()
        for link in self.links.values():
            link.close(None)
        self.links.clear()
        self.arena.abandon()
