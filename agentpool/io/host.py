"""What is left on the host and in the container this process lives in: memory, CPU, memory pressure.

A reading says how much, never whether that is too little: thresholds and hysteresis belong to the core. It starts no
thread and keeps no descriptor open. Any thread may use a `HostSampler`, one at a time.

The host's own memory and CPU times are read from /proc where it has them, elsewhere by psutil, whose import would take
7 ms of a pool's first start. They are the host's, also inside a container. A container's limit is found here:
`/proc/self/cgroup` names our cgroup in each hierarchy, `/proc/self/mountinfo` says which part of that hierarchy is
mounted where, and every level from our cgroup up to the mount may have a limit, of which each binds. Limits and our
place are read anew each time, since both may change under a running process (`docker update`, a service manager that
moves us).

Measured on 2 cores with Python 3.11, psutil 7.2 and 4 cgroup levels (hybrid, no limit set): `HostSampler.read` 130 us.
"""

from __future__ import annotations

import os
import re
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["CgroupLevel", "HostReading", "HostSampler", "MemoryBound", "busy_percent", "cgroup_levels", "memory_bounds"]

_STANDARD_ROOT: Final = "/sys/fs/cgroup"
#: v1 writes "no limit" as the largest number of whole pages, 2**63 less one page, whatever a page is.
_NO_LIMIT_V1: Final = 1 << 60
#: The kernel counts CPU time in ticks of 10 ms: a share over less than a few of them is noise.
_SHORTEST_CPU_WINDOW_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class HostReading:
    """One look at the host.

    total_bytes: the smallest of the host's memory and the limits of the cgroups we are in.
    available_bytes: what can be allocated before the tightest of them is reached; page cache that the kernel gives
        up at once counts as available.
    limit_source: whose bound `available_bytes` is: "host", or for instance "cgroup v2 /docker/abc".
    cpu_percent: all CPUs of the host together, 0 to 100, since the previous reading of the same sampler; the first
        reading says 0.0.
    pressure_some_avg10: PSI of memory: percent of the last 10 s in which some task waited for memory, the worse of
        the host's and our cgroup's; None where the kernel does not tell.
    """

    total_bytes: int
    available_bytes: int
    limit_source: str
    cpu_percent: float
    pressure_some_avg10: float | None


