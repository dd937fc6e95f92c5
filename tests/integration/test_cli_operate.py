"""The commands that look at a pool and order it about, each run as a program against a pool of this process."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentpool import AgentPool, HostBudget
from agentpool.cli.health import _RemotePool
from agentpool.control.client import find_pools
from agentpool.control.wire import ControlError

MakePool = Callable[..., AgentPool]
Run = Callable[..., subprocess.CompletedProcess[str]]


def wait_for(path: str) -> int:
    """Runs until the file is there; says beside it that it has begun."""
    Path(path + ".began").touch()
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()


def say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "sockets")


@pytest.fixture
def environment(place: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AGENTPOOL_")}
    return {**kept, "AGENTPOOL_CONTROL_DIR": place, "COLUMNS": "200"}


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    def run(*words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "agentpool", *words], capture_output=True, text=True, timeout=60,
                              check=False, env={**environment, **changed})

    return run


@pytest.fixture
def served(make_pool: MakePool, place: str, wait_until: Callable[..., None]) -> Callable[..., AgentPool]:
    """A pool whose socket is there, with one worker that has done one task."""

    def make(name: str = "reviews", size: int = 2, **settings: object) -> AgentPool:
        pool = make_pool(size, name=name, control=place, **settings)
        pool.submit(os.getpid).result()
        wait_until(lambda: pool._manager.door.is_open, "no control socket came")
        return pool

    return make


# --- looking ---


def test_ps_lists_pools_and_says_so_where_there_is_none(run: Run, served: Callable[..., AgentPool]) -> None:
    done = run("ps", "--no-agents")
    assert (done.returncode, done.stdout) == (0, "No pool of this user is running.\n")
    served("first")
    served("second", 3)
    lines = run("ps", "--no-agents").stdout.splitlines()
    assert lines[0].split()[:9] == ["ID", "NAME", "PID", "STATUS", "WORKERS", "RUNNING", "QUEUED", "MEMORY", "BREAKER"]
    cells = [line.split() for line in lines[1:]]
    assert [(cell[1], cell[2], cell[3], cell[4]) for cell in cells] == [
        ("first", str(os.getpid()), "ok", "1/2"), ("second", str(os.getpid()), "ok", "1/3")]
    document = json.loads(run("ps", "--json").stdout)
    assert [pool["name"] for pool in document["pools"]] == ["first", "second"]
    assert document["pools"][0]["stats"]["counters"]["completed"] == 1
    assert document["foreign_agents"]["count"] >= 0


def test_ps_and_status_show_who_has_the_slots_of_a_budget_and_who_waits(
    run: Run, served: Callable[..., AgentPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    gate, directory = tmp_path / "gate", str(tmp_path / "budget")
    budget = HostBudget(agents=1, memory_mb=800, directory=directory)
    holder, waiter = served("holder", budget=budget), served("waiter", budget=budget)
    held = holder.submit(wait_for, str(gate))
    wait_until(held.running, "it does not run")
    waiting = waiter.submit(os.getpid)
    wait_until(lambda: waiter.get_pool_stats()["host_budget"]["waits_for"], "it does not wait")
    files = {"XDG_CONFIG_HOME": str(tmp_path)}
    (tmp_path / "agentpool").mkdir()
    (tmp_path / "agentpool" / "config.toml").write_text("[budget]\nagents = 3\n")
    listed = json.loads(run("ps", "--no-agents", "--json", **files).stdout)
    (view,) = listed["budgets"]
    assert (view["directory"], view["agents"], view["running"], view["waiting"]) == (directory, 1, 1, 1)
    assert [(each["name"], each["slots"], each["waits_for"]) for each in view["members"]] == [
        ("holder", 1, ""), ("waiter", 0, "a slot"),
    ]
    assert listed["budget_limits"]["budget.agents"] == {"value": 3, "source": f"{tmp_path}/agentpool/config.toml"}
    assert listed["budget_limits"]["budget.memory_mb"]["source"] == "default"
    shown = run("ps", "--no-agents", **files).stdout
    assert f"Host budget in {directory}: 1 of 1 agents run, 1 waiting, " in shown
    assert f"Limits of commands: 3 agents ({tmp_path}/agentpool/config.toml), 800 MB (default)" in shown
    assert "It holds 0 of 1 slots of the host's budget, and waits for a slot" in run("status", "-p", "waiter").stdout
    status = json.loads(run("status", "-p", "waiter", "--json").stdout)
    assert status["budget"]["members"][0]["name"] == "holder"
    assert status["stats"]["host_budget"]["directory"] == directory
    (tmp_path / "agentpool" / "config.toml").write_text("[budget\n")
    done = run("ps", "--no-agents", **files)
    assert done.returncode == 0, "a broken file keeps nobody from looking"
    assert "Limits of commands: unknown. " in done.stdout
    os.chmod(directory, 0o755)
    assert f"Host budget in {directory}: the runtime directory" in run("ps", "--no-agents").stdout
    os.chmod(directory, 0o700)
    gate.touch()
    assert waiting.result(30)


def test_ps_finds_agent_programs_that_no_pool_owns(
    run: Run, served: Callable[..., AgentPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    pool = served()
    program = tmp_path / "claude"
    program.write_text("import time\ntime.sleep(300)\n")
    command = [sys.executable, str(program)]
    ours = pool.submit(subprocess.run, command, check=False)
    with subprocess.Popen(command) as foreign:
        try:
            wait_until(ours.running, "it does not run")
            found = json.loads(run("ps", "--json").stdout)["foreign_agents"]["processes"]
            assert foreign.pid in [each["pid"] for each in found]
            assert [each for each in found if each["pid"] in _below(pool)] == [], "the pool's own"
            assert f"{foreign.pid}  claude" in run("ps").stdout
        finally:
            foreign.kill()
    pool.kill_workers()


@pytest.mark.parametrize(("says", "is_known"), [
    ("""echo '[{"pid": '$SESSION', "status": "busy", "name": "night", "cwd": "/work"}, 7, {}]'""", True),
    ("echo '[]'", False),
    ("echo '{\"pid\": 1}'", False),
    ("echo 'error: unknown option --json'; exit 1", False),
    ("sleep 600 & sleep 600", False),
])
def test_ps_tells_what_claude_code_knows_of_its_sessions(run: Run, tmp_path: Path, says: str, is_known: bool) -> None:
    session = tmp_path / "claude"
    session.write_text("import sys\nsys.stdin.read()\n")
    command = tmp_path / "bin" / "claude"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n[ \"$*\" = 'agents --json' ] || exit 2\n{says}\n")
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    with subprocess.Popen([sys.executable, str(session)], stdin=subprocess.PIPE) as process:
        changed = {"PATH": path, "SESSION": str(process.pid)}
        found = json.loads(run("ps", "--json", **changed).stdout)["foreign_agents"]["processes"]
        known = {"status": "busy", "name": "night", "cwd": "/work"}
        assert [each["session"] for each in found if each["pid"] == process.pid] == [known if is_known else {}]
        lines = [line.split() for line in run("ps", **changed).stdout.splitlines()]
        (cells,) = [cells for cells in lines if cells[:1] == [str(process.pid)]]
        assert (cells[-3:] == ["busy", "night", "/work"]) == is_known


def test_ps_finds_what_dead_pools_left(run: Run, served: Callable[..., AgentPool]) -> None:
    pool = served()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    left = {**os.environ, "AGENTPOOL_KEEPER": f"{gone.pid}-0123456789abcdef"}
    with subprocess.Popen(["sleep", "300"], env=left) as orphan:
        try:
            document = json.loads(run("ps", "--json").stdout)
            (found,) = [each for each in document["orphans"] if each["pid"] == orphan.pid]
            assert (found["pool_pid"], found["command"]) == (gone.pid, "sleep 300")
            living = {worker["pid"] for worker in pool.get_pool_stats()["workers"]}
            assert not living & {each["pid"] for each in document["orphans"]}
            assert "were left by pools that are dead; `agentpool sweep` ends them:" in run("ps").stdout
        finally:
            orphan.kill()


def _below(pool: AgentPool) -> set[int]:
    import psutil

    return {child.pid for worker in pool.get_pool_stats()["workers"]
            for child in psutil.Process(worker["pid"]).children(recursive=True)}


def test_ps_shows_a_pool_that_does_not_answer(
    run: Run, place: str, wait_until: Callable[..., None], environment: dict[str, str], stop: Callable[[int], None]
) -> None:
    source = (f"import os, sys; from agentpool import AgentPool; pool = AgentPool(1, control={place!r}); "
              "pool.submit(os.getpid).result(); sys.stdin.read(); pool.shutdown()")
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE) as program:
        wait_until(lambda: find_pools([place]), "it has no socket")
        stop(program.pid)
        try:
            assert " silent " in run("ps", "--no-agents").stdout
            done = run("status", "--pool", str(program.pid))
            assert done.returncode == 5
            assert "does not answer within 5 s: its process is stopped" in done.stderr
        finally:
            program.send_signal(signal.SIGCONT)
            assert program.stdin is not None
            program.stdin.close()


def test_status_shows_workers_tasks_and_why_it_is_degraded(
    run: Run, served: Callable[..., AgentPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    pool = served()
    future = pool.options(name="evil \x1b[31m name").submit(wait_for, str(tmp_path / "end"))
    wait_until(future.running, "it does not run")
    pool.breaker.force_open("at work")
    done = run("status")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Pool reviews ({os.getpid()}-")
    assert "\n! at work\n" in done.stdout
    assert "evil " in done.stdout
    assert "\x1b" not in done.stdout
    status = json.loads(run("status", "--json").stdout)
    assert status["breaker"]["state"] == "forced_open"
    assert status["stats"]["running"] == 1
    (tmp_path / "end").touch()


def test_status_watch_goes_on_until_the_pool_ends(
    served: Callable[..., AgentPool], environment: dict[str, str]
) -> None:
    pool = served()
    with subprocess.Popen([sys.executable, "-m", "agentpool", "status", "--watch", "--interval", "0.1"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as watching:
        assert watching.stdout is not None
        assert [watching.stdout.readline().partition(":")[0] for _ in range(3)] == ["ok"] * 3
        pool.shutdown()
        out, err = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert out.splitlines()[-1].startswith("closed: ")
    assert err == "Pool reviews ended.\n"


def test_watching_a_pool_that_is_killed_has_an_exit_code_of_its_own(
    place: str, environment: dict[str, str], wait_until: Callable[..., None]
) -> None:
    source = (f"import os, sys; from agentpool import AgentPool; pool = AgentPool(1, control={place!r}); "
              "pool.submit(os.getpid).result(); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE) as program:
        wait_until(lambda: find_pools([place]), "it has no socket")
        with subprocess.Popen([sys.executable, "-m", "agentpool", "status", "--watch", "--json"],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as watching:
            assert watching.stdout is not None
            assert json.loads(watching.stdout.readline())["stats"]["status"] in ("ok", "degraded")
            program.kill()
            _, err = watching.communicate(timeout=60)
    assert watching.returncode == 7
    assert err == "agentpool: the pool is gone: its process ended, or it was shut down\n"


def test_health_is_of_all_pools_and_can_be_checked(run: Run, served: Callable[..., AgentPool]) -> None:
    pool = served("first")
    served("second")
    report = json.loads(run("health").stdout)
    assert [each["name"].partition(" ")[0] for each in report["pools"]] == ["first", "second"]
    assert report["agent_pool"]["max_pool_size"] == 4
    pool.breaker.force_open("at work")
    done = run("health", "--check", "--pool", "first")
    assert done.returncode == 1
    assert "at work" in json.loads(done.stdout)["reasons"]


def test_health_leaves_out_a_pool_that_ended_since_it_was_found(served: Callable[..., AgentPool], place: str) -> None:
    pool = served()
    (found,) = find_pools([place])
    assert _RemotePool(found).get_pool_stats()["max_pool_size"] == 2
    pool.shutdown()
    with pytest.raises(ControlError, match="its process ended, or it was shut down"):
        _RemotePool(found)


def test_logs_are_printed_whole_and_followed(
    run: Run, served: Callable[..., AgentPool], environment: dict[str, str], place: str
) -> None:
    pool = served(size=1)
    pool.submit(say, "one", "\x1b]0;title\x07two").result()
    done = run("logs", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "one"
    assert done.stdout.endswith("two\n")
    assert "\x1b" not in done.stdout
    assert run("logs").stdout.splitlines()[0] == "  1  one"
    with subprocess.Popen([sys.executable, "-m", "agentpool", "logs", "-f", "1"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=environment) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == "one\n"
        assert following.stdout.readline().endswith("two\n")
        pool.submit(say, "three").result()
        assert following.stdout.readline() == "three\n"
        pool.recycle()
        out, err = following.communicate(timeout=60)
    assert (following.returncode, out) == (0, "")
    assert err == "agentpool: worker 1 ended: it exited with code 0 (by hand)\n"
    done = run("logs", "1")
    assert done.stdout.splitlines()[0] == "one"
    assert re.fullmatch(r"agentpool: worker 1 ended(.* ago)?: it exited with code 0 \(by hand\)\n", done.stderr)
    (said, end) = map(json.loads, run("logs", "1", "--json").stdout.splitlines())
    assert said["text"].endswith("three\n")
    assert (end["ended"], end["how"]) == (True, "exited with code 0 (by hand)")
    done = run("logs", "77")
    assert done.returncode == 6
    assert "there is no worker 77" in done.stderr


# --- which pool ---


def test_of_several_pools_one_must_be_named(run: Run, served: Callable[..., AgentPool]) -> None:
    served("first")
    served("second")
    done = run("status")
    assert done.returncode == 4
    assert "these pools are there; say which with --pool ID:" in done.stderr
    assert "first" in done.stderr
    assert "second" in done.stderr
    pools = json.loads(run("ps", "--json").stdout)["pools"]
    for wanted in ("second", pools[1]["id"], pools[1]["socket"]):
        assert json.loads(run("status", "--json", "--pool", wanted).stdout)["pool"]["name"] == "second"
    assert json.loads(run("status", "--json", AGENTPOOL_POOL="first").stdout)["pool"]["name"] == "first"
    done = run("status", "--pool", str(os.getpid()))
    assert done.returncode == 4
    assert f"these pools are called {os.getpid()}" in done.stderr
    done = run("status", "--pool", "third")
    assert done.returncode == 3
    assert "no pool is called third; these are there:" in done.stderr


def test_no_pool_at_all_has_an_exit_code_and_the_reason(run: Run, place: str, tmp_path: Path) -> None:
    done = run("status")
    assert done.returncode == 3
    assert f"there is no pool of this user in {place}. A pool can be seen from 50 ms" in done.stderr
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    done = run("status", "--control-dir", str(tmp_path / "open"))
    assert done.returncode == 3
    assert "the folder is not private" in done.stderr


# --- ordering about ---


def test_pause_and_resume(run: Run, served: Callable[..., AgentPool]) -> None:
    pool = served()
    assert run("pause").stdout == "Paused: nothing begins until `agentpool resume`.\n"
    future = pool.submit(os.getpid)
    assert json.loads(run("status", "--json").stdout)["stats"]["queue_length"] == 1
    assert json.loads(run("resume", "--json").stdout) == {"paused": False}
    assert future.result(20) > 0


def test_drain_waits_and_gives_up_in_time(
    run: Run, served: Callable[..., AgentPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    pool = served()
    future = pool.submit(wait_for, str(tmp_path / "end"))
    wait_until(future.running, "it does not run")
    done = run("drain", "--timeout", "0.3")
    assert (done.returncode, done.stdout) == (1, "Draining: 1 task not over yet.\n")
    threading.Timer(1.0, (tmp_path / "end").touch).start()
    done = run("drain", "--timeout", "60", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"drained": True, "unfinished": 0}
    assert future.done()
    assert run("resume").returncode == 0
    assert pool.submit(os.getpid).result(20) > 0


@pytest.mark.parametrize(("words", "says"), [((), True), (("--pool", "reviews"), False)])
def test_an_order_that_names_no_pool_says_on_a_terminal_which_one_it_went_to(
    served: Callable[..., AgentPool], environment: dict[str, str], words: tuple[str, ...], says: bool
) -> None:
    pool = served()
    terminal, theirs = pty.openpty()
    try:
        subprocess.run([sys.executable, "-m", "agentpool", "pause", *words], stdout=subprocess.PIPE, stderr=theirs,
                       check=True, timeout=60, env=environment)
        os.write(theirs, b"end\n")
        shown = os.read(terminal, 4096).decode()
    finally:
        os.close(terminal)
        os.close(theirs)
    assert ("agentpool: pool reviews (" in shown) is says
    assert pool.get_pool_stats()["is_paused"]


def test_recycle_kill_and_resize(
    run: Run, served: Callable[..., AgentPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    pool = served()
    assert run("recycle", "1").stdout == "1 worker goes as soon as its task has ended.\n"
    future = pool.submit(wait_for, str(tmp_path / "never"))
    wait_until((tmp_path / "never.began").exists, "it does not run")
    number = next(str(each["id"]) for each in pool.get_pool_stats()["workers"] if each["status"] == "busy")
    assert run("kill", number, "--reason", "it eats the disk").stdout == f"Worker {number} was killed.\n"
    assert "it eats the disk" in str(future.exception(20))
    wait_until(lambda: number not in [str(each["id"]) for each in pool.get_pool_stats()["workers"]], "it lives")
    done = run("kill", number, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"killed": False})
    done = run("kill", "999")
    assert done.returncode == 6
    assert "never had a worker 999" in done.stderr
    assert run("resize", "5", "-c", "3").stdout == "At most 5 workers, 3 tasks at once.\n"
    assert pool.settings.max_workers == 5
    done = run("resize")
    assert done.returncode == 2
    assert "resize needs the number of workers" in done.stderr


def test_breaker_is_shown_opened_closed_and_reset(run: Run, served: Callable[..., AgentPool]) -> None:
    pool = served()
    assert run("breaker").stdout == "The breaker is closed.\n"
    assert run("breaker", "open", "--reason", "no power").stdout == "The breaker is forced open: no power.\n"
    assert pool.breaker.get_state() == "forced_open"
    assert run("breaker", "open", "--ttl", "3600").stdout == "The breaker is forced open for 59 min: opened by hand.\n"
    assert run("breaker", "close", "--ttl", "30").stdout.startswith("The breaker is held closed for ")
    assert pool.breaker.is_held_closed
    assert json.loads(run("breaker", "reset", "--json").stdout)["state"] == "closed"
    assert not pool.breaker.is_held_closed
    for words in (("close",), ("reset", "--ttl", "5"), ("smash",), ("open", "--ttl", "0")):
        assert run("breaker", *words).returncode == 2, words


def test_shutdown_stops_at_once_or_gracefully(
    run: Run, served: Callable[..., AgentPool], tmp_path: Path, wait_until: Callable[..., None], place: str
) -> None:
    pool = served()
    future = pool.submit(wait_for, str(tmp_path / "never"))
    wait_until((tmp_path / "never.began").exists, "it does not run")
    done = run("shutdown", "--reason", "out of memory")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Stopped: ")
    assert "1 task stopped, 0 cancelled." in done.stdout
    assert "out of memory" in str(future.exception(20))
    assert os.listdir(place) == [], "it returns when the pool is gone"
    pool = served("second")
    future = pool.submit(wait_for, str(tmp_path / "end"))
    done = run("shutdown", "--graceful", "--timeout", "0.5", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"unfinished": 1, "is_over": False})
    (tmp_path / "end").touch()
    assert future.result(20) > 0


# --- the rest ---


def test_doctor_finds_this_host_fit(run: Run) -> None:
    done = run("doctor", "--json")
    document = json.loads(done.stdout)
    failed = [check for check in document["checks"] if check["result"] == "fail"]
    assert (done.returncode, failed) == (0, [])
    names = [check["name"] for check in document["checks"]]
    assert {"memory limit", "memory pressure", "pidfd", "child subreaper", "descriptors", "start by fork",
            "start by spawn", "breaker", "recycling", "hard memory limit", "emergency shutdown", "orchestrator",
            } <= set(names)
    done = run("doctor", "--no-try")
    assert done.stdout.splitlines()[0].split() == ["CHECK", "RESULT", "FOUND"]
    assert "start by fork" not in done.stdout


def test_doctor_says_what_is_wrong_and_how_to_mend_it(environment: dict[str, str]) -> None:
    source = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 4096)); "
              "sys.argv = ['agentpool', 'doctor', '--no-try']; runpy.run_module('agentpool', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False,
                          env=environment)
    assert done.returncode == 0, "a warning is no failure"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("descriptors")]
    assert line.split(maxsplit=2)[1:] == [
        "warn", "200 descriptors at most (hard limit 4096). Pools with many workers want 1024: ulimit -n 1024"]


@pytest.mark.parametrize("command", [
    "ps", "status", "health", "top", "logs", "recycle", "kill", "drain", "pause", "resume", "resize", "breaker",
    "shutdown", "doctor",
])
def test_help_has_examples_and_exit_codes(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "Exit code: 0" in done.stdout
    assert f"Examples:\n    agentpool {command}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 90


def test_shell_completion_is_offered(run: Run) -> None:
    done = run("--show-completion", "bash")
    assert done.returncode == 0
    assert "agentpool" in done.stdout
    completed = run(_AGENTPOOL_COMPLETE="complete_bash", COMP_WORDS="agentpool re", COMP_CWORD="1")
    assert set(completed.stdout.split()) == {"recycle", "resize", "resume"}


def test_top_needs_a_terminal(run: Run, served: Callable[..., AgentPool]) -> None:
    served()
    done = run("top")
    assert done.returncode == 2
    assert "top needs a terminal; elsewhere use: agentpool status --watch" in done.stderr


def test_ctrl_c_ends_a_watch(served: Callable[..., AgentPool], environment: dict[str, str]) -> None:
    served()
    with subprocess.Popen([sys.executable, "-m", "agentpool", "status", "--watch"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=environment) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert "Traceback" not in err


@pytest.fixture(autouse=True)
def _no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
