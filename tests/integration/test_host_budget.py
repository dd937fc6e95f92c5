"""Pools of several processes that share one budget: never more than it run, nobody starves, and the dead hold nothing.

What ran when is told by the tasks themselves: each writes to a journal when it began and ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentpool import AgentPool, HostBudget, SettingsError

#: A program with a pool of scope "host": directory of the budget, agents, memory, journal, name, tasks, seconds, extra.
PROGRAM = """
import os, sys, time
from agentpool import AgentPool, HostBudget

def job(journal, name, seconds):
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    began = time.monotonic()
    os.write(descriptor, f"began {name} {began}\\n".encode())
    time.sleep(seconds)
    os.write(descriptor, f"ran {name} {began} {time.monotonic()}\\n".encode())

if __name__ == "__main__":
    directory, agents, journal, name, tasks, seconds = sys.argv[1:7]
    with AgentPool(max_workers=8, budget=HostBudget(agents=int(agents), directory=directory),
                   cpu_threshold_percent=100, name=name) as pool:
        for future in [pool.submit(job, journal, name, float(seconds)) for _ in range(int(tasks))]:
            future.result()
"""


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "budget")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def start(tmp_path: Path, directory: str, journal: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the program above; kills what is left of it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str, tasks: int, seconds: float, *, agents: int = 2) -> subprocess.Popen[bytes]:
        words = [directory, str(agents), str(journal), name, str(tasks), str(seconds)]
        started.append(subprocess.Popen([sys.executable, str(program), *words]))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def ran(journal: Path) -> list[tuple[str, float, float]]:
    """Name, beginning and end of each task that ended."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [(name, float(began), float(ended)) for name, began, ended in
            (line.split()[1:] for line in lines if line.startswith("ran "))]


def began(journal: Path, name: str) -> int:
    lines = journal.read_text().splitlines() if journal.exists() else []
    return sum(line.startswith(f"began {name} ") for line in lines)


def most_at_once(tasks: list[tuple[str, float, float]]) -> int:
    changes = sorted([(at, 1) for _, at, _ in tasks] + [(at, -1) for _, _, at in tasks])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def test_fifty_six_agents_of_eight_processes_share_the_budget(
    start: Callable[..., subprocess.Popen[bytes]], journal: Path, directory: str
) -> None:
    programs = [start(f"p{number}", 7, 0.05, agents=3) for number in range(8)]
    assert [program.wait(timeout=100) for program in programs] == [0] * 8
    tasks = ran(journal)
    assert len(tasks) == 56
    assert most_at_once(tasks) == 3, "the whole budget is used, and no more than it"
    assert os.listdir(directory) == ["slots"], "whoever ended left nothing"


def test_a_pool_with_much_to_do_does_not_starve_one_that_comes_later(
    start: Callable[..., subprocess.Popen[bytes]], journal: Path, wait_until: Callable[..., None]
) -> None:
    greedy = start("greedy", 100_000, 0.02, agents=1)
    wait_until(lambda: began(journal, "greedy") > 3, "nothing runs")
    modest = start("modest", 5, 0.02, agents=1)
    assert modest.wait(timeout=60) == 0
    greedy.kill()
    tasks = ran(journal)
    assert most_at_once(tasks) == 1
    assert sum(name == "modest" for name, _, _ in tasks) == 5


def test_slots_of_a_killed_pool_are_taken_over_at_once(
    start: Callable[..., subprocess.Popen[bytes]], journal: Path, directory: str, wait_until: Callable[..., None],
    make_pool: Callable[..., AgentPool],
) -> None:
    holder = start("holder", 1, 600, agents=1)
    wait_until(lambda: began(journal, "holder") == 1, "nothing runs")
    pool = make_pool(2, budget=HostBudget(agents=1, directory=directory))
    future = pool.submit(time.monotonic)
    wait_until(lambda: pool.get_pool_stats()["host_budget"]["waits_for"], "it does not wait")
    assert not future.running()
    holder.kill()
    killed_at = time.monotonic()
    assert future.result(timeout=20) - killed_at < 2, "it was looked at by time, or by chance"
    assert sorted(os.listdir(directory))[-1] == "slots"
    assert len([name for name in os.listdir(directory) if name.endswith(".json")]) == 1


