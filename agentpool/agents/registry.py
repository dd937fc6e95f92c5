"""Kinds of agents: which class or program runs, what it may use, and how it is retried.

    registry = AgentRegistry()

    @registry.agent("summarizer", memory_limit_mb=300, timeout=60)
    class Summarizer(Agent): ...

    pool.submit_agent(registry.get("summarizer"), "prompt")

Data and look-up only: starts nothing, and reads a file only where it is told to. Any thread may use a registry.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from agentpool.config import TaskOptions
from agentpool.errors import SettingsError
from agentpool_worker.agents.base import STOCK, Configured, resolve

if TYPE_CHECKING:
    from os import PathLike

    from agentpool.core.retry import RetryLike

__all__ = ["AgentKind", "AgentRegistry", "agent", "default_registry", "kind_of"]

C = TypeVar("C", bound=type[Any])

#: The pool's timeout for an agent that keeps to its own: so many seconds longer.
_NET_SECONDS: Final = 10.0

#: The fields of a kind that are task options, by the names that those have.
_OPTIONS: Final = {
    "timeout": "timeout",
    "retry": "retry",
    "priority": "priority",
    "memory_limit_mb": "memory_limit_mb",
    "memory_growth_mb": "memory_growth_mb",
    "hard_memory_limit_mb": "hard_memory_limit_mb",
    "expected_memory_mb": "expected_memory_mb",
    "concurrency": "group_limit",
    "capture_output": "capture_output",
    "capture_logging": "capture_logging",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentKind:
    """One kind of agent, and the task options that its tasks have unless a view of the pool says otherwise.

    name: shown in reports; tasks of one kind prefer a worker that holds its agent.
    agent: a class, the name of a stock agent ("claude", "command", ...), or "module:Class".
    config: keywords that the class is made with in the worker; plain data. Empty: it is made without.
    description: what it is good for, in words.
    memory_limit_mb, memory_growth_mb, hard_memory_limit_mb, timeout, priority, capture_output, capture_logging: as in
        `TaskOptions`; None: as the pool says.
    timeout: agent programs interrupt themselves after it, and stay in use.
    retry: as in `TaskOptions`. Where nobody says anything, agent programs get `agentpool.agents.agent_retry()`, and
        what is `idempotent` three attempts for a lost worker.
    concurrency: at most so many tasks of this kind run at once in a pool.
    expected_memory_mb: reserved when a task of this kind starts, so that the same free memory is not given out twice.
    idempotent: None: as the class says.
    source: the file that it came from. extra: what that file says beside what is known here.
    """

    name: str
    agent: str | type[Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    memory_limit_mb: float | None = None
    memory_growth_mb: float | None = None
    hard_memory_limit_mb: float | None = None
    expected_memory_mb: float | None = None
    timeout: float | None = None
    retry: RetryLike = None
    concurrency: int | None = None
    priority: int | None = None
    idempotent: bool | None = None
    capture_output: bool | None = None
    capture_logging: int | str | None = None
    source: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise SettingsError(f"an agent kind needs a name, got {self.name!r}")
        if not isinstance(self.agent, (str, type)):
            raise SettingsError(f"agent kind {self.name!r}: agent must be a class or a name, got {self.agent!r}")
        if not isinstance(self.config, Mapping) or not all(isinstance(name, str) for name in self.config):
            raise SettingsError(f"agent kind {self.name!r}: config must map keywords to values, got {self.config!r}")
        try:
            TaskOptions(**self._given())
        except SettingsError as error:
            raise SettingsError(f"agent kind {self.name!r}: {error}".replace("group_limit", "concurrency")) from None

    def __hash__(self) -> int:
        return hash(self.name)

    def _given(self) -> dict[str, Any]:
        """The task options that this kind sets."""
        given = {option: getattr(self, name) for name, option in _OPTIONS.items() if getattr(self, name) is not None}
        if self.concurrency is not None:
            given["group"] = self.name
        return given

    @property
    def options(self) -> dict[str, Any]:
        """Its task options, as `pool.options(**kind.options)` takes them. Imports the class where it must ask it."""
        given = self._given()
        if self.timeout is not None and self._interrupts_itself:
            given["timeout"] = self.timeout + _NET_SECONDS
        return given

    @property
    def _interrupts_itself(self) -> bool:
        return bool(getattr(resolve(self.agent), "interrupts_itself", False))

    @property
    def is_idempotent(self) -> bool:
        """May a task of this kind run again where its worker was lost? Imports the class where it must ask it."""
        if self.idempotent is not None:
            return self.idempotent
        return bool(getattr(resolve(self.agent), "idempotent", False))

    @property
    def target(self) -> str | type[Any] | Configured:
        """What a worker is told to run."""
        config = dict(self.config)
        if self.timeout is not None and self._interrupts_itself:
            config.setdefault("timeout", self.timeout)
        if not config and self.name in (self.agent, getattr(self.agent, "name", None)):
            return self.agent
        return Configured(self.name, self.agent, config)

    def updated(self, **changes: Any) -> AgentKind:
        """This kind with some fields replaced. Raises SettingsError for an unknown one."""
        known = {item.name for item in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise SettingsError(f"an agent kind has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return replace(self, **changes)


class AgentRegistry:
    """Agent kinds by name. The stock agents are in every registry, unless something else took their name."""

    def __init__(self) -> None:
        self._kinds: dict[str, AgentKind] = {}
        self._by_class: dict[type[Any], AgentKind] = {}
        self._lock = threading.Lock()  # guards both dicts

    def register(self, kind: AgentKind, *, replace: bool = False) -> AgentKind:
        """Add a kind. Raises SettingsError where another one has its name, unless `replace`."""
        with self._lock:
            other = self._kinds.get(kind.name)
            if other is not None and not replace and not _is_same_place(other, kind):
                raise SettingsError(
                    f"there is an agent kind {kind.name!r} already ({_origin(other)}); give this one ({_origin(kind)}) "
                    "another name, or say replace=True"
                )
            self._kinds[kind.name] = kind
            if isinstance(kind.agent, type):
                self._by_class[kind.agent] = kind
        return kind

    def agent(self, name: str, **settings: Any) -> Callable[[C], C]:
        """A decorator that registers an agent class under a name, with the fields of `AgentKind` as keywords.

        Raises SettingsError for settings that are unknown or out of range, TypeError for what is no agent class.
        """
        if not isinstance(name, str):
            raise TypeError(f"the first argument of agent() is the kind's name: @agent('my-agent'), got {name!r}")
        known = {item.name for item in fields(AgentKind)} - {"name", "agent"}
        if unknown := sorted(set(settings) - known):
            what = ", ".join(unknown)
            raise SettingsError(f"agent kind {name!r} has no {what}; known are {', '.join(sorted(known))}")

        def register(cls: C) -> C:
            resolve(cls)
            settings.setdefault("description", next(iter((cls.__doc__ or "").strip().splitlines()), ""))
            self.register(AgentKind(name=name, agent=cls, **settings))
            return cls

        return register

    def get(self, name: str | type[Any]) -> AgentKind:
        """The kind of this name, or that of a class that was registered. Raises LookupError, which lists the known."""
        found = self.find(name)
        if found is not None:
            return found
        if isinstance(name, str) and name in STOCK:
            return AgentKind(name=name, agent=name)
        raise LookupError(f"unknown agent kind {name!r}; known are {', '.join(self.names())}")

    def find(self, name: str | type[Any]) -> AgentKind | None:
        """As `get`, but None for what was not registered."""
        return self._kinds.get(name) if isinstance(name, str) else self._by_class.get(name)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._kinds, *STOCK})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._kinds or name in STOCK)

    def __iter__(self) -> Iterator[AgentKind]:
        """The kinds that were registered, by name."""
        return iter([self._kinds[name] for name in sorted(self._kinds)])

    def __len__(self) -> int:
        return len(self._kinds)

    @classmethod
    def from_directory(
        cls,
        *directories: str | PathLike[str],
        program: str = "claude",
        config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> AgentRegistry:
        """A registry of the sub-agent files (`*.md`) in these directories; of two files of one name, the first counts.

        So give the project's directory before the user's: `from_directory(".claude/agents", home / ".claude/agents")`.
        A directory that does not exist has none. program: the stock agent that runs them. config: keywords for it, such
        as `session=True`. settings: fields of `AgentKind` for all of them.
        Raises AgentFileError, which names file and line; ModuleNotFoundError where PyYAML is missing.
        """
        from agentpool.agents.markdown import read_directory

        registry = cls()
        for directory in directories:
            for kind in read_directory(directory, program=program, config=config, **settings):
                if kind.name not in registry._kinds:
                    registry.register(kind)
        return registry


def _is_same_place(one: AgentKind, other: AgentKind) -> bool:
    """Is it the same class once more, as a module that is loaded again or a notebook cell defines it?"""
    return (
        isinstance(one.agent, type)
        and isinstance(other.agent, type)
        and (one.agent.__module__, one.agent.__qualname__) == (other.agent.__module__, other.agent.__qualname__)
    )


def _origin(kind: AgentKind) -> str:
    if kind.source is not None:
        return kind.source
    return kind.agent if isinstance(kind.agent, str) else f"{kind.agent.__module__}.{kind.agent.__qualname__}"


#: Where `@agent` registers, and where `pool.submit_agent` looks names and classes up.
default_registry: Final = AgentRegistry()

agent = default_registry.agent


def kind_of(kind: object) -> AgentKind | None:
    """The kind that `pool.submit_agent(kind, ...)` means; None: none that was registered, but a plain class or name."""
    if isinstance(kind, AgentKind):
        return kind
    return default_registry.find(kind) if isinstance(kind, (str, type)) else None
