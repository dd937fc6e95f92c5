"""The queue with lines."""

from __future__ import annotations

from agentpool.core.lines import LinedQueue, comes_before
from agentpool.core.records import TaskRecord, TaskSpec
from agentpool.core.transitions import TaskState


def made(number: int, **spec) -> TaskRecord:
    return TaskRecord(number, TaskSpec(**spec), None)


def test_plain_tasks_and_those_in_lines_are_counted_together_and_popped_apart() -> None:
    queue = LinedQueue()
    first, second, third = made(1, group="g", group_limit=1), made(2), made(3, expected_bytes=5)
    for task in (first, second, third):
        queue.push(task)
    assert (len(queue), queue.plain_length, queue.line_length) == (3, 1, 2)
    assert queue.peek() is second
    assert queue.pop() is second
    assert queue.peek() is None
    assert queue.heads() == [first, third]


def test_it_is_looked_at_in_the_order_in_which_tasks_would_run() -> None:
    queue = LinedQueue()
    tasks = [made(1), made(2, group="g", group_limit=1), made(3, priority=1), made(4, expected_bytes=5, priority=1),
             made(5, group="h", group_limit=1), made(6)]
    for task in tasks:
        queue.push(task)
    assert [task.id for task in queue] == [3, 4, 1, 2, 5, 6]
    assert comes_before(tasks[2], tasks[3])
    assert not comes_before(tasks[0], tasks[3])


def test_each_group_has_a_line_of_its_own_by_priority() -> None:
    queue = LinedQueue()
    low, high, other = (made(1, group="g", group_limit=1), made(2, group="g", group_limit=1, priority=9),
                        made(3, group="h", group_limit=1))
    for task in (low, high, other):
        queue.push(task)
    assert queue.heads() == [high, other]
    queue.take(high)
    assert queue.heads() == [low, other]
    queue.push_front(high)
    assert queue.heads() == [high, other]


def test_what_leaves_is_accounted_where_it_stood() -> None:
    queue = LinedQueue()
    lined, plain = made(1, group="g", group_limit=1), made(2)
    queue.push(lined)
    queue.push(plain)
    lined.state = TaskState.RESOLVED
    queue.discard(lined)
    assert (len(queue), queue.line_length) == (1, 0)
    assert queue.heads() == []
    assert queue.lines == {}, "an empty line is dropped"
    plain.state = TaskState.RESOLVED
    queue.discard(plain)
    assert len(queue) == 0


def test_a_group_without_a_limit_is_only_a_name() -> None:
    assert made(1, group="g").spec.line is None
    assert made(1, group="g", expected_bytes=1).spec.line == made(1, expected_bytes=2).spec.line


def test_clearing_takes_all() -> None:
    queue = LinedQueue()
    tasks = [made(1), made(2, group="g", group_limit=1), made(3)]
    for task in tasks:
        queue.push(task)
    assert queue.clear() == tasks
    assert (len(queue), queue.line_length, queue.heads()) == (0, 0, [])


def test_one_that_comes_back_into_its_line_counts_once() -> None:
    queue = LinedQueue()
    queue.push_front(TaskRecord(1, TaskSpec(group="g", group_limit=1), None))
    assert (len(queue), queue.line_length, queue.plain_length) == (1, 1, 0)
