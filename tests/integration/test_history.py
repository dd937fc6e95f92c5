"""What a future tells of the attempts of its task: where, when, how long, how much memory, and how each ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
import tenacity

from agentpool import AgentPool, TaskTimeoutError

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MakePool = Callable[..., AgentPool]
LONG = 60.0
MB = 1024 * 1024


def again(seconds: float = 0.0) -> tenacity.Retrying:
    return tenacity.Retrying(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_fixed(seconds),
                             retry=tenacity.retry_if_exception_type(Exception))


def in_turn(note: str) -> str:
    """First it crashes, then it raises, then it returns."""
    with open(note, "a") as file:
        file.write("x")
    number = os.stat(note).st_size
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        raise ValueError("the second time")
    return f"attempt {number} by {os.getpid()}"


class TestHistory:
    def test_of_a_task_that_returns_at_once(self, make_pool: MakePool) -> None:
        before = time.time()
        future = make_pool().submit(os.getpid)
        pid = future.result(LONG)
        (attempt,) = future.history
        assert (attempt.number, attempt.worker_pid, attempt.outcome, attempt.error) == (1, pid, "returned", "")
        assert attempt.worker_id == 1
        assert attempt.ended_at is not None
        assert before - 1 < attempt.queued_at <= attempt.started_at <= attempt.ended_at < time.time() + 1
        assert attempt.seconds == attempt.ended_at - attempt.started_at
        assert future.attempts == 1

    def test_of_attempts_that_ended_in_different_ways(self, make_pool: MakePool, tmp_path: Path) -> None:
        future = make_pool(max_workers=1).options(retry=again(0.05)).submit(in_turn, str(tmp_path / "note"))
        words = future.result(LONG)
        crashed, raised, returned = future.history
        assert [attempt.outcome for attempt in future.history] == ["crashed", "raised", "returned"]
        assert [attempt.number for attempt in future.history] == [1, 2, 3]
        assert crashed.error.startswith("WorkerCrashedError: the worker (pid ")
        assert raised.error == "ValueError: the second time"
        assert returned.error == ""
        assert words == f"attempt 3 by {returned.worker_pid}"
        assert crashed.worker_id != raised.worker_id
        assert crashed.worker_pid != returned.worker_pid
        times = [moment for attempt in future.history for moment in (attempt.started_at, attempt.ended_at)]
        assert times == sorted(times)  # type: ignore[type-var]
        assert raised.queued_at - crashed.ended_at > 0.04  # type: ignore[operator]  # the back-off is no waiting in the queue
        assert future.attempts == 3

    def test_each_attempt_has_its_own_peak_and_the_task_the_highest(self, make_pool: MakePool, tmp_path: Path) -> None:
        def task(note: str) -> None:
            is_first = not os.path.exists(note)
            open(note, "w").close()
            data = b"x" * (80 if is_first else 1) * MB
            time.sleep(0.01)
            if is_first:
                raise ValueError(f"once more, with {len(data)} bytes")

        pool = make_pool(max_workers=1, memory_limit_mb=None, max_tasks_per_child=1)
        future = pool.options(retry=again()).submit(task, str(tmp_path / "note"))
        future.result(LONG)
        first, second = future.history
        assert first.peak_rss_bytes > 80 * MB > second.peak_rss_bytes > 0
        assert future.peak_rss_bytes == future.snapshot().peak_rss_bytes == first.peak_rss_bytes

    def test_while_it_runs_when_it_is_stopped_and_where_it_never_began(
        self, make_pool: MakePool, wait_until: Callable[..., None]
    ) -> None:
        pool = make_pool(max_workers=1)
        running, waiting = pool.submit(time.sleep, 600), pool.submit(time.sleep, 600)
        wait_until(lambda: running.running() and running.worker_pid, "it does not run")
        (attempt,) = running.history
        assert (attempt.outcome, attempt.ended_at, attempt.worker_pid) == ("running", None, running.worker_pid)
        assert attempt.seconds > 0
        assert waiting.history == []
        assert waiting.cancel()
        assert waiting.history == []
        assert running.kill()
        running.exception(LONG)
        (attempt,) = running.history
        assert (attempt.outcome, attempt.error) == (
            "killed", f"TaskKilledError: task {running.snapshot().task_id} was stopped: future.kill() was called"
        )

    def test_of_a_timeout(self, make_pool: MakePool) -> None:
        future = make_pool().options(timeout=0.2).submit(time.sleep, 600)
        assert isinstance(future.exception(LONG), TaskTimeoutError)
        (attempt,) = future.history
        assert attempt.outcome == "timed_out"
        assert attempt.seconds >= 0.19

    def test_of_one_that_waits_for_another_attempt(
        self, make_pool: MakePool, wait_until: Callable[..., None]
    ) -> None:
        def fail() -> None:
            raise ValueError("always")

        future = make_pool().options(retry=again(3600)).submit(fail)
        wait_until(lambda: future.snapshot().state == "waiting_to_retry", "it does not wait")
        assert [(attempt.number, attempt.outcome) for attempt in future.history] == [(1, "raised")]
        assert future.cancel()
        assert [(attempt.number, attempt.outcome) for attempt in future.history] == [(1, "raised")]

    def test_a_policy_that_looks_at_values(self, make_pool: MakePool, tmp_path: Path) -> None:
        def count(note: str) -> int:
            with open(note, "a") as file:
                file.write("x")
            return os.stat(note).st_size

        policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_none(),
                                   retry=tenacity.retry_if_result(lambda value: value < 3))
        future = make_pool().options(retry=policy).submit(count, str(tmp_path / "note"))
        assert future.result(LONG) == 3
        assert [attempt.outcome for attempt in future.history] == ["returned"] * 3

    def test_of_one_that_could_not_be_sent(self, make_pool: MakePool) -> None:
        import threading

        future = make_pool().submit(threading.Lock().acquire)
        assert (future.history, future.worker_pid) == ([], None)


class TestBars:
    @staticmethod
    def work(pages: int) -> int:
        from agentpool_worker import context

        for page in range(pages):
            context.current().progress(page + 1, pages, f"page [{page + 1}]")
        return pages

    def test_of_tqdm(self, make_pool: MakePool) -> None:
        import io

        tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed")
        from agentpool.bars import tqdm_bar

        class Bar(tqdm.tqdm):  # type: ignore[name-defined, misc]
            monitor_interval = 0  # it would leave a thread behind

        written = io.StringIO()
        future = make_pool().options(name="reading").submit(self.work, 40)
        bar = tqdm_bar(future, bar_class=Bar, file=written, unit="page", mininterval=0)
        assert future.result(LONG) == 40
        assert (bar.n, bar.total, bar.desc) == (40, 40, "reading")
        last = written.getvalue().split("\r")[-1]
        assert "reading: 100%" in last
        assert "40/40" in last
        assert "page [40]" in last
        assert last.endswith("\n"), "the bar was not closed"

    def test_of_rich_for_several_tasks(self, make_pool: MakePool) -> None:
        import io

        from rich.console import Console
        from rich.progress import Progress

        from agentpool.bars import rich_bar

        pool = make_pool()
        progress = Progress(console=Console(file=io.StringIO()))
        with progress:
            futures = [pool.submit(self.work, pages) for pages in (3, 7)]
            for future in futures:
                assert rich_bar(future, progress, "a [b] c") is progress
            assert [future.result(LONG) for future in futures] == [3, 7]
            pool.shutdown()
        assert [(bar.completed, bar.total, bar.finished) for bar in progress.tasks] == [(3, 3, True), (7, 7, True)]
        assert progress.tasks[1].description == r"a \[b] c: page [7]"

    def test_of_rich_for_one(self, make_pool: MakePool) -> None:
        from agentpool.bars import rich_bar

        pool = make_pool()
        future = pool.submit(self.work, 3)
        progress = rich_bar(future)
        assert future.result(LONG) == 3
        pool.shutdown()
        assert progress.live.is_started is False
        assert progress.tasks[0].completed == 3

    @pytest.mark.parametrize(("name", "library"), [("tqdm_bar", "tqdm"), ("rich_bar", "rich")])
    def test_without_the_library(
        self, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, name: str, library: str
    ) -> None:
        from agentpool import bars

        for module in [loaded for loaded in sys.modules if loaded.split(".")[0] == library]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=rf"a progress bar of {library} needs {library}, which cannot be imported "
                                              r".*pip install 'agentpool-runtime\[progress\]'"):
            getattr(bars, name)(make_pool().submit(abs, -1))
