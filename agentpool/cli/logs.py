"""`agentpool logs`: what workers wrote to their standard error, and what they go on writing."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

import typer

from agentpool.cli.reach import EXIT_CODES, Folder, Json, Pool, reach
from agentpool.cli.tables import seconds_words
from agentpool.cli.terminal import message
from agentpool_worker.agents.rendering import printable

__all__ = ["EXAMPLES", "logs"]

EXAMPLES: Final = f"""\b
The last 64 KiB of each worker's standard error are kept while it lives, and of
the last 16 workers that wrote any when they have ended. What a task prints to
standard output is the program's own output, and is not kept: print(...,
file=sys.stderr), or logging, is what can be followed. How a worker ended goes
to standard error.

{EXIT_CODES}
\b
Examples:
  agentpool logs 3
  agentpool logs -f
  agentpool logs -f 3 --pool reviews
"""


def logs(
    worker: Annotated[
        int | None, typer.Argument(metavar="WORKER", help="Its number in `agentpool status`; none: every worker.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the worker, or the pool, ends.")] = False,
    pool: Pool = None,
    as_json: Json = False,
    place: Folder = None,
) -> None:
    """Print what workers wrote to their standard error. Of several, each line begins with the worker's number."""
    with reach(pool, place) as client:
        printer = _Printer(has_prefix=worker is None)
        for event in client.follow("logs", worker=worker, follow=follow):
            if as_json:
                print(json.dumps(event), flush=True)
            else:
                printer.show(event)
        if not as_json:
            printer.end()
            if follow and worker not in printer.ended:
                message("the pool ended")


class _Printer:
    """Lines stay whole, however they arrive."""

    def __init__(self, *, has_prefix: bool) -> None:
        self._has_prefix = has_prefix
        self._rest: dict[int, str] = {}
        #: workers that are no more
        self.ended: set[int] = set()

    def show(self, event: dict[str, Any]) -> None:
        worker = event["worker"]
        if lost := event.get("lost"):
            message(f"{lost} bytes of worker {worker} are not kept any more")
        *lines, self._rest[worker] = (self._rest.get(worker, "") + event.get("text", "")).split("\n")
        if event.get("ended") and (rest := self._rest.pop(worker)):
            lines.append(rest)
        for line in lines:
            self._print(worker, line)
        if event.get("ended"):
            self.ended.add(worker)
            message(_end_words(worker, event))

    def end(self) -> None:
        for worker, rest in self._rest.items():
            if rest:
                self._print(worker, rest)

    def _print(self, worker: int, line: str) -> None:
        print(f"{worker:>3}  {printable(line)}" if self._has_prefix else printable(line), flush=True)


def _end_words(worker: int, event: dict[str, Any]) -> str:
    seconds, how = event.get("seconds_ago", 0.0), event.get("how", "")
    ago = f" {seconds_words(seconds)} ago" if seconds >= 1 else ""
    return f"worker {worker} ended{ago}" + (f": it {printable(how)}" if how else "")
