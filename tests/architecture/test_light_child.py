"""What a child process has loaded: the standard library and cloudpickle, and of these only what a start can afford.

A rule, not a list: any module of the standard library may come and go, but for those in HEAVY. Each child here is a
real one; what a bare interpreter of the same environment loads by itself (`site`, `.pth` files) is taken off.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.context import BaseContext

import pytest

#: May be loaded in a child beside the standard library.
ALLOWED = {"agentpool_worker", "cloudpickle"}

#: Of the standard library, what costs a start several milliseconds or belongs to the parent's work. None of it is
#: needed to fork a worker or to run a plain call.
HEAVY = {
    "argparse", "asyncio", "bz2", "concurrent", "csv", "decimal", "doctest", "email", "ftplib", "hashlib", "html",
    "http", "lzma", "mimetypes", "pdb", "pydoc", "queue", "shutil", "socketserver", "sqlite3", "ssl", "statistics",
    "subprocess", "tarfile", "tkinter", "unittest", "urllib", "xml", "zipfile",
}
#: What cloudpickle brings with it: for a child that unpickles by it, not for one that only starts.
CLOUDPICKLES = {"ast", "cloudpickle", "dataclasses", "dis", "inspect", "logging", "opcode", "platform", "uuid"}

PROBE = "import sys, {module}; import json; print(json.dumps(sorted(sys.modules)))"


def _environment() -> dict[str, str]:
    """Without what makes a child measure coverage or show warnings, which loads modules of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTHON"))}


def _loaded(module: str) -> set[str]:
    ended = subprocess.run([sys.executable, "-c", PROBE.format(module=module)], env=_environment(), timeout=60,
                           capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout))


@functools.cache
def _bare() -> frozenset[str]:
    return frozenset(_loaded("sys"))


def _roots(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules - _bare()}


def _foreign(modules: set[str]) -> set[str]:
    """What is neither of the standard library nor allowed. A child's main module has two names."""
    return _roots(modules) - sys.stdlib_module_names - ALLOWED - {"__main__", "__mp_main__"}


@pytest.mark.parametrize("module", [
    "agentpool_worker", "agentpool_worker.protocol", "agentpool_worker.context", "agentpool_worker.main",
    "agentpool_worker.keeper", "agentpool_worker.agents.base",
])
def test_what_a_start_loads(module: str) -> None:
    loaded = _loaded(module)
    assert module in loaded
    assert not _foreign(loaded)
    assert not _roots(loaded) & (HEAVY | CLOUDPICKLES)


@pytest.mark.parametrize("agent", ["security_analyst", "performance_auditor", "test_generator", "command", "cli"])
def test_what_an_agents_module_loads(agent: str) -> None:
    """Its tools come with its setup() or run(): a worker that never runs it does not pay for them."""
    assert not _foreign(_loaded(f"agentpool_worker.agents.{agent}"))


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("context", [None, multiprocessing.get_context("spawn")], ids=["forked", "spawned"])
def test_what_a_real_worker_has_loaded(context: BaseContext | None) -> None:
    from agentpool import AgentPool

    def report() -> list[str]:
        import sys

        return sorted(sys.modules)

    with AgentPool(max_workers=1, mp_context=context) as pool:
        loaded = set(pool.submit(report).result(timeout=60))
    assert "agentpool_worker.main" in loaded
    assert not _foreign(loaded)
    assert not _roots(loaded) & HEAVY


def test_the_rule_sees_what_it_forbids() -> None:
    assert _foreign(_loaded("psutil")) == {"psutil"}
    assert {"tenacity"} <= _foreign(_loaded("tenacity"))
    assert _roots(_loaded("asyncio")) & HEAVY >= {"asyncio"}
