"""Agent classes: how a worker finds one, sets it up once, reuses it, and puts it away.

`resolve` and `kind_name` serve both sides; `run_agent` and `close_all` are the worker's alone and belong to its main
thread: nothing here is locked. Knows nothing of pipes, pools and tasks, and imports next to nothing, because every
worker pays for what this module loads.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from asyncio import Runner

__all__ = ["STOCK", "Agent", "Configured", "close_all", "kind_name", "resolve", "run_agent"]

#: The agents that come with agentpool, by the name that users give: where their class is.
STOCK: Final[dict[str, str]] = {
    "security-analyst": "agentpool_worker.agents.security_analyst:SecurityAnalyst",
    "performance-auditor": "agentpool_worker.agents.performance_auditor:PerformanceAuditor",
    "test-generator": "agentpool_worker.agents.test_generator:TestGenerator",
    "command": "agentpool_worker.agents.command:CommandAgent",
    "claude": "agentpool_worker.agents.cli:Claude",
    "codex": "agentpool_worker.agents.cli:Codex",
    "gemini": "agentpool_worker.agents.cli:Gemini",
    "copilot": "agentpool_worker.agents.cli:Copilot",
    "opencode": "agentpool_worker.agents.cli:OpenCode",
    "aider": "agentpool_worker.agents.cli:Aider",
    "llm": "agentpool_worker.agents.cli:Llm",
}


class Agent:
    """A kind of work with something worth keeping between tasks: a model, a client, a loaded tool.

    A worker makes one instance per class, without arguments (or per kind, with its `config`), calls `setup()` once,
    `run()` for each task, one at a time, and `close()` when the worker retires (not when it is killed). Deriving from
    this class is a convenience: any class with a `run` method will do. All three methods may be `async def`: they share
    one event loop per worker, so what `setup()` opened there can be used in every `run()`.

    name: shown in reports; empty: the class's own name.
    idempotent: True promises that running a task twice does no harm. Only then is a task whose worker was lost run
    again without being asked for.
    retries_transient_errors: True: a task that raised an `AgentError` which passes by itself (an overloaded API) is run
    again without being asked for.
    interrupts_itself: True: the class takes a keyword `timeout` and keeps to it, which costs no worker; a kind's
    timeout is handed to it, and the pool's is only the net below.
    """

    name: ClassVar[str] = ""
    idempotent: ClassVar[bool] = False
    retries_transient_errors: ClassVar[bool] = False
    interrupts_itself: ClassVar[bool] = False

    def setup(self) -> Any:
        """Load what every task needs. An error fails the task that caused it; the next task tries anew."""

    def run(self, prompt: str, *args: Any, **kwargs: Any) -> Any:
        """Do one task; the result must be picklable. `kwargs` are those of `pool.submit_agent`."""
        raise NotImplementedError(f"{type(self).__qualname__} has no run(): define run(self, prompt, **kwargs)")

    def close(self) -> Any:
        """Release what `setup()` took."""


class Configured:
    """An agent that is made with keywords: the class that `target` means, as `target(**config)`.

    A worker keeps one instance for each name and configuration. `config` is plain data.
    """

    __slots__ = ("config", "name", "target")

    def __init__(self, name: str, target: str | type[Any], config: dict[str, Any]) -> None:
        self.name = name
        self.target = target
        self.config = config


def resolve(kind: str | type[Any] | Configured) -> type[Any]:
    """The class that `kind` means: a stock agent's name, "module:Class", the class itself, or one with a configuration.

    Raises LookupError for a name that leads nowhere, TypeError for what is no agent class. A module is imported here;
    an error of its own while it is imported arrives unchanged.
    """
    if isinstance(kind, Configured):
        return resolve(kind.target)
    if isinstance(kind, str):
        cls = _load(kind, STOCK.get(kind, kind))
    elif isinstance(kind, type):
        cls = kind
    else:
        hint = ": pass the class, not an instance" if callable(getattr(kind, "run", None)) else ""
        raise TypeError(f"an agent is a class or a name, got {kind!r}{hint}; known names are {_known()}")
    if not isinstance(cls, type):
        raise TypeError(f"{kind!r} is not a class but a {type(cls).__name__}; an agent is a class with a run() method")
    if not callable(getattr(cls, "run", None)):
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} is no agent: it has no run(prompt, ...) method")
    return cls


def kind_name(kind: str | type[Any] | Configured) -> str:
    """A stable label for `kind`, the same for a class and for the name that leads to it. Imports nothing."""
    if isinstance(kind, Configured):
        return kind.name
    if isinstance(kind, str):
        target = kind
    elif isinstance(kind, type):
        target = f"{kind.__module__}:{kind.__qualname__}"
    else:
        raise TypeError(f"an agent is a class or a name, got {kind!r}; known names are {_known()}")
    for name, stock_target in STOCK.items():
        if target == stock_target:
            return name
    return target


def _known() -> str:
    return ", ".join(sorted(STOCK))


def _load(kind: str, target: str) -> Any:
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise LookupError(f"unknown agent {kind!r}; known are {_known()}, or 'module:Class', or a class")
    import importlib

    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the agent's own module being absent is a wrong name. A module that it needs is a fault to show as it is.
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        raise LookupError(f"agent {kind!r}: there is no module {error.name!r} on sys.path here") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            hint = "; pass the class itself: it is sent by value" if module_name == "__main__" else ""
            raise LookupError(f"agent {kind!r}: module {module_name!r} has no {path!r}{hint}") from None
    return found


# --- the worker's side -------------------------------------------------------------------------------------------

#: One instance per class. The class object is the key: cloudpickle gives a class that came by value its identity back.
#: Of an agent with a configuration the key is (name, class, configuration in words).
_instances: dict[type[Any] | tuple[str, type[Any], str], Any] = {}
#: The event loop that all async agents of this worker share; made when the first one needs it.
_runner: Runner | None = None


def run_agent(kind: str | type[Any] | Configured, prompt: str, kwargs: dict[str, Any]) -> Any:
    """Run one task of `kind` in this worker and return its result.

    The first task of a kind makes the instance and sets it up; an instance whose setup raised is not kept. An instance
    whose `run()` raised an ordinary exception is kept; one that was broken off (cancelled, interrupted, told to exit)
    is closed, since nobody knows what it was in the middle of.
    """
    cls = resolve(kind)
    config = kind.config if isinstance(kind, Configured) else {}
    key = (kind.name, cls, repr(config)) if isinstance(kind, Configured) else cls
    agent = _instances.get(key)
    if agent is None:
        _close_predecessor(key)
        agent = _make(cls, config)
        _call(agent, "setup")
        _instances[key] = agent
    try:
        return _finish(agent.run(prompt, **kwargs))
    except Exception:
        raise
    except BaseException:
        _instances.pop(key, None)
        _close(agent)
        raise


def close_all() -> None:
    """Close every instance, the newest first, and the event loop. Failures are printed to stderr, none is raised."""
    global _runner
    while _instances:
        _close(_instances.popitem()[1])
    runner, _runner = _runner, None
    if runner is not None:
        try:
            runner.close()
        except Exception:
            _complain("the agents' event loop")


def _make(cls: type[Any], config: dict[str, Any]) -> Any:
    try:
        return cls(**config)
    except TypeError as error:
        how = f"with the keywords {', '.join(config)}, the configuration of its kind" if config else "without arguments"
        error.add_note(f"A worker makes the agent as {cls.__qualname__}(), {how}; "
                       "give run() what differs between tasks.")
        raise


def _close_predecessor(key: type[Any] | tuple[str, type[Any], str]) -> None:
    """Put away the instance of an older definition, as left by a notebook cell that was run again.

    Classes made in a function are let be: several of them legitimately share a qualified name.
    """
    if isinstance(key, tuple):
        outdated: list[Any] = [old for old in _instances if isinstance(old, tuple) and old[0] == key[0]]
    elif "<locals>" in key.__qualname__:
        return
    else:
        name = kind_name(key)
        outdated = [old for old in _instances if not isinstance(old, tuple) and kind_name(old) == name]
    for old in outdated:
        _close(_instances.pop(old))


def _close(agent: Any) -> None:
    try:
        _call(agent, "close")
    except Exception:
        _complain(f"{type(agent).__qualname__}.close()")


def _call(agent: Any, method: str) -> None:
    function = getattr(agent, method, None)
    if function is not None:
        _finish(function())


def _finish(value: Any) -> Any:
    """`value`, or, where it is awaitable, what it comes to on this worker's event loop."""
    if not hasattr(value, "__await__"):
        return value
    import asyncio

    global _runner
    if _runner is None:
        # One loop for all runs, where asyncio.run() would make one each: clients opened in an async setup() are bound
        # to the loop they were opened on.
        _runner = asyncio.Runner()
    task: asyncio.Task[Any] | None = None

    async def wait() -> Any:
        nonlocal task
        task = asyncio.current_task()
        return await value

    try:
        return _runner.run(wait())
    except Exception:
        raise
    except BaseException:
        # Broken off in the middle: only this task is put down, the loop is also the other agents'.
        if task is not None and not task.done():
            task.cancel()
            _runner.run(asyncio.wait([task]))
        raise


def _complain(what: str) -> None:
    import traceback

    print(f"agentpool: {what} failed while the worker retires:", file=sys.stderr)
    traceback.print_exc()
