"""The control socket: who may ask, what peers of any kind cannot do to the pool, and that no socket is left behind."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentpool import AgentPool, SettingsError, WorkerCrashedError
from agentpool.control import folder
from agentpool.control.client import ControlClient, FoundPool, find_pools
from agentpool.control.wire import LONGEST_REQUEST, ControlError

MakePool = Callable[..., AgentPool]


def pid_of_worker() -> int:
    return os.getpid()


def wait_for(path: str) -> int:
    """Runs until the file is there; says beside it that it has begun."""
    Path(path + ".began").touch()
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()


def write_lines(count: int, width: int = 10) -> None:
    for number in range(count):
        print(f"{number:0{width}}", file=sys.stderr)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "sockets")


@pytest.fixture
def find(place: str, wait_until: Callable[..., None]) -> Callable[[], FoundPool]:
    """The one pool, once its socket is there."""

    def look() -> FoundPool:
        wait_until(lambda: find_pools([place]), "no control socket came")
        (found,) = find_pools([place])
        assert not found.problem
        return found

    return look


@pytest.fixture
def client(make_pool: MakePool, place: str, find: Callable[[], FoundPool]) -> Iterator[ControlClient]:
    pool = make_pool(2, name="mine", control=place)
    pool.submit(pid_of_worker).result()
    with find().connect() as client:
        yield client


def raw(found: FoundPool) -> socket.socket:
    """Connected, the hello read."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(found.path)
    assert json.loads(read_line(connection))["protocol"] == 1
    return connection


def read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        data = connection.recv(1)
        if not data:
            break
        line += data
    return line


# --- what is asked and answered ---


def test_it_says_who_it_is(client: ControlClient) -> None:
    pool = client.hello["pool"]
    assert (pool["name"], pool["pid"], pool["user"]) == ("mine", os.getpid(), os.geteuid())
    assert client.hello["verbs"] == sorted(client.hello["verbs"])
    assert client.call("hello")["pool"]["id"] == pool["id"]


def test_status_stats_and_workers_are_those_of_the_pool(client: ControlClient) -> None:
    status = client.call("status")
    assert status["stats"]["status"] == "ok"
    assert status["stats"]["max_pool_size"] == 2
    assert client.call("stats")["counters"]["completed"] == 1
    (worker,) = client.call("workers")
    assert worker["pid"] > 0
    assert client.call("health")["agent_pool"]["max_pool_size"] == 2


def test_tasks_are_listed_running_ones_first(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    pool = make_pool(1, control=place)
    end = str(tmp_path / "end")
    running = pool.options(name="long one", priority=3).submit(wait_for, end)
    wait_until(running.running, "it does not run")
    queued = [pool.submit(pid_of_worker) for _ in range(5)]
    with find().connect() as client:
        answer = client.call("tasks", limit=3)
        assert answer["total"] == 6
        first, *others = answer["tasks"]
        assert (first["name"], first["state"], first["priority"]) == ("long one", "running", 3)
        assert [task["state"] for task in others] == ["queued", "queued"]
    Path(end).touch()
    assert running.result() == queued[-1].result()


def test_the_breaker_is_opened_for_a_time_held_closed_and_reset(
    client: ControlClient, wait_until: Callable[..., None]
) -> None:
    opened = client.call("breaker", action="open", ttl=3600, reason="at work")
    assert (opened["state"], opened["reason"]) == ("forced_open", "at work")
    assert 3590 < opened["seconds_left"] <= 3600
    closed = client.call("breaker", action="close", ttl=3600)
    assert (closed["state"], closed["is_held_closed"]) == ("closed", True)
    assert client.call("breaker", action="reset") == {
        "state": "closed", "failure_count": 0, "reason": "", "is_held_closed": False, "seconds_left": None}
    client.call("breaker", action="open", ttl=0.3)
    wait_until(lambda: client.call("breaker")["state"] == "closed", "it stays open beyond its time")


def test_a_pause_holds_back_what_has_not_begun_until_it_is_resumed(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool]
) -> None:
    pool = make_pool(1, control=place)
    pool.submit(pid_of_worker).result()
    with find().connect() as client:
        assert client.call("pause") == {"paused": True}
        future = pool.submit(pid_of_worker)
        assert client.call("stats")["is_paused"] is True
        assert client.call("tasks")["tasks"][0]["state"] == "queued"
        assert not future.done()
        assert client.call("resume") == {"paused": False}
        assert future.result(20) > 0


