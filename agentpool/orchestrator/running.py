"""Runs a plan through a pool: starts what the core says may start, tells it what ended, and gathers what came of it.

Decides nothing: `agentpool.core.plan` does. How tasks are placed, throttled and retried is the pool's business.
Everything here runs in the thread that called `run_plan`, but for one callback, which only notes that a task has ended.
"""

from __future__ import annotations

import contextlib
import queue
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from agentpool.agents.registry import kind_of
from agentpool.config import MB
from agentpool.core.plan import Ending, NodeState, PlanState, StartAgent, StopAgent
from agentpool.errors import PoolClosedError, QueueFullError
from agentpool.futures import TaskSnapshot
from agentpool.orchestrator.plans import AgentKindLike, Plan, PlannedAgent, check_kinds, label_of, nodes_of
from agentpool.orchestrator.prompts import call_of
from agentpool.orchestrator.reports import AgentOutcome, AgentState, AgentTry, OrchestrationReport, cost_of, usage_of
from agentpool.runtime import interrupts
from agentpool_worker.agents.base import kind_name

if TYPE_CHECKING:
    from agentpool.futures import AgentFuture
    from agentpool.pool import AgentPool

__all__ = ["OnUpdate", "run_plan"]

OnUpdate = Callable[[list[TaskSnapshot]], object]

#: The longest time between two calls of `on_update`.
_UPDATE_SECONDS: Final = 0.25
#: How often it is looked whether something changed that wakes nobody: a task has begun, its memory was read.
_LOOK_SECONDS: Final = 0.05
#: The same where nobody watches and memory is only noted for the report.
_NOTE_SECONDS: Final = 0.5
#: Expected of an agent, in MB, where neither it nor the pool has a memory limit.
_USUAL_MB: Final = 100.0


def run_plan(plan: Plan, pool: AgentPool | None = None, *, on_update: OnUpdate | None = None) -> OrchestrationReport:
    """Run a plan's agents through `pool`, and report; None: `get_agent_pool()`.

    Each agent is submitted as soon as those that it depends on have ended and the budget has room for it; the pool
    throttles. An agent that fails, or that the pool does not take, is an outcome of the report, and so is one that was
    skipped or stopped, when the budget was spent or the pool was closed: `report.ending` says so.

    on_update: called in this thread with a snapshot of each agent's task, in the plan's order, when a state changed and
        at least every 0.25 s, and once more when all is done. The state of an agent that has no task (yet) is
        "waiting" or "skipped".

    Raises LookupError or TypeError for what is no agent, before anything has run; PoolClosedError where the pool was
    closed before. On KeyboardInterrupt, and on any error of `on_update`, what is queued is cancelled and what runs is
    killed before it is raised again, with what had come of the plan: `partial_report(error)`.
    """
    if pool is None:
        from agentpool.pool import get_agent_pool

        pool = get_agent_pool()
    run = _PlanRun(plan, pool, on_update)
    try:
        run.drive()
    except BaseException as error:
        run.give_up(error)
        report = run.report()
        with contextlib.suppress(AttributeError):  # of a class with slots; it is raised all the same
            error.report = report  # type: ignore[attr-defined]
        raise
    return run.report()


@dataclass(slots=True)
class _Try:
    """One kind, submitted for one agent. `future` None: the pool did not take it."""

    kind: AgentKindLike
    submitted_at: float
    future: AgentFuture[Any] | None = None
    error: BaseException | None = None
    ended_at: float | None = None
    #: why it was asked to stop
    stop_reason: str | None = None


