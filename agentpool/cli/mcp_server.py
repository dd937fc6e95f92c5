"""The MCP server: tools that run agents in this process's pool, and look at all pools of the user.

One server serves one client, over standard input and output, and ends with them. The pool is made for the first agent,
and its workers end when they are idle: a session that only looks costs this process and nothing else
(docs/decisions/0051). Tools that wait run in the event loop of the one thread, those that look in threads of their own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

from agentpool import __version__
from agentpool.cli.reach import folders
from agentpool.cli.terminal import UsageProblem
from agentpool.config import MB, HostBudget, PoolOptions
from agentpool.control.client import FoundPool, find_pools
from agentpool.control.wire import ControlError
from agentpool.errors import AgentPoolError
from agentpool.io.rundir import default_runtime_directory
from agentpool.io.shared_budget import SharedBudget
from agentpool.orchestrator import REVIEWERS
from agentpool_worker.agents.base import STOCK
from agentpool_worker.agents.rendering import jsonable, render_result

if TYPE_CHECKING:
    from agentpool.futures import AgentFuture
    from agentpool.pool import AgentPool

__all__ = ["serve"]

_INSTRUCTIONS: Final = (
    "Runs agents in pooled processes, no more at once than this machine's budget allows: calls wait for their turn. "
    "The agents are {agents}. Ask pool_status before you start sub-agents of your own."
)
#: Seconds between two notes of progress while nothing happens.
_NOTE_SECONDS: Final = 1.0
#: Seconds after which a worker without a task ends: the client may come back, and may not.
_IDLE_SECONDS: Final = 30.0


class AgentTask(BaseModel, extra="forbid"):
    """What one agent is to do."""

    agent: str
    prompt: str
    path: str | None = None


class Tools:
    """What the client may call. Its pool is made with the first agent."""

    def __init__(
        self, names: Sequence[str], *, max_workers: int, memory_limit: float | None, budget: HostBudget | None,
        place: str | None,
    ) -> None:
        self.names = tuple(dict.fromkeys(names or REVIEWERS))
        self._max_workers = max_workers
        self._memory_limit = memory_limit
        self._budget = budget
        self._place = place
        self._pool: AgentPool | None = None
        self._lock = threading.Lock()

    def _own_pool(self) -> AgentPool:
        from agentpool.pool import AgentPool

        with self._lock:
            if self._pool is None or self._pool.closed:  # shut down by hand, by `agentpool shutdown`
                settings: PoolOptions = {"idle_timeout": _IDLE_SECONDS, "control": self._place or True}
                if self._budget is not None:
                    settings["budget"] = self._budget
                if self._memory_limit is not None:
                    settings["memory_limit_mb"] = settings["hard_memory_limit_mb"] = self._memory_limit
                self._pool = AgentPool(self._max_workers, name=f"mcp-{os.getpid()}", **settings)
            return self._pool

    def close(self) -> None:
        """The client has gone: nobody waits for what runs."""
        if self._pool is not None:
            self._pool.emergency_stop("the MCP client has gone")

    # -- running -------------------------------------------------------------------------------------------------

    def _submit(self, agent: str, prompt: str, path: str | None, timeout_seconds: float | None) -> AgentFuture[Any]:
        if agent not in self.names:
            raise ToolError(f"there is no agent {agent!r} here; there are: {', '.join(self.names)}")
        if path is not None and not os.path.exists(path):
            raise ToolError(f"there is nothing at {path!r} to look at")
        if path is None and agent in REVIEWERS:
            path = os.getcwd()
        given = {} if path is None else {"path": os.path.abspath(path)}
        try:
            view = self._own_pool().options(name=agent, timeout=timeout_seconds)
            return view.submit_agent(agent, prompt, **given)
        except (AgentPoolError, LookupError, TypeError) as error:
            raise ToolError(str(error)) from error

    async def run_agent(
        self, context: Context, agent: str, prompt: str, path: str | None = None, timeout_seconds: float | None = None
    ) -> dict[str, Any]:
        """Run one agent in a process of its own and return what it found. It may wait for its turn first.

        agent: its name. prompt: what it is to do. path: the file or directory it is to look at.
        """
        future = self._submit(agent, prompt, path, timeout_seconds)
        await self._wait([future], context)
        outcome = _outcome(agent, future)
        if not outcome["ok"]:
            raise ToolError(f"agent {agent} failed: {outcome['error']}")
        return outcome

    async def run_agents(
        self, context: Context, tasks: list[AgentTask], timeout_seconds: float | None = None
    ) -> dict[str, Any]:
        """Run several agents, as many at once as the budget allows, and return what each found, in order.

        tasks: for each agent its name, its prompt, and the path that it is to look at. One that fails does not stop the
        others: its "ok" is false, and "error" says why.
        """
        futures: list[AgentFuture[Any]] = []
        try:
            for task in tasks:
                futures.append(  # noqa: PERF401  those before a wrong one are stopped
                    self._submit(task.agent, task.prompt, task.path, timeout_seconds))
        except ToolError:
            _stop(futures)
            raise
        await self._wait(futures, context)
        outcomes = [_outcome(task.agent, future) for task, future in zip(tasks, futures, strict=True)]
        return {"ok": all(outcome["ok"] for outcome in outcomes), "agents": outcomes}

    async def _wait(self, futures: list[AgentFuture[Any]], context: Context) -> None:
        """Until all are over, with notes of progress; stops them where the client does not wait any more."""
        waiting: set[asyncio.Future[Any]] = {asyncio.wrap_future(future) for future in futures}
        began = time.monotonic()
        try:
            while waiting:
                ended, waiting = await asyncio.wait(waiting, timeout=_NOTE_SECONDS, return_when="FIRST_COMPLETED")
                for future in ended:
                    future.cancelled() or future.exception()  # looked at: asyncio would complain of it
                done = len(futures) - len(waiting)
                # Progress has to grow with every note: parts of a step stand for the time.
                seconds = time.monotonic() - began
                await context.report_progress(done + seconds / (seconds + 60.0), len(futures) + 1, self._note(futures))
        except BaseException:  # cancelled by the client, or the client has gone
            for each in waiting:
                each.cancel()  # asyncio would complain that nobody looked at what becomes of it
            _stop(futures)
            raise

    def _note(self, futures: list[AgentFuture[Any]]) -> str:
        done = sum(future.done() for future in futures)
        running = sum(future.running() for future in futures)
        words = f"{done} of {len(futures)} done, {running} running"
        budget = self._pool.get_pool_stats()["host_budget"] if self._pool is not None else None
        if budget is not None and budget["waits_for"] and not running:
            words += f", waiting for {budget['waits_for']}"
        return words

    # -- looking -------------------------------------------------------------------------------------------------

    def pool_status(self) -> dict[str, Any]:
        """How many agents run on this machine, how many more may, and how all pools of this user stand."""
        pools = []
        for found in find_pools(folders(self._place)):
            try:
                with found.connect() as client:
                    pools.append(_short(client.call("status")))
            except ControlError as error:
                pools.append({"name": found.pool.get("name"), "problem": str(error)})
        return {"budget": self._budget_status(), "pools": pools, "agents": list(self.names)}

    def _budget_status(self) -> dict[str, Any]:
        budget = self._budget or HostBudget()
        shared = SharedBudget(budget.directory or f"{default_runtime_directory()}/budget")
        records = shared.look_on().values()
        running = sum(record.get("slots", 0) for record in records)
        return {
            "agents": budget.agents,
            "running": running,
            "free": max(0, budget.agents - running),
            "waiting_pools": sum(record.get("ticket") is not None for record in records),
            "memory_mb": budget.memory_mb,
            "memory_used_mb": round(sum(record.get("committed_bytes", 0) for record in records) / MB, 1),
        }

    def breaker(
        self, action: Literal["show", "open", "close", "reset"] = "show", pool: str | None = None,
        reason: str | None = None, ttl_seconds: float | None = None,
    ) -> dict[str, Any]:
        """Look at the circuit breakers that stand in front of every start of a process, or set one.

        action: show, open (start nothing more), close (for ttl_seconds, whatever fails), or reset (judge as always).
        pool: name or id; needed to set one where there are several.
        """
        pools = [found for found in find_pools(folders(self._place)) if pool is None or found.matches(pool)]
        if not pools and (pool is not None or action != "show"):
            raise ToolError(f"no pool {pool!r} is running" if pool is not None else "no pool is running")
        if len(pools) > 1 and action != "show":
            names = ", ".join(str(found.pool.get("name")) for found in pools)
            raise ToolError(f"say which pool: {names}")
        try:
            return {str(found.pool.get("name")): _breaker(found, action, reason, ttl_seconds) for found in pools}
        except ControlError as error:
            raise ToolError(str(error)) from error


def _breaker(found: FoundPool, action: str, reason: str | None, ttl_seconds: float | None) -> Any:
    with found.connect() as client:
        return client.call("breaker", action=action, reason=reason, ttl=ttl_seconds)


def _short(status: dict[str, Any]) -> dict[str, Any]:
    stats = status["stats"]
    keys = ("name", "status", "reasons", "running", "queue_length", "total_agents", "max_concurrent", "memory_mb")
    breaker, pid = stats["circuit_breaker"]["state"], status["pool"]["pid"]
    return {key: stats[key] for key in keys} | {"breaker": breaker, "pid": pid}


def _stop(futures: Sequence[AgentFuture[Any]]) -> None:
    for future in reversed(futures):
        if not future.cancel():
            future.kill()


def _outcome(agent: str, future: AgentFuture[Any]) -> dict[str, Any]:
    snapshot = future.snapshot()
    outcome: dict[str, Any] = {
        "agent": agent, "ok": True, "seconds": round(snapshot.elapsed_seconds, 3),
        "peak_memory_mb": round(snapshot.peak_rss_bytes / MB, 1),
    }
    if future.cancelled():
        return outcome | {"ok": False, "error": "it was cancelled"}
    error = future.exception(0)
    if error is not None:
        return outcome | {"ok": False, "error": f"{type(error).__name__}: {error}"}
    result = future.result(0)
    return outcome | {"report": "\n".join(render_result(result)), "result": jsonable(result)}


def serve(
    *, names: Sequence[str], max_workers: int, memory_limit: float | None, budget: HostBudget | None, place: str | None
) -> None:
    """Serves one client until it closes standard input. Raises UsageProblem for an agent that is not known,
    CommandFailed for a folder that is not this user's own.
    """
    for name in names:
        if name not in STOCK and ":" not in name:
            raise UsageProblem(f"unknown agent {name!r}; known are {', '.join(STOCK)}, or 'module:Class'")
    folders(place)  # here, where a user sees what is wrong with it
    tools = Tools(names, max_workers=max_workers, memory_limit=memory_limit, budget=budget, place=place)
    instructions = _INSTRUCTIONS.format(agents=", ".join(tools.names))
    server = MCPServer("agentpool", version=__version__, instructions=instructions, log_level="WARNING")
    for tool in (tools.run_agent, tools.run_agents, tools.pool_status, tools.breaker):
        server.add_tool(tool)
    _keep_output_for_the_protocol()
    try:
        server.run("stdio")
    finally:
        tools.close()


def _keep_output_for_the_protocol() -> None:
    """What agents print goes to standard error: workers inherit descriptor 1, which the protocol has for itself."""
    sys.stdout.flush()
    protocol = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(protocol, "w", encoding="utf-8")  # noqa: SIM115  it lasts as long as the process
