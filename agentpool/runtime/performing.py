"""What the core asks for, performed: futures settled, samples taken, workers started, retired, stopped and killed.

See `changes` for the rooms of the manager. Called by the manager thread alone, outside the lock; user code (callbacks,
listeners) runs here. Decides nothing: `agentpool.core.actions` has what there is to do.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import cast

from agentpool.core import actions as act
from agentpool.core.records import HostState, TaskRecord, WorkerExit, WorkerRecord
from agentpool.errors import InternalError
from agentpool.io.channel import Channel
from agentpool.runtime.changes import Call
from agentpool.runtime.ending import Ending
from agentpool.runtime.links import Link

__all__ = ["Performing"]

log = logging.getLogger("agentpool")


class Performing(Ending):
    """See the module."""

    def _perform(self, action: act.Action) -> None:
        match action:
            case (_, task, is_value, payload):
                self._resolve(task, is_value, payload)
            case act.SampleWorker(worker):
                link = self._staff.links.get(worker.id)
                reading = None if link is None else link.sample()
                self._feed(lambda now: self.core.worker_sampled(now, worker, reading))
            case act.SampleHost():
                self._sample_host()
            case act.Spawn(worker):
                self._spawn(worker)
            case act.RoomFreed():
                with self.lock:
                    self._room.notify_all()
            case act.BreakerChanged(old, new, reason):
                self._breaker_changed(old, new, reason)
            case act.Warn(message):
                log.warning("%s", message)
            case act.Close():
                self._finish()
            case (act.LookAtBudget() | act.PublishShare() | act.TakeSlots() | act.GiveSlots() | act.LeaveBudget()):
                assert self._clerk is not None
                self._clerk.perform(action)
            case act.Retire() | act.Kill() | act.AskToStop() | act.DumpStack() | act.StopTool() | act.Revoke() | (
                act.Collect()
            ):
                link = self._staff.links.get(action.worker.id)
                if link is not None:
                    self._perform_on(link, action)
            case _:
                raise InternalError(f"the core asked for {action!r}, and nobody performs that")

    def _perform_on(
        self,
        link: Link,
        action: act.Retire | act.Kill | act.AskToStop | act.DumpStack | act.StopTool | act.Revoke | act.Collect,
    ) -> None:
        match action:
            case act.Retire():
                with self.lock:
                    self._reactor.unwatch(link.channel.calls_fd)
                    link.channel.end_calls()
            case act.Kill():
                self._kill(link)
            case act.AskToStop(_, task, wants_stack):
                link.channel.ask_to_stop(task.id, wants_stack=wants_stack)
            case act.StopTool():
                link.stop_tool()
            case act.DumpStack():
                link.signal(signal.SIGUSR1)
            case act.Collect():
                with self.lock:
                    if not link.channel.send_collect():
                        self._reception.watch_writing(link)
            case act.Revoke():
                self._revoke(link)

    def _resolve(self, task: TaskRecord, is_value: bool, payload: object) -> None:
        call = self._call_of(task)
        if call is not None:
            call.settle(is_value, payload)

    def _deliver_events(self) -> None:
        """Hand on what running tasks said; before any of these tasks is resolved."""
        said, self._reception.said = self._reception.said, []
        for handle, attempt, payloads, dropped in said:
            cast(Call, handle).receive_events(attempt, payloads, dropped)

    # -- workers -------------------------------------------------------------------------------------------------

    def _spawn(self, worker: WorkerRecord) -> None:
        channel = None
        try:
            channel = Channel(self._staff.arena, worker.id)
            link = Link(worker, channel, self._staff.keeper_for_spawn(), self.core.settings.memory_metric)
        except Exception as error:  # out of descriptors or processes, no interpreter, ...: a failed start
            if channel is not None:
                channel.close()
            failure = WorkerExit(exit_code=None, story=f"{type(error).__name__}: {error}")
            self._feed(lambda now: self.core.worker_exited(now, worker, failure))
            return
        with self.lock:
            self._staff.links[worker.id] = link
            if not channel.send_init(*self._initializer):
                self._reception.watch_writing(link)
        self._reception.watch(link)
        self._staff.hand_over(link)

    def _revoke(self, link: Link) -> None:
        """Take back what waits behind a call that takes its time, and what that worker had finished before it."""
        self._reception.take_everything(link)
        with self._section() as now:
            self._reception.tell_core(now)
            self._take_backlog_back(now, link)
            self._take(now)
        self._deliver_events()

    def _kill(self, link: Link) -> None:
        if link.is_kill_wanted and (link.pid is None or link.is_dead()) and link.keeper is self._staff.keeper:
            # Asked for the second time: it is dead, or was never forked, and the keeper does not say so.
            log.error("the keeper process does not answer; it is killed")
            link.keeper.kill()
        link.kill()

    # -- the host and the breaker --------------------------------------------------------------------------------

    def _sample_host(self) -> None:
        if self._host is None:
            from agentpool.io.host import HostSampler

            self._host = HostSampler()
        reading = self._host.read()
        host = HostState(
            total_bytes=reading.total_bytes,
            available_bytes=reading.available_bytes,
            cpu_percent=reading.cpu_percent,
            pressure_percent=reading.pressure_some_avg10,
            source=reading.limit_source,
        )
        self._feed(lambda now: self.core.host_sampled(now, host, os.cpu_count() or 1))

    def _breaker_changed(self, old: str, new: str, reason: str) -> None:
        level = logging.WARNING if new == "open" else logging.INFO  # what was done by hand surprises nobody
        log.log(level, "circuit breaker %s: %s", new, reason or "recovered")
        self.door.breaker_changed(new, reason)
        for listener in list(self.listeners):
            try:
                listener(old, new, reason)
            except BaseException:  # SystemExit in it must not end this thread
                log.exception("a listener of the circuit breaker raised")