def test_a_drain_refuses_what_is_new_and_says_what_is_left(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    pool = make_pool(1, control=place)
    end = str(tmp_path / "end")
    future = pool.submit(wait_for, end)
    with find().connect() as client:
        assert client.call("drain") == {"unfinished": 1}
        with pytest.raises(RuntimeError, match="draining"):
            pool.submit(pid_of_worker)
        Path(end).touch()
        assert future.result(20) > 0
        wait_until(lambda: client.call("drain") == {"unfinished": 0}, "it is not drained")
        client.call("resume")
        assert pool.submit(pid_of_worker).result(20) > 0


def test_workers_are_recycled_killed_and_resized(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    pool = make_pool(2, control=place)
    first = pool.submit(pid_of_worker).result()
    with find().connect() as client:
        (worker,) = client.call("workers")
        assert client.call("recycle", worker=worker["id"]) == {"recycled": 1}
        assert pool.submit(pid_of_worker).result(20) != first
        wait_until(lambda: [each["status"] for each in client.call("workers")] == ["idle"], "it did not go")
        assert client.call("recycle") == {"recycled": 1}
        future = pool.submit(wait_for, str(tmp_path / "never"))
        wait_until((tmp_path / "never.began").exists, "it does not run")
        busy = next(each["id"] for each in client.call("workers") if each["status"] == "busy")
        assert client.call("kill", worker=busy, reason="it eats the disk") == {"killed": True}
        assert "it eats the disk" in str(future.exception(20))
        assert client.call("resize", workers=3, concurrent=1) == {"max_workers": 3, "max_concurrent": 1}
        assert pool.submit(pid_of_worker).result(20) > 0
        with pytest.raises(ControlError, match="never had a worker 999") as caught:
            client.call("kill", worker=999)
        assert caught.value.code == "no-such-worker"
        with pytest.raises(ControlError, match="kill needs worker") as caught:
            client.call("kill")
        assert caught.value.code == "bad-argument"
        with pytest.raises(ControlError) as caught:
            client.call("resize")
        assert caught.value.code == "bad-argument"


def test_shutdown_stops_everything_and_names_the_reason(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    pool = make_pool(1, control=place)
    future = pool.submit(wait_for, str(tmp_path / "never"))
    wait_until((tmp_path / "never.began").exists, "it does not run")
    queued = pool.submit(pid_of_worker)
    with find().connect() as client:
        done = client.call("shutdown", reason="the disk is full")
        assert done == {"workers_stopped": 1, "tasks_cancelled": 1, "tasks_stopped": 1}
    assert "the disk is full" in str(future.exception(timeout=20))
    assert queued.cancelled()
    wait_until(lambda: not os.listdir(place), "the socket stays")


def test_a_graceful_shutdown_finishes_what_was_accepted(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool], tmp_path: Path
) -> None:
    pool = make_pool(1, control=place)
    end = str(tmp_path / "end")
    future, queued = pool.submit(wait_for, end), pool.submit(pid_of_worker)
    with find().connect() as client:
        assert client.call("shutdown", graceful=True) == {"unfinished": 2}
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(pid_of_worker)
        Path(end).touch()
        assert future.result(20) == queued.result(20)


@pytest.mark.parametrize(("verb", "arguments", "code", "words"), [
    ("dance", {}, "unknown-verb", "there is no verb 'dance'; known are breaker, "),
    ("status", {"loud": True}, "bad-argument", "status knows no 'loud'"),
    ("tasks", {"limit": 0}, "bad-argument", "limit must be a whole number from 1 to 10000, got 0"),
    ("tasks", {"limit": True}, "bad-argument", "limit must be a whole number"),
    ("breaker", {"action": "smash"}, "bad-argument", "action must be show, open, close or reset, got 'smash'"),
    ("breaker", {"action": "close"}, "bad-argument", "breaker close needs ttl"),
    ("breaker", {"action": "open", "ttl": -1}, "bad-argument", "ttl must be a number of seconds from 0.1"),
    ("breaker", {"action": "open", "ttl": float("nan")}, "bad-argument", "ttl must be a number of seconds"),
    ("shutdown", {"reason": ["x"]}, "bad-argument", "reason must be a text"),
    ("logs", {"worker": 99}, "no-such-worker", "there is no worker 99; those whose output is kept are: 1"),
    ("watch", {"interval": 0.001}, "bad-argument", "interval must be a number of seconds from 0.1"),
])
def test_what_cannot_be_done_is_refused_in_words(
    client: ControlClient, verb: str, arguments: dict[str, object], code: str, words: str
) -> None:
    with pytest.raises(ControlError) as caught:
        client.call(verb, **arguments)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert client.call("stats")["status"] == "ok", "the connection goes on, and nothing happened"


# --- following ---


def test_watch_tells_again_and_again_until_the_pool_is_closed(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool]
) -> None:
    pool = make_pool(1, control=place)
    pool.submit(pid_of_worker).result()
    with find().connect() as client:
        snapshots = client.follow("watch", interval=0.1, seconds=20)
        assert [next(snapshots)["stats"]["counters"]["completed"] for _ in range(3)] == [1, 1, 1]
        pool.shutdown()
        left = list(snapshots)
        assert left[-1]["stats"]["status"] == "closed"
        with pytest.raises(ControlError) as caught:
            client.call("status")
        assert caught.value.code == "gone"


def test_a_pool_that_is_killed_while_it_is_watched_is_gone(
    place: str, find: Callable[[], FoundPool], run_pool: Callable[..., subprocess.Popen[str]]
) -> None:
    program = run_pool(place)
    with find().connect() as client:
        snapshots = client.follow("watch", interval=0.1, seconds=20)
        next(snapshots)
        program.kill()
        with pytest.raises(ControlError, match="the pool is gone") as caught:
            for _ in snapshots:
                continue
        assert caught.value.code == "gone"
    assert len(os.listdir(place)) == 1, "a killed process removes nothing"
    program.wait()
    assert find_pools([place]) == []
    assert os.listdir(place) == [], "whoever looks removes it"


def test_a_stopped_pool_is_silent_and_comes_back(
    place: str, find: Callable[[], FoundPool], run_pool: Callable[..., subprocess.Popen[str]],
    stop: Callable[[int], None],
) -> None:
    program = run_pool(place)
    find()
    stop(program.pid)
    try:
        (found,) = find_pools([place], seconds=0.2)
        assert "does not answer within 0.2 s" in found.problem
        assert found.matches(str(program.pid)), "it is found by its pid all the same"
        assert os.listdir(place), "it lives: its socket stays"
    finally:
        program.send_signal(signal.SIGCONT)
    assert find().pool["pid"] == program.pid


def test_logs_are_what_workers_write_to_standard_error(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool]
) -> None:
    pool = make_pool(1, control=place)
    pool.submit(write_lines, 3).result()
    with find().connect() as client:
        events = list(client.follow("logs", worker=1, seconds=20))
        assert "".join(event["text"] for event in events) == "0000000000\n0000000001\n0000000002\n"
        followed = client.follow("logs", follow=True, seconds=20)
        assert next(followed)["text"].startswith("0000000000\n")
        pool.submit(print, "more", file=None)  # a worker's standard output is this process's own, and not kept
        pool.submit(write_lines, 1, 4).result()
        assert next(followed) == {"worker": 1, "text": "0000\n"}
        pool.shutdown()
        (end,) = followed
        assert (end["worker"], end["ended"], end["how"]) == (1, True, "exited with code 0 (shutdown)")


