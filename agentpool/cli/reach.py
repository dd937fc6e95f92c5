"""Which pool a command is meant for, and what its exit code is when that pool cannot be had. Main thread only.

Exit codes of the commands that look at pools and order them about:

    0 done   1 done, and the answer is no   2 wrong command line   3 no such pool   4 several pools: say which
    5 the pool does not answer   6 the pool refused   7 the pool ended meanwhile   130 interrupted
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer

from agentpool.cli.terminal import CommandFailed
from agentpool.control import folder
from agentpool.control.client import ControlClient, FoundPool, find_pools
from agentpool.control.wire import ControlError

__all__ = ["EXIT_CODES", "Folder", "Json", "Pool", "answer_no", "choose", "failure", "folders", "print_json", "reach"]

ANSWER_IS_NO: Final = 1
NO_POOL: Final = 3
SEVERAL_POOLS: Final = 4
NO_ANSWER: Final = 5
REFUSED: Final = 6
POOL_ENDED: Final = 7

EXIT_CODES: Final = """\b
Exit code: 0: done; 1: done, and the answer is no; 2: wrong command line;
3: no such pool; 4: several pools, say which; 5: the pool does not answer;
6: the pool refused; 7: the pool ended meanwhile; 130: interrupted.
"""

Pool = Annotated[
    str | None,
    typer.Option("--pool", "-p", metavar="ID|NAME|PID", envvar="AGENTPOOL_POOL",
                 help="Which pool, as `agentpool ps` lists it; not needed where there is only one."),
]
Folder = Annotated[
    str | None,
    typer.Option("--control-dir", metavar="DIR", envvar="AGENTPOOL_CONTROL_DIR",
                 help="Look for pools in this folder only, as in AgentPool(control=DIR)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_CODES: Final = {"gone": POOL_ENDED, "closed": POOL_ENDED, "silent": NO_ANSWER, "protocol": NO_ANSWER,
                 "bad-request": NO_ANSWER, "refused": NO_ANSWER}


def folders(given: str | None) -> list[str]:
    """Where to look. Raises CommandFailed for a folder that was named and is none of this user's."""
    if given is None:
        return folder.candidates()
    try:
        os.close(folder.open_folder(given))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CommandFailed(f"{given}: {error.strerror}", NO_POOL) from None
    return [given]


def failure(error: ControlError) -> CommandFailed:
    """As the command line tells it."""
    return CommandFailed(str(error), _CODES.get(error.code, REFUSED))


def answer_no(is_no: bool) -> None:
    """End with exit code 1 where it is so."""
    if is_no:
        raise typer.Exit(ANSWER_IS_NO)


def choose(wanted: str | None, place: str | None) -> FoundPool:
    """The pool that is meant. Raises CommandFailed, with the pools that there are."""
    found = find_pools(folders(place))
    matching = found if wanted is None else [pool for pool in found if pool.matches(wanted)]
    if len(matching) == 1:
        return matching[0]
    if not found:
        raise CommandFailed(f"there is no pool of this user {_where(place)}. A pool can be seen from 50 ms after its "
                            "first task on, unless it was made with control=False", NO_POOL)
    words = "these pools are there" if wanted is None or not matching else f"these pools are called {wanted}"
    if not matching:
        words = f"no pool is called {wanted}; these are there"
    lines = "\n".join(f"  {_line(pool)}" for pool in matching or found)
    raise CommandFailed(f"{words}; say which with --pool ID:\n{lines}" if matching else f"{words}:\n{lines}",
                        SEVERAL_POOLS if matching else NO_POOL)


def _where(place: str | None) -> str:
    return f"in {place}" if place is not None else "on this host"


def _line(pool: FoundPool) -> str:
    if pool.problem:
        return f"{os.path.basename(pool.path)}: {pool.problem}"
    command = " ".join(pool.pool["command"])[:60]
    return f"{pool.pool['id']}  {pool.pool['name']}  ({command})"


@contextmanager
def reach(wanted: str | None, place: str | None) -> Iterator[ControlClient]:
    """Connected to the pool that is meant. What it refuses, or its end, is a CommandFailed."""
    try:
        with choose(wanted, place).connect() as client:
            yield client
    except ControlError as error:
        raise failure(error) from None


def print_json(document: Any) -> None:
    """One document."""
    print(json.dumps(document, indent=2))
