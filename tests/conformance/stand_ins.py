"""What CPython's excluded tests are about, tested through the public API of an executor only (see `cpython_suite.py`).

Imported in test processes and in the executor's workers. Knows no executor by name: `self.executor`,
`self.executor_type` and `self.get_context()` come from CPython's ExecutorMixin.
"""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from unittest import TestCase
else:
    TestCase = object

#: Seconds; generous, for a machine that has other work too.
PATIENCE = 15.0


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} after {PATIENCE:.0f} s"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")


def _await_gone(pids: Iterable[int]) -> None:
    pids = set(pids)
    _await(lambda: not any(map(_is_alive, pids)), f"a worker of {sorted(pids)} is still alive")


def _pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def _note_pid_and_sleep(path: str) -> None:
    Path(path).write_text(f"{os.getpid()}\n")
    time.sleep(3 * PATIENCE)


def _fail_far_away(value: int) -> NoReturn:
    raise RuntimeError(value)  # the line that the caller must be shown


def _failing_initializer() -> NoReturn:
    raise ValueError("this initializer always fails")


class _NotToBePickled:
    def __reduce__(self) -> NoReturn:
        raise ValueError("not to be pickled")


class StandIns(TestCase):
    """Mixed into CPython's ExecutorMixin and BaseTestCase."""

    executor: Any
    executor_type: Any
    worker_count: int
    get_context: Any

    def _make(self, max_workers: int, **kwargs: Any) -> Any:
        return self.executor_type(max_workers, mp_context=self.get_context(), **kwargs)

    def test_killed_worker(self) -> None:
        """A task whose worker is killed fails at once, with the error that handlers know."""
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder, "pid")
            future: Future[None] = self.executor.submit(_note_pid_and_sleep, str(note))
            _await(lambda: note.exists() and note.read_text().endswith("\n"), "the task has not started")
            os.kill(int(note.read_text()), signal.SIGKILL)
            assert isinstance(future.exception(timeout=PATIENCE), BrokenProcessPool)

    def test_remote_traceback(self) -> None:
        """The task's own exception arrives, and shows where it was raised."""
        error = self.executor.submit(_fail_far_away, 123).exception(timeout=PATIENCE)
        assert type(error) is RuntimeError
        assert error.args == (123,)
        shown = "".join(traceback.format_exception(error))
        assert "_fail_far_away" in shown
        assert "the line that the caller must be shown" in shown

    def test_workers_never_exceed_max(self) -> None:
        futures = [self.executor.submit(_pid_after, 0.02) for _ in range(15 * self.worker_count)]
        pids = {future.result(timeout=PATIENCE) for future in futures}
        assert 1 <= len(pids) <= self.worker_count
        assert os.getpid() not in pids

    def test_idle_worker_is_reused(self) -> None:
        pids = {self.executor.submit(os.getpid).result(timeout=PATIENCE) for _ in range(20)}
        assert len(pids) <= self.worker_count

    def test_tasks_per_child(self) -> None:
        with self._make(1, max_tasks_per_child=3) as executor:
            pids = [executor.submit(os.getpid).result(timeout=PATIENCE) for _ in range(7)]
        assert len(set(pids[:3])) == 1, pids
        assert len(set(pids[3:6])) == 1, pids
        assert len(set(pids)) == 3, pids

    def test_workers_end_at_shutdown(self) -> None:
        with self._make(3) as executor:
            pids = {future.result(timeout=PATIENCE) for future in [executor.submit(_pid_after, 0.1) for _ in range(9)]}
        _await_gone(pids)

    def test_workers_end_when_dropped(self) -> None:
        """An executor nobody holds finishes what it accepted, and ends its workers."""
        executor = self._make(3)
        results = executor.map(abs, range(-5, 5))
        pid = executor.submit(os.getpid).result(timeout=PATIENCE)
        del executor
        assert list(results) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]
        del results
        gc.collect()
        _await_gone([pid])

    def test_shutdown_without_wait_finishes_tasks(self) -> None:
        executor = self._make(2)
        futures = [executor.submit(_pid_after, 0.2) for _ in range(10)]
        executor.shutdown(wait=False)
        assert not all(future.done() for future in futures), "shutdown(wait=False) waited"
        assert not wait(futures, timeout=PATIENCE).not_done
        _await_gone(future.result() for future in futures)

    def test_failing_initializer(self) -> None:
        executor = self._make(2, initializer=_failing_initializer)
        try:
            assert isinstance(executor.submit(os.getpid).exception(timeout=PATIENCE), BrokenExecutor)

            def refuses() -> bool:
                try:
                    executor.submit(os.getpid)
                except BrokenExecutor:
                    return True
                return False

            _await(refuses, "submit() still accepts tasks")
        finally:
            executor.shutdown(wait=True)

    def test_pickling_error_then_shutdown_without_wait(self) -> None:
        executor = self._make(2)
        pid = executor.submit(os.getpid).result(timeout=PATIENCE)
        future = executor.submit(id, _NotToBePickled())
        executor.shutdown(wait=False)
        error = future.exception(timeout=PATIENCE)
        assert error is not None
        assert "not to be pickled" in "".join(traceback.format_exception(error))
        _await_gone([pid])
