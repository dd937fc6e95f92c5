"""What operators may order of a running pool: resize, pause, resume, drain, recycle, kill a worker.

A facade: what an order means is decided in `agentpool.core.operations`. Any thread may call it, callbacks included, and
any number of times; each order is done, or is on its way, when the call returns.
"""

from __future__ import annotations

from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from agentpool.runtime.manager import Manager

if TYPE_CHECKING:
    from agentpool.futures import AgentFuture

__all__ = ["Operating"]


class Operating:
    """What a pool offers to its operators. All of it raises PoolClosedError once the pool is closed and empty."""

    _manager: Manager

    def resize(self, max_workers: int | None = None, max_concurrent: int | None = None) -> None:
        """Change how many workers there may be, how many tasks run at once, or both; None: leave that as it is.

        Growing starts what waits. Shrinking retires idle workers now, and others as soon as their tasks have ended; no
        task is stopped. Where `max_concurrent` was never given it follows `max_workers`; where it, or `min_workers`, is
        above a smaller `max_workers`, that counts until the pool grows again.
        Raises SettingsError, and changes nothing, for sizes that are out of range or contradict each other.
        """
        core = self._manager.core
        self._manager.order(lambda now: core.resize(now, max_workers, max_concurrent))

    def pause(self) -> None:
        """Begin no task until `resume`. Running tasks go on; new ones are accepted, within `max_pending`, and wait.

        Raises PoolClosedError while the pool shuts down; a shutdown or `drain` of a paused pool ends the pause.
        """
        self._manager.order_open(self._manager.core.pause)

    def resume(self) -> None:
        """End a pause or a drain: begin what waits, and accept new tasks. Raises PoolClosedError after shutdown."""
        self._manager.resume()

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new tasks (PoolClosedError) until `resume`, and wait until all that were accepted are settled.

        timeout: seconds to wait; None: as long as it takes. True: they are. False: some are not, and the pool goes on
        with them. Does not wait in a callback of a future. Workers stay; `shutdown` ends them.
        """
        futures: list[AgentFuture[Any]] = self._manager.drain()  # type: ignore[assignment]  # its calls are futures
        return not wait(futures, 0 if self._manager.is_own_thread else timeout).not_done

    def recycle(self, worker_id: int | None = None) -> int:
        """Replace one worker (its `id` in `get_pool_stats()["workers"]`), or all, as soon as their tasks have ended.

        No work is lost. Returns how many go for this; a worker that is starting, or leaving anyway, is not counted.
        Raises UnknownWorkerError for an id that no worker of this pool ever had.
        """
        core = self._manager.core
        return self._manager.order(lambda now: core.recycle(now, worker_id))

    def kill_worker(self, worker_id: int, reason: str = "") -> bool:
        """Kill one worker and all processes below it, now. The pool goes on, and replaces it where work waits.

        Its task fails with WorkerKilledError, which names `reason`; where its retry policy allows a lost worker it runs
        again, and so does one whose code the worker had not begun yet: `future.kill()` stops a task for good. False:
        that worker is gone already. Raises UnknownWorkerError for an id that no worker ever had.
        """
        core = self._manager.core
        words = f"pool.kill_worker({worker_id})" + (f": {reason}" if reason else "")
        return self._manager.order(lambda now: core.kill_worker(now, worker_id, words))
