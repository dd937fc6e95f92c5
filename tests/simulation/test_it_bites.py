"""The simulator finds what is broken: schedulers, managers and rules, one promise at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_schedulers import BROKEN

from agentpool.core.invariants import RULES
from agentpool.core.scheduler import Scheduler
from agentpool.testing import FakeChannel, Simulator, shrunken
from agentpool.testing.quickcheck import COVERED, is_well

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_scheduler_is_found(broken: type[Scheduler]) -> None:
    report = Simulator(broken).run(range(BROKEN[broken]))
    assert report.failures, f"{BROKEN[broken]} schedules, and nobody noticed: {broken.__doc__}"


def test_a_failure_is_cut_down_and_tells_its_story() -> None:
    (broken,) = (cls for cls in BROKEN if cls.__name__ == "RunsAgainUnasked")
    simulator = Simulator(broken)
    (failure,) = simulator.run(range(100)).failures
    small = shrunken(simulator, failure)
    assert small.rule == failure.rule == "no_second_attempt_unasked"
    assert len(small.schedule.steps) <= 5 < len(failure.schedule.steps)
    assert simulator.play(small.schedule) == small
    assert "exited with code" in small.story or "was killed by" in small.story
    assert "really began 2" in small.story


# -- the manager ------------------------------------------------------------------------------------------------------


def _manager(simulator: Simulator) -> Any:
    return simulator._stage._manager_module.Manager


def _reception(simulator: Simulator) -> Any:
    """As the lowest room of that manager has it."""
    lowest = next(room for room in _manager(simulator).__mro__ if room.__name__ == "Changes")
    return lowest.__init__.__globals__["Reception"]


def _sleeps_too_long(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline that a user's thread sets does not wake the manager."""
    monkeypatch.setattr(_manager(simulator), "_wake_for_deadline", lambda self: None)


def _leaves_the_outbox(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead worker had not sent is not looked for."""
    monkeypatch.setattr(FakeChannel, "unsent_results", lambda self: [])


def _leaves_last_results(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death is told before the results that were in the pipe by then."""
    read = FakeChannel.read_results
    monkeypatch.setattr(FakeChannel, "read_results",
                        lambda self, *, is_last=False: ([], True) if is_last else read(self))


def _misses_the_keepers_death(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper is gone, and its workers are waited for."""
    monkeypatch.setattr(_reception(simulator), "_keeper_lost", lambda self: None)


def _settles_under_the_lock(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks of users run with the pool's lock held."""
    resolve = _manager(simulator)._resolve

    def locked(self: Any, *about: Any) -> None:
        with self.lock:
            resolve(self, *about)

    monkeypatch.setattr(_manager(simulator), "_resolve", locked)


def _forgets_to_go_on_writing(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full pipe is not written to again."""
    monkeypatch.setattr(_reception(simulator), "watch_writing", lambda self, link: None)


def _believes_what_was_taken_back(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking a call back is taken for granted, though it has begun."""

    def revoke(self: FakeChannel, task_id: int) -> bool:
        slot = self._slots.pop(task_id, None)
        self.revoked_slots.add(-1 if slot is None else slot)
        return slot is not None

    monkeypatch.setattr(FakeChannel, "revoke", revoke)


def _leaks(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The channel of a failed start is not closed."""
    monkeypatch.setattr(FakeChannel, "close", lambda self: None)


@pytest.mark.parametrize("break_it", [
    _sleeps_too_long, _leaves_the_outbox, _leaves_last_results, _misses_the_keepers_death, _settles_under_the_lock,
    _forgets_to_go_on_writing, _believes_what_was_taken_back, _leaks,
], ids=lambda break_it: break_it.__name__.strip("_"))
def test_a_broken_manager_is_found(break_it: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = Simulator()
    break_it(simulator, monkeypatch)
    assert simulator.run(range(4000)).failures, f"4,000 schedules, and nobody noticed: {break_it.__doc__}"


# -- the rules --------------------------------------------------------------------------------------------------------


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_for_quickcheck", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_broken_rules = _load(TESTS / "unit" / "test_core_invariants.py")
_Bench = _load(TESTS / "unit" / "conftest.py").Bench


def test_every_rule_is_looked_at() -> None:
    assert {rule.__name__ for rule in RULES} == COVERED, "a new rule: add it to agentpool.testing.quickcheck"


@pytest.mark.parametrize(("rule", "change"), _broken_rules.BREAKS)
def test_the_quick_check_notices_each_broken_rule(rule: str, change: Callable[[Any], None]) -> None:
    bench = _broken_rules.scene(_Bench)
    assert is_well(bench.core)
    change(bench)
    assert not is_well(bench.core)
