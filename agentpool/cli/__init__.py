"""The `agentpool` command. Nothing of typer or rich is imported before it is known to be there.

Runs on the main thread of a process of its own. The only part of agentpool that reads the environment and files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_NEEDED = ("typer", "rich")
_INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line `args` (default: that of this process) and returns its exit code.

    0: everything succeeded. 2: a wrong command line. 130: interrupted. Each command's help names the others.
    """
    try:
        from agentpool.cli.app import run_app

        return run_app(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt:  # before or after the time in which a command answers to signals itself
        return _INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        print(
            f"agentpool: the command line needs {' and '.join(_NEEDED)}, and {error.name} is not installed.\n"
            "Install them with: pip install 'agentpool-runtime[cli]'",
            file=sys.stderr,
        )
        return 1
