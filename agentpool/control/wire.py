"""What travels over a control socket: one JSON object a line, of bounded length. The standard library only.

The server speaks first: `{"agentpool": VERSION, "protocol": 1, "pool": {...}, "verbs": [...]}`. A request is
`{"id": 7, "verb": "resize", "arguments": {"workers": 8}}`; its answer `{"id": 7, "ok": true, "result": ...}`, or
`{"id": 7, "ok": false, "error": {"code": ..., "message": ...}}`. A verb that follows something sends any number of
`{"id": 7, "event": {...}}` after its answer, and `{"id": 7, "end": "why"}`. docs/operations.md has all verbs.
"""

from __future__ import annotations

import json
from typing import Any, Final

from agentpool.errors import AgentPoolError

__all__ = ["LONGEST_REQUEST", "PROTOCOL", "ControlError", "decode", "encode"]

#: Raised when a client of the old one would misunderstand the new one; new verbs and keys do not.
PROTOCOL: Final = 1
LONGEST_REQUEST: Final = 64 * 1024


class ControlError(AgentPoolError):
    """What was asked of a pool over its control socket was not done. `code` is one of docs/operations.md."""

    code: str

    def __init__(self, message: str = "", code: str = "failed") -> None:
        super().__init__(message, code=code)


def encode(message: dict[str, Any]) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":"), default=str).encode() + b"\n"


def decode(line: bytes | bytearray) -> dict[str, Any]:
    """The object of one line. Raises ControlError for anything else, whatever it is."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ControlError(f"a line is not JSON: {error}"[:200], "bad-request") from None
    if not isinstance(message, dict):
        raise ControlError(f"a line must be a JSON object, got {type(message).__name__}", "bad-request")
    return message
