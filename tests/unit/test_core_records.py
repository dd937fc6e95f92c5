from __future__ import annotations

from agentpool.core.records import TaskRecord, TaskSpec, WorkerRecord


def test_records_say_what_a_defects_report_needs() -> None:
    task = TaskRecord(7, TaskSpec(name="parse"), None)
    task.attempts = 2
    assert repr(task) == "<task 7 parse QUEUED attempts=2>"
    worker = WorkerRecord(3, 0.0)
    worker.pid = 4711
    assert repr(worker) == "<worker 3 pid=4711 STARTING done=0>"


def test_records_have_slots_only_as_there_may_be_millions() -> None:
    for record in (TaskRecord(1, TaskSpec(), None), WorkerRecord(1, 0.0), TaskSpec()):
        assert not hasattr(record, "__dict__")
