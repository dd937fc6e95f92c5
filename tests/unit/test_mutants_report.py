"""`make mutants`: what is made of mutmut's results, and the plugin that takes its switches out of the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stress.mutants import __main__ as mutants

SOURCE = '''
from collections.abc import Callable
def switch(choices):
    def wrapper(*args):
        return choices["_mutmut_orig"](*args)
    return lambda original: wrapper

mutants_x_half__mutmut = {}
half = switch(mutants_x_half__mutmut)(None)

def x_half__mutmut_orig(number):
    # of what
    return number / 2

def x_half__mutmut_1(number):
    # of what
    return number * 2

mutants_x_half__mutmut["_mutmut_orig"] = x_half__mutmut_orig
mutants_x_half__mutmut["x_half__mutmut_1"] = x_half__mutmut_1
mutants_xǁHouseǁdoor__mutmut = {}

class House:
    door = switch(mutants_xǁHouseǁdoor__mutmut)(None)

    def xǁHouseǁdoor__mutmut_orig(self):
        return "open"

    def xǁHouseǁdoor__mutmut_1(self):
        return "XXopenXX"

    def xǁHouseǁdoor__mutmut_2(self):
        return None

mutants_xǁHouseǁdoor__mutmut["_mutmut_orig"] = House.xǁHouseǁdoor__mutmut_orig
mutants_xǁHouseǁdoor__mutmut["xǁHouseǁdoor__mutmut_1"] = House.xǁHouseǁdoor__mutmut_1
'''
NAMES = ("x_half__mutmut_1", "xǁHouseǁdoor__mutmut_1", "xǁHouseǁdoor__mutmut_2")


@pytest.fixture
def make_results(tmp_path: Path):
    def make(*codes: int | None) -> Path:
        core = tmp_path / "agentpool/core"
        core.mkdir(parents=True, exist_ok=True)
        (core / "home.py").write_text(SOURCE)
        found = {f"agentpool.core.home.{name}": code for name, code in zip(NAMES, codes, strict=True)}
        (core / "home.py.meta").write_text(json.dumps({"exit_code_by_key": found}))
        return tmp_path

    return make


def test_a_mutant_is_named_by_function_and_change_which_outlive_a_renumbering(make_results) -> None:
    half, door, other = mutants.read(make_results(0, 33, 1))
    assert half.key == ("home.half", "return number / 2", "return number * 2")
    assert (door.function, door.state, door.after) == ("home.House.door", "survived", 'return "XXopenXX"')
    assert other.state == "killed"


def test_the_table_counts_what_was_checked(make_results) -> None:
    found = mutants.read(make_results(0, 36, None))
    assert mutants.table(found).splitlines()[2:] == [
        "| home | 3 | 0 | 1 | 1 | 1 | 50.0 |", "| all | 3 | 0 | 1 | 1 | 1 | 50.0 |"]


def test_it_fails_below_90_percent_and_names_who_is_not_explained(make_results, capsys) -> None:
    assert mutants.main(["--results", str(make_results(0, 1, None))]) == 1
    shown = capsys.readouterr().out
    assert "not looked at yet: home.half\n  - return number / 2\n  + return number * 2" in shown
    assert "1 were not checked" in shown
    assert mutants.main(["--results", str(make_results(1, 3, -24))]) == 0


def test_without_a_run_it_says_what_to_do(tmp_path: Path, capsys) -> None:
    assert mutants.main(["--results", str(tmp_path)]) == 1
    assert "make mutants" in capsys.readouterr().err


def test_the_page_keeps_what_stands_above_the_marker_and_groups_survivors_by_reason(
    make_results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    why = {("home.half", "return number / 2", "return number * 2"): "Nobody halves anything."}
    monkeypatch.setattr(mutants, "explanations", lambda: why)
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n{mutants.MARKER}\nold")
    mutants.main(["--results", str(make_results(0, 0, 1)), "--write", str(page)])
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


@pytest.mark.parametrize(("under_test", "shown"), [
    ("agentpool.core.home.x_half__mutmut_1", "8 open True True"),
    ("agentpool.core.home.xǁHouseǁdoor__mutmut_1", "2.0 XXopenXX True True"),
    ("agentpool.core.other.x_half__mutmut_1", "2.0 open True True"),
    ("stats", "2.0 open False False"),
])
def test_the_mutant_takes_the_place_of_the_function_wherever_it_was_imported(
    make_results, under_test: str, shown: str
) -> None:
    """In a process of its own, as it changes modules for good."""
    program = """
import importlib.util, sys, types
from stress.mutants import binding
spec = importlib.util.spec_from_file_location("agentpool.core.home", sys.argv[1])
home = sys.modules["agentpool.core.home"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(home)
user = sys.modules["user"] = types.ModuleType("user")
user.half = home.half
binding.pytest_collection_finish()
print(user.half(4), home.House().door(), user.half.__name__ != "wrapper", home.House.door.__name__ != "wrapper")
"""
    source = make_results(1, 1, 1) / "agentpool/core/home.py"
    root = Path(mutants.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(source)], capture_output=True, text=True, check=False,
                          env=os.environ | {"MUTANT_UNDER_TEST": under_test, "PYTHONPATH": str(root)})
    assert done.stdout.strip() == shown, done.stderr
