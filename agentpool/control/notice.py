"""The breaker of a pool, as it can be read without asking: a file beside the pool's socket, while the breaker is open.

The hook of Claude Code reads it (agentpool_worker/hook.py). An answer over the socket takes as long as the process
pleases: one whose main thread computes needs tens of milliseconds, one that is stopped never answers. The manager
thread only. Why so: docs/decisions/0054.
"""

from __future__ import annotations

import logging
from typing import Final

from agentpool.control.folder import NOTICE
from agentpool.io.records import LOCKS_EXIST, Record

__all__ = ["BreakerNotice"]

log = logging.getLogger("agentpool")

_OPEN: Final = ("open", "forced_open")
#: Characters of a pool's name and of a reason: they fit into one page, and each may take twelve bytes of JSON.
_LONGEST_NAME: Final = 60
_LONGEST_REASON: Final = 240


class BreakerNotice:
    """See the module. socket: the path of the pool's own."""

    def __init__(self, socket: str) -> None:
        self._path = socket.removesuffix(".sock") + NOTICE
        self._record: Record | None = None

    def show(self, pool: str, state: str, reason: str) -> None:
        """The breaker is now in that state. Where no file can be written, the log says so and the pool goes on."""
        if not LOCKS_EXIST:
            return
        if state not in _OPEN:
            self.remove()
            return
        content = {"pool": pool[:_LONGEST_NAME], "state": state, "reason": reason[:_LONGEST_REASON]}
        try:
            if self._record is None:
                self._record = Record(self._path, content)
            else:
                self._record.write(content)
        except OSError as error:
            log.warning("the hook of Claude Code will not know that the breaker of pool %s is open: %s", pool, error)

    def remove(self) -> None:
        """The breaker is not open any more, or the pool is over. May be called twice."""
        if self._record is not None:
            self._record.unlink()
        self.abandon()

    def abandon(self) -> None:
        """In a forked copy of the process: the file stays the parent's."""
        record, self._record = self._record, None
        if record is not None:
            record.close()
