"""The moves that a schedule can make in a `World`: of users, workers, the keeper, the machine and the clock.

Each `do_*` method is one move, with two whole numbers that pick whom and how. Whatever they are, and whatever was done
before, a move is possible or does nothing: so any part of a schedule is a schedule, and a failure can be cut down.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Final

from agentpool.config import MB, PoolSettings
from agentpool.core.records import SessionRecord, TaskRecord, TaskSpec
from agentpool.core.retry import compile_policy
from agentpool.core.transitions import TaskState
from agentpool.errors import InitializerError, PoolClosedError, QueueFullError, SessionLostError, TaskKilledError
from agentpool.testing.fates import FATES, move_on
from agentpool.testing.needs import rationed_specs
from agentpool.testing.oracle import FakeFuture, Oracle, Violation
from agentpool.testing.process import FakeProcess, How
from agentpool.testing.stage import Blocked, Stage

__all__ = ["Moves"]

_SECONDS: Final = (0.0, 0.001, 0.011, 0.06, 0.3, 1.1, 5.5, 70.0)
_SIZES: Final = tuple(size * MB for size in (20, 60, 90, 120, 180, 220, 420, 900))
_CODES: Final = (-9, -11, 1, 0)
_TOOK: Final = (0.0, None, 0.0005, 0.1)
_KEYS: Final = ("f", "f", None, "g")


class Moves:
    """A pool's manager, its users and the machine below it."""

    def __init__(
        self, stage: Stage, settings: PoolSettings, specs: Sequence[TaskSpec], oracle: Oracle, seed: int
    ) -> None:
        self.settings = settings
        self.specs = specs
        self.oracle = oracle
        self.stage = stage
        self.pool = stage.manager(settings, seed=seed, witness=oracle)
        self.core = self.pool.core
        self.machine = stage.machine
        #: users' threads that wait for room, as (future, call key)
        self.blocked: list[tuple[FakeFuture, str | None]] = []
        #: users ordered a drain, and no end of it yet
        self.is_drained = False
        #: nobody interferes any more
        self.is_ending = False
        #: those that were opened last
        self.sessions: dict[int, SessionRecord] = {}
        self._session_ids = count(1)
        self._notified = 0
        self.pool.listeners.append(lambda old, new, reason: self.oracle.facts.add("breaker"))

    # -- everybody -----------------------------------------------------------------------------------------------

    def _acknowledges(self, process: FakeProcess) -> bool:
        """A worker hears that it is to stop its task, unless that lets nobody hear."""
        future = self._task_in(process)
        return (future is None or not future.fate.is_deaf) and process.acknowledge()

    def _task_in(self, process: FakeProcess) -> FakeFuture | None:
        return None if process.current is None else self.oracle.futures[process.current.task_id]

    def next_end(self) -> float | None:
        """When a task that takes its time will return; None: none does."""
        ends = [
            process.began_at + future.fate.seconds
            for process in self.machine.living()
            if (future := self._task_in(process)) is not None and future.fate.seconds and not process.is_frozen
            and not (future.fate.hangs)
        ]
        return min(ends, default=None)

    def be_kind(self) -> bool:
        """Everybody does what is expected of him. False: there was nothing to do."""
        machine, is_last = self.machine, self.is_ending
        has_moved = False
        for keeper in machine.keepers:
            if keeper.is_dead:
                continue
            keeper.is_frozen &= not is_last
            if keeper.is_kill_pending:
                keeper.die()
            keeper.make_room()
            while keeper.fork():
                has_moved = True
        for process in machine.living():
            process.is_frozen &= not is_last
            if process.obey():
                has_moved = True
                continue
            while process.may_move or process.channel.control:
                if not self._acknowledges(process) and not move_on(process, self._task_in(process), is_last=is_last):
                    break
                has_moved = True
        for keeper in machine.keepers:
            while keeper.reap():
                has_moved = True
        return has_moved

    # -- users ---------------------------------------------------------------------------------------------------

    def do_submit(self, a: int, b: int) -> None:
        """Submit one task, two, or up to 8; some wait for room, some are followed by another one, from a callback."""
        spec = self.specs[a % len(self.specs)]
        fate = FATES[a // len(self.specs) % len(FATES)]
        key = _KEYS[b >> 3 & 3]
        for _ in range(1 + (b & 7 if b & 128 else b & 1)):
            future = FakeFuture(self.oracle, spec, fate)
            if b & 64:
                future.follower = self.specs[b % len(self.specs)]
            self._submit(future, key, block=bool(b & 32))

    def do_submit_rationed(self, a: int, b: int) -> None:
        """Submit up to 4 tasks of groups, or with memory to reserve, or with a growth limit of their own."""
        specs = rationed_specs()
        fate = FATES[a // len(specs) % len(FATES)]
        for _ in range(1 + (b & 3)):
            self._submit(FakeFuture(self.oracle, specs[a % len(specs)], fate), "f", block=bool(b & 32))

    def do_session(self, a: int, b: int) -> None:
        """Submit up to 3 tasks in one of three sessions, which is opened where it is not, and perhaps close it."""
        session = self.sessions.get(a % 3)
        if session is None or session.is_closed or session.error is not None:
            timeout = (0.3, 5.0, None, 5.0)[b >> 2 & 3]
            session = self.sessions[a % 3] = SessionRecord(next(self._session_ids), None, timeout)
        fate = FATES[a // 3 % len(FATES)]
        policy = compile_policy(3) if b & 64 else None
        spec = TaskSpec(session=session, policy=policy, timeout=0.5 if b & 128 else None)
        for _ in range(1 + (b & 1)):
            self._submit(FakeFuture(self.oracle, spec, fate), "f", block=bool(b & 32))
        if b & 16:
            self._close_session(session)

    def _close_session(self, session: SessionRecord) -> None:
        if not self.pool.is_finished:
            self.pool.order(lambda now: self.core.close_session(now, session))

    def close_sessions(self) -> None:
        """All are closed."""
        for session in self.sessions.values():
            self._close_session(session)

    def _submit(self, future: FakeFuture, key: str | None, *, block: bool) -> None:
        core = self.core
        try:
            task = self.pool.submit(future, future.spec, key, block=block)
        except SessionLostError:
            if future.spec.session is None or future.spec.session.error is None:
                raise Violation("an_open_pool_accepts", "submit says that the session is lost") from None
        except PoolClosedError:
            is_over = future.spec.session is not None and future.spec.session.is_closed
            if not core.is_closing and not core.is_draining and not is_over:
                raise Violation("an_open_pool_accepts", "submit says that the pool is closed") from None
        except QueueFullError:
            if core.settings.max_pending is None or len(core.queue) < core.settings.max_pending:
                raise Violation("an_open_pool_accepts", "submit says that the queue is full") from None
        except InitializerError:
            if core.broken is None:
                raise Violation("an_open_pool_accepts", "submit says that the pool is broken") from None
        except Blocked:
            self.blocked.append((future, key))
        else:
            if self.is_drained:
                raise Violation("a_drained_pool_accepts_nothing", f"{task!r} was accepted", task.id)
            self.oracle.accepted(future, task)

    def retry_blocked(self) -> None:
        if self.blocked and self._notified != self.stage.notified:
            self._notified = self.stage.notified
            waiting, self.blocked = self.blocked, []
            with self.stage.as_user():
                for future, key in waiting:
                    self._submit(future, key, block=True)

    def follow(self, future: FakeFuture) -> None:
        """A future's callbacks."""
        spec = future.follower
        if spec is not None and not self.is_ending:
            self._submit(FakeFuture(self.oracle, spec, FATES[0]), "f", block=True)

    def _pick_open(self, a: int) -> TaskRecord | None:
        futures = list(self.oracle.open.values())
        return futures[a % len(futures)].task if futures else None

    def do_cancel(self, a: int, b: int) -> None:
        """`future.cancel()`; the worker may begin the call at that very instant."""
        task = self._pick_open(a)
        if b & 1:
            for worker in self.core.workers.values():
                if worker.backlog and (process := self.machine.processes.get(worker.pid or 0)) is not None:
                    task = worker.backlog[0]
                    if process.current is not None:
                        process.move(is_held=True, seconds=0.0)  # the manager has not heard of that end yet
                    process.collide(task.id)
                    break
        if task is not None:
            self._cancel(task)

    def _cancel(self, task: TaskRecord) -> bool:
        future = self.oracle.futures[task.id]
        future.wishes.add("cancel")
        is_cancelled = self.pool.cancel(task)
        if is_cancelled is not (future.end == "cancelled"):
            raise Violation("cancel_says_what_it_did", f"it returned {is_cancelled}, the future is {future.end!r}",
                            task.id)
        if not is_cancelled:
            future.wishes.discard("cancel")
        return is_cancelled

    def do_kill(self, a: int, b: int) -> None:
        """`future.kill()`."""
        task = self._pick_open(a)
        if task is None or self._cancel(task):
            return
        future = self.oracle.futures[task.id]
        is_running = task.state in (TaskState.RUNNING, TaskState.STOPPING)
        future.wishes.add("kill")
        is_stopping = self.pool.kill(task, "killed by a user")
        if is_stopping and is_running:
            future.is_kill_promised = True

    def do_shutdown(self, a: int, b: int) -> None:
        """`pool.shutdown(wait=False)`."""
        self.oracle.facts.add("closed")
        if a & 1:
            self.oracle.facts.add("cancel")
        self.pool.shutdown(wait=False, cancel_futures=bool(a & 1))

    def do_stop_all(self, a: int, b: int) -> None:
        """Emergency shutdown."""
        self.oracle.facts |= {"closed", "stop"}
        self.pool.stop_all(TaskKilledError("stopped by a user"), "a user said so", wait=False)

    def do_drop(self, a: int, b: int) -> None:
        """The pool object is collected."""
        self.oracle.facts.add("closed")
        self.pool.drop()

    def do_start(self, a: int, b: int) -> None:
        """Start the floor of workers."""
        if not self.core.is_closing:
            self.pool.start()

    def do_force_open(self, a: int, b: int) -> None:
        """Open the breaker by hand."""
        if not self.pool.is_finished:
            self.oracle.facts.add("breaker")
            self.pool.force_open("by a user")

    def do_reset(self, a: int, b: int) -> None:
        """Close the breaker by hand."""
        if not self.pool.is_finished:
            self.pool.reset_breaker()

    # -- operators -----------------------------------------------------------------------------------------------

    def do_resize(self, a: int, b: int) -> None:
        """The pool shrinks or grows."""
        if not self.pool.is_finished:
            most = 1 + a % 5
            at_once = (None, 1, most, None)[b & 3]
            self.pool.order(lambda now: self.core.resize(now, (most, None)[b >> 2 & 1 and at_once == 1], at_once))

    def do_pause(self, a: int, b: int) -> None:
        """Nothing begins for a while."""
        if not self.core.is_closing:
            self.pool.order_open(self.core.pause)

    def do_resume(self, a: int, b: int) -> None:
        """A pause or a drain is over."""
        if not self.core.is_closing:
            self.is_drained = False
            self.pool.resume()

    def do_drain(self, a: int, b: int) -> None:
        """Nothing is accepted for a while."""
        self.oracle.facts.add("closed")
        self.pool.drain()
        self.is_drained = True

    def do_recycle(self, a: int, b: int) -> None:
        """One worker is to be replaced, or all."""
        workers = list(self.core.workers)
        if not self.pool.is_finished:
            which = workers[a % len(workers)] if b & 1 and workers else None
            self.pool.order(lambda now: self.core.recycle(now, which))

    def do_kill_worker(self, a: int, b: int) -> None:
        """A worker is killed by hand."""
        workers = list(self.core.workers)
        if workers and not self.pool.is_finished:
            self.oracle.facts.add("kill_worker")
            self.pool.order(lambda now: self.core.kill_worker(now, workers[a % len(workers)], "by a user"))

    # -- workers -------------------------------------------------------------------------------------------------

    def _pick(self, a: int) -> FakeProcess | None:
        living = self.machine.living()
        return living[a % len(living)] if living else None

    def do_work(self, a: int, b: int) -> None:
        """A worker makes one move."""
        able = [process for process in self.machine.living() if process.may_move]
        if able:
            how = b & 7
            process = able[a % len(able)]
            move_on(process, self._task_in(process), how=how if how <= How.RESULT_FAILED else How.VALUE,
                    is_held=bool(b & 8), seconds=_TOOK[b >> 4 & 3])

    def do_toil(self, a: int, b: int) -> None:
        """A worker makes many moves, with short calls."""
        able = [process for process in self.machine.living() if process.may_move]
        if able:
            process = able[a % len(able)]
            for _ in range(1 + (b & 15)):
                move_on(process, self._task_in(process), is_held=bool(b & 16), seconds=0.0)

    def do_collide(self, a: int, b: int) -> None:
        """A worker is about to begin its next call, just as somebody takes it back."""
        for process in self.machine.living():
            if process.channel.calls:
                process.collide(process.channel.calls[0].task_id)

    def do_die(self, a: int, b: int) -> None:
        """A worker dies by itself or by its task, more or less in the midst of something."""
        process = self._pick(a)
        if process is not None:
            process.holds_pipe = bool(b & 8)
            process.die(_CODES[b & 3], b >> 2 & 1)

    def do_obey(self, a: int, b: int) -> None:
        """Somebody who was killed is gone."""
        for process in self.machine.living():
            if process.obey():
                return

    def do_acknowledge(self, a: int, b: int) -> None:
        """A worker hears that it is to stop its task."""
        for process in self.machine.living():
            if self._acknowledges(process):
                return

    def do_freeze(self, a: int, b: int) -> None:
        """A worker makes no more moves, or goes on."""
        process = self._pick(a)
        if process is not None:
            process.is_frozen = not process.is_frozen

    def do_grow(self, a: int, b: int) -> None:
        """A worker, or a process that its task started, takes memory, or gives it back."""
        process = self._pick(a)
        if process is not None:
            size = _SIZES[b & 7]
            if b & 8:
                process.tools.append(size)
            else:
                process.rss_bytes = size

    def do_corrupt(self, a: int, b: int) -> None:
        """A task writes into the pipe of results."""
        process = self._pick(a)
        if process is not None:
            self.oracle.facts.add("corrupt")
            process.corrupt()

    def do_complain(self, a: int, b: int) -> None:
        """A worker writes to standard error."""
        process = self._pick(a)
        if process is not None:
            process.complain(b"something is wrong\n")

    def do_fail_to_start(self, a: int, b: int) -> None:
        """An initializer raises, as a rule for want of memory: otherwise there is not much of a pool left."""
        starting = [process for process in self.machine.living() if not process.is_ready]
        if starting:
            if not b & 3:
                self.oracle.facts |= {"initializer", "closed"}
            starting[a % len(starting)].fail_to_start(is_starved=bool(b & 3))

    def do_clog(self, a: int, b: int) -> None:
        """A worker's pipe of calls, or the keeper's socket, is full."""
        process = self._pick(a)
        if b & 1 and self.machine.keepers:
            self.machine.keepers[-1].is_full = True
        elif process is not None:
            process.channel.is_full = True

    # -- the keeper, the machine, time ---------------------------------------------------------------------------

    def do_fork(self, a: int, b: int) -> None:
        """The keeper forks a worker, or cannot."""
        for keeper in self.machine.keepers:
            keeper.make_room()
            if keeper.fork(fails=b & 15 == 15) and b & 15 == 14:
                next(reversed(self.machine.processes.values())).is_stillborn = True

    def do_reap(self, a: int, b: int) -> None:
        """The keeper tells of a death."""
        for keeper in self.machine.keepers:
            keeper.reap()

    def do_keeper(self, a: int, b: int) -> None:
        """The keeper dies, hangs, or goes on."""
        for keeper in self.machine.keepers:
            if b & 1 or keeper.is_kill_pending:
                keeper.die()
            else:
                keeper.is_frozen = not keeper.is_frozen

    def do_exhaust(self, a: int, b: int) -> None:
        """No descriptor can be had, or again."""
        self.machine.is_exhausted = not self.machine.is_exhausted

    def do_host(self, a: int, b: int) -> None:
        """The machine's memory and CPU change."""
        machine = self.machine
        total = machine.total_bytes
        machine.available_bytes = (total // 2, total // 100, total // 2, int(total * 0.053))[a & 3]
        machine.cpu_percent = (5.0, 95.0, 5.0, 75.0)[b & 3]
        machine.pressure_percent = (None, None, 58.0, 90.0)[b >> 2 & 3]

    def do_advance(self, a: int, b: int) -> None:
        """Time passes, and the manager's thread gets no turn."""
        self.machine.clock.advance(_SECONDS[a & 7])

    def do_race(self, a: int, b: int) -> None:
        """The next step is made by another thread, just before the manager takes its lock for the n-th time."""
        self.stage.countdown = 1 + a % 5

    def do_turn(self, a: int, b: int) -> None:
        """The manager's thread goes on: see `_passing`."""

    def do_behave(self, a: int, b: int) -> None:
        """Everybody is kind for a moment: see `_passing`."""
        if not self.stage.is_started:
            self.be_kind()
