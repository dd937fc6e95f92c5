"""What workers see of this process, and what anybody else may see of them: environment, directory, core dumps,
descriptors, sockets. Each with forked workers and with fresh interpreters."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from agentpool import AgentPool, BreakerSettings, SettingsError, WorkerCrashedError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

MakePool = Callable[..., AgentPool]
WaitUntil = Callable[..., None]
LONG = 30
#: What the pool itself, and the interpreter where no locale is set, put into a worker's environment.
OURS = {"AGENTPOOL_KEEPER", "AGENTPOOL_WORKER", "LC_CTYPE"}
CLOEXEC = 0o2000000  # as /proc/<pid>/fdinfo writes it

each_method = pytest.mark.parametrize("method", ["fork", "spawn"])


# what runs in the workers


def environment() -> dict[str, str]:
    return dict(os.environ)


def environment_of_a_program() -> dict[str, str]:
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    return json.loads(subprocess.check_output([sys.executable, "-c", code]))  # type: ignore[no-any-return]


def environment_as_it_began(pid: int | str) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def directories() -> tuple[str, str]:
    """Of the task and of a program that it starts."""
    code = "import os; print(os.getcwd())"
    return os.getcwd(), subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def core_limits() -> tuple[int, int]:
    """The soft limit of the task and of a program that it starts."""
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    return resource.getrlimit(resource.RLIMIT_CORE)[0], int(subprocess.check_output([sys.executable, "-c", code]))


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def flags_of_descriptors() -> dict[int, bool]:
    """Of this process, above 2: does each one close on exec? Without that of the listing itself."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = bool(fcntl.fcntl(int(name), fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
        except OSError:
            continue
    return {number: closes for number, closes in found.items() if number > 2}


def descriptors_of_a_program() -> list[int]:
    """What a program has that was started without any care."""
    program = ["/bin/sh", "-c", "exec ls /proc/self/fd"]
    numbers = subprocess.check_output(program, close_fds=False, text=True).split()
    return sorted(map(int, numbers))[:-1]  # the last one is that of the listing


# environment