class _PlanRun:
    """One run of one plan."""

    def __init__(self, plan: Plan, pool: AgentPool, on_update: OnUpdate | None) -> None:
        usual_mb = pool.settings.memory_limit_mb or _USUAL_MB
        self._plan = plan
        self._pool = pool
        self._on_update = on_update
        self._agents = {agent.name: agent for agent in plan.agents}
        self._classes = check_kinds(plan)
        self._tries: dict[str, list[_Try]] = {name: [] for name in self._agents}
        self._results: dict[str, Any] = {}
        #: tasks that have ended, as the pool's thread notes them
        self._ended: queue.SimpleQueue[tuple[str, _Try, float]] = queue.SimpleQueue()
        self._shown: list[tuple[str, int, int]] = []
        self._shown_at = 0.0
        self._began_at = time.monotonic()
        self._over_at: float | None = None
        self._state = PlanState(
            self._began_at,
            nodes_of(plan, usual_mb),
            budget_seconds=plan.budget_seconds,
            budget_bytes=None if plan.budget_mb is None else int(plan.budget_mb * MB),
            stops_on_failure=plan.stops_on_failure,
        )

    # -- the loop ------------------------------------------------------------------------------------------------

    def drive(self) -> None:
        """Runs it to its end."""
        while True:
            self._perform()
            self._show()
            if self._state.is_over:
                self._over_at = time.monotonic()
                return
            self._wait()
            self._read_memory()

    def give_up(self, error: BaseException) -> None:
        """Ends it here: what is queued is cancelled, what runs is killed. It is not waited for."""
        reason = "it was interrupted" if isinstance(error, KeyboardInterrupt) else f"{_one_line(error)} was raised"
        with interrupts.held():
            for name, tries in self._tries.items():
                if tries and not self._state.state_of(name).is_final:
                    self._stop(StopAgent(name, reason))
            self._state.ended(time.monotonic(), Ending.INTERRUPTED, reason)
            self._over_at = time.monotonic()

    def _perform(self) -> None:
        while True:
            with interrupts.held():  # Ctrl-C waits while the core changes, here and below
                actions = self._state.take_actions(time.monotonic())
            if not actions:
                return
            for action in actions:
                if isinstance(action, StopAgent):
                    self._stop(action)
                else:
                    self._start(action)

    def _wait(self) -> None:
        """Until a task has ended, or it is time to look."""
        is_watched = self._on_update is not None or self._plan.budget_mb is not None
        now = time.monotonic()
        wake_at = now + (_LOOK_SECONDS if is_watched else _NOTE_SECONDS)
        if (deadline := self._state.next_deadline()) is not None:
            wake_at = min(wake_at, deadline)
        try:
            name, tried, ended_at = self._ended.get(timeout=max(0.0, wake_at - now))
            while True:
                self._settle(name, tried, ended_at)
                name, tried, ended_at = self._ended.get_nowait()
        except queue.Empty:
            pass

    def _read_memory(self) -> None:
        readings = {}
        for name, tries in self._tries.items():
            if tries and tries[-1].future is not None and not self._state.state_of(name).is_final:
                snapshot = tries[-1].future.snapshot()
                if snapshot.sampled_at is not None:
                    readings[name] = snapshot.sampled_at, snapshot.rss_bytes
        self._state.memory_sampled(time.monotonic(), readings)

    # -- what the core asks for ----------------------------------------------------------------------------------

    def _start(self, action: StartAgent) -> None:
        name, state = action.name, self._state
        if state.state_of(name) is NodeState.STOPPING:  # it was to be started, and another one's failure ended the plan
            state.postponed(time.monotonic(), name)
            return
        agent = self._agents[name]
        tried = _Try(agent.kinds[action.choice], time.monotonic())
        try:
            self._submit(agent, self._classes[name][action.choice], tried)
        except QueueFullError:
            state.postponed(time.monotonic(), name)
            return
        except PoolClosedError as error:
            if not any(self._tries.values()):
                raise
            state.ended(time.monotonic(), Ending.POOL_LOST, _one_line(error))
            self._lost(name, tried, error)
        except Exception as error:  # a prompt that is a function, or what the pool does not take: the agent's failure
            self._lost(name, tried, error)

    def _submit(self, agent: PlannedAgent, cls: type[Any], tried: _Try) -> None:
        results = {name: self._results[name] for name in agent.after if name in self._results}
        missing = {name: self._why_missing(name) for name in agent.after if name not in results}
        prompt, kwargs = call_of(self._plan, agent, cls.run, results, missing)
        if kind_name(cls) == "command":
            kwargs.setdefault("check", True)  # what is to run after a command relies on it
        limits = self._limits(agent, tried.kind)
        view = self._pool.options(**{**agent.all_options, **limits, "name": agent.name, "block": False})
        with interrupts.held():  # so that no task is submitted and not known here
            future = view.submit_agent(tried.kind, prompt, **kwargs)
            tried.future = future
            self._tries[agent.name].append(tried)
            future.add_done_callback(lambda _: self._ended.put((agent.name, tried, time.monotonic())))

    def _limits(self, agent: PlannedAgent, kind: AgentKindLike) -> dict[str, float]:
        """No agent alone may hold more than the budget: the pool sees to that faster than we could."""
        if self._plan.budget_mb is None:
            return {}
        found = kind_of(kind)
        given = {**({} if found is None else found.options), **agent.all_options}
        own = given.get("hard_memory_limit_mb") or self._pool.settings.hard_memory_limit_mb
        hard_mb = min(self._plan.budget_mb, own or self._plan.budget_mb)
        soft_mb = given.get("memory_limit_mb")
        limits = {"hard_memory_limit_mb": hard_mb}
        return limits if soft_mb is None else {**limits, "memory_limit_mb": min(soft_mb, hard_mb)}

    def _why_missing(self, name: str) -> str:
        tries = self._tries[name]
        if tries and tries[-1].error is not None:
            return _one_line(tries[-1].error)
        return self._state.reason_of(name) or "it did not run"

    def _stop(self, action: StopAgent) -> None:
        tried = self._tries[action.name][-1]
        if tried.future is not None and tried.future.kill():
            tried.stop_reason = action.reason

    def _lost(self, name: str, tried: _Try, error: Exception) -> None:
        """It never became a task."""
        tried.error, tried.ended_at = error, time.monotonic()
        self._tries[name].append(tried)
        self._state.failed(time.monotonic(), name)

    def _settle(self, name: str, tried: _Try, ended_at: float) -> None:
        error, result = _come_to(tried)
        with interrupts.held():
            tried.error, tried.ended_at = error, ended_at
            if error is None:
                self._results[name] = result
                self._state.succeeded(time.monotonic(), name)
            else:
                self._state.failed(time.monotonic(), name)

    # -- showing -------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        if self._on_update is None:
            return
        snapshots = [self._snapshot(agent) for agent in self._plan.agents]
        seen = [(snapshot.state, snapshot.task_id, snapshot.attempts) for snapshot in snapshots]
        now = time.monotonic()
        if self._state.is_over or seen != self._shown or now - self._shown_at >= _UPDATE_SECONDS:
            self._on_update(snapshots)
            self._shown, self._shown_at = seen, now

    def _snapshot(self, agent: PlannedAgent) -> TaskSnapshot:
        tries = self._tries[agent.name]
        state = self._state.state_of(agent.name)
        if tries and tries[-1].future is not None and state is not NodeState.WAITING:
            return replace(tries[-1].future.snapshot(), kind=label_of(tries[-1].kind))
        word, error = "waiting", None
        if state.is_final:
            word = "failed" if tries else "skipped"
            error = _one_line(tries[-1].error) if tries and tries[-1].error else self._state.reason_of(agent.name)
        kind = agent.kinds[self._state.choice_of(agent.name)]
        return TaskSnapshot(0, agent.name, label_of(kind), word, 0, 0.0, 0, 0, None, error)

    # -- what came of it -----------------------------------------------------------------------------------------

    def report(self) -> OrchestrationReport:
        """What came of it so far; what has not ended counts as stopped."""
        plan, state = self._plan, self._state
        return OrchestrationReport(
            prompt=plan.prompt,
            path=plan.path,
            out=plan.out,
            agents=tuple(self._outcome(agent) for agent in plan.agents),
            wall_seconds=(self._over_at or time.monotonic()) - self._began_at,
            health=_health(),
            ending=state.ending.value,
            ending_reason=state.ending_reason,
            peak_rss_bytes=state.peak_bytes,
            budget_seconds=plan.budget_seconds,
            budget_mb=plan.budget_mb,
        )

    def _outcome(self, agent: PlannedAgent) -> AgentOutcome:
        state, tries = self._state.state_of(agent.name), self._tries[agent.name]
        word, result = _WORDS.get(state, "stopped"), self._results.get(agent.name)
        if not state.is_final and tries and tries[-1].future is not None and tries[-1].future.done():
            tries[-1].error, result = _come_to(tries[-1])  # it ended, and we were interrupted before we heard of it
            word = "stopped" if tries[-1].error else "succeeded"
        ended_at = (tries[-1].ended_at or self._over_at or time.monotonic()) if tries else 0.0
        return AgentOutcome(
            name=agent.name,
            kind=label_of(tries[-1].kind if tries else agent.kind),
            state=word,
            required=agent.policy == "required",
            reason=None if word == "succeeded" else self._state.reason_of(agent.name),
            tries=tuple(_cost(each) for each in tries),
            wall_seconds=ended_at - tries[0].submitted_at if tries else 0.0,
            result=result,
        )


