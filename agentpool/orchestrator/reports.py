"""What became of a plan: an outcome for each agent with what it cost, as data, as JSON, and as text.

Formats, and runs nothing. Any thread may call it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from agentpool.config import MB
from agentpool_worker.agents.rendering import jsonable, printable, render_result
from agentpool_worker.agents.tokens import token_counts

__all__ = ["AgentOutcome", "AgentTry", "OrchestrationReport", "cost_of", "partial_report", "usage_of"]

AgentState = Literal["succeeded", "failed", "skipped", "stopped"]

_COSTS: Final = ("cost_usd", "total_cost_usd")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTry:
    """One kind that was run for an agent: its own, or a fallback.

    attempts: how often it was started (0: never). queue_seconds: from its submission to its first start.
    elapsed_seconds: of its last attempt. peak_rss_bytes: the most that its worker's process tree was seen to hold.
    error: why it did not succeed, in one line or few, and error_details, with the remote traceback; else None.
    usage: tokens by name, and cost_usd: as its result, or its exception, has them; else None.
    """

    kind: str
    attempts: int = 0
    queue_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    peak_rss_bytes: int = 0
    error: str | None = None
    error_details: str | None = None
    usage: dict[str, int] | None = None
    cost_usd: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": self.kind,
            "attempts": self.attempts,
            "queue_seconds": round(self.queue_seconds, 3),
            "elapsed_seconds": round(self.elapsed_seconds, 3),
            "peak_rss_mb": round(self.peak_rss_bytes / MB, 1),
            "error": self.error,
            "error_details": self.error_details,
            "usage": self.usage,
            "cost_usd": self.cost_usd,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOutcome:
    """What became of one agent, and what it cost.

    kind: what gave the result, or was run last. state: "succeeded", "failed", "skipped" (it was never started) or
    "stopped" (the plan ended first). reason: why it was skipped or stopped. required: its failure is the plan's.
    tries: each kind that was run for it, in order: more than one where a fallback was needed.
    wall_seconds: from its first submission to its end, waiting included. result: what it returned, where `ok`.
    """

    name: str
    kind: str
    state: AgentState
    required: bool = True
    reason: str | None = None
    tries: tuple[AgentTry, ...] = ()
    wall_seconds: float = 0.0
    result: Any = None

    @property
    def ok(self) -> bool:
        """Did it succeed?"""
        return self.state == "succeeded"

    @property
    def attempts(self) -> int:
        """How often it was started, fallbacks included."""
        return sum(each.attempts for each in self.tries)

    @property
    def queue_seconds(self) -> float:
        """How long it waited for a worker, all tries together."""
        return sum(each.queue_seconds for each in self.tries)

    @property
    def elapsed_seconds(self) -> float:
        """How long its last attempt ran."""
        return self.tries[-1].elapsed_seconds if self.tries else 0.0

    @property
    def peak_rss_bytes(self) -> int:
        """The most that it was seen to hold, in any of its tries."""
        return max((each.peak_rss_bytes for each in self.tries), default=0)

    @property
    def error(self) -> str | None:
        """Why there is no result, in one line or few; None where it succeeded."""
        if self.ok:
            return None
        if self.state == "failed" and self.tries and self.tries[-1].error is not None:
            return self.tries[-1].error
        return f"{self.state}: {self.reason}"

    @property
    def error_details(self) -> str | None:
        """The error with its remote traceback, where there is one."""
        return None if self.ok or not self.tries else self.tries[-1].error_details

    @property
    def usage(self) -> dict[str, int] | None:
        """The tokens of all its tries, by name; None: nothing that it returned names any."""
        return _sum_of_usage(each.usage for each in self.tries)

    @property
    def cost_usd(self) -> float | None:
        """The cost of all its tries; None: nothing that it returned has one."""
        return _sum_of_costs(each.cost_usd for each in self.tries)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; in a user's agent's result, what JSON does not know becomes its repr."""
        return {
            "name": self.name,
            "kind": self.kind,
            "ok": self.ok,
            "state": self.state,
            "required": self.required,
            "reason": self.reason,
            "attempts": self.attempts,
            "wall_seconds": round(self.wall_seconds, 3),
            "queue_seconds": round(self.queue_seconds, 3),
            "elapsed_seconds": round(self.elapsed_seconds, 3),
            "peak_rss_mb": round(self.peak_rss_bytes / MB, 1),
            "usage": self.usage,
            "cost_usd": self.cost_usd,
            "result": jsonable(self.result),
            "error": self.error,
            "error_details": self.error_details,
            "tries": [each.to_dict() for each in self.tries],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestrationReport:
    """The outcome of each agent, in the plan's order, the time from first submit to last result, and the health report.

    ending: "completed", or what ended the plan before that: "budget_spent", "failure" (where it stops on failure),
    "interrupted" or "pool_lost"; ending_reason: the same in words. peak_rss_bytes: the most that all its agents
    together were seen to hold. budget_seconds, budget_mb: what the plan was given.

    `str(report)` is `to_text()`.
    """

    prompt: str
    path: str | None
    out: str | None
    agents: tuple[AgentOutcome, ...]
    wall_seconds: float
    health: dict[str, Any] = field(repr=False)
    ending: str = "completed"
    ending_reason: str | None = None
    peak_rss_bytes: int = 0
    budget_seconds: float | None = None
    budget_mb: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every required agent succeeded."""
        return all(agent.ok for agent in self.agents if agent.required)

    @property
    def results(self) -> dict[str, Any]:
        """What the agents that succeeded returned, by name."""
        return {agent.name: agent.result for agent in self.agents if agent.ok}

    @property
    def usage(self) -> dict[str, int] | None:
        """The tokens of all agents together; None: no result names any."""
        return _sum_of_usage(agent.usage for agent in self.agents)

    @property
    def cost_usd(self) -> float | None:
        """The cost of all agents together; None: no result has one."""
        return _sum_of_costs(agent.cost_usd for agent in self.agents)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "ok": self.ok,
            "prompt": self.prompt,
            "path": self.path,
            "out": self.out,
            "ending": self.ending,
            "ending_reason": self.ending_reason,
            "wall_seconds": round(self.wall_seconds, 3),
            "peak_rss_mb": round(self.peak_rss_bytes / MB, 1),
            "budget_seconds": self.budget_seconds,
            "budget_mb": self.budget_mb,
            "usage": self.usage,
            "cost_usd": self.cost_usd,
            "agents": [agent.to_dict() for agent in self.agents],
            "health": jsonable(self.health),
        }

    def to_text(self) -> str:
        """A section per agent, with its summary and the worst ten of what it found; no health report."""
        succeeded = sum(agent.ok for agent in self.agents)
        lines = [] if self.path is None else [f"Report on {printable(self.path)}"]
        lines += [
            f"Prompt: {printable(self.prompt)}",
            f"{succeeded} of {len(self.agents)} agents succeeded, in {self.wall_seconds:.2f} s",
        ]
        if self.ending != "completed":
            lines.append(f"Ended early: {printable(self.ending_reason or self.ending)}")
        for agent in self.agents:
            lines += ["", *_section(agent)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()


def partial_report(error: BaseException) -> OrchestrationReport | None:
    """What had come of a plan when this exception, KeyboardInterrupt say, ended `run_plan`; None: it did not."""
    report = getattr(error, "report", None)
    return report if isinstance(report, OrchestrationReport) else None


def _section(agent: AgentOutcome) -> list[str]:
    word = {"succeeded": "ok", "failed": "FAILED", "stopped": "STOPPED"}.get(agent.state, agent.state)
    if not agent.required and agent.state == "failed":
        word = "failed (optional)"
    if agent.tries:
        attempts = f"{agent.attempts} attempt{'' if agent.attempts == 1 else 's'}"
        memory = f", peak memory {agent.peak_rss_bytes / MB:.0f} MB" if agent.peak_rss_bytes else ""
        head = f"{printable(agent.name)}: {word} ({attempts}, {agent.elapsed_seconds:.2f} s{memory})"
    else:
        head = f"{printable(agent.name)}: {word}"
    body = render_result(agent.result) if agent.ok else [printable(line) for line in (agent.error or "").splitlines()]
    before = [
        f"{printable(each.kind)} failed, so {printable(following.kind)} was run: {_first_line(each.error)}"
        for each, following in zip(agent.tries, agent.tries[1:], strict=False)
    ]
    return [head, *(f"  {line}".rstrip() for line in (*before, *body))]


def _first_line(text: str | None) -> str:
    return printable(next(iter((text or "").strip().splitlines()), ""))


# --- tokens and costs --------------------------------------------------------------------------------------------


def usage_of(result: object) -> dict[str, int] | None:
    """The tokens that a result, or an exception, names in its `usage`, by the names of the event `Usage`."""
    return token_counts(_field(result, "usage")) or None


def cost_of(result: object) -> float | None:
    """What a result, or an exception, says that it cost."""
    costs = [_field(result, name) for name in _COSTS]
    return next((float(cost) for cost in costs if type(cost) in (int, float)), None)


def _field(thing: object, name: str) -> Any:
    if isinstance(thing, Mapping):
        return thing.get(name)
    try:
        return getattr(thing, name, None)
    except Exception:  # a property of a user's class; what it did is worth more than what it cost
        return None


def _sum_of_usage(usages: Iterable[dict[str, int] | None]) -> dict[str, int] | None:
    total: dict[str, int] = {}
    for usage in usages:
        for name, count in (usage or {}).items():
            total[name] = total.get(name, 0) + count
    return total or None


def _sum_of_costs(costs: Iterable[float | None]) -> float | None:
    known = [cost for cost in costs if cost is not None]
    return sum(known) if known else None
