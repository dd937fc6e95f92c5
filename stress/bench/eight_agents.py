"""Eight agents started at once: a process each, unthrottled, against the default pool. The measured before and after.

    python stress/bench/eight_agents.py                 # three rounds, a table
    python stress/bench/eight_agents.py --rounds 5 --json out.json
    python stress/bench/eight_agents.py --write docs/benchmarks.md

Each mode runs in a fresh interpreter; this driver samples the whole tree below it every 50 ms and sums PSS, so that a
page that several processes share counts once. The agents are the stock ones, on the installed `tenacity` package.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

KINDS = ["security-analyst", "performance-auditor", "test-generator"]
AGENTS = [KINDS[index % 3] for index in range(8)]
SAMPLE_SECONDS = 0.05
MB = 1024 * 1024
BEGIN, END = "<!-- eight-agents: begin -->", "<!-- eight-agents: end -->"


def target() -> str:
    """The code that the agents work on: real, and not this project's."""
    spec = importlib.util.find_spec("tenacity")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent)


def arguments(kind: str, out: str, number: int) -> dict[str, str]:
    """What one agent is given."""
    given = {"path": target()}
    if kind == "test-generator":
        given["out"] = os.path.join(out, str(number))
    return given


ONE_AGENT = """
import json, sys
from agentpool_worker.agents import base
base.run_agent(sys.argv[1], "Review this code", json.loads(sys.argv[2]))
"""


def run_unthrottled(out: str) -> None:
    """As the old system did: a process for each agent, all at once."""
    children = [
        subprocess.Popen([sys.executable, "-c", ONE_AGENT, kind, json.dumps(arguments(kind, out, number))])
        for number, kind in enumerate(AGENTS)
    ]
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit("an agent failed")


def run_pool(out: str) -> None:
    """The default pool."""
    from agentpool import AgentPool

    with AgentPool() as pool:
        futures = [
            pool.submit_agent(kind, "Review this code", **arguments(kind, out, number))
            for number, kind in enumerate(AGENTS)
        ]
        for future in futures:
            future.result()


MODES = {"unthrottled": run_unthrottled, "pool": run_pool}


def measure(mode: str) -> dict[str, float]:
    """One run of a mode, watched from outside."""
    with tempfile.TemporaryDirectory() as out:
        started = time.monotonic()
        child = subprocess.Popen([sys.executable, __file__, "--run", mode, "--out", out])
        root = psutil.Process(child.pid)
        peak = rss_peak = most = 0
        seen: set[tuple[int, float]] = set()
        while child.poll() is None:
            pss = rss = alive = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    memory = process.memory_full_info()
                except (psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError, ProcessLookupError):
                    continue
                seen.add((process.pid, process.create_time()))
                alive += 1
                pss += memory.pss
                rss += memory.rss
            peak, rss_peak, most = max(peak, pss), max(rss_peak, rss), max(most, alive)
            time.sleep(SAMPLE_SECONDS)
        wall = time.monotonic() - started
    if child.returncode:
        raise SystemExit(f"{mode} failed")
    return {"wall_s": wall, "peak_pss_mb": peak / MB, "peak_rss_mb": rss_peak / MB, "most_at_once": most,
            "processes": len(seen)}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians, with the spread in brackets, and the ratio of the medians."""
    names = {
        "peak_pss_mb": "peak memory, PSS summed (MB)",
        "peak_rss_mb": "peak memory, RSS summed (MB)",
        "wall_s": "wall time (s)",
        "most_at_once": "processes at once, at most",
        "processes": "processes seen in all",
    }
    lines = ["| | a process each, unthrottled | the default pool | pool / unthrottled |", "|---|---|---|---|"]
    for key, name in names.items():
        cells, medians = [], []
        for mode in MODES:
            values = [round_[key] for round_ in results[mode]]
            medians.append(statistics.median(values))
            cells.append(f"{medians[-1]:.4g} ({min(values):.4g} to {max(values):.4g})")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {medians[1] / medians[0]:.2f} |")
    return "\n".join(lines)


def machine() -> str:
    """Where it was measured."""
    memory = psutil.virtual_memory().total / MB / 1024
    return (f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release().split('-')[0]}, "
            f"Python {platform.python_version()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--write", metavar="FILE", help=f"put the table between {BEGIN} and {END}")
    parser.add_argument("--run", choices=sorted(MODES), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        MODES[options.run](options.out)
        return
    results: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        for mode in MODES:  # in turn, so that a noisy minute hits both
            results[mode].append(measure(mode))
            print(f"round {number + 1} {mode}: {results[mode][-1]}", file=sys.stderr)
    text = f"{machine()}; median of {options.rounds} (least to most).\n\n{table(results)}"
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine(), "results": results}, indent=2))
    if options.write:
        page = Path(options.write)
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
