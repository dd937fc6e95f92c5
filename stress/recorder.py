"""The time series: one row every moment, written to a file, so that a long run takes no memory here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from stress import procs
from stress.ledger import Ledger

#: Rows of a run, whatever its length.
ROWS: Final = 2400
LEAST_SECONDS: Final = 0.2
MB: Final = procs.MB


def percentile(values: list[float], share: float) -> float | None:
    """Of sorted values."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else None


class Recorder:
    """look: what the executor says of itself (breaker state, queue), or None."""

    def __init__(self, path: Path, ledger: Ledger, census: procs.Census, look: Callable[[], dict[str, Any]],
                 seconds: float | None) -> None:
        self.path = path
        self._ledger = ledger
        self._census = census
        self._look = look
        self._interval = max(LEAST_SECONDS, (seconds or 0.0) / ROWS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stress-recorder", daemon=True)
        self.began_at = time.monotonic()
        self.latest: dict[str, Any] = {}
        self.peak_pool_mb = 0.0
        self.peak_worker_mb = 0.0
        self.peak_workers = 0
        self.least_available_mb = procs.available() / MB
        #: memory that is to stay available, and what the executor may take beside that; None: nobody asked for it
        self.floor_mb: float | None = None
        self.spare_mb = 0.0
        #: by how much the executor had more than that, while less than that was available
        self.crossed_mb = 0.0
        self._settled = 0
        self._at = self.began_at

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Write the last row."""
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        with open(self.path, "w", buffering=1) as file:
            while not self._stop.wait(self._interval):
                self._row(file)
            self._row(file)

    def _row(self, file: Any) -> None:
        try:
            row = self._read()
        except OSError:  # no descriptor is free, which may be a fault's doing
            return
        self.latest = row
        file.write(json.dumps(row) + "\n")

    def _read(self) -> dict[str, Any]:
        crew = self._census.take()
        now = time.monotonic()
        settled = self._ledger.settled
        rate = (settled - self._settled) / max(1e-6, now - self._at)
        latencies = sorted(self._ledger.take_latencies())
        self._settled, self._at = settled, now
        workers = {str(pid): round(size / MB, 1) for pid, size in crew.workers.items()}
        pool_mb, available_mb = sum(crew.workers.values()) / MB, procs.available() / MB
        self.peak_pool_mb = max(self.peak_pool_mb, pool_mb)
        self.peak_worker_mb = max(self.peak_worker_mb, *workers.values(), 0.0)
        self.peak_workers = max(self.peak_workers, len(workers))
        self.least_available_mb = min(self.least_available_mb, available_mb)
        if self.floor_mb is not None and available_mb < self.floor_mb:
            self.crossed_mb = max(self.crossed_mb, pool_mb - self.spare_mb)
        row = {
            "t": round(now - self.began_at, 3), "settled": settled, "rate": round(rate, 2),
            "open": len(self._ledger.open), "pool_mb": round(pool_mb, 1), "workers_mb": workers,
            "parent_mb": round(procs.own_rss() / MB, 2), "available_mb": round(available_mb, 0),
        }
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            value = percentile(latencies, share)
            row[name] = None if value is None else round(value, 6)
        return row | self._look()

    def rows(self) -> list[dict[str, Any]]:
        """All of them."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]
