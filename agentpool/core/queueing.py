"""The queue of tasks that wait for a worker: by priority, first in first out within one, bounded by the scheduler.

A deque per priority: pushing and popping cost the same whatever the length, and nearly every pool has one priority.
A cancelled task is dropped lazily: it stays in its deque, in state RESOLVED, until it comes to the front, or until
there are more such than queued ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from agentpool.core.records import TaskRecord
from agentpool.core.transitions import TaskState

__all__ = ["TaskQueue"]

_QUEUED = TaskState.QUEUED
#: Dropped tasks stay where they are until they outnumber the queued ones and are at least this many.
_COMPACT_ABOVE: Final = 64


class TaskQueue:
    """Tasks in state QUEUED. `len()` counts only those."""

    __slots__ = ("_dropped", "_front", "_lanes", "_order", "length")

    def __init__(self) -> None:
        self._lanes: dict[int, deque[TaskRecord]] = {}
        #: priorities that have a lane, highest first
        self._order: list[int] = []
        #: the lane of the highest priority, where there is one
        self._front: deque[TaskRecord] = deque()
        #: `len()` of this queue, for the hot path, where a call would count
        self.length = 0
        #: the others
        self._dropped = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[TaskRecord]:
        """The queued tasks in the order in which they will run."""
        for priority in self._order:
            for task in self._lanes[priority]:
                if task.state is _QUEUED:
                    yield task

    def _lane(self, priority: int) -> deque[TaskRecord]:
        lane = self._lanes.get(priority)
        if lane is None:
            lane = self._lanes[priority] = deque()
            self._order.append(priority)
            self._order.sort(reverse=True)
            self._front = self._lanes[self._order[0]]
        return lane

    def push(self, task: TaskRecord) -> None:
        """Queue a task behind those of its priority."""
        self._lane(task.spec.priority).append(task)
        self.length += 1

    def push_front(self, task: TaskRecord) -> None:
        """Queue a task before those of its priority: it had its turn already and was given back."""
        self._lane(task.spec.priority).appendleft(task)
        self.length += 1

    def peek(self) -> TaskRecord | None:
        """The next task, left where it is; None: the queue is empty."""
        front = self._front
        if front and front[0].state is _QUEUED:
            return front[0]
        while self._order:
            priority = self._order[0]
            lane = self._lanes[priority]
            self._front = lane
            while lane:
                if lane[0].state is _QUEUED:
                    return lane[0]
                lane.popleft()
                self._dropped -= 1
            del self._lanes[priority]
            del self._order[0]
        return None

    def pop(self) -> TaskRecord:
        """Take the next task. Raises IndexError where the queue is empty."""
        task = self.peek()
        if task is None:
            raise IndexError("pop from an empty queue")
        self._front.popleft()
        self.length -= 1
        return task

    def discard(self) -> None:
        """Account for one task that left the queue by leaving state QUEUED."""
        self.length -= 1
        self._dropped += 1
        if self._dropped > _COMPACT_ABOVE and self._dropped > self.length:
            # While nothing can run, nothing comes to the front: without this, tasks that time out would pile up.
            self._lanes = {
                priority: lane
                for priority in self._order
                if (lane := deque(task for task in self._lanes[priority] if task.state is _QUEUED))
            }
            self._order = list(self._lanes)
            self._front = self._lanes[self._order[0]] if self._order else deque()
            self._dropped = 0

    def clear(self) -> list[TaskRecord]:
        """Empty the queue; returns what was queued, in order."""
        tasks = list(self)
        self._lanes.clear()
        self._order.clear()
        self._front = deque()
        self.length = self._dropped = 0
        return tasks
