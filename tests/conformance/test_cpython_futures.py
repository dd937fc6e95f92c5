"""CPython's own executor tests against AgentPool: what ProcessPoolExecutor's users rely on holds here too.

Each test runs in a process of its own (`one_test.py`), a few at a time; a parametrized test below waits for its own and
reports it. Once per start method that differs: "spawn" (a fresh interpreter per worker) and "forkserver" (forked by the
keeper, which is also the default).

Some interpreters are built without their tests. The environment variable AGENTPOOL_CPYTHON_SUITE then names a copy:
the file test_concurrent_futures.py (3.11) or the folder test_concurrent_futures (3.12 and later).
AGENTPOOL_CONFORMANCE_EXECUTOR names another executor, to compare with: concurrent.futures:ProcessPoolExecutor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
try:
    import cpython_suite
finally:
    sys.path.remove(str(HERE))

SUITE_VARIABLE = "AGENTPOOL_CPYTHON_SUITE"
EXECUTOR_VARIABLE = "AGENTPOOL_CONFORMANCE_EXECUTOR"
START_METHODS = ("spawn", "forkserver")
#: Seconds that one test may take; CPython's own slowest takes 7.
LIMIT = 40.0
#: Tests at a time. They mostly wait: three keep two cores busy without stretching CPython's short time limits.
AT_A_TIME = 3


def _environment(overlay: Path | None, temporary: Path) -> dict[str, str]:
    """What a test's process sees. A TMPDIR of its own; nothing of the outer run's coverage or warnings filter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_", "PYTHON"))}
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [*([str(overlay)] if overlay else []), str(HERE), *(str(Path(entry).absolute()) for entry in given if entry)]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "TMPDIR": str(temporary)}


def _overlay(scratch: Path) -> Path | None:
    """A folder for PYTHONPATH with the copy of the suite that the environment names; None: the interpreter has one."""
    copy = os.environ.get(SUITE_VARIABLE)
    return cpython_suite.make_overlay(Path(copy), scratch / "overlay") if copy else None


def _skip_reason() -> str | None:
    if sys.platform != "linux":
        return "CPython's executor tests are run on Linux only: their watcher needs pidfd and a child subreaper"
    if SUITE_VARIABLE in os.environ or cpython_suite.installed_suite() is not None:
        return None
    return (
        f"this Python ({sys.version.split()[0]}, {sys.base_prefix}) was built without test.test_concurrent_futures; "
        f"name a copy in {SUITE_VARIABLE}, e.g. that of Debian's libpython3.11-testsuite"
    )


def _collect() -> list[dict[str, Any]]:
    """All tests, in a child: the suite changes too much of the process that imports it."""
    with tempfile.TemporaryDirectory(prefix="agentpool-") as folder:
        environment = _environment(_overlay(Path(folder)), Path(folder))
        environment.pop(EXECUTOR_VARIABLE, None)
        listed = subprocess.run([sys.executable, str(HERE / "cpython_suite.py"), "list"], env=environment,
                                capture_output=True, text=True, timeout=LIMIT)
    if listed.returncode:
        raise RuntimeError(f"cannot list CPython's executor tests:\n{listed.stderr}")
    found: list[dict[str, Any]] = json.loads(listed.stdout)
    return found


if reason := _skip_reason():
    pytest.skip(reason, allow_module_level=True)

TESTS = _collect()
INCLUDED = [test["id"] for test in TESTS if test["reason"] is None]


def _run(folder: Path, overlay: Path | None, test_id: str, start_method: str) -> dict[str, Any]:
    """Run one test to its end; called in a thread."""
    folder.mkdir()
    environment = _environment(overlay, folder) | {
        EXECUTOR_VARIABLE: os.environ.get(EXECUTOR_VARIABLE, "agentpool:AgentPool"),
        "AGENTPOOL_CONFORMANCE_CONTEXT": start_method,
    }
    result, log = folder / "result.json", folder / "log"
    with log.open("wb") as output:
        ended = subprocess.run(
            [sys.executable, str(HERE / "one_test.py"), test_id, str(LIMIT), str(result)], env=environment, cwd=folder,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=2 * LIMIT,
        )
    text = log.read_text(errors="replace")[-6000:]
    if ended.returncode:
        return {"status": "failed", "detail": f"its watcher ended with status {ended.returncode}", "log": text}
    return {**json.loads(result.read_text()), "log": text}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[dict[str, Any]]]]:
    """Every selected test, started a few at a time in the order in which their results are asked for."""
    asked = [
        (item.callspec.params["test_id"], item.callspec.params["start_method"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_cpython" and item.path == Path(__file__)
    ]
    with tempfile.TemporaryDirectory(prefix="agentpool-") as name:
        scratch = Path(name)
        overlay = _overlay(scratch)
        pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="conformance")
        try:
            yield {(test_id, start_method): pool.submit(_run, scratch / str(number), overlay, test_id, start_method)
                   for number, (test_id, start_method) in enumerate(asked)}
        finally:
            pool.shutdown(cancel_futures=True)


# A test's own limit is LIMIT; before it come at most the tests that were started just before it.
@pytest.mark.timeout(4 * LIMIT)
@pytest.mark.parametrize("test_id", INCLUDED)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_cpython(test_id: str, start_method: str, outcomes: dict[tuple[str, str], Future[dict[str, Any]]]) -> None:
    outcome = outcomes[test_id, start_method].result()
    if outcome["status"] == "skipped":
        pytest.skip(f"by CPython's own word: {outcome['detail']}")
    assert outcome["status"] == "passed", f"{outcome['detail']}\n--- output of the test's process ---\n{outcome['log']}"


def test_every_exclusion_has_its_reason() -> None:
    """A newer CPython may add a test that touches private attributes; a stand-in may be renamed."""
    unexplained = [test["id"] for test in TESTS if test["private"] and test["reason"] is None]
    assert not unexplained, "these touch private attributes of ProcessPoolExecutor and are not in EXCLUDED"
    stand_ins = {test["id"] for test in TESTS}
    for test_id, (reason, stand_in) in cpython_suite.EXCLUDED.items():
        assert reason
        assert stand_in is None or f"StandIn.{stand_in}" in stand_ins, f"{test_id} names a stand-in that does not exist"
