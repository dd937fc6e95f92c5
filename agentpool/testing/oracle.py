"""An independent record of what was promised to whom, and of what really ran: the oracle.

It hears of every call that is accepted, begun, ended or lost in an imagined worker, and of every future that is
settled, and says where the two do not fit together: a task that ran twice at once, or twice without leave; a result
that was safe and got lost; a value that nobody returned; an error without a cause; a future settled twice, or never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from agentpool.core.records import SessionRecord, TaskRecord, TaskSpec, WorkerRecord
from agentpool.errors import (
    CircuitOpenError,
    InitializerError,
    MemoryLimitError,
    MemoryReservationError,
    PoolClosedError,
    QuarantinedError,
    QueueTimeoutError,
    ResultPicklingError,
    SessionLostError,
    TaskKilledError,
    TaskTimeoutError,
    TaskUnpicklingError,
    WorkerCrashedError,
    WorkerKilledError,
)
from agentpool.runtime.outcomes import Encoded
from agentpool.testing.fates import Fate
from agentpool.testing.process import FakeProcess, TaskCancelled, TaskError
from agentpool_worker import protocol

if TYPE_CHECKING:
    from agentpool.testing.world import World

__all__ = ["FakeFuture", "Oracle", "Violation"]

_ERROR_OF: Final[dict[int, type[BaseException]]] = {
    protocol.ERROR: TaskError,
    protocol.CALL_FAILED: TaskUnpicklingError,
    protocol.RESULT_FAILED: ResultPicklingError,
}


class Violation(AssertionError):
    """The pool broke a promise. `number`: of the task concerned, 0 where there is none."""

    def __init__(self, rule: str, message: str, number: int = 0) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.number = number


class FakeFuture:
    """What the manager settles (`agentpool.runtime.manager.Call`), with all that really happened to its task."""

    __slots__ = (
        "_oracle", "begun", "buffers", "deaths", "end", "ended", "fate", "follower", "heard", "is_kill_promised",
        "is_safe", "payload", "process", "produced", "said", "spec", "task", "wishes", "worker",
    )

    def __init__(self, oracle: Oracle, spec: TaskSpec, fate: Fate) -> None:
        self._oracle = oracle
        self.spec = spec
        #: what the task does
        self.fate = fate
        self.payload: bytes | tuple[bytes, ...] = b"call"
        # An imagined worker takes a buffer for the kind of agent that it has to set up.
        self.buffers: Sequence[memoryview] = () if spec.kind is None else (memoryview(spec.kind.encode()),)
        self.worker: WorkerRecord | None = None
        self.task: TaskRecord | None = None
        #: how often a worker began it, how often one ended it, how often one died with it
        self.begun = 0
        self.ended = 0
        self.deaths = 0
        #: which worker runs it now
        self.process: FakeProcess | None = None
        #: what the last attempt came to, as (frame kind, payload), and whether no death could lose that
        self.produced: tuple[int, bytes] | None = None
        self.is_safe = False
        #: what users asked for: "cancel", "kill"
        self.wishes: set[str] = set()
        #: how often the task said something, and which of that arrived last
        self.said = 0
        self.heard = 0
        self.is_kill_promised = False
        #: how it was settled; "" while it is not
        self.end = ""
        #: submit this when it is settled, in a callback
        self.follower: TaskSpec | None = None

    def story(self) -> str:
        """What happened to it, for the report of a failure."""
        return (
            f"{self.task!r}, {self.spec}, {self.fate}: {self.end or 'not settled'}; really began {self.begun}, ended "
            f"{self.ended}, was lost {self.deaths} times; runs in {self.process}; last came to {self.produced}; wishes "
            f"{sorted(self.wishes)}"
        )

    def settle(self, is_value: bool, payload: object) -> None:
        """Set the result or the exception, and run the callbacks."""
        self._oracle.settled(self, is_value, payload)

    def settle_cancelled(self) -> None:
        """Become cancelled."""
        self._oracle.cancelled(self)

    def receive_events(self, attempt: int, payloads: Sequence[bytes], dropped: int) -> None:
        """What the task says while it runs."""
        self._oracle.heard(self, attempt, payloads)


class Oracle:
    """See the module. Raises `Violation`, out of whichever call showed it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.futures: dict[int, FakeFuture] = {}
        #: accepted and not settled, in order
        self.open: dict[int, FakeFuture] = {}
        #: session -> the process that ran its last task, and that task; process -> the session that has it
        self.sessions: dict[int, tuple[int, int]] = {}
        self.owners: dict[int, SessionRecord] = {}
        self.settlements = 0
        self.begins = 0
        #: how each settled task ended
        self.ends: list[str] = []
        #: what was done to the pool as a whole: "cancel", "stop", "breaker", "initializer", "corrupt"
        self.facts: set[str] = set()

    def accepted(self, future: FakeFuture, task: TaskRecord) -> None:
        """`submit` returned."""
        future.task = task
        self.futures[task.id] = self.open[task.id] = future

    # -- what workers do -----------------------------------------------------------------------------------------

    def began(self, process: FakeProcess, task_id: int) -> None:
        """A worker begins to run a task."""
        future = self.futures[task_id]
        if future.process is not None:
            raise Violation("nothing_runs_twice_at_once", f"task {task_id} begins in {process} and runs in "
                            f"{future.process}", task_id)
        if future.end:
            raise Violation("what_is_settled_does_not_run", f"task {task_id} begins in {process} and is "
                            f"{future.end} already", task_id)
        self.begins += 1
        future.begun += 1
        if future.begun > 1 and future.spec.policy is None:
            raise Violation("no_second_attempt_unasked", f"task {task_id} begins for the second time", task_id)
        future.process = process
        if fate_bytes := future.fate.grows:
            if future.fate.in_tool:
                process.tools.append(fate_bytes)
            else:
                process.rss_bytes = fate_bytes
        future.produced, future.is_safe = None, False
        running = sum(1 for other in self._world.machine.living() if other.current is not None)
        core = self._world.core
        self._judge_group(future.spec, task_id)
        self._judge_session(process, future.spec.session, task_id)
        if running > core.concurrency + core.overhang:
            raise Violation("the_throttle_holds", f"{running} tasks really run at once", task_id)

    def _judge_session(self, process: FakeProcess, session: SessionRecord | None, task_id: int) -> None:
        owner = self.owners.get(process.pid)
        if session is None:
            if owner is not None:
                raise Violation("a_session_has_its_worker_alone", f"it runs in {process} of {owner}", task_id)
            return
        before, last = self.sessions.get(session.id, (process.pid, task_id))
        if process.pid != before or task_id < last:
            raise Violation("a_session_runs_in_order_in_one_worker", f"task {task_id} of {session} runs in {process}, "
                            f"task {last} ran in {before}", task_id)
        self.owners[process.pid] = session
        self.sessions[session.id] = (process.pid, task_id)

    def _judge_group(self, spec: TaskSpec, task_id: int) -> None:
        if spec.group is None or spec.group_limit is None:
            return
        limits = [
            self.futures[other.current.task_id].spec.group_limit for other in self._world.machine.living()
            if other.current is not None and self.futures[other.current.task_id].spec.group == spec.group
        ]
        # Each was placed as its own limit allows, and they may begin in another order than they were placed.
        if len(limits) > max(limit or len(limits) for limit in limits):
            raise Violation("groups_keep_their_limits", f"{len(limits)} of {spec.group!r} really run at once", task_id)

    def ended(self, process: FakeProcess, task_id: int, kind: int, payload: bytes, *, is_safe: bool) -> None:
        """A task ended in its worker."""
        future = self.futures[task_id]
        future.process = None
        process.tools.clear()
        future.ended += 1
        future.produced, future.is_safe = (kind, payload), is_safe

    def lost(self, process: FakeProcess, task_id: int) -> None:
        """A worker died with a task, or with its half written result."""
        future = self.futures[task_id]
        future.process = None
        future.deaths += 1

    def says(self, process: FakeProcess, task_id: int) -> list[bytes]:
        """What a task says: its attempt, and how often it said something. Every other one says nothing."""
        if task_id % 2:
            return []
        future = self.futures[task_id]
        future.said += 1
        return [b"%d %d" % (future.begun, future.said)]

    # -- what futures are told -----------------------------------------------------------------------------------

    def heard(self, future: FakeFuture, attempt: int, payloads: Sequence[bytes]) -> None:
        """A future is told what its task said."""
        task = future.task
        number = 0 if task is None else task.id
        if future.end:
            raise Violation("nothing_is_heard_after_the_end", f"task {number} was {future.end}", number)
        for payload in payloads:
            began, order = map(int, payload.split())
            if began != attempt:
                raise Violation("events_know_their_attempt", f"task {number} said in attempt {began} what was heard as "
                                f"of attempt {attempt}", number)
            if order <= future.heard:
                raise Violation("events_keep_their_order", f"task {number}: {order} after {future.heard}", number)
            future.heard = order

    def _settle(self, future: FakeFuture, how: str) -> TaskRecord:
        task = future.task
        assert task is not None
        if future.end:
            raise Violation("settled_exactly_once", f"task {task.id} is {how}, and was {future.end} before", task.id)
        if self._world.is_locked:
            raise Violation("settled_outside_the_lock", f"task {task.id} is {how} with the lock held", task.id)
        future.end = how
        self.settlements += 1
        self.ends.append(how)
        del self.open[task.id]
        if future.begun != task.attempts:
            raise Violation("attempts_are_charged_when_begun", f"task {task.id} is charged with {task.attempts} "
                            f"attempts, and began {future.begun} times", task.id)
        return task

    def cancelled(self, future: FakeFuture) -> None:
        """A future is told that it is cancelled."""
        task = self._settle(future, "cancelled")
        if "cancel" not in future.wishes and self.facts.isdisjoint(("cancel", "stop")):
            raise Violation("errors_have_causes", f"nobody cancelled task {task.id}", task.id)
        if future.process is not None:
            raise Violation("what_runs_is_not_cancelled", f"task {task.id} runs in {future.process}", task.id)
        self._world.follow(future)

    def settled(self, future: FakeFuture, is_value: bool, payload: object) -> None:
        """A future is told its value or error."""
        task = self._settle(future, "resolved" if is_value else type(payload).__name__)
        if is_value:
            self._judge_value(future, task, payload)
        elif (why := self._doubt(future, task, payload)) is not None:
            raise Violation("errors_have_causes", f"task {task.id} got {type(payload).__name__} ({payload}), and "
                            f"{why}", task.id)
        self._world.follow(future)

    def _judge_value(self, future: FakeFuture, task: TaskRecord, payload: object) -> None:
        value: Any = payload.rebuild() if isinstance(payload, Encoded) else payload
        produced = future.produced
        if produced is None or produced[0] != protocol.VALUE or value != protocol.loads(produced[1]) or (
            value[0] != task.id
        ):
            raise Violation("the_right_value", f"task {task.id} got {value!r}; its last attempt came to {produced}",
                            task.id)
        if future.is_kill_promised:
            raise Violation("a_promised_kill_kills", f"task {task.id} returned {value!r} although it was to be killed",
                            task.id)

    def _doubt(self, future: FakeFuture, task: TaskRecord, error: object) -> str | None:
        """Why this error cannot be right; None: it can."""
        spec, now, facts = future.spec, self._world.machine.clock.now, self.facts
        match error:
            case QuarantinedError():
                return None if future.deaths >= 3 else f"only {future.deaths} workers died of it"
            case WorkerKilledError() if "kill_worker" not in facts:
                return "nobody killed a worker"
            case SessionLostError():
                is_lost = spec.session is not None and spec.session.error is not None
                return None if is_lost else "its session is not lost"
            case WorkerCrashedError():
                if not future.deaths and "corrupt" not in facts:
                    return "no worker died while it ran it"
                if future.is_safe and "corrupt" not in facts:
                    return f"its last attempt had ended, with {future.produced}"
                return None
            case TaskTimeoutError():
                is_due = spec.timeout is not None and now >= task.started_at + spec.timeout
                return None if is_due else f"its timeout is {spec.timeout}, it ran since {task.started_at}, now {now}"
            case MemoryReservationError():
                most = self._world.machine.total_bytes
                return None if (spec.expected_bytes or 0) > most * 0.9 else f"it expects only {spec.expected_bytes}"
            case MemoryLimitError():
                is_over = error.is_pool_wide or error.peak_rss_bytes > error.limit_bytes
                return None if is_over else f"its peak was {error.peak_rss_bytes}, its limit {error.limit_bytes}"
            case TaskKilledError():
                return None if "kill" in future.wishes or "stop" in facts else "nobody killed it"
            case QueueTimeoutError():
                limit = spec.queue_timeout
                return None if limit is not None and now >= task.queued_at + limit else f"its queue_timeout is {limit}"
            case CircuitOpenError():
                return None if "breaker" in facts else "the breaker never opened"
            case InitializerError():
                return None if "initializer" in facts else "no initializer failed"
            case PoolClosedError():
                return None if "closed" in facts else "the pool is open"
            case LookupError():
                return None if spec.policy is not None else "it has no policy that could raise it"
            case TaskCancelled():
                return "whoever had it asked to stop has a better reason"
        produced = future.produced
        if produced is not None and produced[0] in _ERROR_OF and isinstance(error, _ERROR_OF[produced[0]]):
            return None
        return f"its last attempt came to {produced}"
