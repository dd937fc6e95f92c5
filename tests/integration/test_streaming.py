"""Tasks that say something while they run, and who hears it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool import AgentPool, TaskKilledError, WorkerCrashedError
from agentpool.events import Custom, Event, Log, Progress, Retry, Text, ToolUse, Unreadable, Usage

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
LONG = 60.0


@pytest.fixture
def pool(make_pool: MakePool) -> AgentPool:
    return make_pool(max_workers=2)


def count(number: int) -> int:
    from agentpool_worker import context

    for index in range(number):
        context.current().progress(index + 1, number)
    return number


def wait_for(path: str) -> None:
    import pathlib
    import time

    while not pathlib.Path(path).exists():
        time.sleep(0.005)


def dones(events: list[Event]) -> list[float]:
    return [event.done for event in events if isinstance(event, Progress)]


class TestWhatIsHeard:
    def test_each_kind_arrives_as_it_was_said(self, pool: AgentPool) -> None:
        def task() -> str:
            from agentpool_worker import context

            me = context.current()
            me.progress(1, 3, "reading")
            me.emit({"rows": [1, 2]})
            me.log("odd", level="warning")
            me.text("I will", is_delta=True)
            me.tool_use("bash", {"command": "ls"}, id="t1")
            me.usage(input_tokens=10, output_tokens=2, cost_usd=0.01, is_total=True)
            me.retry(1, limit=5, delay_seconds=0.5, status=529, reason="overloaded")
            return "done"

        future = pool.submit(task)
        found = list(future.events())
        assert future.result() == "done"
        at, one = [event.time for event in found], {"attempt": 1}
        assert at == sorted(at)
        assert found == [
            Progress(time=at[0], **one, done=1, total=3, message="reading"),
            Custom(time=at[1], **one, data={"rows": [1, 2]}),
            Log(time=at[2], **one, level=30, message="odd"),
            Text(time=at[3], **one, text="I will", is_delta=True),
            ToolUse(time=at[4], **one, name="bash", input={"command": "ls"}, id="t1"),
            Usage(time=at[5], **one, input_tokens=10, output_tokens=2, cost_usd=0.01, is_total=True),
            Retry(time=at[6], **one, number=1, limit=5, delay_seconds=0.5, status=529, reason="overloaded"),
        ]
        assert future.events_dropped == 0

    def test_it_is_heard_while_the_task_runs(self, pool: AgentPool, tmp_path: Path) -> None:
        def task(gate: str) -> None:
            from agentpool_worker import context

            context.current().progress(1, 2)
            wait_for(gate)
            context.current().progress(2, 2)

        future = pool.submit(task, str(tmp_path / "gate"))
        events = future.events()
        assert dones([next(events)]) == [1]
        assert not future.done()
        (tmp_path / "gate").touch()
        assert dones(list(events)) == [2]
        assert future.result() is None

    def test_a_task_that_says_nothing_ends_the_loop(self, pool: AgentPool) -> None:
        assert list(pool.submit(abs, -1).events()) == []

    def test_so_does_one_that_never_began(self, make_pool: MakePool, tmp_path: Path) -> None:
        pool = make_pool(max_workers=1)
        running = pool.submit(wait_for, str(tmp_path / "gate"))
        waiting = pool.submit(count, 1)
        heard: list[list[Event]] = []
        reader = threading.Thread(target=lambda: heard.append(list(waiting.events())))
        reader.start()
        assert waiting.cancel()
        reader.join(LONG)
        assert heard == [[]]
        (tmp_path / "gate").touch()
        running.result(LONG)

    def test_a_coroutine_and_its_threads_may_speak(self, pool: AgentPool) -> None:
        async def task() -> None:
            import asyncio

            from agentpool_worker import context

            me = context.current()
            await asyncio.gather(*[asyncio.to_thread(me.progress, number) for number in range(200)])

        future = pool.submit(task)
        assert sorted(dones(list(future.events()))) == list(range(200))

    def test_a_thread_that_outlives_its_task_has_no_say(self, make_pool: MakePool, tmp_path: Path) -> None:
        pool = make_pool(max_workers=1)

        def task(gate: str, said: str) -> None:
            import pathlib
            import threading

            from agentpool_worker import context

            me = context.current()
            me.progress(1)

            def late() -> None:
                wait_for(gate)
                me.progress(2)
                pathlib.Path(said).touch()

            threading.Thread(target=late, daemon=True).start()

        def other(gate: str, said: str) -> None:
            import pathlib

            pathlib.Path(gate).touch()
            wait_for(said)

        gate, late_said = str(tmp_path / "gate"), str(tmp_path / "said")
        first = pool.submit(task, gate, late_said)
        first.result(LONG)
        second = pool.submit(other, gate, late_said)
        second.result(LONG)
        assert dones(list(first.events())) == [1]
        assert list(second.events()) == []

    def test_what_a_task_forks_has_no_say_and_does_no_harm(self, pool: AgentPool, tmp_path: Path) -> None:
        def task(path: str) -> str:
            import os

            from agentpool_worker import context

            context.current().progress(1)
            pid = os.fork()
            if pid == 0:
                with open(path, "wb") as file:  # it may get the number that the pipe had
                    file.write(b"mine")
                    context.current().progress(2)
                os._exit(0)
            os.waitpid(pid, 0)
            context.current().progress(3)
            return open(path).read()

        future = pool.submit(task, str(tmp_path / "file"))
        assert dones(list(future.events())) == [1, 3]
        assert future.result() == "mine"

    def test_several_hear_the_same(self, pool: AgentPool) -> None:
        future = pool.submit(count, 300)
        heard: list[list[float]] = []
        readers = [threading.Thread(target=lambda: heard.append(dones(list(future.events())))) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(LONG)
        assert heard == [[float(number + 1) for number in range(300)]] * 4

    def test_in_a_running_loop(self, pool: AgentPool) -> None:
        async def hear() -> tuple[list[float], int, int]:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0)

            ticker = asyncio.create_task(tick())
            future = pool.submit(count, 100)
            found = [event async for event in future.events()]
            ticker.cancel()
            return dones(found), await asyncio.wrap_future(future), ticks

        found, result, ticks = asyncio.run(hear())
        assert found == [number + 1 for number in range(100)]
        assert result == 100
        assert ticks > 1


class TestCallbacks:
    def test_each_is_called_for_each_event_before_the_future_is_done(self, pool: AgentPool, tmp_path: Path) -> None:
        def task(gate: str) -> int:
            from agentpool_worker import context

            for index in range(500):
                context.current().progress(index)
            wait_for(gate)
            context.current().progress(500)
            return 7

        heard: list[tuple[float, bool, str]] = []
        others: list[float] = []
        future = pool.submit(task, str(tmp_path / "gate"))
        next(future.events())  # what came before counts as well
        future.add_event_callback(
            lambda event: heard.append((event.done, future.done(), threading.current_thread().name))  # type: ignore[attr-defined]
        )
        future.add_event_callback(lambda event: others.append(event.done))  # type: ignore[attr-defined]
        (tmp_path / "gate").touch()
        assert future.result(LONG) == 7
        assert heard == [(index, False, f"agentpool-events-{pool.name}") for index in range(501)]
        assert others == list(range(501))

    def test_one_that_raises_is_logged_and_the_next_is_called(
        self, pool: AgentPool, caplog: pytest.LogCaptureFixture
    ) -> None:
        heard = []

        def fail(event: Event) -> None:
            raise SystemExit("from the callback")

        future = pool.submit(count, 3)
        future.add_event_callback(fail)
        future.add_event_callback(heard.append)
        assert future.result(LONG) == 3
        assert dones(heard) == [1, 2, 3]
        records = [record for record in caplog.records if "exception calling event callback for" in record.message]
        assert len(records) == 3
        assert records[0].exc_info is not None
        assert records[0].exc_info[0] is SystemExit

    def test_one_that_comes_late_is_called_at_once(self, pool: AgentPool) -> None:
        future = pool.submit(count, 3)
        assert future.result(LONG) == 3
        heard: list[tuple[Event, str]] = []
        future.add_event_callback(lambda event: heard.append((event, threading.current_thread().name)))
        assert [(event.done, name) for event, name in heard] == [(n, "MainThread") for n in (1, 2, 3)]  # type: ignore[attr-defined]

    def test_a_slow_one_holds_up_its_own_future_and_no_other(self, pool: AgentPool) -> None:
        gate, entered = threading.Event(), threading.Event()

        def wait(_: Event) -> None:
            entered.set()
            gate.wait(LONG)

        future = pool.submit(count, 5)
        future.add_event_callback(wait)
        try:
            assert entered.wait(LONG)
            assert [pool.submit(count, number).result(LONG) for number in range(50)] == list(range(50))
            assert not future.done()
            assert dones(list(pool.submit(count, 2).events())) == [1, 2]
        finally:
            gate.set()
        assert future.result(LONG) == 5

    def test_it_misses_what_is_not_kept(self, pool: AgentPool) -> None:
        gate, heard = threading.Event(), []

        def hear(event: Event) -> None:
            gate.wait(LONG)
            heard.append(event)

        future = pool.submit(count, 5000)
        future.add_event_callback(hear)
        while future.events_dropped < 3000:
            pool.submit(abs, -1).result(LONG)
        gate.set()
        assert future.result(LONG) == 5000
        assert dones(heard)[-1] == 5000
        assert len(heard) < 2001

    def test_callbacks_of_futures_come_after_and_may_use_the_pool(self, make_pool: MakePool) -> None:
        pool = make_pool(max_workers=2, max_pending=1)
        order: list[str] = []
        more = []

        def hear(event: Event) -> None:
            order.append("event")
            more.append(pool.submit(abs, -4))

        future = pool.submit(count, 1)
        future.add_done_callback(lambda _: order.append("done"))
        future.add_event_callback(hear)
        assert future.result(LONG) == 1
        pool.shutdown()
        assert order == ["event", "done"]
        assert [submitted.result(0) for submitted in more] == [4]

    def test_a_shutdown_waits_for_them_and_they_may_shut_down(self, make_pool: MakePool) -> None:
        pool = make_pool(max_workers=1)
        heard = []

        def hear(event: Event) -> None:
            heard.append(event)
            pool.shutdown(wait=True)  # from the pool's own thread: it cannot wait for itself

        future = pool.submit(count, 200)
        future.add_event_callback(hear)
        pool.shutdown(wait=True)
        assert future.result(0) == 200
        assert len(heard) == 200

    def test_of_one_whose_call_could_not_be_sent(self, pool: AgentPool) -> None:
        future = pool.submit(threading.Lock().acquire)
        future.add_event_callback(lambda event: pytest.fail(f"{event}"))
        assert list(future.events()) == []
        assert future.exception() is not None


class TestWhatIsRefused:
    def test_numbers_levels_and_sizes(self, pool: AgentPool) -> None:
        def task() -> list[str]:
            from agentpool_worker import context

            me, errors = context.current(), []
            for attempt in (
                lambda: me.progress("much"),  # type: ignore[arg-type]
                lambda: me.log("x", level="loud"),
                lambda: me.emit(b"x" * 1024 * 1024),
                lambda: me.emit(lambda: me.task_id),  # it refers to the context, which is the worker's own
                lambda: me.emit(threading.Lock()),
            ):
                try:
                    attempt()
                    errors.append("")
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
            return errors

        future = pool.submit(task)
        found = future.result(LONG)
        assert found[0] == "ValueError: could not convert string to float: 'much'"
        assert found[1] == ("ValueError: level must be a number or one of DEBUG, INFO, WARNING, ERROR, CRITICAL, got "
                            "'loud'")
        assert found[2].startswith("ValueError: an event of 1,048,")
        assert found[2].endswith("is larger than 983,040; return large data as the result, or write it to a file and "
                                 "emit its name")
        assert found[3:] == ["TypeError: cannot pickle '_thread.lock' object"] * 2
        assert list(future.events()) == []

    def test_outside_of_a_task(self) -> None:
        from agentpool_worker import context

        with pytest.raises(RuntimeError, match="is for code that runs as a task of an AgentPool"):
            context.current()

    def test_what_cannot_be_rebuilt_here_costs_nothing_else(self, pool: AgentPool) -> None:
        def task() -> int:
            from agentpool_worker import context

            class Touchy:
                def __reduce__(self) -> Any:
                    return exec, ("raise SystemExit('no')",)

            context.current().progress(1)
            context.current().emit(Touchy())
            context.current().progress(2)
            return 5

        future = pool.submit(task)
        assert future.result(LONG) == 5
        first, second, third = future.events()
        assert dones([first, third]) == [1, 2]
        assert isinstance(second, Unreadable)
        assert second.error == "SystemExit: no"


class TestFramesThatCannotBeBelieved:
    """A task that has got hold of its worker's link: it ends its worker, and nobody else."""

    @staticmethod
    def forge(what: str) -> None:
        import os

        from agentpool_worker import context, protocol

        worker: Any = context._outlet
        task_id = context.current().task_id
        if what == "too few":
            frame = protocol.HEADER.pack(protocol.MAGIC, protocol.EVENTS, 0, 0, task_id, 3, 5, 0, 0) + b"abc"
        elif what == "too much":
            frame = protocol.HEADER.pack(protocol.MAGIC, protocol.EVENTS, 0, 0, task_id, 3, 0, 0, 0) + b"abc"
        else:
            frame = protocol.HEADER.pack(protocol.MAGIC, protocol.OUTPUT, 0, 0, task_id, 0, 0, 0, 0)
        if what == "a file":
            with open(os.devnull, "rb") as file:
                worker._link.send_descriptors([file.fileno(), file.fileno()])
        elif what == "one pipe":
            worker._link.send_descriptors([os.pipe()[0]])
        worker._link.write([frame])
        threading.Event().wait()

    @pytest.mark.parametrize(("what", "words"), [
        ("too few", "a frame of 5 events is too short for them"),
        ("too much", "0 events of 0 bytes came in a frame of 3"),
        ("no descriptors", "descriptors were announced, and none came"),
        ("a file", "other descriptors came than those of pipes"),
        ("one pipe", "1 descriptors came for the output of task"),
    ])
    def test_they_end_their_worker(
        self, make_pool: MakePool, caplog: pytest.LogCaptureFixture, what: str, words: str
    ) -> None:
        pool = make_pool(max_workers=2)
        future = pool.submit(self.forge, what)
        error = future.exception(LONG)
        assert isinstance(error, WorkerCrashedError)
        assert words in error.stderr_tail
        assert words in caplog.text
        assert dones(list(pool.submit(count, 3).events())) == [1, 2, 3]

    def test_events_of_a_task_that_is_not_this_workers_are_nobodys(self, make_pool: MakePool) -> None:
        def lie() -> int:
            from agentpool_worker import context, protocol

            worker: Any = context._outlet
            worker._link.write([protocol.encode_events(context.current().task_id + 1000, [b"x"], 0)])
            context.current().progress(1)
            return 1

        future = make_pool().submit(lie)
        assert future.result(LONG) == 1
        assert dones(list(future.events())) == [1]


