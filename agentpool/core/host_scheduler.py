"""The scheduler of a pool that shares the host's budget with others: it runs no more tasks than it holds slots.

A `Scheduler` whose `concurrency` is what `budget.Share` has got hold of. It asks for a look at the other pools, takes
what is its own and gives back what it does not use. Pure; one thread at a time, like the class that it extends.
"""

from __future__ import annotations

from itertools import chain, islice

from agentpool.config import MB, PoolSettings
from agentpool.core.actions import Action, GiveSlots, LeaveBudget, LookAtBudget, PublishShare, TakeSlots
from agentpool.core.budget import Member, Share, View
from agentpool.core.records import TaskRecord, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.core.timers import Timer

__all__ = ["HostScheduler"]

#: A change of the pool's memory is told to the others where it is greater than this.
_WORTH_TELLING = 4 * MB


class HostScheduler(Scheduler):
    """See the module."""

    def __init__(self, settings: PoolSettings, *, seed: int = 0) -> None:
        super().__init__(settings, seed=seed)
        assert settings.budget is not None
        self.share: Share = Share(settings.budget)
        self.concurrency = 0
        self._is_member = False
        self._is_looking = False
        self._told_bytes = 0
        self._linger_timer: Timer | None = None
        self._look_timer: Timer | None = None

    # -- events --------------------------------------------------------------------------------------------------

    def budget_rang(self, now: float) -> None:
        """Another pool came, went, waits, or gave back a slot."""
        if self.share.rang():
            self._look(is_loud=False)

    def budget_seen(self, now: float, view: View) -> None:
        """The answer to LookAtBudget."""
        self._is_looking = False
        share = self.share
        count = self._wanted(now) - len(share.held)
        slots = share.seen(now, view, self._needs(max(count, 0)), self.committed_bytes)
        if slots:
            self._actions.append(TakeSlots(tuple(slots)))
            self._is_looking = True  # until it is known which of them it got
        elif share.is_asking:
            self._actions.append(PublishShare(is_loud=True))
        if share.is_memory_wanted and not self.queue_length:
            for worker in list(self.idle.values())[: max(0, self.live - self.settings.min_workers)]:
                self._retire(now, worker, "room in the host's budget")
        self._set_look_timer(now)

    def slots_taken(self, now: float, slots: tuple[int, ...]) -> None:
        """The answer to TakeSlots: these it got."""
        self._is_looking = False
        self.share.took(now, slots)
        self._slots_changed()
        if not slots:
            self._look(is_loud=False)  # somebody was quicker

    def take_actions(self, now: float) -> list[Action]:
        """What to do now, in order."""
        if self.is_closed:
            return super().take_actions(now)
        self._give_back(now)
        actions = super().take_actions(now)
        self.share.used(self.active)
        if not self.is_closed:
            self._give_back(now)
            self._tell_memory()
            self._seek(now)
        more, self._actions = self._actions, []
        return actions if more is actions else actions + more  # the same list where it was empty till then

    # -- deciding ------------------------------------------------------------------------------------------------

    def own_member(self, now: float) -> Member:
        """What the others are told of this pool; the shell fills in its name."""
        share = self.share
        return Member(id="", agents=share.agents, slots=len(share.held), committed_bytes=self.committed_bytes,
                      ticket=share.ticket, need_bytes=share.need_bytes, wants_memory=share.wants_memory, looked_at=now)

    @property
    def committed_bytes(self) -> int:
        """What the pool uses, and what its running tasks, and those to come next, are still expected to use."""
        expected = sum(
            max(0, expected_bytes(worker.running) - worker.rss_bytes)
            for worker in self.workers.values() if worker.running is not None
        )
        return self.pool_bytes + expected + self.share.cleared_bytes

    def _wanted(self, now: float) -> int:
        """Slots that could be used now, those in use included."""
        if self.active and self._is_reserved():
            return self.active
        # Where no process may be started, more tasks than there are workers would only keep slots from others.
        ready = len(self.idle) + len(self.kept) + self.starting + len(self.checking)
        most = 0 if self.is_paused else self.settings.concurrency
        waiting = self.startable(most)
        if waiting > ready and not self._may_start(now):
            waiting = ready
        return max(self.active, min(most, self.active + waiting))

    def _needs(self, count: int) -> list[int]:
        """The expected memory of the next tasks, beyond that of a worker that is there for it."""
        tasks = islice(chain(self.isolated, self.queue), count)
        idle = sorted((worker.rss_bytes for worker in self.idle.values()), reverse=True)
        needs = [expected_bytes(task) for task in tasks]
        return [max(0, need - (idle[index] if index < len(idle) else 0)) for index, need in enumerate(needs)]

    def _give_back(self, now: float) -> None:
        share = self.share
        spare = len(share.held) - self.active
        busy_soon = min(spare, self._wanted(now) - self.active)
        slots = share.idle_slots(now, spare - busy_soon)
        if busy_soon > 0:
            slots += share.ended_turns(now, busy_soon, self._needs(busy_soon))
        if slots:
            self._actions.append(GiveSlots(tuple(slots)))
            self._slots_changed()
            if share.ticket is not None:
                self._look(is_loud=False)  # nobody tells it that the slot is free: it gave it itself
        if share.spare_since is not None and self._linger_timer is None:
            self._linger_timer = self.timers.add(share.linger_until, self._linger_over)

    def _linger_over(self, now: float) -> None:
        self._linger_timer = None  # whoever takes the actions after a tick looks at the spare slots

    def _slots_changed(self) -> None:
        self._set_concurrency()
        self._is_dirty = True

    def _set_concurrency(self) -> None:
        super()._set_concurrency()
        self.concurrency = min(self.concurrency, len(self.share.held))
        self.overhang = max(0, self.active - self.concurrency)

    def _seek(self, now: float) -> None:
        share = self.share
        is_news = share.want(now, self._wanted(now), next(iter(self._needs(1)), 0))
        if is_news and share.ticket is not None:
            self._look(is_loud=True)
        elif is_news:
            self._actions.append(PublishShare(is_loud=True))
        if self._is_member and not (share.held or share.ticket is not None or self.workers):
            self._is_member = False
            self._actions.append(LeaveBudget())

    def _look(self, *, is_loud: bool) -> None:
        if is_loud or not self._is_looking:
            self._is_member = self._is_looking = True
            self._actions.append(LookAtBudget(is_loud))

    def _set_look_timer(self, now: float) -> None:
        self.timers.cancel(self._look_timer)
        when = self.share.look_at
        self._look_timer = None if when is None else self.timers.add(max(when, now), self._look_due)

    def _look_due(self, now: float) -> None:
        self._look_timer = None
        if self._is_member:
            self._look(is_loud=False)

    def _tell_memory(self) -> None:
        change = self.pool_bytes - self._told_bytes
        if not self.workers:
            self._told_bytes = 0
        elif abs(change) > max(_WORTH_TELLING, self._told_bytes // 16):
            self._told_bytes = self.pool_bytes
            self._is_member = True
            self._actions.append(PublishShare(is_loud=change < 0 and self.share.is_memory_wanted))

    # -- what differs from a pool of its own ---------------------------------------------------------------------

    def _send_ahead(self, worker: WorkerRecord, head: TaskRecord) -> None:
        if not self.share.is_contended:  # else the slot could not be given back before those have run as well
            super()._send_ahead(worker, head)


def expected_bytes(task: TaskRecord) -> int:
    """What the task was said to need, 0 where nothing was."""
    return task.spec.expected_bytes or 0
