"""`make mutants`: a mutant in the place of its function, a run that tries some, and what is made of the results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stress.mutants import __main__ as mutants
from stress.mutants import generate
from stress.mutants.generate import Mutant, put_in_place
from stress.mutants.results import Result, append, latest
from stress.mutants.run import wanted

ROOT = Path(mutants.__file__).parents[2]
HALF = Mutant("home.half", "d1", 1, "return number / 2", "return number * 2",
              "def half(number, by=2):\n    return number * by")
DOOR = Mutant("home.House.door", "d2", 1, 'return "open"', 'return "XXopenXX"',
              '    def door(self):\n        return "XX" + super().door()')
WALL = Mutant("home.House.wall", "d3", 1, 'return "white"', "return None",
              "    @staticmethod\n    def wall():\n        return None")
HOME = '''
def half(number, by=1):
    return number / 2

class Building:
    def door(self):
        return "open"

class House(Building):
    def door(self):
        return super().door()

    @staticmethod
    def wall():
        return "white"
'''


@pytest.fixture
def make_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """States of the three mutants, in their order; None: not tried."""
    monkeypatch.setattr(generate, "of_core", lambda: [HALF, DOOR, WALL])

    def make(*states: str | None) -> Path:
        path = tmp_path / "results.jsonl"
        path.unlink(missing_ok=True)
        for mutant, state in zip((HALF, DOOR, WALL), states, strict=True):
            if state is not None:
                append(path, Result(*mutant.key, state, "", False, 0.1))
        return path

    return make


def test_the_latest_result_counts_and_only_of_the_function_as_it_is(make_results) -> None:
    path = make_results("survived", "survived", None)
    append(path, Result(*DOOR.key, "killed", "test_door", True, 0.1))
    append(path, Result("home.House.wall", "another digest", 1, "killed", "test_wall", True, 0.1))
    half, door, wall = mutants.read(path)
    assert half.key == ("home.half", "return number / 2", "return number * 2")
    assert (half.state, door.state, wall.state) == ("survived", "killed", "unchecked")


def test_what_is_tried_has_no_result_or_is_asked_for_again_by_name(make_results) -> None:
    done = latest(make_results("survived", None, "killed"))
    everything = [HALF, DOOR, WALL]
    assert wanted(everything, done, [], []) == [DOOR]
    assert wanted(everything, done, [], ["survived"]) == [HALF, DOOR]
    assert wanted(everything, done, ["*.House.*"], ["survived", "killed"]) == [DOOR, WALL]


def test_the_table_counts_what_was_checked(make_results) -> None:
    found = mutants.read(make_results("survived", "timeout", None))
    assert mutants.table(found).splitlines()[2:] == [
        "| home | 3 | 0 | 1 | 1 | 1 | 50.0 |", "| all | 3 | 0 | 1 | 1 | 1 | 50.0 |"]


def test_it_fails_below_90_percent_and_names_who_is_not_explained(make_results, capsys) -> None:
    assert mutants.main(["--results", str(make_results("survived", "killed", None))]) == 1
    shown = capsys.readouterr().out
    assert "not looked at yet: home.half\n  - return number / 2\n  + return number * 2" in shown
    assert "1 were not checked" in shown
    assert mutants.main(["--results", str(make_results("killed", "killed", "timeout"))]) == 0


def test_without_a_run_it_says_what_to_do(make_results, capsys) -> None:
    assert mutants.main(["--results", str(make_results(None, None, None))]) == 1
    assert "make mutants" in capsys.readouterr().err


def test_the_page_keeps_what_stands_above_the_marker_and_groups_survivors_by_reason(
    make_results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    why = {("home.half", "return number / 2", "return number * 2"): "Nobody halves anything."}
    monkeypatch.setattr(mutants, "explanations", lambda: why)
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n{mutants.MARKER}\nold")
    mutants.main(["--results", str(make_results("survived", "survived", "killed")), "--write", str(page)])
    text = page.read_text()
    assert text.startswith(f"# Mine\n{mutants.MARKER}\n\n| module")
    assert "old" not in text
    assert text.index("### Not looked at yet (1)") < text.index("### Nobody halves anything. (1)")
    assert '- `home.House.door`: `return "open"` becomes `return "XXopenXX"`' in text


def test_every_explanation_is_of_a_function_that_there_is() -> None:
    import agentpool.core as core

    functions = {key[0] for key in mutants.explanations()}
    for name in functions:
        module, *path = name.split(".")
        found = __import__(f"{core.__name__}.{module}", fromlist=["x"])
        for part in path:
            found = getattr(found, part)
        assert callable(found), name


def test_the_mutant_takes_the_place_of_the_function_wherever_it_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mutated_here").mkdir()
    (tmp_path / "mutated_here/__init__.py").touch()
    (tmp_path / "mutated_here/home.py").write_text(HOME)
    monkeypatch.syspath_prepend(tmp_path)
    from mutated_here.home import House, half  # type: ignore[import-not-found]

    assert (half(4), House().door(), House.wall()) == (2, "open", "white")
    for mutant in (HALF, DOOR, WALL):
        put_in_place(mutant, "mutated_here")
    assert (half(4), half(4, 3), House().door(), House.wall()) == (8, 12, "XXopen", None)


def test_a_run_tells_who_was_killed_by_what_who_survived_and_who_never_ends(tmp_path: Path) -> None:
    """Mutants of one function made by hand, in a process of its own."""
    results = tmp_path / "results.jsonl"
    program = """
import json, sys
from pathlib import Path
import pytest
from stress.mutants.generate import Mutant
from stress.mutants.run import OPTIONS, Runner
mutants = [Mutant("timers.TimerQueue.__len__", "d", number, "", "", source)
           for number, source in enumerate(json.loads(sys.argv[2]))]
runner = Runner(mutants, [], Path(sys.argv[1]), False)
sys.exit(pytest.main([*OPTIONS, "tests/unit/test_core_timers.py"], plugins=[runner]))
"""
    sources = [f"    def __len__(self):\n        {body}" for body in (
        "return -1", "return len(self._heap) - self._cancelled", "while True: pass", "return [0] * (1 << 31)")]
    done = subprocess.run([sys.executable, "-c", program, str(results), json.dumps(sources)], cwd=ROOT, check=False,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [latest(results)["timers.TimerQueue.__len__", "d", number] for number in range(4)]
    assert [one.state for one in found] == ["killed", "survived", "timeout", "killed"]
    assert "tests/unit/test_core_timers.py::test_" in found[0].by
