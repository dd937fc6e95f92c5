"""What the public API promises a type checker: mypy, strict, over `public_api.py`, against the installed packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _mypy(folder: Path, *targets: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--python-version=3.11", "--no-error-summary",
         f"--cache-dir={folder}", *map(str, targets)],
        cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_public_api_is_typed(tmp_path: Path) -> None:
    checked = _mypy(tmp_path, HERE / "public_api.py")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wrong_expectation_is_noticed(tmp_path: Path) -> None:
    """That the check checks: with `Any` for everything the file above would pass as well."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from typing import assert_type\n"
        "from agentpool import AgentPool\n"
        "assert_type(AgentPool().submit(len, 'abc').result(), str)\n"
        "AgentPool().submit(len, 3)\n"
    )
    checked = _mypy(tmp_path, wrong)
    told = checked.stdout.splitlines()
    places = [line.partition(": error: ")[0] for line in told if ": error: " in line]
    assert places == ["wrong.py:3", "wrong.py:4"], told
    assert "assert-type" in told[0]
    assert "arg-type" in checked.stdout
