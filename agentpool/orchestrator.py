"""Plans a prompt into agent tasks and runs them through a pool.

Decides which agents a prompt asks for, waits for them, and gathers what they came to. How they are placed, throttled
and retried is the pool's business, how their results read the agents' own. Any thread may call it, and everything here
runs in the thread that does.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from agentpool.config import MB
from agentpool.errors import AgentPoolError, PoolClosedError
from agentpool_worker.agents.base import kind_name, resolve
from agentpool_worker.agents.rendering import jsonable, printable, render_result

if TYPE_CHECKING:
    from agentpool.futures import AgentFuture, TaskSnapshot
    from agentpool.pool import AgentPool

__all__ = [
    "REVIEWERS",
    "AgentOutcome",
    "OrchestrationReport",
    "Plan",
    "PlannedAgent",
    "orchestrate_with_memory_management",
    "plan",
    "run_plan",
]

#: The agents of a general review, in the order of its report.
REVIEWERS: Final = ("security-analyst", "performance-auditor", "test-generator")

#: The words that ask for an agent, each as a pattern for a whole word in lower case. Words that say other things just
#: as often ("perform", "fast" as in FastAPI, "memory") are left out on purpose.
_WORDS: Final[dict[str, re.Pattern[str]]] = {
    "security-analyst": re.compile(
        r"(in)?secur(e|ely|ity|ing)|vulnerab(le|ility|ilities)|exploit(s|able)?|cves?|injections?|secrets|unsafe|"
        r"harden(ed|ing)?|bandit"
    ),
    "performance-auditor": re.compile(
        r"performan(ce|t)|perf|slow(er|est|ly|ness)?|speed(s|ing|up)?|faster|fastest|optimi[sz](e|ed|ing|ation|ations)|"
        r"(in)?efficien(t|tly|cy)|bottlenecks?|complex(ity)?|latency|profiling|ruff"
    ),
    "test-generator": re.compile(r"tests?|testing|untested|coverage|fuzz(ing)?|hypothesis|ghostwriter|pytest"),
}
_REVIEW: Final = re.compile(r"(review|audit|inspect|assess|analy[sz]e|check)(s|ed|ing)?")
_MAKE: Final = re.compile(r"(write|generate|add|create|make|produce)(s)?")
#: Words after which everything is meant, whatever is named beside it.
_ALL: Final = frozenset({"everything", "overall", "comprehensive", "especially", "particularly", "including"})
#: The words that follow, up to a pause, name what is not wanted.
_EXCLUDING: Final = frozenset({"without", "except", "excluding", "skip", "skipping", "omit"})
#: The words that follow are not a wish: "no tests" may be an order as well as a complaint.
_DENYING: Final = frozenset({"no", "not", "never", "isn't", "don't", "doesn't"})
_PAUSE: Final = frozenset({".", ",", ";", ":", "!", "?", "but", "then"})
#: How many words such a word reaches.
_REACH: Final = 3

#: The longest time between two calls of `on_update`, and how often it is looked whether something changed.
_UPDATE_SECONDS: Final = 0.25
_LOOK_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class PlannedAgent:
    """One agent of a plan: its `kind` as `submit_agent` takes it, its `name` in reports, and why it was chosen."""

    kind: str | type[Any]
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Which agents look at `path` (absolute), and where (`out`, absolute, or None) those that write files put them."""

    prompt: str
    path: str
    out: str | None
    agents: tuple[PlannedAgent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOutcome:
    """What became of one agent.

    `attempts`: how often it was started (0: never). `elapsed_seconds`: of its last attempt. `peak_rss_bytes`: the most
    that its worker's process tree was seen to hold. `result`: what it returned, where `ok`; else `error`, in one line
    or few, and `error_details`, with the remote traceback.
    """

    name: str
    kind: str
    ok: bool
    attempts: int = 0
    elapsed_seconds: float = 0.0
    peak_rss_bytes: int = 0
    result: Any = None
    error: str | None = None
    error_details: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; in a user's agent's result, what JSON does not know becomes its repr."""
        return {
            "name": self.name,
            "kind": self.kind,
            "ok": self.ok,
            "attempts": self.attempts,
            "elapsed_seconds": round(self.elapsed_seconds, 3),
            "peak_rss_mb": round(self.peak_rss_bytes / MB, 1),
            "result": jsonable(self.result),
            "error": self.error,
            "error_details": self.error_details,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestrationReport:
    """The outcome of each agent, in the plan's order, the time from first submit to last result, and the health report.

    `str(report)` is `to_text()`.
    """

    prompt: str
    path: str
    out: str | None
    agents: tuple[AgentOutcome, ...]
    wall_seconds: float
    health: dict[str, Any] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether every agent succeeded."""
        return all(agent.ok for agent in self.agents)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "ok": self.ok,
            "prompt": self.prompt,
            "path": self.path,
            "out": self.out,
            "wall_seconds": round(self.wall_seconds, 3),
            "agents": [agent.to_dict() for agent in self.agents],
            "health": jsonable(self.health),
        }

    def to_text(self) -> str:
        """A section per agent, with its summary and the worst ten of what it found; no health report."""
        succeeded = sum(agent.ok for agent in self.agents)
        lines = [
            f"Report on {printable(self.path)}",
            f"Prompt: {printable(self.prompt)}",
            f"{succeeded} of {len(self.agents)} agents succeeded, in {self.wall_seconds:.2f} s",
        ]
        for agent in self.agents:
            lines += ["", *_section(agent)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()


def plan(
    prompt: str,
    *,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    agents: Sequence[str | type[Any]] | None = None,
) -> Plan:
    """Plan which agents to run for `prompt`.

    agents: the agents to run, whatever the prompt says: stock names, "module:Class" or classes; their `run` is called
        with the prompt and the keywords `path` and `out`. None: the prompt's words decide. Words about security,
        performance and tests each ask for the agent concerned ("look for vulnerabilities": only the security-analyst),
        words after "without", "except" or "skip" leave it out, words after "no" or "not" do neither. Where nothing is
        asked for, and where a review is to be followed by tests ("review this and write tests"), all three run. It is
        a table of words, not a model: `agents` settles what it gets wrong.
    path: a Python file or a directory. out: a directory for written files, made if missing; None: none are written.

    Raises FileNotFoundError for a `path` that does not exist, NotADirectoryError where `out` is a file, LookupError
    for an unknown agent, TypeError for what is no agent, ValueError where no agent is left.
    """
    where = os.path.abspath(path)
    if not os.path.exists(where):
        raise FileNotFoundError(f"there is nothing at {where!r} to look at: path must be a Python file or a directory")
    target = None if out is None else os.path.abspath(out)
    if target is not None and os.path.exists(target) and not os.path.isdir(target):
        raise NotADirectoryError(f"out must be a directory for the agents to write to, but {target!r} is a file")
    if isinstance(agents, str):
        raise TypeError(f"agents must be a sequence of agents, got the string {agents!r}: write [{agents!r}]")
    chosen = _chosen_by_words(prompt) if agents is None else _chosen_by_name(agents)
    if not chosen:
        raise ValueError(f"no agent is left to run for the prompt {prompt!r}; known are {', '.join(REVIEWERS)}")
    return Plan(prompt, where, target, tuple(chosen))


def run_plan(
    plan: Plan, pool: AgentPool | None = None, *, on_update: Callable[[list[TaskSnapshot]], object] | None = None
) -> OrchestrationReport:
    """Run a plan's agents through `pool` and wait for all of them; None: `get_agent_pool()`.

    An agent that fails, or that the pool does not take, is an outcome of the report; the others go on.

    on_update: called in this thread with a snapshot of each agent's task, in the plan's order, when a state changed and
        at least every 0.25 s, and once more when all is done.

    Raises PoolClosedError. On KeyboardInterrupt, and on any error of `on_update`, what is queued is cancelled and what
    runs is killed before it is raised again.
    """
    if pool is None:
        from agentpool.pool import get_agent_pool

        pool = get_agent_pool()
    started = time.monotonic()
    submitted: list[tuple[PlannedAgent, AgentFuture[Any] | AgentPoolError]] = []
    try:
        for agent in plan.agents:
            submitted.append((agent, _submit(pool, plan, agent)))  # noqa: PERF401  kept also when the next one raises
        _wait([future for _, future in submitted if isinstance(future, Future)], on_update)
    except BaseException:
        for _, future in submitted:
            if isinstance(future, Future) and not future.cancel():
                future.kill()
        raise
    wall_seconds = time.monotonic() - started
    outcomes = tuple(_outcome(agent, future) for agent, future in submitted)
    return OrchestrationReport(
        prompt=plan.prompt, path=plan.path, out=plan.out, agents=outcomes, wall_seconds=wall_seconds, health=_health()
    )


def orchestrate_with_memory_management(
    prompt: str,
    *,
    path: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    agents: Sequence[str | type[Any]] | None = None,
    pool: AgentPool | None = None,
    on_update: Callable[[list[TaskSnapshot]], object] | None = None,
) -> OrchestrationReport:
    """Plan `prompt`, run the plan through `pool`, and report.

    path: the current directory by default. Everything else, and all errors, as in `plan` and `run_plan`.
    """
    todo = plan(prompt, path=os.curdir if path is None else path, out=out, agents=agents)
    return run_plan(todo, pool, on_update=on_update)


# --- planning ----------------------------------------------------------------------------------------------------


def _chosen_by_name(agents: Sequence[str | type[Any]]) -> list[PlannedAgent]:
    chosen: dict[str, PlannedAgent] = {}
    for kind in agents:
        if kind == "command":
            raise LookupError(
                f"the agent 'command' runs command lines, not reviews: use `agentpool run`, or one of {_reviewers()}"
            )
        if isinstance(kind, str) and ":" not in kind and kind not in REVIEWERS:
            raise LookupError(f"unknown agent {kind!r}; known are {_reviewers()}, or 'module:Class', or a class")
        name = kind_name(resolve(kind))
        chosen.setdefault(name, PlannedAgent(kind, name, "asked for by name"))
    return list(chosen.values())


def _reviewers() -> str:
    return ", ".join(REVIEWERS)


def _chosen_by_words(prompt: str) -> list[PlannedAgent]:
    words = re.findall(r"[\w']+|[.,;:!?]", prompt.lower())
    wanted, excluded = _read_wishes(words)
    only_tests = set(wanted) == {"test-generator"}
    is_review = any(_REVIEW.fullmatch(word) for word in words)
    if only_tests and is_review and any(_MAKE.fullmatch(word) for word in words):
        wanted = {}  # "review this and write tests": the tests are asked for beside the review, not instead
    if _ALL.intersection(words):
        wanted = {}
    return [
        PlannedAgent(name, name, f"the prompt says {wanted[name]!r}" if wanted else "a general review")
        for name in REVIEWERS
        if name not in excluded and (not wanted or name in wanted)
    ]


def _read_wishes(words: list[str]) -> tuple[dict[str, str], set[str]]:
    """The agents that are asked for, each with the word that does, and those that are to be left out."""
    wanted: dict[str, str] = {}
    excluded: set[str] = set()
    reversing = ""
    reach = 0
    for word in words:
        if word in _EXCLUDING or word in _DENYING:
            reversing, reach = word, _REACH
            continue
        if word in _PAUSE:
            reach = 0
        for name, pattern in _WORDS.items():
            if not pattern.fullmatch(word):
                continue
            if reach <= 0:
                wanted.setdefault(name, word)
            elif reversing in _EXCLUDING:
                excluded.add(name)
                reach = _REACH + 1  # the list may go on: "without tests and performance"
        reach -= 1
    return wanted, excluded


# --- running -----------------------------------------------------------------------------------------------------


def _submit(pool: AgentPool, plan: Plan, agent: PlannedAgent) -> AgentFuture[Any] | AgentPoolError:
    try:
        return pool.options(name=agent.name).submit_agent(agent.kind, plan.prompt, path=plan.path, out=plan.out)
    except PoolClosedError:
        raise
    except AgentPoolError as error:
        return error


def _wait(futures: list[AgentFuture[Any]], on_update: Callable[[list[TaskSnapshot]], object] | None) -> None:
    if on_update is None:
        wait(futures)
        return
    shown: list[tuple[str, int]] = []
    shown_at = 0.0
    pending: set[Future[Any]] = set(futures)
    while True:
        finished = not pending
        snapshots = [future.snapshot() for future in futures]
        seen = [(snapshot.state, snapshot.attempts) for snapshot in snapshots]
        now = time.monotonic()
        if finished or seen != shown or now - shown_at >= _UPDATE_SECONDS:
            on_update(snapshots)
            shown, shown_at = seen, now
        if finished:
            return
        # Only the end of a task wakes us; that one has started, or is made again, shows at the next look.
        pending = wait(pending, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED).not_done


def _outcome(agent: PlannedAgent, future: AgentFuture[Any] | AgentPoolError) -> AgentOutcome:
    if not isinstance(future, Future):
        return _failure(agent, future)
    snapshot = future.snapshot()
    figures: dict[str, Any] = {
        "attempts": snapshot.attempts,
        "elapsed_seconds": snapshot.elapsed_seconds,
        "peak_rss_bytes": snapshot.peak_rss_bytes,
    }
    try:
        error = future.exception()
    except CancelledError as cancelled:
        error = cancelled
    if error is not None:
        return _failure(agent, error, **figures)
    return AgentOutcome(name=agent.name, kind=kind_name(agent.kind), ok=True, result=future.result(), **figures)


def _failure(agent: PlannedAgent, error: BaseException, **figures: Any) -> AgentOutcome:
    return AgentOutcome(
        name=agent.name,
        kind=kind_name(agent.kind),
        ok=False,
        error=f"{type(error).__name__}: {error}" if str(error) else type(error).__name__,
        error_details="".join(traceback.format_exception(error)),
        **figures,
    )


def _health() -> dict[str, Any]:
    from agentpool.monitor import get_resource_monitor

    try:
        return get_resource_monitor().get_health_report()
    except Exception as error:
        # What the agents found is worth more than the report on their health.
        return {"status": "unknown", "reasons": [f"no health report: {type(error).__name__}: {error}"]}


# --- reporting ---------------------------------------------------------------------------------------------------

def _section(agent: AgentOutcome) -> list[str]:
    attempts = f"{agent.attempts} attempt{'' if agent.attempts == 1 else 's'}"
    memory = f", peak memory {agent.peak_rss_bytes / MB:.0f} MB" if agent.peak_rss_bytes else ""
    head = f"{agent.name}: {'ok' if agent.ok else 'FAILED'} ({attempts}, {agent.elapsed_seconds:.2f} s{memory})"
    body = render_result(agent.result) if agent.ok else [printable(line) for line in (agent.error or "").splitlines()]
    return [head, *(f"  {line}".rstrip() for line in body)]
