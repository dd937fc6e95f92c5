"""Hypothesis drives the bare scheduler through whatever can happen; after every step all invariants are checked."""

from __future__ import annotations

from collections.abc import Callable

import tenacity
from fake_crew import TOTAL, Process, World
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from agentpool.config import MB, BreakerSettings, HostBudget, PoolSettings
from agentpool.core.records import SessionRecord, TaskSpec
from agentpool.core.retry import Escalate, RetryPolicy
from agentpool.errors import MemoryLimitError, TaskTimeoutError


def _raises(state: tenacity.RetryCallState) -> bool:
    raise LookupError("a strategy with a fault")


POLICIES = (
    None,
    None,
    RetryPolicy(),
    RetryPolicy(stop=tenacity.stop_after_attempt(4), wait=tenacity.wait_none(),
                retry=tenacity.retry_if_exception_type()),
    RetryPolicy(stop=tenacity.stop_after_delay(30), wait=tenacity.wait_fixed(1),
                retry=tenacity.retry_if_exception_type((TaskTimeoutError, MemoryLimitError))),
    RetryPolicy(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_none(),
                retry=tenacity.retry_if_result(lambda value: value == "again")),
    RetryPolicy(retry=_raises),
    Escalate(factor=2, wait=tenacity.wait_none()),
    Escalate(factor=1, alone=True, wait=tenacity.wait_none()),
)

