from __future__ import annotations

import runpy
import sys

import pytest

from agentpool.core.transitions import (
    BREAKER_TRANSITIONS,
    TASK_TRANSITIONS,
    WORKER_TRANSITIONS,
    BreakerState,
    TaskState,
    WorkerState,
    allowed_masks,
    mermaid,
)

TABLES = [(TaskState, TASK_TRANSITIONS), (WorkerState, WORKER_TRANSITIONS), (BreakerState, BREAKER_TRANSITIONS)]


@pytest.mark.parametrize(("states", "table"), TABLES)
def test_a_table_has_every_state_and_none_follows_itself(states, table) -> None:
    assert list(table) == list(states)
    for state, successors in table.items():
        assert state not in successors
        assert all(when for when in successors.values())


@pytest.mark.parametrize(("states", "table"), TABLES)
def test_every_state_can_be_reached_from_the_first(states, table) -> None:
    reached, waiting = {states(0)}, [states(0)]
    while waiting:
        more = set(table[waiting.pop()]) - reached
        reached |= more
        waiting += more
    assert reached == set(states)


def test_resolved_and_gone_are_the_only_ends() -> None:
    assert [state for state, after in TASK_TRANSITIONS.items() if not after] == [TaskState.RESOLVED]
    assert [state for state, after in WORKER_TRANSITIONS.items() if not after] == [WorkerState.GONE]
    assert all(BREAKER_TRANSITIONS.values())


@pytest.mark.parametrize(("states", "table"), TABLES)
def test_masks_say_what_the_table_says(states, table) -> None:
    masks = allowed_masks(table)
    for state in states:
        assert [after for after in states if masks[state] >> after & 1] == sorted(table[state])


def test_labels_are_what_users_see() -> None:
    assert [state.label for state in BreakerState] == ["closed", "open", "half_open", "forced_open"]


def test_the_diagram_has_an_arrow_for_each_transition_and_the_end() -> None:
    lines = mermaid(TASK_TRANSITIONS).splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert "    QUEUED --> RUNNING: sent to a free worker" in lines
    assert "    RESOLVED --> [*]" in lines
    assert len(lines) == 2 + sum(map(len, TASK_TRANSITIONS.values()))


def test_as_a_script_it_prints_the_diagrams_for_the_docs(capsys, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "agentpool.core.transitions")
    runpy.run_module("agentpool.core.transitions", run_name="__main__")
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("###")] == ["### task", "### worker", "### breaker"]
    assert text.count("stateDiagram-v2") == 3