class TestLosses:
    def test_a_task_that_crashes_keeps_what_it_said(self, pool: AgentPool) -> None:
        def task() -> None:
            from agentpool_worker import context

            for index in range(500):
                context.current().progress(index)
            os.kill(os.getpid(), signal.SIGKILL)

        future = pool.submit(task)
        assert dones(list(future.events())) == list(range(500))
        assert isinstance(future.exception(), WorkerCrashedError)

    def test_attempts_stay_in_order_and_are_told_apart(self, pool: AgentPool, tmp_path: Path) -> None:
        def task(log: str) -> str:
            from agentpool_worker import context

            with open(log, "a") as file:
                file.write("x")
            number = os.stat(log).st_size
            for index in range(20):
                context.current().progress(number * 100 + index)
            if number < 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return "third time"

        future = pool.options(retry=3).submit(task, str(tmp_path / "log"))
        found = list(future.events())
        assert future.result() == "third time"
        assert [(event.attempt, done) for event, done in zip(found, dones(found), strict=True)] == [
            (number, number * 100 + index) for number in (1, 2, 3) for index in range(20)
        ]

    def test_a_flood_starves_nobody_and_fills_nothing(self, pool: AgentPool) -> None:
        def flood() -> int:
            from agentpool_worker import context

            for index in range(1_000_000):
                context.current().progress(index)
            return 1

        future = pool.submit(flood)
        first = next(future.events())
        others = 0
        while not future.done():
            assert pool.submit(abs, -others).result(LONG) == others
            others += 1
        found = dones(list(future.events()))
        assert future.result() == 1
        assert isinstance(first, Progress)
        assert others > 100
        assert len(found) == 1000
        assert found[-1] == 999_999
        assert found == sorted(found)
        assert len(found) + future.events_dropped == 1_000_000

    def test_a_parent_that_is_busy_holds_no_task_up(self, make_pool: MakePool, tmp_path: Path) -> None:
        """The manager thread is in a callback, so that nobody reads; the task goes on, and says what was dropped."""
        pool = make_pool(max_workers=2)
        gate = threading.Event()
        busy = threading.Event()

        def block(_: object) -> None:
            busy.set()
            gate.wait(LONG)

        def task(end: str) -> None:
            import pathlib

            from agentpool_worker import context

            for index in range(50_000):
                context.current().progress(index, message="x" * 50)
            pathlib.Path(end).touch()

        end = tmp_path / "end"
        begun = pool.submit(task, str(tmp_path / "warm"))
        begun.result(LONG)
        blocker = pool.submit(abs, -1)
        blocker.add_done_callback(block)
        try:
            assert busy.wait(LONG)
            future = pool.submit(task, str(end))
            wait_for(str(end))
            assert not future.done()
        finally:
            gate.set()
        future.result(LONG)
        found = dones(list(future.events()))
        assert found[-1] == 49_999
        assert len(found) + future.events_dropped == 50_000
        assert future.events_dropped > 40_000


