"""Why a program could not be started, in words that name the cure. Pure but for the size of a page; any thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

__all__ = ["why_not_started"]


def why_not_started(argv: Sequence[str], cwd: object, error: OSError | ValueError) -> str:
    """`error` is what starting `argv` in `cwd` (None: here) came to: OSError, or ValueError for a NUL in a word."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.errno == errno.E2BIG:
        reason = f"{reason}: {_too_long(argv)}"
    # The operating system reports a missing directory, or a script's missing interpreter, on the same number.
    where = f" in directory {cwd}" if cwd is not None else ""
    return f"cannot start {argv[0]!r}{where}: {reason}"


def _too_long(argv: Sequence[str]) -> str:
    sizes = [len(os.fsencode(word)) for word in argv]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    limit = 32 * os.sysconf("SC_PAGE_SIZE") - 1  # Linux: MAX_ARG_STRLEN, with its NUL
    cure = "shorten it, hand it over on standard input, or write it to a file and name that"
    if sizes[longest] > limit:
        return (f"its argument {longest}, {argv[longest][:30]!r}..., has {sizes[longest]:,} bytes, and the system "
                f"takes {limit:,} in one; {cure}")
    return f"its arguments ({sum(sizes):,} bytes) and its environment are more than the system takes together; {cure}"
