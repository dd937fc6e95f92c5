"""What Claude Code knows of its sessions on this host, for `agentpool ps`: the answer of `claude agents --json`.

It starts a program of 130 MB for a quarter of a second, so it is asked only where one of its processes was found. One
that is missing, does not know the command, says something else or takes too long tells nothing. Main thread only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from typing import Any, Final

__all__ = ["find_sessions"]

#: Seconds that it may take.
PATIENCE: Final = 2.0
#: It is to look, and to call nobody.
_QUIET: Final = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "DISABLE_TELEMETRY": "1"}
_KEYS: Final = ("kind", "status", "name", "cwd", "sessionId")


def find_sessions() -> dict[int, dict[str, str]]:
    """For the pid of each session what is known: `kind`, `status`, `name`, `cwd`, `sessionId`."""
    program = shutil.which("claude")
    answer = "" if program is None else _answer([program, "agents", "--json"])
    try:
        found: Any = json.loads(answer)
    except ValueError:
        return {}
    sessions = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    return {
        each["pid"]: {key: str(each[key]) for key in _KEYS if each.get(key) is not None}
        for each in sessions if isinstance(each.get("pid"), int)
    }


def _answer(command: list[str]) -> str:
    # In a folder without settings, and in a session of its own: it may have processes below it.
    process = subprocess.Popen(command, cwd="/", env=os.environ | _QUIET, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    with process:
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    return said.decode(errors="replace") if process.returncode == 0 else ""