def test_a_stopped_pool_keeps_its_slot(
    start: Callable[..., subprocess.Popen[bytes]], journal: Path, directory: str, wait_until: Callable[..., None],
    make_pool: Callable[..., AgentPool],
) -> None:
    holder = start("holder", 1, 600, agents=1)
    wait_until(lambda: began(journal, "holder") == 1, "nothing runs")
    os.kill(holder.pid, signal.SIGSTOP)
    pool = make_pool(2, queue_timeout=3.0, budget=HostBudget(agents=1, directory=directory))
    with pytest.raises(TimeoutError):
        pool.submit(os.getpid).result(timeout=30)
    assert began(journal, "holder") == 1


def test_a_stopped_pool_ahead_in_line_is_passed_over(
    start: Callable[..., subprocess.Popen[bytes]], journal: Path, directory: str, wait_until: Callable[..., None],
    make_pool: Callable[..., AgentPool],
) -> None:
    mine = make_pool(1, budget=HostBudget(agents=1, directory=directory))
    blocking = mine.submit(time.sleep, 600)
    wait_until(blocking.running, "nothing runs")
    stopped = start("stopped", 1, 0.01, agents=1)
    wait_until(lambda: _waiting(directory) == 1, "it does not wait")
    os.kill(stopped.pid, signal.SIGSTOP)
    behind = start("behind", 1, 0.01, agents=1)
    wait_until(lambda: _waiting(directory) == 2, "it does not wait")
    blocking.kill()
    assert behind.wait(timeout=60) == 0
    assert began(journal, "stopped") == 0
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.wait(timeout=60) == 0, "it has its turn when it goes on"


def _waiting(directory: str) -> int:
    from agentpool.io.shared_budget import SharedBudget

    return sum(record.get("ticket") is not None for record in SharedBudget(directory).look_on().values())


def test_a_worker_does_not_keep_its_pools_slot(
    start: Callable[..., subprocess.Popen[bytes]], journal: Path, directory: str, wait_until: Callable[..., None]
) -> None:
    """Keeper and workers are forked by, or from, the holder: none of them may have the descriptors of the locks."""
    holder = start("holder", 1, 600, agents=1)
    wait_until(lambda: began(journal, "holder") == 1, "nothing runs")
    having = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _has_open(pid, directory)]
    assert having == [holder.pid]


def _has_open(pid: int, directory: str) -> bool:
    links = []
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                links.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or none of ours
        return False
    return any(link.startswith(directory) for link in links)


def test_a_forked_copy_of_the_holder_keeps_nothing(
    directory: str, make_pool: Callable[..., AgentPool], wait_until: Callable[..., None]
) -> None:
    pool = make_pool(1, budget=HostBudget(agents=1, directory=directory))
    future = pool.submit(time.sleep, 600)
    wait_until(future.running, "nothing runs")
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        wait_until(lambda: not _has_open(child, directory), "the copy has the descriptors")
        assert _has_open(os.getpid(), directory)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    future.kill()


def test_the_memory_of_all_pools_counts(directory: str, make_pool: Callable[..., AgentPool],
                                        wait_until: Callable[..., None]) -> None:
    budget = HostBudget(agents=4, memory_mb=60, directory=directory)
    first, second = (make_pool(1, budget=budget, memory_limit_mb=None) for _ in range(2))
    eater = first.submit(_eat, 100)
    wait_until(eater.running, "nothing runs")
    wait_until(lambda: first.get_pool_stats()["memory_mb"] > 80, "its memory is not seen")
    waiting = second.submit(os.getpid)
    wait_until(lambda: "memory" in second.get_pool_stats()["host_budget"]["waits_for"], "it does not wait for memory")
    assert not waiting.done()
    eater.kill()
    waiting.result(timeout=20)


def _eat(megabytes: int) -> None:
    eaten = b"x" * (megabytes << 20)
    time.sleep(600 + len(eaten) % 2)


def test_a_task_that_says_what_it_needs_follows_one_that_did_not(
    directory: str, make_pool: Callable[..., AgentPool]
) -> None:
    """The pool gives its only slot back to weigh the second task, and there is nobody to tell it that it is free."""
    pool = make_pool(1, budget=HostBudget(agents=1, directory=directory))
    first = pool.submit(time.sleep, 0.3)
    second = pool.options(expected_memory_mb=10).submit(os.getpid)
    assert first.result(timeout=20) is None
    assert second.result(timeout=20)


