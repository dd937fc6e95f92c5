"""What tasks share by more than free workers: places of a group, and memory that is promised before it is used.

The fifth of the seven rooms of one state machine, see `crew`. A task with such a need stands in a line of its own (see
`lines`) and begins when its need is met; those who need nothing overtake it. Among those who wait for memory nobody is
overtaken: a large need would never be met otherwise. Pure; one thread at a time.
"""

from __future__ import annotations

from abc import abstractmethod

from agentpool.config import PoolSettings
from agentpool.core import failures
from agentpool.core.crew import HOST_READING_AGE
from agentpool.core.lines import comes_before
from agentpool.core.operations import Operations
from agentpool.core.records import HostState, TaskRecord, WorkerRecord

__all__ = ["Rationing"]


class Rationing(Operations):
    """See the module."""

    def __init__(self, settings: PoolSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        #: group -> its tasks that run
        self.groups: dict[str, int] = {}
        #: sum of `reserved_bytes` of `workers`: memory that was promised and is not in their readings yet
        self.reserved_bytes = 0
        #: a task that had memory promised has ended since the last reading of the host
        self._is_reading_old = False

    @abstractmethod
    def _choose(self, task: TaskRecord) -> WorkerRecord:
        """The best idle worker for a task; there is one."""

    # -- who is next ---------------------------------------------------------------------------------------------

    def _next_in_line(self, now: float) -> tuple[WorkerRecord, TaskRecord] | None:
        """While tasks stand in lines: who begins next, and where; it is taken out of the queue. None: nobody may."""
        queue = self.queue
        while hopeless := [task for task in queue.heads() if self._never_fits(task)]:
            for task in hopeless:
                queue.take(task)
                self._resolve(task, False, failures.never_fits(task, self._givable_bytes()))
        plain = queue.peek() if self.idle else None
        self.is_memory_awaited = False
        for task in queue.heads():
            if plain is not None and comes_before(plain, task):
                break
            worker = self._worker_for(now, task)
            if worker is not None:
                queue.take(task)
                return worker, task
        return None if plain is None else (self._choose(plain), queue.pop())

    def _worker_for(self, now: float, task: TaskRecord) -> WorkerRecord | None:
        """Where this task may begin now; None: nowhere."""
        worker = self._choose(task) if self.idle else None
        return worker if self._admits(now, task, worker) else None

    def _admits(self, now: float, task: TaskRecord, worker: WorkerRecord | None) -> bool:
        """Is all there that it needs besides a worker? None: it would be a new one."""
        if self._group_room(task) <= 0:
            return False
        if task.spec.expected_bytes is None:
            return True
        if self.is_memory_awaited or not self._is_reading_fresh(now) or not self._fits(task, worker):
            self.is_memory_awaited = True
            self._watch_host(now)  # where no worker is left nobody else would look again
            return False
        return True

    def _line_demand(self, most: int) -> int:
        """How many of those in lines could begin if there were more workers; `most` is enough."""
        count, free = 0, self._free_bytes()
        for line in self.queue.lines.values():
            head = line.peek()
            room = 0 if head is None else min(self._line_room(head), most - count)
            for task in line:
                if room <= 0:
                    break
                if task.spec.expected_bytes is not None:
                    if free is not None and task.spec.expected_bytes > free:
                        break
                    free = None if free is None else free - task.spec.expected_bytes
                room -= 1
                count += 1
        return count

    def _line_room(self, head: TaskRecord) -> int:
        """How many of this line could begin if they had workers and memory."""
        return self._group_room(head)

    # -- groups --------------------------------------------------------------------------------------------------

    def _group_room(self, task: TaskRecord) -> int:
        """How many more of its group may run; what is in no group has room for itself."""
        spec = task.spec
        if spec.group is None or spec.group_limit is None:
            return self.settings.max_workers
        return spec.group_limit - self.groups.get(spec.group, 0)

    # -- memory --------------------------------------------------------------------------------------------------

    def _givable_bytes(self) -> int | None:
        """Memory that could be promised if nothing used any; None: not measured yet."""
        host = self.governor.host
        return None if host is None else host.total_bytes - self.governor.floor_bytes(host)

    def _free_bytes(self) -> int | None:
        """Memory that can be promised by the last reading; None: not measured yet."""
        host = self.governor.host
        if host is None:
            return None
        return host.available_bytes - self.governor.floor_bytes(host) - self.reserved_bytes

    def _never_fits(self, task: TaskRecord) -> bool:
        givable = self._givable_bytes()
        return task.spec.expected_bytes is not None and givable is not None and task.spec.expected_bytes > givable

    def _fits(self, task: TaskRecord, worker: WorkerRecord | None) -> bool:
        """Is there memory for it in this worker, or in a new one? What the worker holds already is part of it."""
        free = self._free_bytes()
        need = (task.spec.expected_bytes or 0) - (0 if worker is None else worker.rss_bytes)
        return need <= 0 or free is None or need <= free

    def _is_reading_fresh(self, now: float) -> bool:
        """Otherwise it is asked for, and comes back to placing."""
        at = self.governor.sampled_at
        if at is not None and now - at <= HOST_READING_AGE and not self._is_reading_old:
            return True
        self._ask_host()
        return False

    def host_sampled(self, now: float, host: HostState, cpu_count: int = 1) -> None:
        """A reading of the machine.

        Of what was promised, the part that the workers' readings show by now is in this reading as well. What they took
        since counts twice until the next one: that is the safe side.
        """
        self._is_reading_old = False
        if self.reserved_bytes:
            for worker in self.workers.values():
                if worker.reserved_bytes:
                    self._reserve(worker, self._unseen_bytes(worker))
        super().host_sampled(now, host, cpu_count)

    def _unseen_bytes(self, worker: WorkerRecord) -> int:
        spec = worker.ration
        expected = None if spec is None else spec.expected_bytes
        return 0 if expected is None else max(0, expected - worker.rss_bytes)

    def _reserve(self, worker: WorkerRecord, reserved_bytes: int) -> None:
        self.reserved_bytes += reserved_bytes - worker.reserved_bytes
        worker.reserved_bytes = reserved_bytes

    # -- taking and giving back ----------------------------------------------------------------------------------

    def _take_ration(self, worker: WorkerRecord, task: TaskRecord) -> None:
        """A task with such a need begins."""
        spec = worker.ration = task.spec
        if spec.group is not None:
            self.groups[spec.group] = self.groups.get(spec.group, 0) + 1
        self._reserve(worker, self._unseen_bytes(worker))

    def _return_ration(self, worker: WorkerRecord) -> None:
        """It is in its worker no longer."""
        spec, worker.ration = worker.ration, None
        assert spec is not None
        if spec.group is not None:
            left = self.groups[spec.group] - 1
            if left:
                self.groups[spec.group] = left
            else:
                del self.groups[spec.group]
        if spec.expected_bytes is not None:
            self._reserve(worker, 0)
            self._is_reading_old = True
        self._is_dirty = True

    def _why_it_waits(self, task: TaskRecord) -> str:
        """For the error of one that waited too long: what it waited for, "" where that was only a free worker."""
        spec = task.spec
        if self._group_room(task) <= 0:
            return f"; its group {spec.group!r} ran {spec.group_limit} at once all the time (group_limit)"
        if spec.expected_bytes is not None and self.is_memory_awaited:
            return failures.memory_awaited(spec.expected_bytes, self._free_bytes(), self.reserved_bytes)
        return ""
