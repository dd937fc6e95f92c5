"""The chaos thread: breaks something every now and then, and writes down what it did to whom.

The oracle accepts the failure of a task only where the task's own journal says that it ran in a process that a fault
here killed. Faults that this machine or executor cannot have are skipped, with the reason.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from stress import procs
from stress.procs import Census

ALL: Final = ("kill_worker", "stop_worker", "kill_keeper", "fill_disk", "starve_descriptors", "load_cpu")
_CLONE_NEWNS: Final = 0x20000
_MNT_DETACH: Final = 2
_MS_REC_PRIVATE: Final = 0x4000 | 0x40000
#: Bytes that temporary files may take where the disk is to be filled.
_DISK_BYTES: Final = 4 * procs.MB
_FULL_SECONDS: Final = 1.0
_STARVED_SECONDS: Final = 0.5
_CPU_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Mark:
    """One fault. at: seconds by the monotonic clock; pids: who died of it."""

    at: float
    kind: str
    detail: str
    pids: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_small_disk(folder: Path) -> str:
    """Mount a small file system there, for this process and its children only; "" or why it cannot be.

    Its own mount namespace ends with its processes, so that nothing is left whatever becomes of them. To be called
    before any thread is started.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        steps: tuple[Callable[[], int], ...] = (
            lambda: libc.unshare(_CLONE_NEWNS),
            lambda: libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None),
            lambda: libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0),
                               b"size=%d" % _DISK_BYTES),
        )
        for step in steps:
            if step():
                return f"a small disk cannot be mounted: {os.strerror(ctypes.get_errno())}"
    except AttributeError:
        return "this platform cannot mount a small disk for one process"
    return ""


def remove_small_disk(folder: Path) -> None:
    """Unmount it, so that the folder can be removed."""
    ctypes.CDLL(None).umount2(os.fsencode(folder), _MNT_DETACH)


@dataclass
class Chaos:
    """kinds: which faults; every: mean seconds between two; disk: a small file system, or None."""

    kinds: Sequence[str]
    every: float
    seed: int
    census: Census
    disk: Path | None
    marks: list[Mark] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if "fill_disk" in self.kinds and self.disk is None:
            self.skipped.setdefault("fill_disk", "no small disk")

    def start(self) -> None:
        """Begin."""
        if self.kinds:
            self._thread = threading.Thread(target=self._run, name="stress-chaos", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Everything that a fault took is given back when this returns."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30)

    def _run(self) -> None:
        kinds = [kind for kind in self.kinds if kind not in self.skipped]
        order: list[str] = []
        while kinds and not self._stop.wait(self._random.uniform(0.5, 1.5) * self.every):
            # Each once before any a second time: a short run meets all of them too.
            if not order:
                order = self._random.sample(kinds, len(kinds))
            kind = order.pop()
            try:
                getattr(self, f"_{kind}")()
            except OSError as error:
                self.skipped[kind] = f"{type(error).__name__}: {error}"

    def _mark(self, kind: str, detail: str, *pids: int) -> None:
        self.marks.append(Mark(time.monotonic(), kind, detail, pids))

    # -- the faults ----------------------------------------------------------------------------------------------

    def _one(self) -> int | None:
        workers = sorted(self.census.take().workers)
        return self._random.choice(workers) if workers else None

    def _kill_worker(self) -> None:
        pid = self._one()
        if pid is not None and procs.send(pid, signal.SIGKILL):
            self._mark("kill_worker", f"SIGKILL to worker {pid}", pid)

    def _stop_worker(self) -> None:
        pid = self._one()
        if pid is None or not procs.send(pid, signal.SIGSTOP):
            return
        seconds = self._random.uniform(0.1, 1.0)
        self._mark("stop_worker", f"SIGSTOP to worker {pid} for {seconds:.2f} s")
        self._stop.wait(seconds)
        procs.send(pid, signal.SIGCONT)

    def _kill_keeper(self) -> None:
        crew = self.census.take()
        if not crew.servers:
            return
        # Marked first: whoever dies of it dies after the mark.
        self._mark("kill_keeper", f"SIGKILL to keeper {crew.servers[0]}", *crew.workers)
        procs.send(crew.servers[0], signal.SIGKILL)

    def _fill_disk(self) -> None:
        assert self.disk is not None
        self._mark("fill_disk", f"no space for temporary files for {_FULL_SECONDS:g} s")
        ballast = self.disk / "ballast"
        try:
            with suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while not self._stop.is_set():
                    if not file.write(b"x" * 4096):
                        break
            self._stop.wait(_FULL_SECONDS)
        finally:
            ballast.unlink(missing_ok=True)

    def _starve_descriptors(self) -> None:
        taken: list[int] = []
        self._mark("starve_descriptors", f"no free descriptor in the parent for {_STARVED_SECONDS:g} s")
        end = time.monotonic() + _STARVED_SECONDS
        try:
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            while time.monotonic() < end and not self._stop.is_set():
                try:
                    taken.append(os.dup(taken[0]))
                except OSError:
                    self._stop.wait(0.01)
        finally:
            for fd in taken:
                os.close(fd)

    def _load_cpu(self) -> None:
        code = f"import time\nend = time.monotonic() + {_CPU_SECONDS}\nwhile time.monotonic() < end: pass"
        busy = []
        try:
            for _ in range(os.cpu_count() or 1):
                helper = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL)
                busy.append(helper)
                self.census.ours.add(helper.pid)
            self._mark("load_cpu", f"{len(busy)} processes compute for {_CPU_SECONDS:g} s")
            self._stop.wait(_CPU_SECONDS)
        finally:
            for helper in busy:
                helper.kill()
                helper.wait()
                self.census.ours.discard(helper.pid)
