"""Keeps Ctrl-C from tearing a change of the core apart.

KeyboardInterrupt is raised between any two instructions of the main thread, also in the middle of a critical section:
the core would be half changed then. Around such a section the standard handler of SIGINT gives way to one that takes
note; at the end KeyboardInterrupt is raised where it can do no harm. It costs 0.7 us, in the main thread only.
A handler that the program set itself is left alone; for what that raises see `Manager._enter`. Where it raises between
`hold` and the `try` behind it, `release` is never called: so the one that takes note looks whether the section is
still on the stack, and gives way where it is not.
"""

from __future__ import annotations

# The functions behind `signal`, which itself takes ten times as long, for making enums.
import _signal  # type: ignore[import-not-found]
import contextlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType

__all__ = ["held", "hold", "release"]

_SIGINT = int(signal.SIGINT)
_main_thread = threading.main_thread().ident
_came = False
#: the call that holds; None: nobody does
_holder: FrameType | None = None


def _take_note(number: int, frame: FrameType | None) -> None:
    global _came, _holder
    while frame is not None and frame is not _holder:
        frame = frame.f_back
    if frame is not None:
        _came = True
        return
    _holder = None
    _signal.signal(_SIGINT, signal.default_int_handler)
    raise KeyboardInterrupt


def hold(holder: FrameType | None = None) -> bool:
    """Have Ctrl-C wait until `release`, at the latest until the caller (or the call `holder`) has ended.

    False: there is nothing to hold, and nothing to release.
    """
    global _came, _holder
    if threading.get_ident() != _main_thread or _signal.getsignal(_SIGINT) is not signal.default_int_handler:
        return False
    _came = False  # a second one may have been raised by itself in `release`, and have left it set
    _holder = holder or sys._getframe(1)
    _signal.signal(_SIGINT, _take_note)
    return True


def release() -> None:
    """Raises KeyboardInterrupt where Ctrl-C came since `hold`."""
    global _came, _holder
    _signal.signal(_SIGINT, signal.default_int_handler)
    _holder = None
    if _came:
        _came = False
        raise KeyboardInterrupt


def _manages_a_context(code: CodeType) -> bool:
    return code.co_filename == contextlib.__file__ or bool(code.co_flags & inspect.CO_GENERATOR)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """`hold` and `release` around a block, off the hot path. Blocks may be nested."""
    # The call whose block this is: context managers, as this one is, are not on the stack while it runs.
    caller: FrameType | None = sys._getframe(1)
    while caller and (_manages_a_context(caller.f_code)):
        caller = caller.f_back
    is_held = hold(caller)
    del caller  # it has this generator in its variables
    try:
        yield
    finally:
        if is_held:
            release()


def _after_fork_in_child() -> None:
    global _main_thread
    _main_thread = threading.main_thread().ident


os.register_at_fork(after_in_child=_after_fork_in_child)
