"""Keeps Ctrl-C from tearing a change of the core apart.

KeyboardInterrupt is raised between any two instructions of the main thread, also in the middle of a critical section:
the core would be half changed then. Around such a section the standard handler of SIGINT gives way to one that takes
note; at the end KeyboardInterrupt is raised where it can do no harm. It costs 0.6 us, in the main thread only.
A handler that the program set itself is left alone; for what that raises see `Manager._enter`.
"""

from __future__ import annotations

# The functions behind `signal`, which itself takes ten times as long, for making enums.
import _signal  # type: ignore[import-not-found]
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["held", "hold", "release"]

_SIGINT = int(signal.SIGINT)
_main_thread = threading.main_thread().ident
_came = False


def _take_note(number: int, frame: object) -> None:
    global _came
    _came = True


def hold() -> bool:
    """Have Ctrl-C wait until `release`. False: there is nothing to hold, and nothing to release."""
    global _came
    if threading.get_ident() != _main_thread or _signal.getsignal(_SIGINT) is not signal.default_int_handler:
        return False
    _came = False  # a second one may have been raised by itself in `release`, and have left it set
    _signal.signal(_SIGINT, _take_note)
    return True


def release() -> None:
    """Raises KeyboardInterrupt where Ctrl-C came since `hold`."""
    global _came
    _signal.signal(_SIGINT, signal.default_int_handler)
    if _came:
        _came = False
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """`hold` and `release` around a block, off the hot path. Blocks may be nested."""
    is_held = hold()
    try:
        yield
    finally:
        if is_held:
            release()


def _after_fork_in_child() -> None:
    global _main_thread
    _main_thread = threading.main_thread().ident


os.register_at_fork(after_in_child=_after_fork_in_child)
