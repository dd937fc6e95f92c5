"""Starts cells in turns, keeps them within their limits, and leaves nothing running. Knows no case and no pool.

As a child subreaper it gets back whatever a cell loses, so that no process escapes it; it ends only its own
descendants, by pid.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stress.bench.cell import CODE, RESULT
from stress.bench.contenders import Contender, takes_part
from stress.bench.meters import descendants, machine_busy_seconds

if TYPE_CHECKING:
    from stress.bench.registry import Case

    #: One cell's outcome: `metrics`, or `status` how it failed; `seconds`, `foreign_cpu`; `note`, `stderr`, `left`.
    Cell = dict[str, Any]
    #: case -> contender -> the cells of all rounds
    Results = dict[str, dict[str, list[Cell]]]

ROOT = Path(__file__).parents[2]
#: Seconds that a cell gets to shut down once it has its result.
GRACE_SECONDS = 10.0
#: Seconds that what a cell left running gets to end by itself.
LINGER_SECONDS = 1.0
POLL_SECONDS = 0.03
PR_SET_CHILD_SUBREAPER = 36


class Runner:
    """Runs one cell at a time."""

    def __init__(self, *, quick: bool = False, quiet_seconds: float = 0.0) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._scratch = tempfile.mkdtemp(prefix="agentpool-bench-")
        self._quick = quick
        self._quiet_seconds = quiet_seconds
        self._own_seconds = sum(os.times()[:4])

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run(self, spec: Case, contender: str) -> Cell:
        """One cell: what it measured, or how it failed."""
        self._await_quiet()
        folder = tempfile.mkdtemp(dir=self._scratch)
        busy, began = machine_busy_seconds(), time.monotonic()
        length = "quick" if self._quick else "full"
        errors, result = os.path.join(folder, "stderr"), os.path.join(folder, RESULT)
        with open(errors, "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-c", CODE, spec.name, contender, length, folder],
                env=_environment(folder), stdin=subprocess.DEVNULL, stdout=err, stderr=err, cwd=folder,
            )
        try:
            _wait(process, result, began + spec.limit_seconds)
            cell: Cell = {"seconds": round(time.monotonic() - began, 2)}
            code = process.poll()
            if os.path.exists(result):
                cell["metrics"] = json.loads(Path(result).read_text())
                if code:
                    cell["note"] = f"exit status {code} after the result"
                elif code is None:
                    cell["note"] = "hung in shutdown"
            else:
                cell["status"] = "hung" if code is None else "failed"
            if "status" in cell or "note" in cell:
                cell["stderr"] = Path(errors).read_text(errors="replace")[-3000:]
        finally:
            left = _clean(process)
        if left and code is not None and not spec.abrupt:
            cell["left"] = left
        cell["foreign_cpu"] = round(self._foreign(busy, began), 2)
        shutil.rmtree(folder, ignore_errors=True)
        return cell

    def _await_quiet(self) -> None:
        """Wait, within patience, until others use less than a quarter of a core."""
        end = time.monotonic() + self._quiet_seconds
        while time.monotonic() < end:
            busy = machine_busy_seconds()
            time.sleep(0.4)
            if machine_busy_seconds() - busy < 0.1:
                return

    def _foreign(self, busy: float, began: float) -> float:
        """CPUs that others kept busy during the cell, about: all that was used less what this process and the children
        that it collected used."""
        own = sum(os.times()[:4])
        mine, self._own_seconds = own - self._own_seconds, own
        return max(0.0, (machine_busy_seconds() - busy - mine) / (time.monotonic() - began))


def _environment(folder: str) -> dict[str, str]:
    """What cells see: this clone, bytecode that is cached, a folder of their own for temporary files."""
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{folder}", TMPDIR=folder)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _wait(process: subprocess.Popen[bytes], result: str, deadline: float) -> None:
    """Until the cell has ended, or its time is over."""
    has_result = False
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        if not has_result and os.path.exists(result):
            has_result, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)


def _clean(process: subprocess.Popen[bytes]) -> int:
    """End all that the cell left; return how many processes had not ended by themselves."""
    end = time.monotonic() + LINGER_SECONDS
    while process.poll() is not None and _others(process) and time.monotonic() < end:
        time.sleep(0.05)
        _collect(process)
    count = len(_others(process))
    for _ in range(200):
        for pid in _others(process) + ([process.pid] if process.poll() is None else []):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _collect(process)
        if process.poll() is not None and not _others(process):
            break
        time.sleep(0.02)
    return count


def _others(process: subprocess.Popen[bytes]) -> list[int]:
    return [pid for pid in descendants(os.getpid()) if pid != process.pid]


def _collect(process: subprocess.Popen[bytes]) -> None:
    """Dead orphans; the cell itself is collected by its Popen."""
    if process.poll() is None:
        return
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def turns(
    cases: list[Case], contenders: dict[str, type[Contender]], rounds: int | None
) -> Iterator[tuple[Case, int, str]]:
    """Case, round and contender of each cell: contenders take turns, so that a noisy minute hits all of them."""
    for spec in cases:
        names = [name for name, contender in contenders.items() if takes_part(contender, spec.name, spec.wants)]
        for number in range(rounds or spec.rounds):
            for name in names:
                yield spec, number, name
