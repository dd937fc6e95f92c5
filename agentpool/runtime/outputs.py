"""What running tasks write, where they were submitted with `capture_output`: read here, told as events.

Called by the manager thread alone, outside the pool's lock.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from agentpool.io.output import TaskOutput
from agentpool.io.reactor import Reactor
from agentpool.runtime.links import Link
from agentpool_worker import protocol
from agentpool_worker.protocol import Frame

__all__ = ["Outputs"]

#: A task is over with one of these.
_LAST: Final = frozenset({protocol.VALUE, protocol.ERROR, protocol.CALL_FAILED, protocol.RESULT_FAILED})


class Outputs:
    """Reads what the workers' tasks write. `say(link, task_id, payloads)` is told of it."""

    def __init__(self, reactor: Reactor, say: Callable[[Link, int, list[bytes]], None]) -> None:
        self._reactor = reactor
        self._say = say

    def begin(self, link: Link, task_id: int) -> None:
        """The worker passed the pipes of this task. Raises ProtocolError."""
        descriptors = link.channel.take_descriptors(2)
        if len(descriptors) != 2 or task_id in link.outputs:
            for descriptor in descriptors:
                os.close(descriptor)
            raise protocol.ProtocolError(f"{len(descriptors)} descriptors came for the output of task {task_id}")
        output = link.outputs[task_id] = TaskOutput(descriptors)
        for name, descriptor in output.open.items():
            self._reactor.watch(descriptor, partial(self._read, link, task_id, output, name))
        self._read_all(link, task_id, output)

    def read_all(self, link: Link) -> None:
        """What the worker's tasks wrote until now comes before what it says next."""
        for task_id, output in link.outputs.items():
            self._read_all(link, task_id, output)

    def end(self, link: Link, frames: Iterable[Frame]) -> None:
        """Of tasks that end with these frames nothing more is read. Before the core hears of their end."""
        for frame in frames:
            if frame.kind in _LAST and (output := link.outputs.pop(frame.task_id, None)) is not None:
                for name, descriptor in output.open.items():
                    self._reactor.unwatch(descriptor)
                    self._tell(link, frame.task_id, name, [(b"", output.rest(name))])
                output.close()

    def _read(self, link: Link, task_id: int, output: TaskOutput, name: str) -> None:
        descriptor = output.open.get(name)
        if descriptor is not None:
            self._tell(link, task_id, name, [output.read(name)])
            self._close_ended(output, name, descriptor)

    def _read_all(self, link: Link, task_id: int, output: TaskOutput) -> None:
        for name, descriptor in list(output.open.items()):
            self._tell(link, task_id, name, output.read_all(name))
            self._close_ended(output, name, descriptor)

    def _close_ended(self, output: TaskOutput, name: str, descriptor: int) -> None:
        if name not in output.open:
            self._reactor.unwatch(descriptor)
            os.close(descriptor)

    def _tell(self, link: Link, task_id: int, name: str, found: list[tuple[bytes, str]]) -> None:
        payloads = []
        for data, text in found:
            if name == "stderr":
                link.channel.keep_stderr(data)  # the last words of a crash are in its report, as always
            if text:
                payloads.append(pickle.dumps((time.time(), "output", (name, text)), 5))
        if payloads:
            self._say(link, task_id, payloads)