@each_method
def test_secrets_are_withheld(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """From tasks, from what they start, and from /proc of every process of the pool."""
    secret = "sk-not-for-agents"
    monkeypatch.setenv("A_TOKEN", secret)
    monkeypatch.setenv("LANGUAGE", "en")
    pool = make_pool(1, method, env_allow=["PATH", "LANG*"])
    allowed = {name for name in os.environ if name == "PATH" or name.startswith("LANG")}
    found = pool.submit(environment).result(LONG)
    assert set(found) - OURS == allowed
    assert found["LANGUAGE"] == "en"
    assert set(pool.submit(environment_of_a_program).result(LONG)) - OURS == allowed
    worker = pool.submit(os.getpid).result(LONG)
    keeper = psutil.Process(worker).ppid()
    for process in (worker, keeper):
        assert secret.encode() not in environment_as_it_began(process)


@each_method
def test_nothing_is_needed_of_the_environment(make_pool: MakePool, method: str) -> None:
    assert set(make_pool(1, method, env_allow=()).submit(environment).result(LONG)) <= OURS


@each_method
def test_names_are_patterns_and_case_counts(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    for name in ("SHOWN_1", "SHOWN_22", "shown_1", "HIDDEN_1"):
        monkeypatch.setenv(name, name)
    found = make_pool(1, method, env_allow={"SHOWN_?", "HIDDEN_[2-9]"}).submit(environment).result(LONG)
    assert {name for name in found if name.upper().startswith(("SHOWN", "HIDDEN"))} == {"SHOWN_1"}


@each_method
def test_what_is_given_goes_before_what_is_inherited(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("LEVEL", "outer")
    monkeypatch.setenv("OTHER", "kept")
    found = make_pool(1, method, env={"LEVEL": "inner"}).submit(environment).result(LONG)
    assert (found["LEVEL"], found["OTHER"]) == ("inner", "kept")
    both = make_pool(1, method, env={"LEVEL": "inner"}, env_allow=["OTHER", "LEVEL"]).submit(environment).result(LONG)
    assert (both["LEVEL"], both["OTHER"], "PATH" in both) == ("inner", "kept", False)
    only = make_pool(1, method, env={"LEVEL": "inner"}, env_allow=["PATH"])
    assert only.submit(environment_of_a_program).result(LONG)["LEVEL"] == "inner"
    assert os.environ["LEVEL"] == "outer", "this process's own is left alone"


@each_method
def test_without_settings_it_is_that_of_the_first_worker(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As the keeper was started; what is changed here later is not seen, however fresh the worker."""
    monkeypatch.setenv("LEVEL", "before the pool")
    pool = make_pool(1, method, max_tasks_per_child=1)
    monkeypatch.setenv("LEVEL", "before the first worker")
    assert pool.submit(environment).result(LONG)["LEVEL"] == "before the first worker"
    monkeypatch.setenv("LEVEL", "later")
    assert pool.submit(environment).result(LONG)["LEVEL"] == "before the first worker"


# directory


@each_method
def test_workers_start_in_their_directory(make_pool: MakePool, tmp_path: Path, method: str) -> None:
    (tmp_path / "module_of_that_directory.py").write_text("")
    here = os.getcwd()
    pool = make_pool(1, method, cwd=str(tmp_path))
    assert pool.submit(directories).result(LONG) == (str(tmp_path), str(tmp_path))
    assert isinstance(pool.submit(__import__, "module_of_that_directory").exception(LONG), ImportError), (
        "a directory to work in is no place to import from")
    assert os.getcwd() == here


@each_method
def test_a_directory_that_is_missing_is_named_and_waited_for(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, method: str
) -> None:
    there = tmp_path / "not there yet"
    pool = make_pool(1, method, cwd=str(there),
                     breaker=BreakerSettings(failure_threshold=1, open_seconds=0.2, max_open_seconds=0.4))
    task = pool.submit(os.getcwd)
    wait_until(lambda: f"No such file or directory: '{there}'" in pool.breaker.reason, "the breaker does not say why")
    assert not task.done()
    there.mkdir()
    assert task.result(LONG) == str(there)


# core dumps


@pytest.fixture
def cores_allowed() -> Iterator[None]:
    """This process may dump core, and so may what it starts unless that is taken from it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if not hard:
        pytest.skip("the hard limit of core dumps is 0")
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@each_method
def test_core_dumps_are_off_unless_allowed(make_pool: MakePool, cores_allowed: None, method: str) -> None:
    assert make_pool(1, method).submit(core_limits).result(LONG) == (0, 0)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    assert make_pool(1, method, core_dumps=True).submit(core_limits).result(LONG) == (hard, hard)


def test_a_crash_leaves_no_core_file(make_pool: MakePool, cores_allowed: None, tmp_path: Path) -> None:
    pool = make_pool(1, cwd=str(tmp_path))
    assert isinstance(pool.submit(crash).exception(LONG), WorkerCrashedError)
    assert not list(tmp_path.iterdir())
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if pattern.startswith(("|", "/")):
        return  # with leave to dump, it would not come here
    pool = make_pool(1, cwd=str(tmp_path), core_dumps=True)
    assert isinstance(pool.submit(crash).exception(LONG), WorkerCrashedError)
    [core] = tmp_path.iterdir()
    core.unlink()


# what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"env": {"NAME": 1}}, "env must map names to strings, and one of its names or values is none"),
        ({"env": {b"NAME": b"x"}}, "env must map names to strings"),
        ({"env": {None: "x"}}, "env must map names to strings"),
        ({"env": [("NAME", "x")]}, r"env must map names to strings, got \[\('NAME', 'x'\)\]"),
        ({"env": "NAME=x"}, "env must map names to strings, got 'NAME=x'"),
        ({"env": {"": "x"}}, "env: '' cannot be the name of a variable"),
        ({"env": {"NAME=": "x"}}, "env: 'NAME=' cannot be the name of a variable: it is empty, or has '=' or a NUL"),
        ({"env": {"NAME": "x\0y"}}, "env: the value of NAME has a NUL in it"),
        ({"env_allow": "PATH"}, "env_allow must be a sequence of names or patterns, got 'PATH'"),
        ({"env_allow": ["PATH", 1]}, "env_allow must be a sequence of names or patterns, got .*1"),
        ({"env_allow": 5}, "env_allow must be a sequence of names or patterns, got 5"),
        ({"cwd": 5}, "cwd must be a path as a string, got 5"),
        ({"cwd": "a\0b"}, "cwd must be a path as a string"),
        ({"core_dumps": "no"}, "core_dumps must be True or False, got 'no'"),
        ({"core_dumps": None}, "core_dumps must be True or False, got None"),
        ({"cwd": Path("/tmp")}, r"cwd must be a path as a string, got PosixPath\('/tmp'\)"),
    ],
    ids=repr,
)
def test_surroundings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        AgentPool(**settings)


# descriptors


def flags_in_proc(pid: int) -> dict[int, bool]:
    """Of another process, above 2: does each descriptor close on exec?"""
    found = {}
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        flags = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith("flags:"))
        found[int(path.name)] = bool(int(flags, 8) & CLOEXEC)
    return {number: closes for number, closes in found.items() if number > 2}


@each_method
def test_the_parents_descriptors_are_close_on_exec(make_pool: MakePool, method: str) -> None:
    before = flags_of_descriptors()
    pool = make_pool(2, method, min_workers=2)
    pool.submit(os.getpid).result(LONG)
    opened = {number: closes for number, closes in flags_of_descriptors().items() if number not in before}
    assert len(opened) > 8, "those of two workers and a keeper"
    assert all(opened.values()), opened


@each_method
def test_the_keepers_descriptors_are_close_on_exec(make_pool: MakePool, method: str) -> None:
    pool = make_pool(1, method)
    found = flags_in_proc(psutil.Process(pool.submit(os.getpid).result(LONG)).ppid())
    assert found
    assert all(found.values()), found


@each_method
def test_a_workers_descriptors_are_close_on_exec(make_pool: MakePool, method: str) -> None:
    pool = make_pool(1, method)
    found = pool.submit(flags_of_descriptors).result(LONG)
    assert len(found) >= 4, "calls, results, control and page"
    assert all(found.values()), found
    assert pool.submit(descriptors_of_a_program).result(LONG) == [0, 1, 2]


# sockets


@each_method
def test_no_process_of_a_pool_has_an_address(make_pool: MakePool, method: str) -> None:
    """Nothing to connect to: no socket of a network, no name in the file system or in the kernel's own list.

    But for the control socket, which is switched off here and has tests of its own.
    """
    before = own_sockets()
    pool = make_pool(2, method, min_workers=2, control=False)
    worker = pool.submit(os.getpid).result(LONG)
    keeper = psutil.Process(worker).parent()
    assert keeper is not None
    for process in (keeper, *keeper.children(recursive=True)):
        assert not process.net_connections("inet"), process
        assert not [each.laddr for each in process.net_connections("unix") if each.laddr], process
    assert [kind for kind, address in own_sockets() if address or kind != "AF_UNIX"] == [
        kind for kind, address in before if address or kind != "AF_UNIX"]


def own_sockets() -> list[tuple[str, str]]:
    return sorted((each.family.name, str(each.laddr or "")) for each in psutil.Process().net_connections("all"))
