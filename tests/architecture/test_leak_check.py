"""The leak check of `tests/conftest.py` finds what it is there for, and nothing else: it is run on tests that leak."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

LEAKY = '''
import multiprocessing.shared_memory
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest

kept = []
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)  # left behind"]
DAEMON = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # a daemon"], start_new_session=True,
                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
os._exit(0)
"""


def test_process():
    kept.append(subprocess.Popen(SLEEP))


def test_daemon():
    subprocess.run([sys.executable, "-c", DAEMON], check=True)


def test_zombie():
    kept.append(subprocess.Popen(["true"]))


def test_descriptor():
    kept.append(os.pipe())


def test_thread():
    event = threading.Event()
    kept.append(event)
    threading.Thread(target=event.wait, name="left-behind", daemon=True).start()


def test_file():
    descriptor, path = tempfile.mkstemp(prefix="left-behind-")
    os.close(descriptor)


def test_shared_memory():
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=100)
    kept.append(memory)
'''

CLEAN = '''
import multiprocessing
import os
import select
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_pool(method):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()


def test_manager():
    with multiprocessing.get_context("spawn").Manager() as manager:
        assert list(manager.list([1])) == [1]


def test_all_closed(tmp_path):
    (tmp_path / "kept-by-pytest").write_text("x")
    with tempfile.NamedTemporaryFile() as file:
        assert file.name.startswith(os.environ["TMPDIR"])
    # It ends by itself, a little after the test.
    threading.Timer(0.3, int).start()


def test_orphan_that_ends():
    """Its exit code is nobody's but the subreaper's, and an exit code that is waited for is not stolen."""
    awaited = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    said = subprocess.run(["sh", "-c", "sleep 0.2 >/dev/null 2>&1 & echo $!"], check=True, capture_output=True)
    orphan = os.pidfd_open(int(said.stdout))
    assert select.select([orphan], [], [], 30)[0]
    os.close(orphan)
    assert awaited.wait() == 3


def test_cycle():
    cycle = [os.fdopen(os.open("/dev/null", os.O_RDONLY), closefd=False)]
    cycle.append(cycle)
    os.close(cycle[0].fileno())


def test_failure_is_reported_once():
    descriptor = os.pipe()
    raise ValueError("the test's own failure")
'''


def _run_pytest(folder: Path, source: str) -> list[str]:
    shutil.copy(TESTS / "conftest.py", folder / "conftest.py")
    inner = folder / "integration"
    inner.mkdir()
    shutil.copy(TESTS / "integration" / "conftest.py", inner / "conftest.py")
    (inner / "test_it.py").write_text(source)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error",
         "--rootdir", str(folder), str(inner)],
        env=os.environ | {"AGENTPOOL_TEST_PATIENCE": "1", "TMPDIR": str(folder)}, cwd=folder, timeout=100,
        capture_output=True, text=True)
    return [*ended.stdout.splitlines(), *ended.stderr.splitlines()]


def _section(lines: list[str], test: str) -> str:
    """What the check said at the end of `test`."""
    start = next(number for number, line in enumerate(lines) if f"ERROR at teardown of {test} " in line)
    told = next(number for number in range(start, len(lines)) if "the test left behind" in lines[number])
    end = next(number for number in range(told, len(lines)) if lines[number].startswith(("_", "=")))
    return "\n".join(lines[told:end])


@pytest.mark.skipif(sys.platform != "linux", reason="the leak check reads /proc")
def test_it_finds_and_names_each_kind_of_leak(tmp_path: Path) -> None:
    lines = _run_pytest(tmp_path, LEAKY)
    assert "7 passed, 7 errors" in lines[-1], "\n".join(lines)
    for test, told in {
        "test_process": "# left behind",
        "test_daemon": "# a daemon",
        "test_zombie": "Z): [no command line]",
        "test_descriptor": ": pipe:[",
        "test_thread": "thread 'left-behind'",
        "test_file": "temporary file ",
        "test_shared_memory": "shared memory /dev/shm/psm_",
    }.items():
        section = _section(lines, test)
        assert told in section, section
        # Only what this test left, though those before it left their own.
        others = {"process": "process ", "thread": "thread ", "file": "temporary file ", "descriptor": "descriptor "}
        kinds = {kind for kind, words in others.items() if f"\n  {words}" in f"\n{section}"}
        expected = {"test_daemon": {"process"}, "test_zombie": {"process"}, "test_shared_memory": {"descriptor"}}
        assert kinds == expected.get(test, {test.removeprefix("test_")}), section


@pytest.mark.skipif(sys.platform != "linux", reason="the leak check reads /proc")
def test_it_is_quiet_otherwise(tmp_path: Path) -> None:
    lines = _run_pytest(tmp_path, CLEAN)
    assert "1 failed, 6 passed" in lines[-1], "\n".join(lines)
    assert "error" not in lines[-1], "\n".join(lines)
