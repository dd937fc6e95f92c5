"""Idle workers cost next to nothing. What they cost exactly is measured by stress/bench/idle_workers.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "stress" / "bench" / "idle_workers.py"


def test_64_idle_workers_cost_under_half_a_percent_of_a_core() -> None:
    """Too short to see a full sweep (0.01 % of a core); whatever polls, ticks or spins shows."""
    words = [sys.executable, str(SCRIPT), "--workers", "64", "--seconds", "3", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["workers"] == 64
    assert found["percent"] < 0.5
    assert found["workers_wakeups_per_second"] < 1, "idle workers sleep"
