"""Recorded schedules and fresh ones: the real core and manager keep their promises on an imaginary machine."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tenacity

import agentpool.runtime.manager as real_manager
from agentpool.config import PoolSettings
from agentpool.core.records import TaskSpec
from agentpool.core.retry import RetryPolicy
from agentpool.testing import Coverage, Schedule, Simulator, simulate

SEEDS = sorted((Path(__file__).parent / "seeds").glob("*.json"))
#: The same in a run that nobody watches, so that it cannot fail by chance; elsewhere each run looks somewhere else.
SEED = 0 if os.environ.get("CI") else random.SystemRandom().randrange(1 << 30)


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.stem)
def test_recorded_schedules(path: Path) -> None:
    failure = Simulator().play(Schedule.from_json(json.loads(path.read_text())), is_thorough=True)
    assert failure is None, f"{path.name}: {failure}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fresh_schedules_keep_all_promises_and_reach_all_transitions() -> None:
    Coverage.clear()
    report = Simulator().run(range(20_000), SEED)
    assert not report.failures, (
        f"python -m stress simulate --seed {SEED} --number {report.failures[0].schedule.seed}\n{report.failures[0]}"
    )
    assert report.schedules == 20_000
    assert not report.disagreements, "a rule has changed: bring agentpool.testing.quickcheck up to date"
    missing = [(table, old, new) for table, rows in Coverage.rows().items() for old, new, times in rows if not times]
    assert not missing, f"seed {SEED} reached no {missing}"
    assert {"resolved", "cancelled", "WorkerCrashedError", "QuarantinedError", "TaskTimeoutError", "MemoryLimitError",
            "TaskKilledError", "QueueTimeoutError", "CircuitOpenError", "TaskError"} <= report.ends.keys()


def test_the_rules_themselves_agree() -> None:
    simulator = Simulator()
    for number in range(150):
        failure = simulator.play(Schedule.drawn(3, number), is_thorough=True)
        assert failure is None, str(failure)


def test_a_schedule_replays_exactly() -> None:
    stories = []
    for _ in range(2):
        simulator = Simulator()
        told = []
        for number in (5, 17, 5):
            schedule = Schedule.from_json(json.loads(json.dumps(Schedule.drawn(8, number).as_json())))
            assert schedule == Schedule.drawn(8, number)
            failure, world = simulator._play(schedule, False)
            assert failure is None
            told.append((world.core.story(), world.machine.clock.now, world.oracle.ends))
        assert told[0] == told[2], "what was played in between has left something behind"
        stories.append(told)
    assert stories[0] == stories[1]


def test_any_part_of_a_schedule_is_a_schedule() -> None:
    simulator = Simulator()
    for number in range(40):
        whole = Schedule.drawn(21, number)
        for part in (whole.steps[::2], whole.steps[1::2], whole.steps[::-1], ()):
            failure = simulator.play(Schedule(whole.seed, whole.settings, tuple(part)))
            assert failure is None, str(failure)


def test_ones_own_policy_and_settings() -> None:
    asked: list[int] = []

    class Mine(RetryPolicy):
        def decide(self, *, attempt: int, **about: object) -> float | None:  # type: ignore[override]
            asked.append(attempt)
            return 0.1 if attempt < 3 else None

    report = simulate(300, specs=[TaskSpec(policy=Mine(retry=tenacity.retry_never))], settings=[PoolSettings()])
    assert not report.failures, str(report.failures[0])
    assert max(asked) == 3


def test_a_policy_that_never_stops_is_found() -> None:
    class Endless(RetryPolicy):
        def decide(self, **about: object) -> float | None:  # type: ignore[override]
            return 0.1

    report = simulate(200, specs=[TaskSpec(policy=Endless(retry=tenacity.retry_never))])
    assert report.failures
    assert report.failures[0].rule == "everything_ends"


def test_a_real_pool_beside_it_notices_nothing() -> None:
    state = random.getstate()
    assert not simulate(5).failures
    assert real_manager.time is time
    assert real_manager.threading is threading
    assert random.getstate() == state


def test_the_library_does_not_load_the_kit() -> None:
    program = "import sys, agentpool; agentpool.AgentPool; print([n for n in sys.modules if 'agentpool.testing' in n])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
