"""Agents on a coding agent's command line: which program, and which kinds the files in `.claude/agents` describe.

The one place of the library that reads files which it was not told of (decision 0044): only through `runner=...` of
`orchestrate_with_memory_management`, only these two directories, and only where they belong to this user. Any thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from agentpool.errors import PlanError
from agentpool.orchestrator.words import REVIEWERS

if TYPE_CHECKING:
    from agentpool.agents import AgentKind

__all__ = ["AUTO", "STOCK", "Kinds", "kinds_for"]

#: Where Claude Code has its sub-agents, in a project and in the user's home.
_DIRECTORY: Final = os.path.join(".claude", "agents")
#: The first of these that is installed runs the files' kinds, where nobody says which: those that can work on code.
_PROGRAMS: Final = ("claude", "codex", "gemini", "copilot", "opencode", "aider")

#: What a short prompt was measured to hold, in MB, the program's whole tree.
_EXPECTED_MB: Final = {"claude": 330.0, "codex": 190.0, "gemini": 390.0, "copilot": 390.0, "opencode": 640.0,
                       "aider": 250.0, "llm": 70.0}

AUTO: Final = "auto"
STOCK: Final = "stock"


@dataclass(frozen=True)
class Kinds:
    """The kinds that were found, and the program that runs them. `project` wins over `user`.

    falls_back: a stock agent of the same name takes over where the program fails.
    """

    runner: str = STOCK
    project: dict[str, AgentKind] = field(default_factory=dict)
    user: dict[str, AgentKind] = field(default_factory=dict)
    falls_back: bool = False

    def find(self, name: str) -> AgentKind | None:
        """The kind of this name."""
        return self.project.get(name) or self.user.get(name)

    def within(self, budget_mb: float | None) -> Kinds:
        """Those that a budget has room for, where the stock agent of the same name can do it instead."""
        if budget_mb is None or not self.falls_back:
            return self

        def fitting(kinds: dict[str, AgentKind]) -> dict[str, AgentKind]:
            return {name: kind for name, kind in kinds.items()
                    if name not in REVIEWERS or (kind.expected_memory_mb or 0) <= budget_mb}

        return replace(self, project=fitting(self.project), user=fitting(self.user))

    def named_in(self, prompt: str) -> list[AgentKind]:
        """The kinds that the prompt names: "docs-writer", "docs writer", "the reviewer agent", "@reviewer".

        A name of one word alone may mean anything.
        """
        said = f" {' '.join(_words(prompt))} "
        found = []
        for kind in self:
            name = " ".join(_words(kind.name))
            forms = [f"@{name}"] if " " not in name else [name, f"@{name}"]
            forms += [f"{name} agent", f"{name} subagent", f"agent {name}", f"subagent {name}"]
            if name and any(f" {form} " in said for form in forms):
                found.append(kind)
        return found

    def __iter__(self) -> Iterator[AgentKind]:
        return iter({**self.project, **{name: kind for name, kind in self.user.items() if name not in self.project}}
                    .values())


def kinds_for(runner: str | None, *, project: str, home: str) -> Kinds:
    """What `runner` means here; `project` and `home` are the directories whose `.claude/agents` are read.

    None and "stock": nothing is read. "auto": where there are agent files and a program for them, those. The name of a
    program: it must be installed.

    Raises PlanError for an unknown runner and one that is not installed, AgentFileError (a ValueError) for a file that
    cannot be understood, ModuleNotFoundError where PyYAML is missing.
    """
    if runner is None or runner == STOCK:
        return Kinds()
    directories = [os.path.join(folder, _DIRECTORY) for folder in (project, home)]
    if runner == AUTO:
        if not any(map(_has_agents, directories)):
            return Kinds()  # without looking for programs, which starts each of them
        program = _installed()
        if program is None:
            return Kinds()
    else:
        program = _checked(runner)
    found = [_read(directory, program) for directory in directories]
    if os.path.realpath(directories[0]) == os.path.realpath(directories[1]):
        found[1] = {}
    return Kinds(program, found[0], found[1], falls_back=runner == AUTO)


def _checked(runner: str) -> str:
    from agentpool.agents import installed_agents

    try:
        [program] = installed_agents([runner])
    except LookupError as error:
        raise PlanError(f"runner must be {AUTO!r}, {STOCK!r}, None or a program: {error}") from error
    if not program.ok:
        raise PlanError(f"the runner {runner!r} cannot be used: {program.problem}")
    return program.name


def _installed() -> str | None:
    from agentpool.agents import installed_agents

    return next((name for name in _PROGRAMS if installed_agents([name])[0].ok), None)


def _has_agents(directory: str) -> bool:
    """Are there agent files, of this user's own?"""
    try:
        owner = os.stat(directory).st_uid
    except OSError:
        return False
    # What stands in another user's directory, /tmp/.claude say, is not for us to run.
    return owner in (os.geteuid(), 0) and any(name.endswith(".md") for _, _, names in os.walk(directory)
                                              for name in names)


def _read(directory: str, program: str) -> dict[str, AgentKind]:
    if not _has_agents(directory):
        return {}
    from agentpool.agents import AgentRegistry

    expected_mb = _EXPECTED_MB.get(program)
    return {kind.name: kind for kind in
            AgentRegistry.from_directory(directory, program=program, expected_memory_mb=expected_mb)}


def _words(text: str) -> list[str]:
    """The words of a text, each with the @ that may stand before it."""
    return re.findall(r"@?[a-z0-9]+", text.lower())
