"""The command: `python -m stress`, with one subcommand for each way to try to break the pool."""

from __future__ import annotations

import argparse
import sys

from stress import run, simulate

EXAMPLES = """\
subcommands:
  run        scenarios with real processes (python -m stress run --help)
  simulate   schedules of faults on an imaginary machine, in virtual time (python -m stress simulate --help)

see also: python -m stress.bench --help
"""


def main(words: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stress", description="Tries to break agentpool.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for module in (run, simulate):
        module.add_to(subcommands)
    options = parser.parse_args(words)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