def test_logs_of_workers_that_ended_are_kept_with_how_they_ended(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool]
) -> None:
    def fail(code: int) -> None:
        print("last words", file=sys.stderr, flush=True)
        os._exit(code)

    pool = make_pool(1, control=place)
    with pytest.raises(WorkerCrashedError):
        pool.submit(fail, 3).result(30)
    captured = pool.options(capture_output=True).submit(fail, 4)
    assert isinstance(captured.exception(30), WorkerCrashedError)
    pool.submit(abs, 1).result(30)
    with find().connect() as client:
        for worker, code in ((1, 3), (2, 4)):
            said, end = client.follow("logs", worker=worker, seconds=20)
            assert said == {"worker": worker, "text": "last words\n"}
            assert end["how"] == f"exited with code {code}"
            assert end["seconds_ago"] >= 0
            assert client.call("logs", worker=worker)["workers"] == [1, 2, 3]
        assert [event["worker"] for event in client.follow("logs", seconds=20)] == [1, 1, 2, 2]
        with pytest.raises(ControlError, match="there is no worker 9; those whose output is kept are: 1, 2, 3"):
            list(client.follow("logs", worker=9, seconds=20))


def test_of_a_flood_the_end_is_kept_and_the_rest_is_counted(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool], wait_until: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    pool = make_pool(1, control=place)
    pool.submit(write_lines, 20_000, 19).result()
    (channel,) = pool._manager.channels().values()
    wait_until(lambda: channel.stderr_since(0)[1] == 400_000, "not all of it was read")
    with find().connect() as client:
        (event,) = client.follow("logs", seconds=20)
    assert event["text"].endswith("0000000000000019999\n")
    assert event["lost"] + len(event["text"]) == 400_000
    assert len(event["text"]) == 64 * 1024


