"""What came of a task: values that are rebuilt where they are asked for, and errors with their remote traceback.

A value stays as bytes until somebody calls `result()`, in whose thread it is unpickled: a result of 300 MB must not
hold up the manager thread. Errors are small and are rebuilt at once. Any thread may call this module.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentpool.errors import (
    AgentPoolError,
    InitializerError,
    RemoteTaskError,
    ResultPicklingError,
    ResultUnpicklingError,
    TaskUnpicklingError,
)
from agentpool_worker import protocol
from agentpool_worker.protocol import Frame

__all__ = ["Encoded", "RemoteTraceback", "decode_error", "decode_value", "initializer_error", "unpickling_error"]


class Encoded:
    """A result as the worker sent it."""

    __slots__ = ("buffers", "payload")

    def __init__(self, payload: bytes | bytearray | memoryview, buffers: Sequence[memoryview]) -> None:
        self.payload = payload
        self.buffers = buffers

    def rebuild(self) -> object:
        """The value. Raises what unpickling raises. May be called again: buffers are shared by what it returns."""
        return protocol.loads(self.payload, buffers=self.buffers)


class RemoteTraceback(Exception):
    """The traceback of a task's exception, as text: the `__cause__` of the exception that a future raises."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def decode_value(frame: Frame) -> tuple[bool, object]:
    """A value that a retry policy wants to see, as (is it a value, value or error)."""
    try:
        return True, Encoded(frame.payload, frame.buffers).rebuild()
    except BaseException as error:  # user code; anything may come of it
        return False, unpickling_error(error)


def unpickling_error(cause: BaseException) -> ResultUnpicklingError:
    """What a future raises for a result that cannot be rebuilt here."""
    error = ResultUnpicklingError(
        "the task returned, but its result could not be rebuilt in this process: "
        f"{type(cause).__name__}: {cause}"
    )
    error.__cause__ = cause
    return error


def decode_error(frame: Frame) -> BaseException:
    """The exception that a future gets for an error frame."""
    pickled, name, message, text, why, where = protocol.loads(frame.payload, buffers=frame.buffers)
    original = _rebuild(pickled, name, message, text, why)
    if frame.kind == protocol.ERROR or (frame.kind == protocol.RESULT_FAILED and not isinstance(original, Exception)):
        return original  # (a result whose pickling raises SystemExit is a SystemExit, as in the standard library)
    error: AgentPoolError
    if frame.kind == protocol.CALL_FAILED:
        error = TaskUnpicklingError(
            f"the call arrived in the worker, but its function or an argument could not be rebuilt there: {name}: "
            f"{message}. A module that only this process knows can be sent along with "
            "cloudpickle.register_pickle_by_value(module)"
        )
    else:
        error = ResultPicklingError(
            f"the task returned, but {where or 'its result'} cannot be pickled, so it cannot be sent back: {name}: "
            f"{message}. Return plain data, or what is needed to make the object again"
        )
    error.__cause__ = original
    return error


def _rebuild(pickled: bytes | None, name: str, message: str, text: str, why: str) -> BaseException:
    if pickled is not None:
        try:
            error = protocol.loads(pickled)
        except BaseException as failure:  # user code of the exception's class; anything may come of it
            why = f"{type(failure).__name__}: {failure}"
        else:
            if isinstance(error, BaseException):
                error.__cause__ = RemoteTraceback(text)
                return error
            why = f"its pickle makes a {type(error).__qualname__}"
    replaced = RemoteTaskError(
        f"{name}: {message} (the task raised this; the exception itself cannot be sent between processes: {why}. An "
        "exception class whose __init__ takes other arguments than it passes to super().__init__ needs a __reduce__)",
        type_name=name,
        traceback_text=text,
    )
    replaced.__cause__ = RemoteTraceback(text)
    return replaced


def initializer_error(frame: Frame) -> InitializerError:
    """What breaks a pool whose initializer raised."""
    pickled, name, message, text, why, _ = protocol.loads(frame.payload, buffers=frame.buffers)
    error = InitializerError(
        f"the initializer raised {name}: {message}; the pool is broken, and runs nothing. Its traceback is below"
    )
    error.__cause__ = _rebuild(pickled, name, message, text, why)
    error.add_note(text)
    return error