@dataclass(frozen=True, slots=True)
class CgroupLevel:
    """A cgroup that we are in, directly or by descent: where its files are, and its name in the hierarchy."""

    version: int
    folder: str
    name: str


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """One memory limit that binds us, and what is left below it."""

    limit_bytes: int
    available_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted part of a cgroup hierarchy: `folder` shows the hierarchy from its cgroup `root` down."""

    version: int
    folder: str
    root: str


#: The counters of /proc/stat, in ticks: their shares are what counts.
_CpuTimes = namedtuple("_CpuTimes", "user nice system idle iowait irq softirq steal guest guest_nice")


class HostSampler:
    """Reads memory, CPU and pressure of the host and of the cgroups this process is in.

    `proc_root` and `cgroup_root` are where /proc and /sys/fs/cgroup are looked for. Without them (macOS), what psutil
    knows of the host remains.
    """

    def __init__(self, proc_root: str | os.PathLike[str] = "/proc",
                 cgroup_root: str | os.PathLike[str] = _STANDARD_ROOT) -> None:
        self._proc_root = os.fspath(proc_root)
        self._cgroup_root = os.fspath(cgroup_root)
        self._place: str | None = None
        self._levels: tuple[CgroupLevel, ...] = ()
        self._cpu_times: Any = None
        self._cpu_read_at = 0.0
        self._cpu_percent = 0.0

    def read(self) -> HostReading:
        """Reads everything now. Raises nothing for files that are missing or unreadable: they bind nothing."""
        total, available = _host_memory(self._proc_root)
        levels = self._current_levels()
        tightest = MemoryBound(total, available, "host")
        for bound in memory_bounds(levels):
            total = min(total, bound.limit_bytes)
            if bound.available_bytes < tightest.available_bytes:
                tightest = bound
        return HostReading(total, tightest.available_bytes, tightest.source, self._read_cpu(), self._pressure(levels))

    def _current_levels(self) -> tuple[CgroupLevel, ...]:
        place = _text(f"{self._proc_root}/self/cgroup")
        if place != self._place:
            # Mounts are looked up only when we moved: /proc/self/mountinfo of a container host can be long.
            self._levels = cgroup_levels(self._proc_root, self._cgroup_root)
            self._place = place
        return self._levels

    def _read_cpu(self) -> float:
        # Not psutil.cpu_percent(): that keeps its previous reading per calling thread, and for all callers of psutil
        # in this process together.
        now = time.monotonic()
        if self._cpu_times is None or now - self._cpu_read_at >= _SHORTEST_CPU_WINDOW_SECONDS:
            try:
                times = _cpu_times(self._proc_root)
            except OSError:  # no descriptor is free
                return self._cpu_percent
            if self._cpu_times is not None:
                self._cpu_percent = busy_percent(self._cpu_times, times)
            self._cpu_times, self._cpu_read_at = times, now
        return self._cpu_percent

    def _pressure(self, levels: tuple[CgroupLevel, ...]) -> float | None:
        host = _some_avg10(f"{self._proc_root}/pressure/memory")
        own = None
        for level in levels:
            # Our own cgroup, or the nearest one above it that tells: siblings' trouble further up is not ours.
            if level.version == 2 and (own := _some_avg10(f"{level.folder}/memory.pressure")) is not None:
                break
        known = [value for value in (host, own) if value is not None]
        return max(known, default=None)


def _host_memory(proc_root: str) -> tuple[int, int]:
    """Total and available bytes of the host."""
    text = _text(f"{proc_root}/meminfo")
    found = dict(re.findall(r"^(MemTotal|MemAvailable): +(\d+) kB$", text, re.MULTILINE))
    if len(found) == 2:
        return int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024
    try:
        import psutil

        memory = psutil.virtual_memory()
    except OSError:  # no descriptor is free; a system call does, which takes the page cache for used
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return memory.total, memory.available


def _cpu_times(proc_root: str) -> Any:
    """CPU seconds of the host since its start, by what they were spent on. Raises OSError."""
    line = _text(f"{proc_root}/stat").partition("\n")[0].split()
    if len(line) > len(_CpuTimes._fields) and line[0] == "cpu":
        return _CpuTimes(*map(int, line[1 : len(_CpuTimes._fields) + 1]))
    import psutil

    return psutil.cpu_times()


def busy_percent(before: Any, after: Any) -> float:
    """Share of CPU time that was not idle between two values of `psutil.cpu_times()`, 0.0 to 100.0.

    Waiting for input and output is idle; time stolen by a hypervisor is busy, as psutil has it.
    """
    idle = total = 0.0
    for name in after._fields:
        if name in ("guest", "guest_nice"):
            continue  # Linux counts them in user and nice already
        # Single counters may step back (iowait does, by design); a step back is no negative time.
        spent = max(0.0, getattr(after, name) - getattr(before, name))
        total += spent
        if name in ("idle", "iowait"):
            idle += spent
    return 100.0 * (total - idle) / total if total > 0 else 0.0


def cgroup_levels(proc_root: str, cgroup_root: str) -> tuple[CgroupLevel, ...]:
    """Every cgroup whose memory files may bind us, the innermost first; v1 and v2 hierarchies one after the other.

    Levels that are not visible from here (another mount or namespace) are left out.
    """
    places: dict[int, str] = {}
    for line in _text(f"{proc_root}/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            places[2] = path
        elif "memory" in controllers.split(","):
            places[1] = path
    mounts = list(_mounts(proc_root, cgroup_root)) or list(_usual_mounts(cgroup_root))
    levels: list[CgroupLevel] = []
    for version, path in sorted(places.items()):
        fitting = [mount for mount in mounts if mount.version == version]
        if fitting:
            # Of several mounts of one hierarchy, the one that shows our cgroup and the most of what is above it.
            mount = min(fitting, key=lambda mount: (_inside(path, mount.root) is None, len(mount.root)))
            levels += _levels_of(mount, path)
    return tuple(levels)


def _levels_of(mount: _Mount, path: str) -> Iterator[CgroupLevel]:
    inside = _inside(path, mount.root)
    # A path outside what is mounted means a namespace between us and the mount: the mount point is then as close
    # to our cgroup as can be seen, and in a container it is our cgroup.
    parts = [] if inside is None else [part for part in inside.split("/") if part]
    for depth in range(len(parts), -1, -1):
        tail = "".join(f"/{part}" for part in parts[:depth])
        yield CgroupLevel(mount.version, mount.folder + tail, (mount.root.rstrip("/") + tail) or "/")


def _inside(path: str, root: str) -> str | None:
    """`path` as seen from `root`; None where it lies outside."""
    if ".." in path.split("/"):
        return None
    if root == "/":
        return path
    return path[len(root):] if path == root or path.startswith(f"{root}/") else None


def _mounts(proc_root: str, cgroup_root: str) -> Iterator[_Mount]:
    for line in _text(f"{proc_root}/self/mountinfo").splitlines():
        front, separator, back = line.partition(" - ")
        fields, kind = front.split(), back.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            version = 2
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            version = 1
        else:
            continue
        root, folder = _unescape(fields[3]), _unescape(fields[4])
        if folder == _STANDARD_ROOT or folder.startswith(f"{_STANDARD_ROOT}/"):
            folder = cgroup_root + folder[len(_STANDARD_ROOT):]
        yield _Mount(version, folder, root)


def _usual_mounts(cgroup_root: str) -> Iterator[_Mount]:
    """Where mountinfo cannot be read: the places that every distribution uses."""
    for folder in (cgroup_root, f"{cgroup_root}/unified"):
        if os.path.exists(f"{folder}/cgroup.controllers"):
            yield _Mount(2, folder, "/")
    if os.path.isdir(f"{cgroup_root}/memory"):
        yield _Mount(1, f"{cgroup_root}/memory", "/")


def memory_bounds(levels: tuple[CgroupLevel, ...]) -> Iterator[MemoryBound]:
    """The limits that are set on these levels, each with what is left: limit - (usage - inactive file pages).

    Inactive file pages are counted as usage but given up before the limit hurts; taken as used, a process that read
    a large file would seem to be out of memory.
    """
    innermost_v1 = True
    for level in levels:
        if level.version == 2:
            bound = _bound_v2(level)
        else:
            limit = _number(f"{level.folder}/memory.limit_in_bytes")
            if limit is None:
                continue  # not visible from here
            bound = _bound_v1(level, limit, innermost=innermost_v1)
            innermost_v1 = False
        if bound is not None:
            yield bound


def _bound_v2(level: CgroupLevel) -> MemoryBound | None:
    hard = _number(f"{level.folder}/memory.max")
    # Above memory.high the kernel stops nobody, but throttles until hardly anything moves: a limit for our purpose.
    soft = _number(f"{level.folder}/memory.high")
    set_limits = [limit for limit in (hard, soft) if limit is not None]
    if not set_limits:
        return None
    limit = min(set_limits)
    usage = _number(f"{level.folder}/memory.current") or 0
    cache = _stat(f"{level.folder}/memory.stat", "inactive_file") or 0
    by_high = "" if limit == hard else " (memory.high)"
    return _bound(limit, usage, cache, f"cgroup v2 {level.name}{by_high}")


def _bound_v1(level: CgroupLevel, limit: int, *, innermost: bool) -> MemoryBound | None:
    if innermost:
        # In a container the levels above are not mounted; this figure has the smallest of their limits.
        limit = min(limit, _stat(f"{level.folder}/memory.stat", "hierarchical_memory_limit") or limit)
    elif _number(f"{level.folder}/memory.use_hierarchy") == 0:
        return None  # v1 alone: without use_hierarchy a cgroup does not count, or limit, what is below it
    if limit >= _NO_LIMIT_V1:
        return None
    usage = _number(f"{level.folder}/memory.usage_in_bytes") or 0
    # total_: with what is below, as the usage has it.
    cache = _stat(f"{level.folder}/memory.stat", "total_inactive_file") or 0
    return _bound(limit, usage, cache, f"cgroup v1 {level.name}")


def _bound(limit: int, usage: int, cache: int, source: str) -> MemoryBound:
    return MemoryBound(limit, max(0, limit - max(0, usage - cache)), source)


def _some_avg10(path: str) -> float | None:
    found = re.search(r"^some avg10=([0-9.]+)", _text(path), re.MULTILINE)
    return float(found[1]) if found else None


def _stat(path: str, key: str) -> int | None:
    found = re.search(rf"^{key} (\d+)$", _text(path), re.MULTILINE)
    return int(found[1]) if found else None


def _number(path: str) -> int | None:
    """The number in a file; None where there is none: missing, unreadable, or "max"."""
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _text(path: str) -> str:
    """A small file's text, empty where it is missing or unreadable.

    Which of these files exist depends on kernel, controller and level; a limit that cannot be read cannot be kept to.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        chunks = []
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    except OSError:  # EOPNOTSUPP: pressure is compiled in but switched off; ENODEV: the cgroup was just removed
        return ""
    finally:
        os.close(descriptor)
    return b"".join(chunks).decode("utf-8", "surrogateescape")


def _unescape(field: str) -> str:
    """mountinfo writes blanks and backslashes in paths as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