# --- peers of all kinds ---


@pytest.mark.parametrize("rubbish", [
    b"\x80\x04\x95pickle?\n", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"null\n", b'{"verb": 7}\n', b"[" * 50_000 + b"\n",
    b'{"id": {}, "verb": "status"}\n', b'{"id": 1, "verb": "status", "arguments": []}\n', b"\xff\xfe\n", b"\n",
    b"x" * (LONGEST_REQUEST + 10), b'{"id": 1, "verb": "' + b"9" * LONGEST_REQUEST + b'"}\n', b"1" * 5000 + b"\n",
])
def test_rubbish_is_refused_and_its_peer_is_let_go(client: ControlClient, rubbish: bytes) -> None:
    connection = raw(FoundPool(client.path))
    connection.sendall(rubbish)
    answer = json.loads(read_line(connection))
    assert answer["ok"] is False
    assert answer["error"]["code"] in ("bad-request", "unknown-verb")
    if answer["error"]["code"] == "bad-request":
        assert read_line(connection) == b"", "nobody speaks to it any more"
    connection.close()
    assert client.call("stats")["status"] == "ok"


def test_a_peer_that_only_listens_and_one_that_only_hangs_up_hold_up_nobody(client: ControlClient) -> None:
    silent = raw(FoundPool(client.path))
    half = raw(FoundPool(client.path))
    half.sendall(b'{"id": 1, "verb": "sta')
    for _ in range(20):
        raw(FoundPool(client.path)).close()
    began = time.monotonic()
    assert client.call("stats")["status"] == "ok"
    assert time.monotonic() - began < 5
    half.sendall(b'tus"}\n')
    assert json.loads(read_line(half))["ok"] is True
    silent.close()
    half.close()


def test_a_half_closed_peer_gets_its_answers(client: ControlClient) -> None:
    connection = raw(FoundPool(client.path))
    connection.sendall(b'{"id": 1, "verb": "stats"}\n{"id": 2, "verb": "status"}\n'
                       b'{"id": 3, "verb": "watch", "arguments": {"interval": 0.1}}\n')
    connection.shutdown(socket.SHUT_WR)
    answers = [json.loads(read_line(connection)) for _ in range(5)]
    assert [answer["id"] for answer in answers] == [1, 2, 3, 3, 3]
    assert answers[4]["event"]["stats"]["status"] == "ok", "what it follows goes on, as it still reads"
    connection.close()
    assert client.call("stats")["status"] == "ok"


def test_a_peer_that_follows_and_does_not_read_gets_nothing_old_and_costs_no_memory(
    client: ControlClient, wait_until: Callable[..., None]
) -> None:
    connection = raw(FoundPool(client.path))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for number in range(8):
        connection.sendall(json.dumps({"id": number, "verb": "watch", "arguments": {"interval": 0.1}}).encode() + b"\n")
    server = client_server()
    wait_until(lambda: any(peer.outgoing for peer in list(server._peers.values())), "nothing is held back", 60)
    held = max(len(peer.outgoing) for peer in list(server._peers.values()))
    assert held < 20_000, "a snapshot or two"
    assert client.call("stats")["status"] == "ok"
    connection.close()