_WORDS: Final[dict[NodeState, AgentState]] = {
    NodeState.SUCCEEDED: "succeeded",
    NodeState.FAILED: "failed",
    NodeState.SKIPPED: "skipped",
}


def _come_to(tried: _Try) -> tuple[BaseException | None, Any]:
    """The error and the result of a task that has ended."""
    assert tried.future is not None
    try:
        error = tried.future.exception()
    except CancelledError as cancelled:
        return cancelled, None
    return error, None if error is not None else tried.future.result()


def _cost(tried: _Try) -> AgentTry:
    error, details = tried.error, None
    said = None if error is None else _one_line(error)
    if error is not None:
        details = "".join(traceback.format_exception(error))
    if tried.stop_reason is not None and error is not None:
        said = f"stopped: {tried.stop_reason}"
    if tried.future is None:
        return AgentTry(kind=label_of(tried.kind), error=said, error_details=details)
    snapshot = tried.future.snapshot()
    began_at = snapshot.first_started_at or tried.ended_at or time.monotonic()
    source: object = error
    if error is None and tried.future.done():
        source = tried.future.result()
    return AgentTry(
        kind=label_of(tried.kind),
        attempts=snapshot.attempts,
        queue_seconds=max(0.0, began_at - tried.submitted_at),
        elapsed_seconds=snapshot.elapsed_seconds,
        peak_rss_bytes=snapshot.peak_rss_bytes,
        error=said,
        error_details=details,
        usage=usage_of(source),
        cost_usd=cost_of(source),
    )


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _health() -> dict[str, Any]:
    from agentpool.monitor import get_resource_monitor

    try:
        return get_resource_monitor().get_health_report()
    except Exception as error:
        # What the agents found is worth more than the report on their health.
        return {"status": "unknown", "reasons": [f"no health report: {type(error).__name__}: {error}"]}
