"""`agentpool doctor`: looks whether this host is fit for pools, and tries each part of one. Main thread only."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any, Final

import typer

from agentpool.cli.reach import Json, answer_no, print_json
from agentpool.cli.tables import print_table

__all__ = ["EXAMPLES", "doctor"]

EXAMPLES: Final = """\b
Exit code: 0: nothing failed; 1: a check failed; 2: wrong command line.

\b
Examples:
  agentpool doctor
  agentpool doctor --no-try
  agentpool doctor --json | jq '.checks[] | select(.result == "fail")'
"""


def doctor(
    tries: Annotated[bool, typer.Option("--try/--no-try", help="Try a pool too: starts workers for a moment.")] = True,
    as_json: Json = False,
) -> None:
    """Check this host: memory limits, start methods, pidfd, subreaper, pressure, descriptors; then try each part."""
    from agentpool.cli.checks import LOOKS, TRIALS

    logging.getLogger("agentpool").setLevel(logging.CRITICAL)  # what the trials provoke is no news
    done: list[dict[str, Any]] = []
    for check in (*LOOKS, *(TRIALS if tries else ())):
        if sys.stderr.isatty():
            print(f"\r\x1b[K{check.name} ...", end="", file=sys.stderr, flush=True)
        done.append({"name": check.name, **check.run()})
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    failed = sum(each["result"] == "fail" for each in done)
    if as_json:
        print_json({"ok": not failed, "checks": done})
    else:
        print_table(["CHECK", "RESULT", "FOUND"], [(each["name"], each["result"], _words(each)) for each in done],
                    states="RESULT")
        warned = sum(each["result"] == "warn" for each in done)
        print(f"\n{len(done)} checks: {failed} failed, {warned} with a warning.")
    answer_no(failed > 0)


def _words(check: dict[str, Any]) -> str:
    return f"{check['found']}. {check['cure']}" if check["cure"] else str(check["found"])
