"""What an agent program says meanwhile, passed on as the events of the task that runs it.

Runs in a worker. Where no task runs, nobody is told anything.
"""

from __future__ import annotations

from typing import Any

from agentpool_worker import context
from agentpool_worker.agents.reading import Event

__all__ = ["Teller"]

#: How the programs call their tokens.
_TOKENS = {
    "input_tokens": ("input_tokens", "input", "prompt_tokens"),
    "output_tokens": ("output_tokens", "output", "completion_tokens"),
    "cache_read_tokens": ("cache_read_input_tokens", "cached_input_tokens"),
    "cache_write_tokens": ("cache_creation_input_tokens", "cache_write_input_tokens"),
}


class Teller:
    """For one prompt."""

    def __init__(self) -> None:
        self._retries = 0

    def tell(self, events: list[Event]) -> None:
        """Pass these on. Anything may be in their data."""
        if not events:
            return
        try:
            task = context.current()
        except RuntimeError:  # the agent is used by hand, outside of a pool
            return
        for kind, data in events:
            if kind == "text":
                task.text(str(data.get("text", "")))
            elif kind == "tool_use":
                name = data.get("name") or data.get("tool") or data.get("type") or ""
                task.tool_use(str(name), data.get("input", data), str(data.get("id") or data.get("callID") or ""))
            elif kind == "usage":
                task.usage(**_tokens(data.get("usage")))
            elif kind == "retry":
                self._retries += 1
                task.retry(
                    _whole(data.get("attempt")) or self._retries,
                    limit=_whole(data.get("max_retries")),
                    delay_seconds=(_number(data.get("retry_delay_ms")) or 0.0) / 1000,
                    status=_whole(data.get("error_status")),
                    reason=str(data.get("error") or data.get("retry") or ""),
                )


def _tokens(usage: Any) -> dict[str, Any]:
    if not isinstance(usage, dict):
        return {}
    found: dict[str, Any] = {}
    for name, theirs in _TOKENS.items():
        value = next((_whole(usage[key]) for key in theirs if key in usage), None)
        if value is not None:
            found[name] = value
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
