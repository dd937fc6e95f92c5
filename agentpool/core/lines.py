"""The queue with lines: tasks that need more than a free worker stand in a line of their own, and hold up nobody else.

A line for each group and session, and one for all others that reserve memory: within one, by priority and first in
first out. `TaskQueue`'s own methods see the other tasks, the plain ones; `len()` and iteration all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from agentpool.core.queueing import TaskQueue
from agentpool.core.records import TaskRecord

__all__ = ["LinedQueue", "comes_before"]


def _order(task: TaskRecord) -> tuple[int, int]:
    return -task.spec.priority, task.id


def comes_before(one: TaskRecord, other: TaskRecord) -> bool:
    """Would the one go first, could both begin? By priority, then in order of submission."""
    return _order(one) < _order(other)


class LinedQueue(TaskQueue):
    """See the module. `peek` and `pop` are of plain tasks."""

    __slots__ = ("line_length", "lines")

    def __init__(self) -> None:
        super().__init__()
        #: line -> its tasks; a line that ran empty is dropped lazily
        self.lines: dict[object, TaskQueue] = {}
        #: tasks in all lines together
        self.line_length = 0

    @property
    def plain_length(self) -> int:
        """Tasks that stand in no line."""
        return self.length - self.line_length

    def __iter__(self) -> Iterator[TaskRecord]:
        """The queued tasks in the order in which they would run if no line held one up."""
        if not self.line_length:
            return super().__iter__()
        return merge(super().__iter__(), *self.lines.values(), key=_order)

    def push(self, task: TaskRecord) -> None:
        """Queue a task behind those of its priority."""
        line = task.spec.line
        if line is None:
            self._lane(task.spec.priority).append(task)
        else:
            self._line(line).push(task)
            self.line_length += 1
        self.length += 1

    def push_front(self, task: TaskRecord) -> None:
        """Queue a task before those of its priority: it had its turn already and was given back."""
        line = task.spec.line
        if line is None:
            super().push_front(task)
        else:
            self._line(line).push_front(task)
            self.line_length += 1
            self.length += 1

    def _line(self, line: object) -> TaskQueue:
        found = self.lines.get(line)
        if found is None:
            found = self.lines[line] = TaskQueue()
        return found

    def heads(self) -> list[TaskRecord]:
        """The first task of each line, in their order."""
        found = []
        for name, line in list(self.lines.items()):
            head = line.peek()
            if head is None:
                del self.lines[name]
            else:
                found.append(head)
        found.sort(key=_order)
        return found

    def take(self, head: TaskRecord) -> None:
        """Take the first task out of its line."""
        self.lines[head.spec.line].pop()
        self.line_length -= 1
        self.length -= 1

    def discard(self, task: TaskRecord | None = None) -> None:
        """Account for a task that left the queue by leaving state QUEUED; None: a plain one."""
        if task is None or task.spec.line is None:
            super().discard()
        else:
            self.lines[task.spec.line].discard()
            self.line_length -= 1
            self.length -= 1

    def clear(self) -> list[TaskRecord]:
        """Empty the queue; returns what was queued, in order."""
        tasks = list(self)
        super().clear()
        self.lines.clear()
        self.line_length = 0
        return tasks
