"""What arrives: results, standard error, the keeper's words, deaths. All of it becomes events for the core.

Reading happens outside the pool's lock, in the manager thread, which alone may call this module; an event is a
function of `now` that the manager calls under the lock, in order of arrival. Errors of tasks are rebuilt here, outside
the lock, as that runs code of their classes; values are not rebuilt at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Final

from agentpool.core.failures import end_words
from agentpool.core.records import TaskRecord
from agentpool.core.scheduler import Scheduler
from agentpool.io.reactor import Reactor
from agentpool.io.stderr import Forwarder
from agentpool.runtime import outcomes
from agentpool.runtime.lastwords import Ended
from agentpool.runtime.links import Link, Staff
from agentpool.runtime.outcomes import Encoded
from agentpool.runtime.outputs import Outputs
from agentpool_worker import protocol
from agentpool_worker.protocol import Frame

__all__ = ["Event", "Reception"]

log = logging.getLogger("agentpool")

Event = Callable[[float], None]

#: Reads of a dead worker's standard error: a descendant that still holds it may write for ever.
_LAST_WORDS: Final = 16

_ERRORS: Final = frozenset({protocol.ERROR, protocol.CALL_FAILED, protocol.RESULT_FAILED})


class Reception:
    """Reads from all workers and from the keeper."""

    def __init__(self, core: Scheduler, reactor: Reactor) -> None:
        self._core = core
        self._reactor = reactor
        self._staff = Staff(core.settings, reactor, self._keeper_spoke)
        self.stderr = Forwarder()
        #: workers that are gone
        self.ended = Ended()
        self._outputs = Outputs(reactor, self._task_said)
        self._events: list[Event] = []
        #: what running tasks said, as (the task's handle, attempt, pickled events, events lost in the worker)
        self.said: list[tuple[object, int, list[bytes], int]] = []
        #: links whose standard error is not read until ours takes more
        self._paused: list[Link] = []

    @property
    def staff(self) -> Staff:
        """The keeper and the links that are read from."""
        return self._staff

    @property
    def has_events(self) -> bool:
        """There is something to tell the core."""
        return bool(self._events)

    def tell_later(self, event: Event) -> None:
        """Have the core told of this with the next turn, behind what arrived before."""
        self._events.append(event)

    def tell_core(self, now: float) -> None:
        """Under the lock: feed what arrived, in order."""
        events, self._events = self._events, []
        for event in events:
            event(now)

    def watch(self, link: Link) -> None:
        """Read from this worker from now on."""
        self._reactor.watch(link.channel.results_fd, partial(self._read_results, link))
        self._reactor.watch(link.channel.stderr_fd, partial(self._read_stderr, link))

    def watch_writing(self, link: Link) -> None:
        """Any thread, under the lock: go on writing to this worker when it has read some."""
        self._reactor.watch_writing(link.channel.calls_fd, lambda: self._events.append(lambda _: self._flush(link)))

    def _flush(self, link: Link) -> None:
        if link.channel.flush():
            self._reactor.unwatch_writing(link.channel.calls_fd)

    def take_everything(self, link: Link) -> None:
        """Take the results in the pipe, and those that the worker holds back while it runs a call."""
        self._read_results(link)
        if link.is_distrusted:
            return
        self._receive_all(link, link.channel.unsent_results())

    # -- reading -------------------------------------------------------------------------------------------------

    def _read_results(self, link: Link) -> None:
        try:
            frames, is_ended = link.channel.read_results()
            self._receive_all(link, frames)
        except BaseException as error:  # what cannot be understood; errors of users' classes are caught where they rise
            self._distrust(link, error)
            return
        if is_ended:
            self._reactor.unwatch(link.channel.results_fd)

    def _distrust(self, link: Link, error: BaseException) -> None:
        """Somebody wrote into the worker's descriptors: nothing from it can be believed any more."""
        words = f"its results pipe was corrupted: {type(error).__name__}: {error}"
        log.error("worker %s (pid %s) is killed: %s", link.worker.id, link.pid, words)
        link.is_distrusted = True
        self._reactor.unwatch(link.channel.results_fd)
        link.channel.stderr_tail += f"\n[agentpool: {words}]".encode()
        link.kill()

    def _receive_all(self, link: Link, frames: list[Frame]) -> None:
        """Turn frames into events. Values that nobody here must look into, nearly all there is, become one."""
        if link.outputs:
            self._outputs.read_all(link)
            self._outputs.end(link, frames)
        values: list[Frame] = []
        rest = iter(frames)
        for frame in rest:
            if frame.kind == protocol.VALUE and frame.task_id not in link.wanted_values:
                if not values:
                    self._events.append(partial(self._values_came, link, values))
                values.append(frame)
            else:
                values = []
                self._receive(link, frame)
                if frame.kind == protocol.OUTPUT:  # of a task that may have ended with what is left of these frames
                    self._receive_all(link, list(rest))

    def _values_came(self, link: Link, frames: list[Frame], now: float) -> None:
        """Under the lock. The hot path: what `_finished` does, for many."""
        worker, task_finished, call_finished = link.worker, self._core.task_finished, link.channel.finished
        for _, _, task_id, x, y, z, payload, buffers in frames:
            task = worker.running
            if task is None or task.id != task_id:
                task = self._task_of(link, task_id)
            call_finished(task_id)
            if task is not None:
                task_finished(now, worker, task, True, Encoded(payload, buffers), x / 1e6, y * 1024, z * 1024)

    def _receive(self, link: Link, frame: Frame) -> None:
        """Turn a frame into an event. Errors are rebuilt here, outside the lock: that runs code of their classes."""
        kind, worker, core = frame.kind, link.worker, self._core
        if kind == protocol.VALUE:
            is_value, payload = outcomes.decode_value(frame)
            self._events.append(lambda now: self._finished(now, link, frame, is_value, payload))
        elif kind in _ERRORS:
            error = outcomes.decode_error(frame)
            self._events.append(lambda now: self._finished(now, link, frame, False, error))
        elif kind == protocol.READY:
            baseline = link.baseline_bytes(frame.task_id, frame.x * 1024, is_alone=not frame.flags)
            self._events.append(lambda now: core.worker_ready(now, worker, frame.task_id, baseline))
        elif kind == protocol.SKIPPED:
            self._events.append(lambda now: self._skipped(now, link, frame))
        elif kind == protocol.COLLECTED:
            self._events.append(lambda now: core.worker_collected(now, worker))
        elif kind == protocol.STOPPING:
            self._events.append(lambda now: self._stop_acknowledged(now, link, frame))
        elif kind == protocol.AGENT_SET_UP:
            baseline = link.baseline_bytes(worker.pid or 0, frame.x * 1024)
            self._events.append(lambda now: core.agent_set_up(now, worker, baseline))
        elif kind == protocol.EVENTS:
            payloads = protocol.split_events(frame)
            self._task_said(link, frame.task_id, payloads, frame.y)
        elif kind == protocol.OUTPUT:
            self._outputs.begin(link, frame.task_id)
        elif kind == protocol.INIT_FAILED:
            failure = outcomes.initializer_error(frame)
            if isinstance(failure.__cause__, MemoryError):
                # The machine's fault, or a limit's: a failed start, which may go better the next time.
                link.channel.stderr_tail += f"\n{failure.__cause__.__cause__}".encode()
            else:
                self._events.append(lambda now: core.initializer_failed(now, worker, failure))

    def _task_of(self, link: Link, task_id: int) -> TaskRecord | None:
        head = link.worker.running
        if head is not None and head.id == task_id:
            return head
        return next((task for task in link.worker.backlog if task.id == task_id), None)

    def _finished(self, now: float, link: Link, frame: Frame, is_value: bool, payload: object) -> None:
        task = self._task_of(link, frame.task_id)
        link.finished(frame.task_id)
        if task is None:
            return  # seen before, in the outbox or the pipe
        self._core.task_finished(
            now,
            link.worker,
            task,
            is_value,
            payload,
            frame.x / 1e6,
            frame.y * 1024,
            frame.z * 1024,
        )

    def _skipped(self, now: float, link: Link, frame: Frame) -> None:
        if not link.channel.is_current(frame.task_id, frame.x):
            return  # taken back, which the worker was told by no more than its own look at the page
        task = self._task_of(link, frame.task_id)
        link.finished(frame.task_id)
        if task is not None:
            self._core.task_skipped(now, link.worker, task)

    def _stop_acknowledged(self, now: float, link: Link, frame: Frame) -> None:
        task = self._task_of(link, frame.task_id)
        if task is not None:
            wants_stack = task.stop is not None and task.stop.is_timeout
            self._core.stop_acknowledged(now, link.worker, task, link.channel.report() if wants_stack else "")

    def _task_said(self, link: Link, task_id: int, payloads: list[bytes], dropped: int = 0) -> None:
        """Only under the lock is it known which attempt this is; whether anybody listens is not known there."""
        def said(now: float) -> None:
            task = self._task_of(link, task_id)
            if task is not None:
                self.said.append((task.handle, task.attempts, payloads, dropped))

        self._events.append(said)

    def _read_stderr(self, link: Link) -> None:
        if self.stderr.is_full:
            # Whoever reads our standard error is slow: the writers wait, as they would if they wrote to it themselves.
            self._reactor.unwatch(link.channel.stderr_fd)
            self._paused.append(link)
        elif data := link.channel.read_stderr():
            self.stderr.push(data)
        else:
            self._reactor.unwatch(link.channel.stderr_fd)

    def push_stderr(self) -> None:
        """Go on passing on what workers wrote to their standard error."""
        self.stderr.push()
        if self._paused and not self.stderr.is_full:
            paused, self._paused = self._paused, []
            for link in paused:
                if self._staff.links.get(link.worker.id) is link:
                    self._reactor.watch(link.channel.stderr_fd, partial(self._read_stderr, link))

    # -- the keeper ----------------------------------------------------------------------------------------------

    def _keeper_spoke(self) -> None:
        keeper = self._staff.keeper
        if keeper is None:
            return
        try:
            for what, worker_id, detail, pidfd in keeper.messages():
                self._keeper_said(what, worker_id, detail, pidfd)
        except EOFError:
            self._keeper_lost()

    def _keeper_said(self, what: str, worker_id: int, detail: int | str, pidfd: int | None) -> None:
        link = self._staff.links.get(worker_id)
        if link is None:
            if pidfd is not None:
                os.close(pidfd)
        elif what == "spawned":
            assert isinstance(detail, int)
            pid = detail
            link.spawned(pid, pidfd)
            self._events.append(lambda now: self._core.worker_spawned(now, link.worker, pid))
        elif what == "exited":
            link.exit_code = detail if isinstance(detail, int) else None
            self._observe_death(link)
        else:
            link.channel.stderr_tail += str(detail).encode()
            self._observe_death(link)

    def _observe_death(self, link: Link, *, keeper_lost: bool = False) -> None:
        """Take all that the dead worker had sent, or could not send any more; only then is it gone."""
        if self._staff.links.get(link.worker.id) is not link:
            return
        if not link.is_distrusted:
            try:
                frames, _ = link.channel.read_results(is_last=True)
                self._receive_all(link, frames)
                self._receive_all(link, link.channel.unsent_results())
            except BaseException as error:
                self._distrust(link, error)
        for _ in range(_LAST_WORDS):
            if not (data := link.channel.read_stderr()):
                break
            self.stderr.push(data)
        self._events.append(lambda now: self._worker_gone(now, link, keeper_lost))

    def _worker_gone(self, now: float, link: Link, keeper_lost: bool) -> None:
        if self._staff.links.pop(link.worker.id, None) is link:
            exit_ = link.exit(keeper_lost=keeper_lost)
            self.ended.add(link.worker.id, end_words(link.worker, exit_), *link.channel.stderr_since(0))
            link.close(self._reactor)
            self._core.worker_exited(now, link.worker, exit_)

    def _keeper_lost(self) -> None:
        log.error("the keeper process died; its workers die with it, and a new one is started")
        for link in self._staff.keeper_lost():
            if link.pidfd is None:
                self._observe_death(link, keeper_lost=True)
            else:
                # The kernel kills it now, as its parent is dead; its pidfd tells when that is done.
                link.kill()
                self._reactor.watch(link.pidfd, partial(self._observe_death, link, keeper_lost=True))
