"""A pytest plugin for mutmut: puts the mutant under test in the place of the function, once, when the session begins.

mutmut calls each function of a mutated module through a switch that reads the environment, which makes the core five
times as slow. With the switch taken out a survivor, which sees every test, takes 6 seconds and not 20. While mutmut
notes which test calls what, and for its own checks, the switches stay.

AGENTPOOL_MUTANTS=quick leaves out the long random lives and the simulator, for a first pass in which most die.
"""

from __future__ import annotations

import os
import sys
from types import FunctionType, ModuleType
from typing import Any

MUTATED = "agentpool.core."
SLOW = ("test_a_long_life_loses_nothing", "test_the_rules_themselves_agree", "test_recorded_schedules")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Only where there is a mutant: mutmut is to know all tests."""
    if os.environ.get("AGENTPOOL_MUTANTS") == "quick" and "__mutmut_" in os.environ.get("MUTANT_UNDER_TEST", ""):
        items[:] = [item for item in items if not item.name.startswith(SLOW)]


def pytest_collection_finish() -> None:
    """By now everything that holds one of the functions has been imported."""
    module, _, name = os.environ.get("MUTANT_UNDER_TEST", "").rpartition(".")
    if module:
        bind(module, name)


def bind(module: str, name: str) -> None:
    """The function `name`, as mutmut calls it, of `module`; elsewhere the originals."""
    for mutated in [one for key, one in sys.modules.items() if key.startswith(MUTATED)]:
        for variable, choices in list(vars(mutated).items()):
            if variable.startswith("mutants_x") and isinstance(choices, dict):
                original = choices["_mutmut_orig"]
                wanted = choices.get(name, original) if mutated.__name__ == module else original
                _replace(mutated, variable.removeprefix("mutants_").removesuffix("__mutmut"), wanted)


def _replace(module: ModuleType, mangled: str, wanted: Any) -> None:
    if mangled.startswith("x_"):
        switch = getattr(module, mangled[2:])
        for holder in list(sys.modules.values()):
            for variable, value in list(getattr(holder, "__dict__", {}).items()):
                if value is switch:
                    setattr(holder, variable, wanted)
        return
    _, class_name, method = mangled.split("ǁ")
    owner = getattr(module, class_name)
    if isinstance(vars(owner)[method], FunctionType):
        setattr(owner, method, wanted)
