"""Tasks: what runs in the workers. Imports next to nothing, as workers import it that are not forked."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False  # typing's own would import typing, which is most of what a worker of agentpool weighs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

MIB = 1 << 20


def noop(_: object = None) -> None:
    """Do nothing."""


def echo(value: Any) -> Any:
    """Give the argument back."""
    return value


def nap(seconds: float) -> None:
    """Sleep in C."""
    time.sleep(seconds)


def nap_maybe(seconds: float = 0.0) -> None:
    """Short as a rule: one function for calls of both kinds."""
    if seconds:
        time.sleep(seconds)


def stamp() -> tuple[int, float]:
    """Who, and when: the monotonic clock is one for all processes."""
    return os.getpid(), time.monotonic()


def mark(path: str) -> None:
    """Append a line, "time pid", to a file."""
    with open(path, "a") as file:
        file.write(f"{time.monotonic()} {os.getpid()}\n")


def die(path: str) -> None:
    """Leave a mark, then end the worker without a word."""
    mark(path)
    os._exit(1)


def oversleep(path: str, seconds: float) -> None:
    """Leave a mark, then sleep in C."""
    mark(path)
    time.sleep(seconds)


def meet(folder: str, count: int, limit_seconds: float) -> int:
    """Wait until `count` processes are in this call with this folder; return the pid."""
    with open(os.path.join(folder, str(os.getpid())), "w"):
        pass
    end = time.monotonic() + limit_seconds
    while len(os.listdir(folder)) < count and time.monotonic() < end:
        time.sleep(0.002)
    return os.getpid()


def wait_for_file(path: str, sign: str, limit_seconds: float) -> None:
    """Sign in, then occupy a worker until the file is there."""
    mark(sign)
    end = time.monotonic() + limit_seconds
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.02)


def beget(path: str) -> None:
    """Start a grandchild that outlives the task, note both pids, and linger."""
    import subprocess

    child = subprocess.Popen(["sleep", "300"])
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    time.sleep(60)


_hoard: list[bytes] = []


def leak(size: int) -> tuple[int, float]:
    """Keep `size` bytes for good; return the pid and its RSS in MiB."""
    _hoard.append(b"x" * size)
    time.sleep(0.2)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return os.getpid(), pages * os.sysconf("SC_PAGESIZE") / MIB


def run_chunk(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Several calls as one task, for pools whose map knows no chunks."""
    return [function(item) for item in items]
