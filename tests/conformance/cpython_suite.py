"""CPython's own executor tests, made into test cases for another executor class: the side that runs in child processes.

Nothing of CPython's tests is copied: the interpreter's `test.test_concurrent_futures` (one module up to 3.11, a package
since 3.12) is imported, and each of its generic mixins (`SUITE`) becomes a TestCase whose `executor_type` is the class
under test. Tests that reach into ProcessPoolExecutor's private attributes, or build one by name, say nothing about
another class: `EXCLUDED` names each with its reason, and the stand-in (`stand_ins.py`) that tests the same through the
public API.

Test processes and the executor's workers import this module by its name (its folder is on PYTHONPATH), so what is made
at run time is found lazily through `__getattr__` and can be pickled by reference. It must not import pytest, nor the
test suite of the interpreter before it is asked for.

    python cpython_suite.py list     prints the tests as JSON: [{"id", "reason", "private"}, ...]
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import io
import json
import os
import pkgutil
import re
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

SUITE_NAME = "test.test_concurrent_futures"
EXECUTOR_VARIABLE = "AGENTPOOL_CONFORMANCE_EXECUTOR"
CONTEXT_VARIABLE = "AGENTPOOL_CONFORMANCE_CONTEXT"

#: Class made here -> generic test class. ProcessPoolExecutorTest includes ExecutorTest, ProcessPoolShutdownTest
#: includes ExecutorShutdownTest.
SUITE = {
    "ProcessPoolExecutor": "ProcessPoolExecutorTest",
    "Wait": "WaitTests",
    "AsCompleted": "AsCompletedTests",
    "Shutdown": "ProcessPoolShutdownTest",
    "Initializer": "InitializerMixin",
    "FailingInitializer": "FailingInitializerMixin",
    "Deadlock": "ExecutorDeadlockTest",
    "StandIn": "StandIns",
}

#: Left out: test -> (why, the stand-in that tests the same through the public API, or None).
EXCLUDED: dict[str, tuple[str, str | None]] = {
    "ProcessPoolExecutor.test_max_workers_too_large": ("a limit on Windows of ProcessPoolExecutor, by name", None),
    "ProcessPoolExecutor.test_killed_child": ("finds its victim in executor._processes", "test_killed_worker"),
    "ProcessPoolExecutor.test_traceback": (
        "wants the cause to be of the private class concurrent.futures.process._RemoteTraceback",
        "test_remote_traceback",
    ),
    "ProcessPoolExecutor.test_saturation": (
        "counts executor._processes against executor._max_workers", "test_workers_never_exceed_max"
    ),
    "ProcessPoolExecutor.test_idle_process_reuse_one": ("counts executor._processes", "test_idle_worker_is_reused"),
    "ProcessPoolExecutor.test_idle_process_reuse_multiple": (
        "counts executor._processes", "test_idle_worker_is_reused"
    ),
    "ProcessPoolExecutor.test_max_tasks_per_child": ("counts executor._processes", "test_tasks_per_child"),
    "ProcessPoolExecutor.test_max_tasks_per_child_defaults_to_spawn_context": (
        "reads executor._mp_context; about ProcessPoolExecutor's own choice of a start method", None
    ),
    "ProcessPoolExecutor.test_python_finalization_error": (
        "replaces the creation of ProcessPoolExecutor's own manager and feeder threads", None
    ),
    "Shutdown.test_processes_terminate": (
        "counts executor._processes per start method", "test_workers_end_at_shutdown"
    ),
    "Shutdown.test_context_manager_shutdown": (
        "builds ProcessPoolExecutor by name and reads its _processes", "test_workers_end_at_shutdown"
    ),
    "Shutdown.test_del_shutdown": (
        "builds ProcessPoolExecutor by name and reads its _executor_manager_thread", "test_workers_end_when_dropped"
    ),
    "Shutdown.test_shutdown_no_wait": (
        "builds ProcessPoolExecutor by name and reads its _call_queue", "test_shutdown_without_wait_finishes_tasks"
    ),
    "FailingInitializer.test_initializer": (
        "polls executor._broken, and reads a log record that ProcessPoolExecutor's workers make",
        "test_failing_initializer",
    ),
    "Deadlock.test_shutdown_deadlock_pickle": (
        "joins executor._executor_manager_thread", "test_pickling_error_then_shutdown_without_wait"
    ),
    "Deadlock.test_gh105829_should_not_deadlock_if_wakeup_pipe_full": (
        "replaces ProcessPoolExecutor's private _ThreadWakeup and _ExecutorManagerThread", None
    ),
}

#: Source that touches what is private to ProcessPoolExecutor: such a test must be in EXCLUDED.
_PRIVATE = re.compile(
    r"executor\._|\be\._|\bt\._|futures\.ProcessPoolExecutor\(|futures\.process\._|_ThreadWakeup"
)

#: Parts of the suite that have nothing for an executor of processes.
_NOT_NEEDED = ("test_future", "test_interpreter_pool", "test_thread_pool")

#: Seconds after which a test of the suite calls no answer a deadlock (CPython: five minutes).
DEADLOCK_SECONDS = 20.0


def installed_suite() -> Path | None:
    """Where this interpreter has the suite; None where it was built without."""
    try:
        spec = importlib.util.find_spec(SUITE_NAME)
    except ImportError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def make_overlay(copy: Path, where: Path) -> Path:
    """A folder that, first on PYTHONPATH, adds a copy of the suite to the interpreter's package `test`.

    `copy` is the module test_concurrent_futures.py or the package's folder; `where` must not exist.
    Raises FileNotFoundError where there is no such copy or the interpreter has no package `test` at all.
    """
    if copy.name.removesuffix(".py") != "test_concurrent_futures" or not copy.exists():
        raise FileNotFoundError(f"{copy}: not a copy of test_concurrent_futures")
    spec = importlib.util.find_spec("test")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("this interpreter has no package `test`, which the suite needs (test.support)")
    package = where / "test"
    package.mkdir(parents=True)
    (package / copy.name).symlink_to(copy.resolve())
    (package / "__init__.py").write_text(f"__path__.extend({list(spec.submodule_search_locations)!r})\n")
    return where


def executor_class() -> type[Any]:
    """The class under test, as `EXECUTOR_VARIABLE` names it (module:Class)."""
    module, _, name = os.environ[EXECUTOR_VARIABLE].partition(":")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    return found


@functools.cache
def modules() -> tuple[ModuleType, ...]:
    """The suite's modules, this project's stand-ins last."""
    root = importlib.import_module(SUITE_NAME)
    parts = [info.name for info in pkgutil.iter_modules(getattr(root, "__path__", ()))]
    found = [root, *(importlib.import_module(f"{SUITE_NAME}.{name}") for name in parts if name not in _NOT_NEEDED)]
    for module in found:
        if hasattr(module, "assert_python_ok"):
            module.assert_python_ok = assert_python_ok  # type: ignore[attr-defined]
    return (*found, importlib.import_module("stand_ins"))


def lookup(name: str) -> Any:
    """The first thing of this name in the suite. Raises LookupError."""
    for module in modules():
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(f"{SUITE_NAME} has no {name}")


def assert_python_ok(*args: str, **env: str) -> Any:
    """In place of CPython's: its scripts import the executor by name from concurrent.futures; ours is elsewhere."""
    from test.support import script_helper

    cls = executor_class()
    old = f"from concurrent.futures import {cls.__name__}"
    # One of CPython's scripts uses `multiprocessing` without importing it, in a branch that it never reaches.
    new = f"import multiprocessing; from {cls.__module__} import {cls.__name__}"
    env.setdefault("PYTHONPATH", os.environ["PYTHONPATH"])
    return script_helper.assert_python_ok(*(arg.replace(old, new) for arg in args), **env)