def client_server() -> object:
    """The one control server of this process."""
    from agentpool.control.server import ControlServer

    (server,) = [thing for thing in gc.get_objects() if type(thing) is ControlServer and not thing._is_closing]
    return server


def test_a_hundred_clients_at_once_are_served(client: ControlClient) -> None:
    clients = [ControlClient(client.path, 60) for _ in range(100)]
    answers: list[str] = []

    def ask(one: ControlClient) -> None:
        answers.extend(one.call("stats")["status"] for _ in range(3))

    threads = [threading.Thread(target=ask, args=(one,)) for one in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["ok"] * 300
    for one in clients:
        one.close()


def test_more_clients_than_are_served_at_once_wait_their_turn(client: ControlClient) -> None:
    most = 256
    others = [raw(FoundPool(client.path)) for _ in range(most - 1)]
    waiting = socket.socket(socket.AF_UNIX)
    waiting.settimeout(0.3)
    waiting.connect(client.path)
    with pytest.raises(TimeoutError):
        waiting.recv(1)
    assert client.call("stats")["status"] == "ok"
    others.pop().close()
    waiting.settimeout(20)
    assert b"agentpool" in read_line(waiting)
    for connection in (*others, waiting):
        connection.close()


def test_a_storm_of_requests_does_not_slow_the_pool_down_for_long(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool]
) -> None:
    pool = make_pool(1, control=place)
    pool.submit(pid_of_worker).result()
    found, stop = find(), threading.Event()
    asked = [0]

    def storm() -> None:
        connection = raw(found)
        connection.settimeout(1)
        while not stop.is_set():
            connection.sendall(b'{"verb": "stats"}\n')
            read_line(connection)
            asked[0] += 1
        connection.close()

    threads = [threading.Thread(target=storm) for _ in range(3)]
    for thread in threads:
        thread.start()
    began = time.thread_time(), time.monotonic()
    while asked[0] < 300 and time.monotonic() - began[1] < 20:
        pool.submit(pid_of_worker).result(timeout=20)
    stop.set()
    for thread in threads:
        thread.join()
    assert asked[0] >= 300
    assert pool.get_pool_stats()["counters"]["failed"] == 0


# --- where sockets are ---


