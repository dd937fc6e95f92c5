"""One pool's share of the budget that all pools of a user have together: how many slots it wants, takes and gives back.

A slot is the right to run one agent. Pure, like everything in `core`: what the other pools do is told by a `View`,
which somebody made by looking; what is to be done comes back as numbers of slots. One thread at a time.

The line: a pool that wants a slot draws a ticket, the time at which it began to wait. A free slot belongs to the first
in line whose budget has that slot; slots are taken from the top, since a pool with a smaller budget can use only the
low ones. While somebody waits, nobody takes more than one slot at a time, and a slot that had its turn is given back
with the next end of a task. Whoever stands ahead and does not react (a stopped process) is passed over after a time;
what it holds stays its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agentpool.config import MB, HostBudget

__all__ = ["Member", "Share", "View"]

#: Seconds for which a slot may be used for one task after another although others wait: to hand it over takes about
#: half a millisecond, which should be little beside it.
TURN_SECONDS: Final = 0.1
#: Seconds for which a slot is kept without a task while nobody waits: the next task may come at once.
LINGER_SECONDS: Final = 0.05
#: Seconds that one ahead in line has to take what is free, before it is asked, and then to react, before it is passed.
PATIENCE_SECONDS: Final = 1.0
#: Seconds between two looks while the pool holds a slot and is not alone: memory grows without anybody's notice.
LOOK_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What another pool says of itself.

    agents: of its budget. slots: how many it holds. ticket: since when it waits. looked_at: when it last looked.
    """

    id: str
    agents: int = 0
    slots: int = 0
    committed_bytes: int = 0
    ticket: float | None = None
    need_bytes: int = 0
    wants_memory: bool = False
    looked_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a look showed. `taken`: slots that others have; `members`: the others; `own_id`: how this pool is known.

    `is_blind`: somebody's end would not be noticed, so it is worth to look again by time.
    """

    own_id: str
    taken: frozenset[int]
    members: tuple[Member, ...]
    is_blind: bool = False


class _Suspect:
    __slots__ = ("is_asked", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.is_asked = False


class Share:
    """See the module. Public attributes are for reading only."""

    def __init__(self, budget: HostBudget) -> None:
        self.agents = budget.agents
        self.memory_bytes = None if budget.memory_mb is None else int(budget.memory_mb * MB)
        #: slot -> when it was taken
        self.held: dict[int, float] = {}
        #: slots in which no task was run yet since they were taken
        self.unused: set[int] = set()
        #: since when this pool waits for a slot; None: it does not
        self.ticket: float | None = None
        #: expected memory of the task that is first in this pool's queue
        self.need_bytes = 0
        #: what `need_bytes` of coming tasks the slots in `unused` were taken for
        self.cleared_bytes = 0
        #: somebody else may be waiting
        self.is_contended = False
        #: somebody else waits for memory
        self.is_memory_wanted = False
        #: what this pool waits for is memory
        self.wants_memory = False
        #: all pools together use more than the budget
        self.is_over = False
        #: others take part
        self.has_company = False
        #: since when slots are held for no task
        self.spare_since: float | None = None
        #: when to look again; None: not by time
        self.look_at: float | None = None
        #: somebody ahead is to be asked whether it is still there
        self.is_asking = False
        self.waits_for = ""
        self._suspects: dict[str, _Suspect] = {}
        self._deaf: dict[str, float] = {}

    # -- wanting -------------------------------------------------------------------------------------------------

    def want(self, now: float, slots: int, need_bytes: int) -> bool:
        """So many slots could be used now. True: the line was entered or left, which others are to be told."""
        self.need_bytes = need_bytes
        is_waiting = slots > len(self.held)
        if is_waiting is (self.ticket is not None):
            return False
        self.ticket = now if is_waiting else None
        if not is_waiting:
            self.wants_memory = False
            self.waits_for = ""
            self._suspects.clear()
        return True

    def seen(self, now: float, view: View, needs: Sequence[int], own_bytes: int) -> list[int]:
        """A look at the others. Returns the slots to take now; `needs` has the expected memory of each task to come."""
        waiting = [member for member in view.members if member.ticket is not None]
        self.is_contended = bool(waiting)
        self.is_memory_wanted = any(member.wants_memory for member in waiting)
        self.has_company = bool(view.members)
        used = own_bytes + sum(member.committed_bytes for member in view.members)
        runs_elsewhere = bool(view.taken) or any(member.slots for member in view.members)
        self.is_over = self.memory_bytes is not None and used > self.memory_bytes and runs_elsewhere
        self.look_at = now + LOOK_SECONDS if self.held and view.members else None
        if self.ticket is None:
            return []
        if view.is_blind:
            self._look_by(now + PATIENCE_SECONDS)
        mine = (self.ticket, view.own_id)
        ahead = [member for member in waiting if (member.ticket, member.id) < mine and not self._is_deaf(member)]
        free, blockers = self._free_for_me(view, ahead)
        self._suspect(now, blockers)
        most = 1 if waiting else len(needs)
        slots = free[: min(most, len(needs))]
        used += sum(member.need_bytes for member in ahead)
        taken = self._affordable(slots, needs, used, runs_elsewhere or bool(self.held))
        if self.wants_memory:
            self._look_by(now + LOOK_SECONDS)
        return taken

    def _look_by(self, when: float) -> None:
        self.look_at = when if self.look_at is None else min(when, self.look_at)

    def _is_deaf(self, member: Member) -> bool:
        since = self._deaf.get(member.id)
        if since is not None and member.looked_at > since:
            del self._deaf[member.id]
            return False
        return since is not None

    def _free_for_me(self, view: View, ahead: list[Member]) -> tuple[list[int], list[Member]]:
        """Free slots from the top, without one for each that stands ahead; and those that such a one was left to."""
        free = [slot for slot in reversed(range(self.agents)) if slot not in view.taken and slot not in self.held]
        blockers = []
        for member in sorted(ahead, key=lambda member: (member.ticket, member.id)):
            theirs = next((slot for slot in free if slot < member.agents), None)
            if theirs is not None:
                free.remove(theirs)
                blockers.append(member)
        self.waits_for = "" if free else (f"{len(blockers)} ahead in line" if blockers else "a slot")
        return free, blockers

    def _suspect(self, now: float, blockers: list[Member]) -> None:
        """Whoever leaves a slot free that is its own for too long is asked, and passed over where it does not react."""
        self.is_asking = False
        self._suspects = {
            member.id: self._suspects.get(member.id) or _Suspect(now) for member in blockers
        }
        for member in blockers:
            suspect = self._suspects[member.id]
            if now < suspect.since + PATIENCE_SECONDS:
                continue
            if suspect.is_asked and member.looked_at < suspect.since:
                self._deaf[member.id] = now
                del self._suspects[member.id]
            else:
                suspect.is_asked = not suspect.is_asked  # it has looked, and waits for something else: from the start
                self.is_asking |= suspect.is_asked
                suspect.since = now
        if blockers:
            self._look_by(min((suspect.since for suspect in self._suspects.values()), default=now) + PATIENCE_SECONDS)

    def _affordable(self, slots: list[int], needs: Sequence[int], used: int, somebody_runs: bool) -> list[int]:
        """As many of these slots as the memory allows; one, whatever it says, where nobody runs anything."""
        self.wants_memory = False
        limit = self.memory_bytes
        taken: list[int] = []
        cleared = 0
        for slot, need in zip(slots, needs, strict=False):
            if limit is not None and used + need > limit and (somebody_runs or taken):
                self.wants_memory = not taken
                figures = f"{used / MB:.0f} of {limit / MB:.0f} MB are in use, {need / MB:.0f} are needed"
                self.waits_for = f"memory: {figures}"
                break
            taken.append(slot)
            used += need
            cleared += need
        self.cleared_bytes = cleared
        return taken

    # -- having --------------------------------------------------------------------------------------------------

    def took(self, now: float, slots: Sequence[int]) -> None:
        """These slots are this pool's now."""
        for slot in slots:
            self.held[slot] = now
            self.unused.add(slot)
        if slots:
            # Who wants more stands in line again, behind those who wait already.
            self.ticket = None
            self._suspects.clear()
        else:
            self.cleared_bytes = 0

    def used(self, running: int) -> None:
        """So many tasks run: as many slots are in use."""
        if self.unused and running > len(self.held) - len(self.unused):
            for slot in list(self.unused)[: running - (len(self.held) - len(self.unused))]:
                self.unused.discard(slot)
            if not self.unused:
                self.cleared_bytes = 0

    def idle_slots(self, now: float, idle: int) -> list[int]:
        """Which slots are given back of those for which there is no task."""
        if idle <= 0:
            self.spare_since = None
            return []
        if self.spare_since is None:
            self.spare_since = now
        if not self.is_contended and now < self.linger_until:
            return []
        return self._choose(list(self.held), idle)

    @property
    def linger_until(self) -> float:
        """When slots without a task are given back although nobody waits for them."""
        return (self.spare_since or 0.0) + LINGER_SECONDS

    def ended_turns(self, now: float, free: int, needs: Sequence[int]) -> list[int]:
        """Which slots are given back before tasks that wait run in them. `needs`: as in `seen`."""
        if free <= 0:
            return []
        if self.memory_bytes is not None and sum(needs) > self.cleared_bytes:
            return self._choose(list(self.held), free)  # a task that says what it needs is weighed for itself
        used = [slot for slot in self.held if slot not in self.unused]
        if self.is_over:
            return self._choose(used, free)
        if self.is_contended:
            return self._choose([slot for slot in used if now >= self.held[slot] + TURN_SECONDS], free)
        return []

    def _choose(self, candidates: list[int], most: int) -> list[int]:
        slots = candidates[:most]
        for slot in slots:
            del self.held[slot]
            self.unused.discard(slot)
        if not self.unused:
            self.cleared_bytes = 0
        if not self.held:
            self.spare_since = None
        return slots

    def rang(self) -> bool:
        """Something changed elsewhere. True: it is worth a look now."""
        self.is_contended = True
        return self.ticket is not None or (not self.held and self.memory_bytes is not None)