class TestBeingStopped:
    def test_a_task_that_speaks_all_the_time_can_be_killed(self, pool: AgentPool) -> None:
        def task() -> None:
            from agentpool_worker import context

            while True:
                context.current().progress(1)

        for _ in range(5):
            future = pool.submit(task)
            next(future.events())
            assert future.kill()
            assert isinstance(future.exception(LONG), TaskKilledError)
            assert pool.submit(count, 3).result(LONG) == 3
        assert pool.get_pool_stats()["counters"]["crashed"] == 0

    def test_shutdown_in_the_middle_of_it(self, make_pool: MakePool) -> None:
        pool = make_pool(max_workers=2)
        futures = [pool.submit(count, 20_000) for _ in range(4)]
        next(futures[0].events())
        pool.shutdown(wait=True)
        for future in futures:
            assert future.result(0) == 20_000
            assert dones(list(future.events()))[-1] == 20_000

    def test_kill_workers_in_the_middle_of_it(self, make_pool: MakePool) -> None:
        pool = make_pool(max_workers=2)

        def task() -> None:
            from agentpool_worker import context

            while True:
                context.current().progress(1)

        future = pool.submit(task)
        events = future.events()
        next(events)
        pool.kill_workers()
        assert future.done()
        assert all(isinstance(event, Progress) for event in events)
