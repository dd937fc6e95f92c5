"""Counts of tokens, by one set of names, out of what each agent program and provider calls them.

Pure. The worker uses it for events, the orchestrator for its report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["token_counts"]

#: Ours, and how they are called: by Anthropic and codex, opencode, OpenAI, gemini. Dots lead into an object.
_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "input_tokens": ("input_tokens", "input", "prompt_tokens", "prompt"),
    "output_tokens": ("output_tokens", "output", "completion_tokens", "candidates"),
    "cache_read_tokens": ("cache_read_tokens", "cache_read_input_tokens", "cached_input_tokens", "cache.read",
                          "cached"),
    "cache_write_tokens": ("cache_write_tokens", "cache_creation_input_tokens", "cache_write_input_tokens",
                           "cache.write"),
    "total_tokens": ("total_tokens", "total"),
}
#: Who calls them so counts them among the input tokens as well.
_COUNTED_TWICE: Final = ("cached_input_tokens", "cached")


def token_counts(usage: object) -> dict[str, int]:
    """The counts that `usage` has, an object or a mapping; `input_tokens` are those that no cache had."""
    models = [_at(model, "tokens") for model in usage.values()] if isinstance(usage, Mapping) else []
    if models and all(isinstance(tokens, Mapping) for tokens in models):
        return _sum(map(token_counts, models))  # gemini's, by model
    counts = {}
    for name, theirs in _NAMES.items():
        found = next((count for count in (_at(usage, path) for path in theirs) if type(count) is int), None)
        if found is not None:
            counts[name] = found
    if "input_tokens" in counts:
        twice = next((count for count in (_at(usage, path) for path in _COUNTED_TWICE) if type(count) is int), 0)
        counts["input_tokens"] = max(0, counts["input_tokens"] - twice)
    return counts


def _at(thing: object, path: str) -> Any:
    for name in path.split("."):
        try:
            thing = thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
        except Exception:  # a property of a user's class; nothing is worth less for it
            return None
    return thing


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in parts:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total
