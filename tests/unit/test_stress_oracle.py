"""Whom the oracle of a stress run blames for a task that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stress.faults import Mark
from stress.oracle import _Blame, _Journal, _Task


def journal(tmp_path: Path, *lines: str) -> _Journal:
    (tmp_path / "journal").write_text("".join(f"{line}\n" for line in lines))
    return _Journal(tmp_path / "journal")


def failed(at: float, pid: int = 0) -> _Task:
    return _Task(outcome="failed", settled_at=at, pid=pid)


@pytest.mark.parametrize(("began", "settled", "is_explained"), [
    (100.0, 100.2, True),  # in the process that an earlier task had left about to die
    (99.0, 99.5, False),  # before
    (400.0, 400.2, False),  # long after: the number is another process's by now
    (700.0, 700.2, True),  # and that one was about to die as well
])
def test_a_process_id_that_is_used_again_is_another_process(
    tmp_path: Path, began: float, settled: float, is_explained: bool
) -> None:
    found = journal(tmp_path, "doomed 1 6845 100.0", f"began 2 6845 {began}", "doomed 3 6845 700.0")
    assert _Blame([], found.doomed).explains(failed(settled), found.began[2]) is is_explained


@pytest.mark.parametrize(("began", "settled", "is_explained"), [
    ([(99.0, 7)], 100.1, True),
    ([(99.0, 8)], 100.1, False),
    ([(50.0, 7)], 60.0, False),  # it had failed long before its process was killed
    ([(100.6, 7)], 101.0, False),  # it began after that
    ([], 100.1, True),  # it was lost before it could say that it began
    ([], 130.0, False),
])
def test_a_killed_process_explains_what_ran_in_it_at_that_time(
    began: list[tuple[float, int]], settled: float, is_explained: bool
) -> None:
    blame = _Blame([Mark(100.0, "kill_worker", "SIGKILL", (7,))], {})
    assert blame.explains(failed(settled, pid=7), began) is is_explained


@pytest.mark.parametrize(("began", "settled", "is_explained"), [
    (99.0, 100.3, True), (101.5, 102.0, False), (99.0, 99.2, False), (99.0, 115.0, False)])
def test_so_does_the_keepers_death(began: float, settled: float, is_explained: bool) -> None:
    blame = _Blame([Mark(100.0, "kill_keeper", "SIGKILL", (1, 2))], {})
    assert blame.explains(failed(settled), [(began, 5)]) is is_explained
