"""Stand for `agentpool.io.sampler`: readings of imagined processes and of the machine they run on."""

from __future__ import annotations

from agentpool.io.host import HostReading
from agentpool.io.sampler import TreeReading
from agentpool.testing.machine import Machine
from agentpool.testing.process import FakeProcess

__all__ = ["FakeHostSampler", "FakeTreeSampler"]


class FakeTreeSampler:
    """The methods of `TreeSampler`."""

    __slots__ = ("_process", "_seen", "pid")

    def __init__(self, machine: Machine, pid: int, metric: str = "rss") -> None:
        self.pid = pid
        self._process: FakeProcess | None = machine.processes.get(pid)
        self._seen = 0

    def read(self) -> TreeReading | None:
        """The tree now; None: the process is gone."""
        process = self._process
        if process is None or process.is_dead:
            return None
        tools = process.tools
        self._seen = len(tools)
        rss = process.rss_bytes
        return TreeReading(rss + sum(tools) if tools else rss, rss, 1 + len(tools), process.cpu_seconds)

    def kill_remembered(self) -> None:
        """SIGKILL the descendants that the last reading found."""
        if self._process is not None:
            del self._process.tools[: self._seen]

    def kill_biggest_descendant(self) -> int | None:
        """SIGKILL the descendant with the most memory; None: there is none."""
        process = self._process
        if process is None or process.is_dead or not process.tools:
            return None
        process.tools.remove(max(process.tools))
        return process.pid

    def close(self) -> None:
        """Forgets the process."""
        self._process = None


class FakeHostSampler:
    """The method of `HostSampler`."""

    __slots__ = ("_machine",)

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def read(self) -> HostReading:
        """The machine now."""
        machine = self._machine
        return HostReading(
            machine.total_bytes, machine.available_bytes, "host", machine.cpu_percent, machine.pressure_percent
        )
