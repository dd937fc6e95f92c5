"""What a task says while it runs: frozen records, and how they are rebuilt from what a worker sent.

`future.events()` yields them. Each has a `kind`, the `time` at which it was made, in seconds since the epoch, and the
`attempt` of the task that made it, counted from 1. Any thread may use this module; it knows nothing of pools and pipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final

from agentpool_worker import protocol

if TYPE_CHECKING:
    import logging

__all__ = [
    "Custom",
    "Event",
    "Log",
    "Output",
    "Progress",
    "Retry",
    "Text",
    "ToolUse",
    "Unreadable",
    "Usage",
    "decode",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all events have. time: seconds since the epoch, by the worker's clock. attempt: of the task, from 1."""

    kind: ClassVar[str] = "event"

    time: float
    attempt: int

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data, `kind` included; `Custom.data` is whatever it is."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """`done` of `total` (None: not known) in units of the task's own choice."""

    kind: ClassVar[str] = "progress"

    done: float
    total: float | None = None
    message: str = ""

    @property
    def fraction(self) -> float | None:
        """Between 0 and 1; None where no total is known."""
        if self.total is None or self.total <= 0:
            return None
        return min(1.0, max(0.0, self.done / self.total))


@dataclass(frozen=True, slots=True, kw_only=True)
class Log(Event):
    """A line for a log: of `context.current().log(...)`, or a record of the standard `logging`.

    level: as in `logging`. logger: its name, "" for the context's own. traceback: as text, "" where there is none.
    """

    kind: ClassVar[str] = "log"

    level: int
    message: str
    logger: str = ""
    traceback: str = ""
    thread: str = ""

    @property
    def level_name(self) -> str:
        """"INFO", "WARNING" and so on."""
        import logging

        return logging.getLevelName(self.level)

    def record(self) -> logging.LogRecord:
        """As a record for this process's own logging: `logging.getLogger(record.name).handle(record)`."""
        import logging

        message = f"{self.message}\n{self.traceback}" if self.traceback else self.message
        name = self.logger or "agentpool.task"
        record = logging.LogRecord(name, self.level, "", 0, message, None, None)
        record.created, record.msecs = self.time, (self.time % 1) * 1000
        record.threadName = self.thread
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class Output(Event):
    """What the task, C code in it, or a process that it started wrote. stream: "stdout" or "stderr".

    Cut wherever it was when it was read: lines may be several, or parts. `time` is when it was read.
    """

    kind: ClassVar[str] = "output"

    stream: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Event):
    """An agent said something. is_delta: a part of what it is saying, to be put behind the part before."""

    kind: ClassVar[str] = "text"

    text: str
    is_delta: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse(Event):
    """An agent uses a tool. input: plain data, or the agent's own text. id: the agent's, "" where it has none."""

    kind: ClassVar[str] = "tool_use"

    name: str
    input: Any = None
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(Event):
    """What an agent used. is_total: by the whole task so far, and not by one call of a model.

    input_tokens: those that no cache had. cost_usd: None where it is not known.
    """

    kind: ClassVar[str] = "usage"

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cost_usd: float | None = None
    is_total: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry(Event):
    """An agent tries a call of its model again by itself; the pool's own retries are attempts.

    number: which retry, from 1; limit: how many there will be at most, None: not known. status: of HTTP.
    """

    kind: ClassVar[str] = "retry"

    number: int
    limit: int | None = None
    delay_seconds: float = 0.0
    status: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Custom(Event):
    """What the task passed to `context.current().emit(...)`."""

    kind: ClassVar[str] = "custom"

    data: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable(Event):
    """An event that cannot be rebuilt in this process. `time` is when that was tried. error: why."""

    kind: ClassVar[str] = "unreadable"

    error: str


_CLASSES: Final[Mapping[str, type[Event]]] = {
    cls.kind: cls for cls in (Progress, Log, Output, Text, ToolUse, Usage, Retry, Custom)
}
_FIELDS: Final = {
    kind: tuple(field.name for field in fields(cls) if field.name not in ("time", "attempt"))
    for kind, cls in _CLASSES.items()
}


def decode(payload: bytes, attempt: int) -> Event:
    """The event that a worker of this process sent. Never raises, but for Ctrl-C while a user's class is rebuilt."""
    try:
        time, kind, data = protocol.loads(payload)
        names = _FIELDS[kind]
        return _CLASSES[kind](time=time, attempt=attempt, **dict(zip(names, data, strict=False)))
    except KeyboardInterrupt:
        raise  # it is the reader's
    except BaseException as error:  # code of the user's classes; anything may come of it
        from time import time as now

        return Unreadable(time=now(), attempt=attempt, error=f"{type(error).__name__}: {error}")
