"""What a task may ask of its worker, and tell its parent while it runs. Outside of a task `current()` raises.

    from agentpool_worker import context

    context.current().progress(3, total=10, message="reading")

What is told reaches `future.events()`. It never makes the task wait, and may be dropped where nobody keeps up; results
never are. Any thread of the task may tell; what is told after the task ended is not. Only the worker's main loop makes
contexts. What telling takes is imported with the first word.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from agentpool_worker.streaming import Outlet, Sender

_LEVELS: Final = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}


class TaskCancelled(BaseException):
    """Raised inside a task that is asked to stop: by a timeout, `future.kill()` or a shutdown.

    Not an Exception, so that `except Exception` does not swallow it. Clean up and let it pass: after the pool's
    `kill_grace` the worker is killed.
    """


class TaskContext:
    """The running task, as seen from inside."""

    __slots__ = ("_cancelled", "task_id", "worker_id")

    def __init__(self, task_id: int, worker_id: int, cancelled: threading.Event) -> None:
        self.task_id = task_id
        self.worker_id = worker_id
        self._cancelled = cancelled

    @property
    def is_cancelled(self) -> bool:
        """Has the task been asked to stop? For code in threads that the exception does not reach."""
        return self._cancelled.is_set()

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Say how far the task is: `done` of `total`, in any unit; `total` None where it is not known.

        Raises TypeError or ValueError for what is no number.
        """
        self._tell("progress", (_number(done), None if total is None else _number(total), str(message)))

    def emit(self, event: Any) -> None:
        """Pass anything that can be pickled to the parent, as the `data` of a `Custom` event.

        Raises what pickling raises, and ValueError for what is larger than `streaming.LARGEST` (960 KiB).
        """
        self._tell("custom", (event,))

    def log(self, message: str, level: int | str = "INFO") -> None:
        """Pass a line for the log. level: a number, or a name, as in `logging`. Raises ValueError for another name."""
        number = level if isinstance(level, int) else _LEVELS.get(str(level).upper())
        if number is None:
            raise ValueError(f"level must be a number or one of {', '.join(_LEVELS)}, got {level!r}")
        self._tell("log", (number, str(message)))

    # -- what agents tell ----------------------------------------------------------------------------------------

    def text(self, text: str, *, is_delta: bool = False) -> None:
        """An agent said this. is_delta: it is a part, to be put behind the part before."""
        self._tell("text", (str(text), is_delta))

    def tool_use(self, name: str, input: Any = None, id: str = "") -> None:
        """An agent uses a tool. input: plain data."""
        self._tell("tool_use", (str(name), input, str(id)))

    def usage(
        self,
        *,
        input_tokens: int = 0,
        output_tokens: int = 0,
        cache_read_tokens: int = 0,
        cache_write_tokens: int = 0,
        cost_usd: float | None = None,
        is_total: bool = False,
    ) -> None:
        """What an agent used: in one call of a model or, `is_total`, by the whole task so far."""
        tokens = (input_tokens, output_tokens, cache_read_tokens, cache_write_tokens)
        self._tell("usage", (*tokens, cost_usd, is_total))

    def retry(
        self,
        number: int,
        *,
        limit: int | None = None,
        delay_seconds: float = 0.0,
        status: int | None = None,
        reason: str = "",
    ) -> None:
        """An agent tries a call of its model again by itself: which retry this is, from 1, of how many, and why."""
        self._tell("retry", (number, limit, delay_seconds, status, str(reason)))

    def _tell(self, kind: str, data: tuple[Any, ...]) -> None:
        if _current is self:  # else a thread of a task that ended
            sender = _senders.get(self.task_id) or _open(self.task_id)
            if sender is not None:
                sender.put(kind, data)


_current: TaskContext | None = None
#: what events go through: the worker; None outside of one, and in what a task forked
_outlet: Outlet | None = None
#: of the running task, where it told something: at most one, and a dict as that is made but once by several threads
_senders: dict[int, Sender] = {}
#: what the running task began that ends with it: see `capture`
_endings: list[Callable[[], None]] = []


def current() -> TaskContext:
    """The context of the task that this worker runs. Raises RuntimeError outside of a worker's task."""
    if _current is None:
        raise RuntimeError("agentpool_worker.context.current() is for code that runs as a task of an AgentPool")
    return _current


def _number(value: Any) -> float:
    return value if type(value) in (int, float) else float(value)


def _open(task_id: int) -> Sender | None:
    if _outlet is None:
        return None
    from agentpool_worker import streaming

    return _senders.setdefault(task_id, streaming.Sender(_outlet, task_id))


def _enter(context: TaskContext) -> None:
    """The worker's: a task begins."""
    global _current
    _current = context


def _leave() -> None:
    """The worker's: the task has ended, and its result will be sent next."""
    global _current
    while _endings:
        _endings.pop()()
    _current = None
    while _senders:
        _senders.popitem()[1].close()


def _connect(outlet: Outlet | None) -> None:
    """The worker's, once. None: in a process that a task forked, which has no word."""
    global _outlet
    _outlet = outlet
    _senders.clear()
    _endings.clear()
