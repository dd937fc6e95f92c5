"""A pool's clerk at the host's budget: performs what the core decided about slots, and tells it what others did.

Only the manager thread calls it. It never waits: the pool's bell and the ends of other pools (pidfds, watched only
while this pool stands in line) come through the manager's reactor.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any, Final

from agentpool.core import actions as act
from agentpool.core.budget import Member, View
from agentpool.core.host_scheduler import HostScheduler
from agentpool.io.reactor import Reactor
from agentpool.io.rundir import default_runtime_directory
from agentpool.io.shared_budget import SharedBudget

__all__ = ["BudgetAction", "Clerk"]

log = logging.getLogger("agentpool")

BudgetAction = act.LookAtBudget | act.PublishShare | act.TakeSlots | act.GiveSlots | act.LeaveBudget

_FIELDS: Final = frozenset(field.name for field in fields(Member)) - {"id"}

Event = Callable[[float], None]


class Clerk:
    """See the module.

    feed: tells the core of something now, under the pool's lock. tell_later: with the next turn of the manager.
    """

    def __init__(
        self, core: HostScheduler, name: str, reactor: Reactor, feed: Callable[[Event], None],
        tell_later: Callable[[Event], None],
    ) -> None:
        self._core = core
        self._name = name
        self._reactor = reactor
        self._feed = feed
        self._tell_later = tell_later
        budget = core.settings.budget
        assert budget is not None
        self._shared = SharedBudget(budget.directory or f"{default_runtime_directory()}/budget")
        #: id of another pool -> pidfd of its process
        self._watched: dict[str, int] = {}
        self._record: dict[str, Any] = {}

    def perform(self, action: BudgetAction) -> None:
        """Do what the core asked for. Raises OSError where the directory is gone for good."""
        try:
            self._perform(action)
        except FileNotFoundError as error:
            # Somebody cleaned up, as a system does when a user logs out: the pools meet again in a new one.
            log.warning("the directory of the host's budget was removed (%s); it is made again", error)
            self._unwatch_all()
            self._leave_quietly()
            self._perform(action)
        if self._core.share.ticket is None:
            self._unwatch_all()

    def _perform(self, action: BudgetAction) -> None:
        self._join()
        match action:
            case act.LookAtBudget(is_loud):
                self._look(is_loud)
            case act.PublishShare(is_loud):
                self._publish(is_loud)
            case act.TakeSlots(slots):
                got = self._shared.take(slots)
                self._feed(lambda now: self._core.slots_taken(now, got))
                self._publish(is_loud=False)
            case act.GiveSlots(slots):
                self._shared.give(slots)
                self._publish(is_loud=True)
            case act.LeaveBudget():
                self._leave()

    def _join(self) -> None:
        if self._shared.bell is None:
            self._shared.join()
            assert self._shared.bell is not None
            self._reactor.watch(self._shared.bell, self._rung)

    def _rung(self) -> None:
        self._shared.answer_bell()
        self._tell_later(self._core.budget_rang)

    def _publish(self, is_loud: bool) -> None:
        told: list[Member] = []
        self._feed(lambda now: told.append(self._core.own_member(now)))
        record = asdict(told[0])
        del record["id"]
        limit = self._core.share.memory_bytes
        self._shared.publish(record | {"pid": os.getpid(), "name": ascii(self._name)[1:-1][:80], "memory_bytes": limit})
        if is_loud:
            self._shared.ring()

    def _look(self, is_loud: bool) -> None:
        self._publish(is_loud)
        others = self._shared.look(self._core.share.agents)
        members = []
        is_blind = False
        for member, record in others.records.items():
            members.append(_member(member, record))
            if self._core.share.ticket is not None and member not in self._watched:
                is_blind |= not self._watch(member, record.get("pid"))
        view = View(own_id=self._shared.id, taken=others.taken, members=tuple(members), is_blind=is_blind)
        self._feed(lambda now: self._core.budget_seen(now, view))

    # -- the ends of others --------------------------------------------------------------------------------------

    def _watch(self, member: str, pid: object) -> bool:
        """Notice the end of that pool's process, whose locks the kernel has released by then."""
        if not isinstance(pid, int) or not hasattr(os, "pidfd_open"):
            return False
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # another pid namespace; or it has just ended, and then the next look shows that
            return False
        if not self._shared.lives(member):  # the number may be another process's by now
            os.close(pidfd)
            return False
        self._watched[member] = pidfd
        self._reactor.watch(pidfd, lambda: self._ended(member))
        return True

    def _ended(self, member: str) -> None:
        self._unwatch(member)
        self._tell_later(self._core.budget_rang)

    def _unwatch(self, member: str) -> None:
        pidfd = self._watched.pop(member, None)
        if pidfd is not None:
            self._reactor.unwatch(pidfd)
            os.close(pidfd)

    def _unwatch_all(self) -> None:
        for member in list(self._watched):
            self._unwatch(member)

    # -- the end -------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self._leave_quietly():
            self._shared.ring()

    def _leave_quietly(self) -> bool:
        if self._shared.bell is None:
            return False
        self._reactor.unwatch(self._shared.bell)
        self._shared.leave()
        return True

    def close(self) -> None:
        """Give back everything."""
        self._unwatch_all()
        with suppress(FileNotFoundError):  # the directory was removed
            self._leave()

    def abandon(self) -> None:
        """In a forked copy of the process: let go of the descriptors. The slots are the parent's."""
        for pidfd in self._watched.values():
            os.close(pidfd)
        self._watched.clear()
        self._shared.abandon()


def _member(member: str, record: dict[str, Any]) -> Member:
    known = {name: value for name, value in record.items() if name in _FIELDS}
    return Member(id=member, **known)
