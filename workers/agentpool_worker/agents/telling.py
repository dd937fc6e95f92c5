"""What an agent program says meanwhile, passed on as the events of the task that runs it.

Runs in a worker. Where no task runs, nobody is told anything.
"""

from __future__ import annotations

from typing import Any

from agentpool_worker import context
from agentpool_worker.agents.reading import Event
from agentpool_worker.agents.tokens import token_counts

__all__ = ["Teller"]

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
                counts: dict[str, Any] = {**token_counts(data.get("usage"))}
                counts.pop("total_tokens", None)
                task.usage(**counts)
            elif kind == "retry":
                self._retries += 1
                task.retry(
                    _whole(data.get("attempt")) or self._retries,
                    limit=_whole(data.get("max_retries")),
                    delay_seconds=(_number(data.get("retry_delay_ms")) or 0.0) / 1000,
                    status=_whole(data.get("error_status")),
                    reason=str(data.get("error") or data.get("retry") or ""),
                )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
