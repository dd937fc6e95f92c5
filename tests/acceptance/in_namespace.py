"""Runs a command in a network namespace that has loopback and nothing else, where that is permitted.

    python tests/acceptance/in_namespace.py COMMAND...

Agent programs look for updates, report, and fetch lists of models. Here they reach nobody. Where no namespace may be
made the command runs as it is, and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

UP = 'ip link set lo up 2>/dev/null || ifconfig lo up || exit 77; exec "$@"'


def main(command: list[str]) -> None:
    for options in (["-n"], ["-r", "-n"]):
        unshare = shutil.which("unshare")
        if unshare is None:
            break
        inside = [unshare, *options, "sh", "-c", UP, "sh"]
        if subprocess.run([*inside, "true"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
            os.environ["AGENTPOOL_ACCEPTANCE_NETWORK"] = "loopback only"
            os.execv(unshare, [*inside, *command])
    print("no network namespace may be made here: the agent programs see the network as it is", file=sys.stderr)
    os.environ["AGENTPOOL_ACCEPTANCE_NETWORK"] = "not isolated"
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
