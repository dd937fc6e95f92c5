"""What a task writes and logs, passed to its parent as events: for tasks submitted with the options that ask for it.

Standard output and error become pipes for the length of the task, by file descriptor, so that C code and processes that
the task starts are heard as well. The parent reads these pipes, and not a thread of this process: C code that holds the
interpreter while it fills one would wait for that thread for ever, and the last words of a crash would die with it.
Imported with the first such task; called by the worker's main thread.
"""

from __future__ import annotations

import fcntl
import os
import sys

from agentpool_worker import context, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from collections.abc import Callable
    from typing import Any, Final

    from agentpool_worker.streaming import Outlet

#: Copies of the worker's own descriptors are kept out of the way of code that counts on low numbers.
_KEPT_AT: Final = 200


def run(
    has_output: bool, level: int | None, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A call whose output, and what it logs at this level or above, the parent wants to have.

    The worker ends what is begun here, when it cannot be interrupted any more. Raises what the call raises, and OSError
    where no pipes can be had.
    """
    outlet = context._outlet
    if outlet is not None:
        held = outlet.hold_stop()
        try:
            if has_output:
                _Output().begin(outlet)
            if level is not None:
                _begin_logging(level)
        finally:
            outlet.release_stop(held)
    return protocol.finish(function(*args, **kwargs))


class _Output:
    """Descriptors 1 and 2 of the worker, and what they are while a task has them."""

    def __init__(self) -> None:
        #: descriptor -> a copy of what it was
        self._kept: dict[int, int] = {}
        self._streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
        self._was_buffered = [stream for stream in self._streams if not stream.line_buffering]

    def begin(self, outlet: Outlet) -> None:
        flush(*self._streams)  # what was written before is not the task's
        pipes: dict[int, tuple[int, int]] = {}
        try:
            for number in (1, 2):
                pipes[number] = os.pipe()
            outlet.send_output(context.current().task_id, [pipes[1][0], pipes[2][0]])
            context._endings.append(self.end)
            for number, (_, writing) in pipes.items():
                self._kept[number] = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _KEPT_AT)
                os.dup2(writing, number)
        finally:
            for pair in pipes.values():
                for descriptor in pair:
                    os.close(descriptor)
        self._buffer_lines(True)  # as at a terminal: whoever looks on sees it as it comes

    def end(self) -> None:
        flush(*self._streams, sys.stdout, sys.stderr)  # those that the task put there, too
        for number, kept in self._kept.items():
            try:
                os.dup2(kept, number)
                os.close(kept)
            except OSError:  # the task closed all descriptors that it could think of
                _to_nowhere(number)
        self._buffer_lines(False)

    def _buffer_lines(self, is_wanted: bool) -> None:
        for stream in self._was_buffered:
            try:
                stream.reconfigure(line_buffering=is_wanted)
            except ValueError:  # the task closed or detached it
                continue


def _to_nowhere(number: int) -> None:
    opened = os.open(os.devnull, os.O_WRONLY)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)


def flush(*streams: Any) -> None:
    """Write what these and the C library hold back."""
    for stream in streams:
        try:
            if stream is not None:
                stream.flush()
        except Exception:  # the task closed it, or put something else there: its own affair
            continue
    import ctypes

    ctypes.CDLL(None).fflush(None)


# -- logging ---------------------------------------------------------------------------------------------------------


def _begin_logging(level: int) -> None:
    import logging

    class Handler(logging.Handler):
        """Tells of records what can be told in words."""

        def emit(self, record: logging.LogRecord) -> None:
            try:
                _tell(record)
            except Exception:  # as the handlers of the standard library: one that cannot be formatted is no fault
                self.handleError(record)

    root, handler = logging.getLogger(), Handler(level)
    before = root.level
    lowered = min(before or logging.WARNING, level) or before

    def end() -> None:
        root.removeHandler(handler)
        if root.level == lowered:  # else the task set it, for its worker
            root.setLevel(before)

    context._endings.append(end)
    root.addHandler(handler)
    root.setLevel(lowered)


def _tell(record: logging.LogRecord) -> None:
    import logging

    trace = ""
    if record.exc_info:
        trace = logging.Formatter().formatException(record.exc_info)
    elif record.exc_text:
        trace = record.exc_text
    if record.stack_info:
        trace = f"{trace}\n{record.stack_info}" if trace else record.stack_info
    current = context._current
    if current is not None:  # else a thread that outlives its task
        words = (record.levelno, record.getMessage(), record.name, trace, record.threadName or "")
        current._tell("log", words)
