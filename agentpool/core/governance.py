"""Pool-wide and host-wide governance: what readings of memory, pressure and CPU mean for the whole pool.

It turns readings into holds on the breaker, reasons for the status DEGRADED, and the order to stop the biggest
offender. Readings flap: a limit is acted on at once where acting means not to start something, and after
consecutive readings where acting means to stop something. Knows no clock; called only by the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agentpool.config import MB, PoolSettings
from agentpool.core.breaker import Breaker
from agentpool.core.records import HostState, WorkerRecord
from agentpool.core.transitions import WorkerState

__all__ = ["Governor", "biggest_offender", "leaving_bytes"]

#: Readings in a row before something running is stopped, or an alert is raised or taken back.
CONSECUTIVE: Final = 2
#: CPU is noisier than memory: so many readings above its threshold count as sustained.
CPU_CONSECUTIVE: Final = 3
#: A hold is released only when the reading is better than its limit by this factor.
HYSTERESIS: Final = 1.1
#: `min_available_mb` where the user set none, as a share of the host's or container's memory.
DEFAULT_MIN_AVAILABLE: Final = 0.05


class Governor:
    """What the last readings mean."""

    __slots__ = ("_breaker", "_cpu_high", "_good_host", "_low_host", "critical_reason", "critical_since",
                 "host", "others_cpu_percent", "reasons", "sampled_at", "settings")

    def __init__(self, settings: PoolSettings, breaker: Breaker) -> None:
        self.settings = settings
        self._breaker = breaker
        self.host: HostState | None = None
        self.sampled_at: float | None = None
        #: name -> why the pool is degraded, in words
        self.reasons: dict[str, str] = {}
        self.others_cpu_percent = 0.0
        #: since when all readings of the pool were above its critical memory; None: the last one was not
        self.critical_since: float | None = None
        #: that, in words
        self.critical_reason = ""
        self._low_host = 0
        self._good_host = 0
        self._cpu_high = 0

    def floor_bytes(self, host: HostState) -> int:
        """Available memory below which no worker is started."""
        given = self.settings.min_available_mb
        return int(given * MB) if given is not None else int(host.total_bytes * DEFAULT_MIN_AVAILABLE)

    def host_sampled(self, now: float, host: HostState, pool_cpu_percent: float) -> None:
        """Judge a reading of the host. `pool_cpu_percent` is this pool's own part of the host's CPU."""
        self.host = host
        self.sampled_at = now
        self._judge_available(now, host)
        self._judge_cpu(host, pool_cpu_percent)

    def _judge_available(self, now: float, host: HostState) -> None:
        floor = self.floor_bytes(host)
        limit = self.settings.pressure_threshold
        pressure = host.pressure_percent
        if host.available_bytes < floor:
            reason = (f"{host.source} has {host.available_bytes / MB:.0f} MB available, "
                      f"needs {floor / MB:.0f}")
        elif pressure is not None and pressure > limit:
            reason = f"memory pressure is {pressure:.0f} % (PSI some avg10), above the threshold of {limit:g} %"
        else:
            is_good = host.available_bytes >= floor * HYSTERESIS and (
                pressure is None or pressure <= limit / HYSTERESIS
            )
            self._low_host = 0
            self._good_host = self._good_host + 1 if is_good else 0
            if self._good_host >= CONSECUTIVE:
                self._breaker.release("available", now)
                self.reasons.pop("available", None)
            return
        self._good_host = 0
        self._low_host += 1
        self.reasons["available"] = reason
        self._breaker.hold("available", reason)

    def _judge_cpu(self, host: HostState, pool_cpu_percent: float) -> None:
        limit = self.settings.cpu_threshold_percent
        self.others_cpu_percent = max(0.0, host.cpu_percent - pool_cpu_percent)
        self._cpu_high = self._cpu_high + 1 if host.cpu_percent > limit else 0
        if self._cpu_high >= CPU_CONSECUTIVE:
            self.reasons["cpu"] = f"host CPU is at {host.cpu_percent:.0f} %, above the threshold of {limit:g} %"
        elif host.cpu_percent <= limit / HYSTERESIS:
            self.reasons.pop("cpu", None)

    def pool_sampled(self, now: float, pool_bytes: int) -> None:
        """Judge the sum of all workers' trees."""
        alert, critical = self.settings.alert_bytes, self.settings.critical_bytes
        if critical is not None and pool_bytes > critical:
            if self.critical_since is None:
                self.critical_since = now
            self.critical_reason = self._above(pool_bytes, "critical_memory_mb", critical)
            self._breaker.hold("critical", self.critical_reason)
        else:
            self.critical_since = None
            if critical is not None and pool_bytes <= critical / HYSTERESIS:
                self._breaker.release("critical", now)
        if alert is not None and pool_bytes > alert:
            self.reasons["memory"] = self._above(pool_bytes, "alert_memory_mb", alert)
        elif alert is not None and pool_bytes <= alert / HYSTERESIS:
            self.reasons.pop("memory", None)

    @staticmethod
    def _above(pool_bytes: int, name: str, limit: int) -> str:
        return f"all workers use {pool_bytes / MB:.0f} MB together, above {name} ({limit / MB:.0f})"

    @property
    def may_stop_one(self) -> bool:
        """Whether the pool's memory, where it stays critical, is worth a running task.

        It is where the user set the critical value, or the host is short of memory as well. A derived default alone
        never costs anybody a task.
        """
        return self.settings.critical_memory_mb is not None or self._low_host >= CONSECUTIVE

    @property
    def forbids_growth(self) -> bool:
        """With `cpu_policy="throttle"`: others than this pool keep the CPU busy, so no worker is added."""
        return (
            self.settings.cpu_policy == "throttle"
            and self._cpu_high >= CPU_CONSECUTIVE
            and self.others_cpu_percent > self.settings.cpu_threshold_percent / 2
        )


def leaving_bytes(workers: Iterable[WorkerRecord]) -> int:
    """Memory that is about to be free: of workers that were told to end, or whose task was."""
    return sum(
        worker.rss_bytes
        for worker in workers
        if worker.state in (WorkerState.RETIRING, WorkerState.KILLED)
        or (worker.running is not None and worker.running.stop is not None)
    )


def biggest_offender(workers: Iterable[WorkerRecord]) -> WorkerRecord | None:
    """The busy worker with the greatest tree; of equal ones one whose task may run again, then the latest begun."""
    return max(
        (worker for worker in workers if worker.state is WorkerState.BUSY and worker.running is not None
         and worker.running.stop is None),
        key=_offence,
        default=None,
    )


def _offence(worker: WorkerRecord) -> tuple[int, bool, float]:
    task = worker.running
    assert task is not None
    return worker.rss_bytes, task.spec.policy is not None, task.started_at
