"""The screen of `agentpool top`: driven by textual's pilot against real pools, and once in a real terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable, Static

from agentpool import AgentPool, HostBudget
from agentpool.cli.screen import PoolScreen, Question, trend
from agentpool.control.client import find_pools

MakePool = Callable[..., AgentPool]
PATIENCE = 30.0


def wait_for(path: str) -> int:
    """Runs until the file is there."""
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()


@pytest.fixture
def pool(make_pool: MakePool, tmp_path: Path, wait_until: Callable[..., None]) -> AgentPool:
    """With two workers: one runs a task called "long one", the other has nothing to do."""
    place = str(tmp_path / "sockets")
    made = make_pool(2, name="reviews", control=place)
    end = str(tmp_path / "end")
    tasks = [made.options(name="long one").submit(wait_for, end), made.submit(wait_for, str(tmp_path / "first"))]
    (tmp_path / "first").touch()
    tasks[1].result()
    wait_until(tasks[0].running, "it does not run")
    wait_until(lambda: find_pools([place]), "no control socket came")
    return made


def drive(pool: AgentPool, tmp_path: Path, act: Callable[[PoolScreen, Any], Coroutine[Any, Any, None]]) -> PoolScreen:
    """Run the screen, and `act` on it once it shows something."""
    (found,) = find_pools([str(tmp_path / "sockets")])
    screen = PoolScreen(found.path, 0.1)

    async def run() -> None:
        async with screen.run_test(size=(130, 24)) as pilot:
            await until(lambda: screen._stats)
            await act(screen, pilot)
            screen.exit()
            await until(lambda: not screen.is_running)  # as at q; else what is told meanwhile finds no widgets

    asyncio.run(run())
    return screen


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


def cells(screen: PoolScreen) -> list[list[str]]:
    table = screen.query_one("#workers", DataTable)
    return [[str(cell) for cell in table.get_row(key)] for key in table.rows]


def text(screen: PoolScreen, name: str) -> str:
    return str(screen.query_one(name, Static).render())


def test_it_shows_workers_with_memory_trend_and_task(pool: AgentPool, tmp_path: Path) -> None:
    async def act(screen: PoolScreen, pilot: Any) -> None:
        await until(lambda: len(cells(screen)[0][4]) > 2 and cells(screen)[0][5] != "-")
        rows = cells(screen)
        pids = [str(worker["pid"]) for worker in pool.get_pool_stats()["workers"]]
        assert [row[1] for row in rows] == pids
        busy = next(row for row in rows if row[2] == "busy")
        assert busy[9] == "long one"
        assert re.fullmatch(r"\d+ MB", busy[3])
        assert set(busy[4]) <= set("▁▂▃▄▅▆▇█")
        assert re.fullmatch(r"\d+ %", busy[5])
        summary = text(screen, "#summary")
        assert "reviews" in summary
        assert "workers 2/2  running 1/2  queued 0" in summary
        assert "breaker closed" in summary

    drive(pool, tmp_path, act)


def test_it_shows_the_budget_that_the_pool_shares(make_pool: MakePool, tmp_path: Path,
                                                  wait_until: Callable[..., None]) -> None:
    place, end = str(tmp_path / "sockets"), str(tmp_path / "end")
    budget = HostBudget(agents=1, memory_mb=None, directory=str(tmp_path / "budget"))
    sharing = make_pool(2, control=place, budget=budget)
    held = [sharing.submit(wait_for, end) for _ in range(2)]
    wait_until(lambda: find_pools([place]), "no control socket came")

    async def act(screen: PoolScreen, pilot: Any) -> None:
        await until(lambda: "1 of 1 agents run, 1 waiting" in text(screen, "#summary"))
        assert "It holds 1 of 1 slots of the host's budget, and waits for a slot" in text(screen, "#summary")

    drive(sharing, tmp_path, act)
    Path(end).touch()
    assert all(future.result(30) for future in held)


def test_a_worker_is_killed_only_after_a_yes(pool: AgentPool, tmp_path: Path) -> None:
    async def act(screen: PoolScreen, pilot: Any) -> None:
        index = next(number for number, row in enumerate(cells(screen)) if row[2] == "busy")
        screen.query_one("#workers", DataTable).move_cursor(row=index)
        await pilot.press("k")
        await until(lambda: isinstance(screen.screen, Question))
        await pilot.press("n")
        await until(lambda: not isinstance(screen.screen, Question))
        assert text(screen, "#said") == "Nothing was done."
        assert pool.get_pool_stats()["counters"]["workers_killed"] == 0
        await pilot.press("k")
        await until(lambda: isinstance(screen.screen, Question))
        await pilot.press("enter")  # the button that has the focus is No
        await until(lambda: not isinstance(screen.screen, Question))
        assert pool.get_pool_stats()["counters"]["workers_killed"] == 0
        await pilot.press("k")
        await until(lambda: isinstance(screen.screen, Question))
        await pilot.press("y")
        await until(lambda: pool.get_pool_stats()["counters"]["workers_killed"] == 1)
        await until(lambda: "was killed" in text(screen, "#said"))
        await until(lambda: len(cells(screen)) == 1)

    drive(pool, tmp_path, act)


def test_recycle_pause_breaker_and_drain(pool: AgentPool, tmp_path: Path) -> None:
    async def act(screen: PoolScreen, pilot: Any) -> None:
        index = next(number for number, row in enumerate(cells(screen)) if row[2] == "idle")
        screen.query_one("#workers", DataTable).move_cursor(row=index)
        await pilot.press("r")
        await until(lambda: len(cells(screen)) == 1)
        await pilot.press("p")
        await until(lambda: screen._stats["is_paused"])
        await pilot.press("p")
        await until(lambda: not screen._stats["is_paused"])
        await pilot.press("b")
        await until(lambda: isinstance(screen.screen, Question))
        await pilot.press("y")
        await until(lambda: "forced_open" in text(screen, "#summary"))
        assert "! forced open from agentpool top" in text(screen, "#summary")
        await pilot.press("b")
        await until(lambda: "breaker closed" in text(screen, "#summary"))
        await pilot.press("d", "y")
        await until(lambda: screen._stats["is_draining"])
        await pilot.press("p")
        await until(lambda: not screen._stats["is_draining"])

    drive(pool, tmp_path, act)


def test_the_pools_end_is_told_and_survived(pool: AgentPool, tmp_path: Path) -> None:
    async def act(screen: PoolScreen, pilot: Any) -> None:
        await pilot.press("x", "y")
        await until(lambda: screen.has_ended)
        assert pool.closed
        await until(lambda: "The pool ended" in text(screen, "#ended"))
        assert screen.query_one("#ended").display
        await pilot.press("r")
        await until(lambda: "nobody to tell" in text(screen, "#said"))
        await pilot.press("q")

    drive(pool, tmp_path, act)


def test_a_picture_can_be_taken(pool: AgentPool, tmp_path: Path) -> None:
    async def act(screen: PoolScreen, pilot: Any) -> None:
        picture = screen.export_screenshot(title="agentpool top")
        assert "reviews" in picture
        assert picture.startswith("<svg")

    drive(pool, tmp_path, act)


@pytest.mark.parametrize(("values", "shown"), [
    ([], ""), ([0.0], ""), ([1.0], "█"), ([0.0, 50.0, 100.0], "▁▅█"), ([1.0] * 60, "█" * 16),
])
def test_trend(values: list[float], shown: str) -> None:
    assert trend(deque(values)) == shown


@contextmanager
def ended(program: subprocess.Popen[bytes]) -> Iterator[None]:
    """A failed test does not wait for it."""
    try:
        yield
    finally:
        program.kill()


def test_in_a_terminal_it_leaves_everything_as_it_was(pool: AgentPool, tmp_path: Path) -> None:
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    before = termios.tcgetattr(theirs)
    # An outer run may have set another size in COLUMNS, in which the last column is not seen.
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "24",
                   "AGENTPOOL_CONTROL_DIR": str(tmp_path / "sockets")}
    shown = b""
    with subprocess.Popen([sys.executable, "-m", "agentpool", "top"], stdin=theirs, stdout=theirs, stderr=theirs,
                          env=environment, start_new_session=True) as program, ended(program):
        deadline = time.monotonic() + PATIENCE
        while b"long one" not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([mine], [], [], 1)[0]:
                shown += os.read(mine, 65536)
        assert termios.tcgetattr(theirs) != before, "it takes the terminal over"
        os.write(mine, b"q")
        while program.poll() is None:
            assert time.monotonic() < deadline, shown[-2000:]
            if select.select([mine], [], [], 0.1)[0]:
                shown += os.read(mine, 65536)
    while select.select([mine], [], [], 0.1)[0]:
        shown += os.read(mine, 65536)
    assert program.returncode == 0
    assert termios.tcgetattr(theirs) == before
    assert shown.count(b"\x1b[?1049h") == shown.count(b"\x1b[?1049l") == 1, "the screen before it is back"
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l"), "so is the cursor"
    os.close(mine)
    os.close(theirs)
