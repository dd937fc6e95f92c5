from __future__ import annotations

import pytest

from agentpool.core.queueing import TaskQueue
from agentpool.core.records import TaskRecord, TaskSpec
from agentpool.core.transitions import TaskState


def task(number: int, priority: int = 0) -> TaskRecord:
    return TaskRecord(number, TaskSpec(priority=priority), None)


def fill(*entries: tuple[int, int]) -> tuple[TaskQueue, dict[int, TaskRecord]]:
    queue = TaskQueue()
    tasks = {number: task(number, priority) for number, priority in entries}
    for entry in tasks.values():
        queue.push(entry)
    return queue, tasks


def drop(queue: TaskQueue, entry: TaskRecord) -> None:
    entry.state = TaskState.RESOLVED
    queue.discard()


def drained(queue: TaskQueue) -> list[int]:
    return [queue.pop().id for _ in range(len(queue))]


def test_first_in_first_out_within_a_priority_and_higher_ones_first() -> None:
    queue, _ = fill((1, 0), (2, 5), (3, 0), (4, -1), (5, 5))
    assert [entry.id for entry in queue] == [2, 5, 1, 3, 4]
    assert drained(queue) == [2, 5, 1, 3, 4]
    assert not queue


def test_what_comes_back_goes_before_its_priority_not_before_others() -> None:
    queue, _ = fill((1, 0), (2, 5))
    queue.push_front(task(3))
    assert drained(queue) == [2, 3, 1]


def test_peek_leaves_the_task_where_it_is() -> None:
    queue, tasks = fill((1, 0))
    assert queue.peek() is tasks[1]
    assert queue.peek() is tasks[1]
    assert len(queue) == 1


def test_an_empty_queue_has_nothing() -> None:
    queue = TaskQueue()
    assert queue.peek() is None
    with pytest.raises(IndexError, match="empty"):
        queue.pop()


def test_a_cancelled_task_does_not_count_and_does_not_come_up() -> None:
    queue, tasks = fill((1, 9), (2, 0), (3, 0))
    drop(queue, tasks[1])
    drop(queue, tasks[2])
    assert len(queue) == 1
    assert [entry.id for entry in queue] == [3]
    assert queue.pop() is tasks[3]
    assert queue.peek() is None


def test_cancelled_tasks_do_not_pile_up_while_nothing_runs() -> None:
    queue, tasks = fill((1, 0), (2, 3))
    for number in range(10, 5000):
        entry = task(number, number % 7)
        queue.push(entry)
        drop(queue, entry)
    assert len(queue) == 2
    assert sum(map(len, queue._lanes.values())) < 200
    assert drained(queue) == [2, 1]
    assert tasks[1].state is TaskState.QUEUED


def test_lanes_of_priorities_that_are_used_up_are_forgotten() -> None:
    queue, _ = fill(*((number, number) for number in range(100)))
    drained(queue)
    assert queue.peek() is None
    assert not queue._lanes


def test_clear_returns_what_was_queued_in_order() -> None:
    queue, tasks = fill((1, 0), (2, 5), (3, 0))
    drop(queue, tasks[1])
    assert [entry.id for entry in queue.clear()] == [2, 3]
    assert len(queue) == 0
    queue.push(task(9))
    assert drained(queue) == [9]
