"""The executor under test: any `concurrent.futures.Executor`, named as `module:Class`.

What it can do is read off the object, and what it cannot is noted, so that the report can say what was left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, Final

OURS: Final = "agentpool:AgentPool"
#: Short names.
KNOWN: Final = {
    "agentpool": OURS,
    "ppe": "concurrent.futures:ProcessPoolExecutor",
    "loky": "loky:ProcessPoolExecutor",
    "pebble": "stress.adapters:Pebble",
}
#: What a scenario may need -> in words.
FEATURES: Final = {
    "timeout": "a time limit for a running task",
    "memory": "a memory limit for a running task",
    "recycling": "replaces a worker that grew",
    "kill": "stops a running task",
    "breaker": "a circuit breaker",
    "joblog": "a job log",
}


class Target:
    """A kind of executor. Raises ImportError, AttributeError, TypeError for what is none."""

    def __init__(self, name: str = OURS, cls: type[Executor] | None = None) -> None:
        self.name = KNOWN.get(name, name)
        self.cls = cls or _load(self.name)
        self.is_ours = self.name == OURS
        self.features = frozenset(FEATURES) if self.is_ours else frozenset(getattr(self.cls, "stress_features", ()))

    @property
    def label(self) -> str:
        """For tables: `ProcessPoolExecutor`, `loky`, ..."""
        for label, name in KNOWN.items():
            if name == self.name and label != "ppe":
                return label
        return self.cls.__name__

    def make(self, workers: int, settings: Mapping[str, Any]) -> Executor:
        """One with so many workers; settings are for ours alone."""
        return self.cls(workers, **(settings if self.is_ours else {}))  # type: ignore[call-arg]

    def why_not(self, needs: tuple[str, ...]) -> str:
        """What it lacks of that, in words; "": nothing."""
        return ", ".join(FEATURES[need] for need in needs if need not in self.features)


def _load(name: str) -> type[Executor]:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise TypeError(f"{name!r} is not of the form module:Class, nor one of {', '.join(KNOWN)}")
    found = getattr(importlib.import_module(module), attribute)
    if not callable(found):
        raise TypeError(f"{name} is no class")
    made: type[Executor] = found
    return made