settings_made = st.builds(
    lambda workers, concurrent, floor, **other: PoolSettings(
        max_workers=workers, max_concurrent=min(concurrent, workers), min_workers=min(floor, workers),
        start_timeout=5.0, idle_timeout=10.0, cleanup_interval=5.0,
        scope="pool" if other["budget"] is None else "host",
        breaker=BreakerSettings(failure_threshold=2, window_seconds=20, open_seconds=3, max_open_seconds=10), **other),
    workers=st.integers(1, 3),
    concurrent=st.integers(1, 3),
    floor=st.sampled_from([0, 0, 1, 3]),
    max_pending=st.sampled_from([None, None, 1, 3]),
    max_tasks_per_child=st.sampled_from([None, None, 1, 3, 20]),
    memory_limit_mb=st.sampled_from([100.0, 100.0, None]),
    memory_growth_mb=st.sampled_from([None, 30.0]),
    hard_memory_limit_mb=st.sampled_from([None, 300.0]),
    critical_memory_mb=st.sampled_from([None, 150.0, 500.0]),
    alert_memory_mb=st.sampled_from([None, 100.0]),
    cpu_policy=st.sampled_from(["report", "throttle"]),
    kill_grace=st.sampled_from([0.0, 0.1, 2.0]),
    budget=st.sampled_from([None, None, None, HostBudget(agents=1), HostBudget(agents=3, memory_mb=150)]),
)
specs = st.builds(
    TaskSpec,
    timeout=st.sampled_from([None, None, 0.02, 2.0]),
    queue_timeout=st.sampled_from([None, None, 1.0, 20.0]),
    policy=st.sampled_from(POLICIES),
    priority=st.sampled_from([0, 0, 0, 1, -5]),
    key=st.sampled_from([None, None, "k", "l"]),
    kind=st.sampled_from([None, None, "a", "b"]),
    soft_limit_bytes=st.sampled_from([None, None, 50 * MB]),
    hard_limit_bytes=st.sampled_from([None, None, 200 * MB]),
    growth_limit_bytes=st.sampled_from([None, None, None, 30 * MB]),
    expected_bytes=st.sampled_from([None, None, None, TOTAL // 10, TOTAL * 3 // 10, 2 * TOTAL]),
    group=st.sampled_from([None, None, "g", "h"]),
    group_limit=st.sampled_from([None, 1, 2]),
)
plain = TaskSpec()
retried = TaskSpec(policy=RetryPolicy())
sizes = st.sampled_from([20 * MB, 20 * MB, 60 * MB, 120 * MB, 220 * MB, 420 * MB, None])


def has(**wanted: bool) -> Callable[[SchedulerMachine], bool]:
    """A precondition: there is a living process with these properties."""
    return lambda self: bool(self.found(**wanted))


class SchedulerMachine(RuleBasedStateMachine):
    """What can happen, in any order that a real manager could see."""

    world: World

    @initialize(settings=settings_made, seed=st.integers(0, 9), is_warm=st.booleans())
    def begin(self, settings: PoolSettings, seed: int, is_warm: bool) -> None:
        self.world = World(settings, seed)
        self.sessions: dict[int, SessionRecord] = {}
        self.opened = 0
        self.world.core.start(0.0)
        self.world.settle_down()
        if is_warm:
            for _ in range(6):
                self.world.submit(plain, "f")
            for _ in range(6):
                self.world.be_kind()

    def found(self, **wanted: bool) -> list[Process]:
        return [
            process for process in self.world.living
            if all(bool(getattr(process, name)) is value for name, value in wanted.items())
        ]

    def pick(self, data: st.DataObject, **wanted: bool) -> Process:
        return data.draw(st.sampled_from(self.found(**wanted)))

    # users

    @rule(spec=specs, call_key=st.sampled_from([None, "f", "g"]))
    def submit(self, spec: TaskSpec, call_key: str | None) -> None:
        self.world.submit(spec, call_key)

    @rule(count=st.integers(1, 12), spec=st.sampled_from([plain, plain, retried]))
    def submit_many(self, count: int, spec: TaskSpec) -> None:
        for _ in range(count):
            self.world.submit(spec, "f")

    @precondition(lambda self: self.world.unresolved)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(self.world.unresolved)))

    @precondition(lambda self: self.world.unresolved)
    @rule(data=st.data())
    def kill_task(self, data: st.DataObject) -> None:
        self.world.kill_task(data.draw(st.sampled_from(self.world.unresolved)))

    @precondition(lambda self: len(self.world.tasks) > 8)
    @rule(how=st.sampled_from(["", "", "", "", "", "", "", "shutdown", "cancel", "stop"]))
    def end(self, how: str) -> None:
        if how == "stop":
            self.world.stop_all()
        elif how:
            self.world.shutdown(cancel_futures=how == "cancel")

    @rule(how=st.sampled_from(["force", "reset", "", ""]), seconds=st.sampled_from([None, 0.01, 3.0]))
    def handle_breaker(self, how: str, seconds: float | None) -> None:
        if how == "force":
            self.world.operate(self.world.core.force_open, "by hand", seconds)
        elif how and seconds is not None:
            self.world.operate(self.world.core.hold_closed, seconds)
        elif how:
            self.world.reset_breaker()

    @rule(most=st.integers(1, 5), at_once=st.sampled_from([None, None, 1]))
    def resize(self, most: int, at_once: int | None) -> None:
        self.world.operate(self.world.core.resize, most, at_once)

    @rule(how=st.sampled_from(["pause", "resume", "resume", "drain"]))
    def hold(self, how: str) -> None:
        self.world.operate(getattr(self.world.core, how))

    @rule(number=st.integers(0, 1), count=st.integers(1, 2), policy=st.sampled_from(POLICIES), is_last=st.booleans(),
          idle_timeout=st.sampled_from([None, 0.3, 5.0]))
    def use_a_session(self, number: int, count: int, policy: RetryPolicy | None, is_last: bool,
                      idle_timeout: float | None) -> None:
        session = self.sessions.get(number)
        if session is None or session.is_closed or session.error is not None:
            self.opened += 1
            session = self.sessions[number] = SessionRecord(self.opened, None, idle_timeout)
        for _ in range(count):
            self.world.submit(TaskSpec(session=session, policy=policy), "f")
        if is_last:
            self.world.operate(self.world.core.close_session, session)

    @precondition(lambda self: self.world.core.workers)
    @rule(data=st.data(), how=st.sampled_from(["recycle", "kill", "recycle all"]))
    def order_a_worker(self, data: st.DataObject, how: str) -> None:
        core = self.world.core
        number = data.draw(st.sampled_from(list(core.workers)))
        if how == "kill":
            self.world.operate(core.kill_worker, number, "by hand")
        else:
            self.world.operate(core.recycle, number if how == "recycle" else None)

    @rule(is_lazy=st.booleans())
    def take_actions_late(self, is_lazy: bool) -> None:
        self.world.is_lazy = is_lazy
        self.world.settle_down()

    # processes

    @precondition(has(is_ready=False))
    @rule(data=st.data(), rss=sizes)
    def ready(self, data: st.DataObject, rss: int | None) -> None:
        self.world.ready(self.pick(data, is_ready=False), rss or 20 * MB)

    @precondition(lambda self: has(is_ready=False)(self) and len(self.world.tasks) > 8)
    @rule(data=st.data(), is_meant=st.sampled_from([False, False, False, False, True]))
    def initializer_failed(self, data: st.DataObject, is_meant: bool) -> None:
        if is_meant:
            self.world.initializer_failed(self.pick(data, is_ready=False), ValueError("initializer"))

    @precondition(has(is_ready=True))
    @rule(data=st.data(), how=st.sampled_from(["value", "value", "again", "error"]), count=st.integers(1, 8))
    def step(self, data: st.DataObject, how: str, count: int) -> None:
        process = self.pick(data, is_ready=True)
        for _ in range(count):
            self.world.step(process, is_value=how != "error", payload=OSError() if how == "error" else how)

    @precondition(has(outbox=True))
    @rule(data=st.data(), rss=sizes, is_twice=st.booleans(), seconds=st.sampled_from([0.0, 0.0, 0.0001, 0.002, 0.3]))
    def deliver(self, data: st.DataObject, rss: int | None, is_twice: bool, seconds: float) -> None:
        self.world.deliver(self.pick(data, outbox=True), seconds=seconds, rss_bytes=rss or 0, is_twice=is_twice)

    @precondition(has(is_ready=True))
    @rule(data=st.data(), count=st.integers(1, 30), seconds=st.sampled_from([0.0, 0.0, 0.0001, 0.1]))
    def work(self, data: st.DataObject, count: int, seconds: float) -> None:
        """A process that behaves: calls begin, end, and are reported."""
        process = self.pick(data, is_ready=True)
        for _ in range(count):
            self.world.step(process, payload="done")
            if process.outbox:
                self.world.deliver(process, seconds=seconds)

    @precondition(has(frames=True))
    @rule(data=st.data(), may_collide=st.booleans())
    def take_back(self, data: st.DataObject, may_collide: bool) -> None:
        process = self.pick(data, frames=True)
        if may_collide:
            self.world.revoke(process.worker)
            self.world.settle_down()
        else:
            self.world.take_back_head(process)

    @precondition(has(asked=True))
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        self.world.acknowledge(self.pick(data, asked=True), "a stack")

    @precondition(has(is_collecting=True))
    @rule(data=st.data())
    def collected(self, data: st.DataObject) -> None:
        self.world.collected(self.pick(data, is_collecting=True))

    @precondition(has())
    @rule(data=st.data(), code=st.sampled_from([0, 1, -9, -11, None]))
    def die(self, data: st.DataObject, code: int | None) -> None:
        self.world.die(self.pick(data), code)

    @precondition(has(current=True))
    @rule(data=st.data(), code=st.sampled_from([1, -9, -11]))
    def crash(self, data: st.DataObject, code: int) -> None:
        """A task kills its worker."""
        self.world.die(self.pick(data, current=True), code)

    @precondition(has(is_ready=True))
    @rule(data=st.data(), code=st.sampled_from([1, -9]))
    def crash_while_it_works(self, data: st.DataObject, code: int) -> None:
        process = self.pick(data, is_ready=True)
        if process.current is None:
            self.world.step(process)
        self.world.die(process, code)

    @precondition(has())
    @rule()
    def keeper_is_lost(self) -> None:
        for process in self.world.living:
            self.world.die(process, None, keeper_lost=True)

    @precondition(lambda self: has(is_killed=True)(self) or has(is_sent_home=True)(self))
    @rule()
    def obey(self) -> None:
        """A process that was told to end, or killed, is gone."""
        self.world.die((self.found(is_killed=True) or self.found(is_sent_home=True))[0])

    # measurements and time

    @precondition(lambda self: self.world.sample_wanted)
    @rule(rss=sizes)
    def answer_sample(self, rss: int | None) -> None:
        self.world.answer_sample(rss)

    @precondition(has())
    @rule(data=st.data(), rss=sizes, times=st.integers(1, 2))
    def measure(self, data: st.DataObject, rss: int | None, times: int) -> None:
        """A reading that was asked for at some other time."""
        worker = self.pick(data).worker
        for _ in range(times):
            self.world.sample_wanted.insert(0, worker)
            self.world.answer_sample(rss)

    @precondition(lambda self: self.world.is_host_wanted)
    @rule(available=st.sampled_from([TOTAL // 2, TOTAL // 2, TOTAL // 2, TOTAL // 100, int(TOTAL * 0.053)]),
          cpu=st.sampled_from([5.0, 75.0, 95.0]), pressure=st.sampled_from([None, None, 10.0, 58.0, 90.0]))
    def answer_host(self, available: int, cpu: float, pressure: float | None) -> None:
        self.world.answer_host(available, cpu, pressure)

    @precondition(lambda self: self.world.is_host_wanted)
    @rule()
    def host_is_well(self) -> None:
        self.world.answer_host()

    # the other pools of the host

    @precondition(lambda self: self.world.core.settings.budget is not None)
    @rule(slots=st.sets(st.integers(0, 2)), waits=st.booleans(), memory=st.sampled_from([0, 20 * MB, 400 * MB]),
          rings=st.booleans())
    def others_change(self, slots: set[int], waits: bool, memory: int, rings: bool) -> None:
        self.world.others_slots = slots - self.world.own_slots
        self.world.other_waits, self.world.others_bytes = waits, memory
        if rings:
            self.world.ring()

    @precondition(lambda self: self.world.is_look_wanted)
    @rule()
    def answer_look(self) -> None:
        self.world.answer_look()

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.011, 0.06, 0.3, 1.1, 5.5, 70.0]))
    def advance(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(times=st.integers(1, 5))
    def jump(self, times: int) -> None:
        for _ in range(times):
            self.world.jump()

    @rule(times=st.integers(1, 3))
    def be_kind(self, times: int) -> None:
        """Everything is well for a moment."""
        for _ in range(times):
            self.world.be_kind()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run_to_the_end()


TestScheduler = SchedulerMachine.TestCase
