"""For the tests with real agent programs: `make acceptance` installs them, and runs these with loopback only."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentpool import AgentPool

FOLDER = Path(os.environ.get("AGENTPOOL_ACCEPTANCE", Path(__file__).parents[2] / ".acceptance"))


@pytest.fixture(autouse=True)
def _closed_by_a_leak_check(no_leaks: None) -> None:
    """Each test must leave nothing behind."""


def _module(name: str) -> Any:
    """A file beside this one, as a module."""
    spec = importlib.util.spec_from_file_location(f"acceptance_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def api(_closed_by_a_leak_check: None) -> Iterator[Any]:
    """The local stand-in for the APIs of models."""
    server = _module("local_api").LocalApi()
    yield server
    server.close()


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """The path of an installed program; skips the test, with the reason, where it could not be had."""
    listed = FOLDER / "programs.json"
    programs: dict[str, Any] = json.loads(listed.read_text()) if listed.exists() else {}

    def path_of(name: str) -> str:
        entry = programs.get(name)
        if entry is None:
            pytest.skip(f"{name} is not in {listed}: run `make acceptance`, which installs it")
        if not entry["path"]:
            pytest.skip(f"{name} cannot be had: {entry['problem']}")
        return str(entry["path"])

    return path_of


@pytest.fixture
def surroundings(api: Any, tmp_path: Path) -> dict[str, str]:
    """An environment in which the programs find the local API, a home of their own, and no key of yours."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    return {
        "HOME": str(home),
        "TMPDIR": str(scratch),  # they leave sockets and transcripts there
        "ANTHROPIC_BASE_URL": api.url,
        "ANTHROPIC_API_KEY": "sk-ant-dummy-not-a-key",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
        "IS_SANDBOX": "1",
        "TERM": "dumb",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
    }


@pytest.fixture
def make_pool(surroundings: dict[str, str]) -> Iterator[Callable[..., AgentPool]]:
    """Pools whose workers see these surroundings, and of this process's environment only what names programs."""
    pools: list[AgentPool] = []

    def make(*args: Any, **settings: Any) -> AgentPool:
        settings.setdefault("cpu_threshold_percent", 100)
        settings.setdefault("memory_limit_mb", 600)  # of one agent: the pool's thresholds follow
        settings.setdefault("env_allow", ("PATH", "LD_LIBRARY_PATH"))
        pools.append(AgentPool(*args, env={**surroundings, **settings.pop("env", {})}, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.kill_workers()
    pools.clear()
