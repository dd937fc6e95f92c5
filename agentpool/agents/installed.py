"""Which agent programs this machine has, and in which versions.

Starts each program that it finds with `--version`, and nothing else. Any thread may call it; it takes up to a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from agentpool_worker.agents.failures import AgentNotInstalledError
from agentpool_worker.agents.presets import PRESETS, find, version_of

__all__ = ["Installed", "installed_agents"]


@dataclass(frozen=True, slots=True)
class Installed:
    """One known agent program. `path` and `version` are empty and `problem` says why, where it cannot be used.

    checked: the versions that agentpool was tried with.
    """

    name: str
    path: str
    version: str
    checked: str
    problem: str

    @property
    def ok(self) -> bool:
        return not self.problem


def installed_agents(names: Sequence[str] | None = None, *, path: str | None = None) -> list[Installed]:
    """All known programs, or those of these names, in the order of the docs.

    path: directories to look in, as PATH has them; None: those of this process's PATH.
    Raises LookupError for an unknown name.
    """
    environment = dict(os.environ)
    searched = environment.get("PATH", os.defpath) if path is None else path
    if unknown := sorted(set(names or ()) - set(PRESETS)):
        raise LookupError(f"unknown agent program {', '.join(unknown)}; known are {', '.join(PRESETS)}")
    found = []
    for preset in PRESETS.values():
        if names is not None and preset.name not in names:
            continue
        program = version = problem = ""
        try:
            program = find(preset, None, searched)
            version = version_of(preset, program, environment)
        except AgentNotInstalledError as error:
            problem = str(error)
        found.append(Installed(preset.name, program, version, preset.checked, problem))
    return found