@pytest.mark.parametrize("kind", ["group", "session"])
def test_no_slot_is_kept_for_tasks_that_their_group_or_session_holds_up(
    kind: str, directory: str, make_pool: Callable[..., AgentPool], wait_until: Callable[..., None]
) -> None:
    first, second = (make_pool(2, budget=HostBudget(agents=2, directory=directory)) for _ in range(2))
    one_at_a_time = first.options(group="g", group_limit=1) if kind == "group" else first.session(key="s")
    held_up = [one_at_a_time.submit(time.sleep, 600) for _ in range(3)]
    wait_until(held_up[0].running, "nothing runs")
    assert first.get_pool_stats()["host_budget"]["slots"] == 1
    other = second.submit(time.sleep, 600)
    wait_until(other.running, "the first pool has the slot that it cannot use")
    assert first.get_pool_stats()["host_budget"]["slots"] == 1
    assert not _waiting(directory), "the first pool stands in line for a slot that it could not use"
    for future in held_up[:0:-1]:
        assert future.cancel()
    assert held_up[0].kill()
    assert other.kill()


def test_idle_slots_are_given_back_and_the_pool_leaves(directory: str, make_pool: Callable[..., AgentPool],
                                                       wait_until: Callable[..., None]) -> None:
    pool = make_pool(1, budget=HostBudget(directory=directory), idle_timeout=0.2)
    assert pool.submit(os.getpid).result(timeout=20)
    wait_until(lambda: not pool.get_pool_stats()["host_budget"]["slots"], "it keeps its slot")
    wait_until(lambda: os.listdir(directory) == ["slots"], "it takes part although it has nothing")
    assert pool.submit(os.getpid).result(timeout=20), "and it comes back"


def test_a_removed_directory_is_made_again(directory: str, make_pool: Callable[..., AgentPool],
                                           wait_until: Callable[..., None]) -> None:
    pool = make_pool(1, budget=HostBudget(directory=directory))
    assert pool.submit(os.getpid).result(timeout=20)
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    os.rmdir(directory)
    wait_until(lambda: not pool.get_pool_stats()["host_budget"]["slots"], "it keeps its slot")
    assert pool.submit(os.getpid).result(timeout=20)
    assert os.path.isdir(directory)


def test_the_directory_is_the_users_alone(directory: str, make_pool: Callable[..., AgentPool]) -> None:
    make_pool(1, budget=HostBudget(directory=directory)).submit(os.getpid).result(timeout=20)
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert all(stat.S_IMODE(os.stat(os.path.join(directory, name)).st_mode) == 0o600 for name in os.listdir(directory))
    os.chmod(directory, 0o777)
    with pytest.raises(SettingsError, match="open to other users \\(mode 777\\): chmod 700"):
        AgentPool(budget=HostBudget(directory=directory))


def test_rubbish_in_the_directory_harms_nobody(directory: str, make_pool: Callable[..., AgentPool]) -> None:
    os.makedirs(directory, mode=0o700)
    for name, text in {"1-1.json": "rubbish", "2-2.bell": "no FIFO", "x": "", ".hidden": "{}"}.items():
        Path(directory, name).write_text(text)
    pool = make_pool(1, budget=HostBudget(directory=directory))
    assert pool.submit(os.getpid).result(timeout=20)
    assert "1-1.json" not in os.listdir(directory), "nobody has it locked: its pool is dead"


def test_a_pool_of_its_own_knows_nothing_of_it(make_pool: Callable[..., AgentPool]) -> None:
    pool = make_pool(1)
    assert pool.submit(os.getpid).result(timeout=20)
    assert pool.get_pool_stats()["host_budget"] is None
    check = "import sys, agentpool.pool; print([name for name in sys.modules if 'budget' in name or 'host_s' in name])"
    loaded: Any = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_files_that_were_cleaned_away_are_made_again(
    directory: str, make_pool: Callable[..., AgentPool], wait_until: Callable[..., None]
) -> None:
    """Otherwise the next pool would make a file of slots of its own, and the budget would be two."""
    pool = make_pool(1, budget=HostBudget(agents=1, directory=directory))
    assert pool.submit(os.getpid).result(timeout=20)
    wait_until(lambda: not pool.get_pool_stats()["host_budget"]["slots"], "it keeps its slot")
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    blocking = make_pool(1, budget=HostBudget(agents=1, directory=directory)).submit(time.sleep, 600)
    wait_until(blocking.running, "nothing runs")
    waiting = pool.submit(os.getpid)
    wait_until(lambda: pool.get_pool_stats()["host_budget"]["waits_for"], "it runs beside the other")
    assert not waiting.done()
    blocking.kill()
    waiting.result(timeout=20)