@pytest.fixture
def run_pool() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program with a pool that works until it is told to end."""
    programs: list[subprocess.Popen[str]] = []

    def run(
        place: str | None, *, end: str = "sys.stdin.read(); pool.shutdown()", **options: object
    ) -> subprocess.Popen[str]:
        source = textwrap.dedent(f"""
            import os, sys, time
            from agentpool import AgentPool
            pool = AgentPool(1, name="other", control={place or True!r})
            pool.submit(os.getpid).result()
            while not pool._manager.door.is_open:
                time.sleep(0.01)
            print("ready", flush=True)
            {end}
        """)
        program = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True, **options)  # type: ignore[call-overload]
        programs.append(program)
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        return program  # type: ignore[no-any-return]

    yield run
    for program in programs:
        program.kill()
        program.communicate()


def test_folder_and_socket_are_the_users_alone(client: ControlClient) -> None:
    assert stat.S_IMODE(os.stat(os.path.dirname(client.path)).st_mode) == 0o700
    found = os.stat(client.path)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_ISSOCK(found.st_mode)


def test_pools_of_several_runtime_directories_are_found_in_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_pool: Callable[..., subprocess.Popen[str]]
) -> None:
    pids = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir(0o700)
        pids[name] = run_pool(None, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / name)}).pid
    for name, pid in pids.items():
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / name))
        assert folder.candidates()[0] == str(tmp_path / name / "agentpool")
        assert [found.pool["pid"] for found in find_pools([folder.candidates()[0]])] == [pid]


def test_without_a_runtime_directory_it_is_below_tmp(
    monkeypatch: pytest.MonkeyPatch, run_pool: Callable[..., subprocess.Popen[str]]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    program = run_pool(None, env=environment)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    place = f"/tmp/agentpool-{os.geteuid()}"
    assert place in folder.candidates()
    assert program.pid in [found.pool.get("pid") for found in find_pools([place])]
    assert stat.S_IMODE(os.stat(place).st_mode) == 0o700


def test_a_runtime_directory_that_is_not_there_is_passed_over(
    tmp_path: Path, run_pool: Callable[..., subprocess.Popen[str]]
) -> None:
    program = run_pool(None, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "gone")})
    assert program.pid in [found.pool.get("pid") for found in find_pools([f"/tmp/agentpool-{os.geteuid()}"])]


@pytest.mark.parametrize("trouble", ["open to others", "a file", "a link", "read only", "missing parent"])
def test_a_folder_that_will_not_do_costs_one_line_and_nothing_else(
    make_pool: MakePool, tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture,
    wait_until: Callable[..., None],
) -> None:
    place = tmp_path / "place"
    if trouble == "open to others":
        place.mkdir()
        place.chmod(0o755)
    elif trouble == "a file":
        place.touch()
    elif trouble == "a link":
        (tmp_path / "elsewhere").mkdir(0o700)
        place.symlink_to(tmp_path / "elsewhere")
    elif trouble == "read only":
        place = Path("/proc/agentpool")
    else:
        place = tmp_path / "missing" / "place"
    caplog.set_level(logging.INFO, "agentpool")
    pool = make_pool(1, name="alone", control=place)
    pool.submit(pid_of_worker).result()
    wait_until(lambda: caplog.records, "nothing was said")
    (record,) = caplog.records
    assert record.getMessage().startswith("pool alone has no control socket, and works without one: ")
    assert pool.submit(pid_of_worker).result() > 0


def test_control_can_be_switched_off(make_pool: MakePool, tmp_path: Path, wait_until: Callable[..., None]) -> None:
    pool = make_pool(1, control=False)
    pool.submit(pid_of_worker).result()
    assert pool._manager.door.opener is None
    assert not pool._manager.door.is_open
    with pytest.raises(SettingsError, match="control must be True, False or the path of a folder, got 7"):
        AgentPool(control=7)  # type: ignore[arg-type]


def test_two_pools_of_one_process_have_a_socket_each(
    make_pool: MakePool, place: str, wait_until: Callable[..., None]
) -> None:
    for name in ("first", "second"):
        make_pool(1, name=name, control=place).submit(pid_of_worker)
    wait_until(lambda: len(find_pools([place])) == 2, "not both have one")
    assert [found.pool["name"] for found in find_pools([place])] == ["first", "second"]
    first, second = find_pools([place])
    assert first.pool["id"] != second.pool["id"]
    assert first.matches("first")
    assert first.matches(str(os.getpid()))
    assert not first.matches("second")
    with second.connect() as client:
        client.call("shutdown")
    wait_until(lambda: len(os.listdir(place)) == 1, "it stays")
    with first.connect() as client:
        assert client.call("stats")["name"] == "first"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away_even_where_the_folder_lets_it_in(client: ControlClient) -> None:
    reading, writing = os.pipe()
    place, name = os.path.split(client.path)
    os.chmod(place, 0o777)
    os.chmod(client.path, 0o777)
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(place)
            os.setresuid(65534, 65534, 65534)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(name)
                os.write(writing, read_line(connection))
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    answer = json.loads(os.read(reading, 9999))
    os.close(reading)
    assert answer["error"] == {"code": "refused", "message": "this pool belongs to another user"}
    assert client.call("stats")["status"] == "ok"


# --- no socket is left behind ---


def test_the_next_pool_removes_the_sockets_of_killed_ones_and_only_those(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool], run_pool: Callable[..., subprocess.Popen[str]],
    wait_until: Callable[..., None],
) -> None:
    programs = [run_pool(place) for _ in range(3)]
    for program in programs[:2]:
        program.kill()
        program.wait()
    Path(place, "notes.txt").touch()
    assert len(os.listdir(place)) == 4
    pool = make_pool(1, name="new", control=place)
    pool.submit(pid_of_worker).result()
    wait_until(lambda: pool._manager.door.is_open, "it has none")
    assert len(os.listdir(place)) == 3
    assert {found.pool["name"] for found in find_pools([place])} == {"new", "other"}


def test_what_was_left_half_made_is_removed_when_it_is_old(place: str) -> None:
    os.mkdir(place, 0o700)
    for name in (".1-1-00000000.sock", ".1-1-00000001.sock"):
        with socket.socket(socket.AF_UNIX) as half_made:
            half_made.bind(os.path.join(place, name))
    os.utime(os.path.join(place, ".1-1-00000000.sock"), (0, 0))
    assert find_pools([place]) == []
    assert os.listdir(place) == [".1-1-00000001.sock"]


def test_a_collected_pool_takes_its_socket_along(place: str, wait_until: Callable[..., None]) -> None:
    pool = AgentPool(1, control=place)
    pool.submit(pid_of_worker).result()
    wait_until(lambda: find_pools([place]), "it has none")
    del pool
    gc.collect()
    wait_until(lambda: not os.listdir(place), "the socket stays")


@pytest.mark.parametrize("end", [
    "sys.exit(0)", "raise RuntimeError", "os.kill(os.getpid(), 2)", "del pool", "pool.kill_workers()",
])
def test_a_program_that_ends_leaves_no_socket(
    place: str, run_pool: Callable[..., subprocess.Popen[str]], end: str
) -> None:
    program = run_pool(place, end=end, stderr=subprocess.DEVNULL)
    program.wait(timeout=50)
    assert os.listdir(place) == []


def test_a_fork_of_the_process_neither_answers_nor_removes_the_socket(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool]
) -> None:
    pool = make_pool(1, control=place)
    pool.submit(pid_of_worker).result()
    with find().connect() as client:
        client.call("stats")
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(writing)
                os.read(reading, 1)  # until the parent has looked
                gc.collect()
            finally:
                os._exit(0)
        os.close(reading)
        assert client.call("stats")["status"] == "ok"
        pool.shutdown()
        assert os.listdir(place) == []
        with pytest.raises(ControlError) as caught:
            for _ in range(3):
                client.call("stats")
        assert caught.value.code == "gone", "the copy holds no connection open"
        os.close(writing)
        os.waitpid(pid, 0)


def test_the_thread_comes_with_the_first_client_only(
    make_pool: MakePool, place: str, wait_until: Callable[..., None]
) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("agentpool-control")]

    pool = make_pool(1, control=place)
    pool.submit(pid_of_worker).result()
    wait_until(lambda: pool._manager.door.is_open, "it has no socket")
    assert threads() == []
    with find_pools([place])[0].connect():
        assert len(threads()) == 1
    pool.shutdown()
    assert threads() == []


def test_a_pool_may_end_while_the_thread_ends_by_itself(
    make_pool: MakePool, place: str, find: Callable[[], FoundPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread notices the end at any instant, and takes the descriptor along that it would be woken by."""
    pool = make_pool(1, control=place)
    pool.submit(pid_of_worker).result()
    client = find().connect()
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("agentpool-control")]
    unlink, seen = os.unlink, []

    def unlink_late(path: str, **at: int) -> None:
        if path == client.path:
            client.close()  # which the thread notices
            thread.join(20)
            seen.append(thread.is_alive())
        unlink(path, **at)

    monkeypatch.setattr("agentpool.control.server.os.unlink", unlink_late)
    pool.shutdown()
    assert seen == [False]
    assert pool._manager.core.broken is None


def test_a_client_says_what_is_wrong_with_the_other_end(place: str) -> None:
    os.mkdir(place, 0o700)
    path = os.path.join(place, "1-1-00000000.sock")
    with pytest.raises(ControlError, match="no pool is behind"):
        ControlClient(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(5)
        for said, code in ((b'{"agentpool": "9.0", "protocol": 2}\n', "protocol"), (b"SSH-2.0\n", "bad-request"),
                           (b"", "gone")):
            thread = threading.Thread(target=_say, args=(listener, said))
            thread.start()
            with pytest.raises(ControlError) as caught:
                ControlClient(path, 20)
            assert caught.value.code == code
            thread.join()


def _say(listener: socket.socket, said: bytes) -> None:
    connection, _ = listener.accept()
    connection.sendall(said)
    connection.close()
