"""The benchmark runs: one short case, in its own processes, within its limits, leaving nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "stress.bench", *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=90, check=False)


def test_a_case_is_measured_and_written(tmp_path: Path) -> None:
    kept, page = tmp_path / "out.json", tmp_path / "page.md"
    done = run("--cases", "slow-one,recycle", "--peers", "ppe-fork,agentpool", "--rounds", "1", "--json", str(kept),
               "--write", str(page))
    assert done.returncode == 0, done.stderr
    results = json.loads(kept.read_text())["results"]
    assert set(results) == {"slow-one", "recycle"}
    assert set(results["slow-one"]) == {"ppe-fork", "agentpool"}
    assert set(results["recycle"]) == {"agentpool"}, "ProcessPoolExecutor with fork does not retire workers"
    for rows in results.values():
        for [cell] in rows.values():
            assert "status" not in cell, cell
            assert cell["metrics"]
            assert "left" not in cell, "it left processes running"
    assert "goals met." in page.read_text()
    assert len([line for line in done.stderr.splitlines() if line.startswith("[")]) == 3, "a line for each cell"


def test_what_there_is_can_be_listed() -> None:
    done = run("--list")
    assert done.returncode == 0
    assert {"agentpool", "noop", "many"} <= {line.split()[0] for line in done.stdout.splitlines() if line}


def test_unknown_names_are_refused() -> None:
    for option, word in (("--cases", "no-such-case"), ("--peers", "no-such-pool")):
        done = run(option, word)
        assert done.returncode == 1
        assert word in done.stderr