def _fail_on_deadlock(self: unittest.TestCase, executor: object) -> None:
    raise AssertionError(f"deadlock: no answer in {DEADLOCK_SECONDS:.0f} s")


@functools.cache
def test_case(name: str) -> type[unittest.TestCase]:
    """The TestCase called `name` in SUITE."""
    body: dict[str, Any] = {"__module__": "cpython_suite", "__qualname__": name}
    # Without AGENTPOOL_CONFORMANCE_EXECUTOR nothing is run, only listed.
    if EXECUTOR_VARIABLE in os.environ:
        body |= {"executor_type": executor_class(), "ctx": os.environ[CONTEXT_VARIABLE]}
    if name == "Deadlock":
        # CPython's own _fail_on_deadlock reads executor._processes.
        body |= {"TIMEOUT": DEADLOCK_SECONDS, "_fail_on_deadlock": _fail_on_deadlock}
    bases = (lookup(SUITE[name]), lookup("ExecutorMixin"), lookup("BaseTestCase"))
    made = type(name, bases, body)
    assert issubclass(made, unittest.TestCase)
    return made


def list_tests() -> list[dict[str, Any]]:
    """Every test: its id, why it is left out (None: it is run), and whether its source touches private attributes."""
    found = []
    for name in SUITE:
        cls = test_case(name)
        for test in unittest.defaultTestLoader.getTestCaseNames(cls):
            test_id = f"{name}.{test}"
            private = name != "StandIn" and bool(_PRIVATE.search(inspect.getsource(getattr(cls, test))))
            found.append({"id": test_id, "reason": EXCLUDED.get(test_id, (None,))[0], "private": private})
    return found


def run(test_id: str) -> dict[str, str]:
    """Run one test in this process: {"status": "passed" | "failed" | "skipped", "detail": text}."""
    name, _, test = test_id.partition(".")
    globals()["setUpModule"] = lookup("setUpModule")  # unittest looks for it in the module of the TestCase
    runner = unittest.TextTestRunner(stream=io.StringIO(), verbosity=0)
    result = runner.run(unittest.TestSuite([test_case(name)(test)]))
    bad = [*result.failures, *result.errors]
    if bad or result.unexpectedSuccesses:
        return {"status": "failed", "detail": "\n".join(text for _, text in bad) or "unexpected success"}
    if result.skipped:
        return {"status": "skipped", "detail": "\n".join(text for _, text in result.skipped)}
    return {"status": "passed", "detail": ""}


def __getattr__(name: str) -> Any:
    # What a worker asks for when it rebuilds a reference to one of the classes made above.
    if name in SUITE and EXECUTOR_VARIABLE in os.environ:
        return test_case(name)
    raise AttributeError(name)


if __name__ == "__main__":
    if sys.argv[1:] != ["list"]:
        sys.exit(__doc__)
    print(json.dumps(list_tests()))
