"""Changes one value in a JSON text and leaves every other character as it is: order, indentation, spacing.

Pure; any thread. Where the text cannot be read, or an object is expected and something else stands there, ValueError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, Final

__all__ = ["remove", "set_value"]

_DECODER: Final = json.JSONDecoder()
_SPACE: Final = re.compile(r"[ \t\r\n]*")


class _Member:
    """One member of an object, or element of an array: where its text begins, its value, and where it ends."""

    __slots__ = ("begin", "end", "key", "value_at")

    def __init__(self, key: str | int, begin: int, value_at: int, end: int) -> None:
        self.key = key
        self.begin = begin
        self.value_at = value_at
        self.end = end


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _members(text: str, at: int) -> tuple[list[_Member], int]:
    """The members of the object or array that begins at `at`, and where it is closed."""
    is_object = text[at] == "{"
    members: list[_Member] = []
    at = _skip(text, at + 1)
    while text[at] not in "]}":
        begin = at
        key: str | int = len(members)
        if is_object:
            key, at = scanstring(text, at + 1)
            at = _skip(text, _skip(text, at) + 1)
        value_at = at
        _, at = _DECODER.raw_decode(text, at)
        members.append(_Member(key, begin, value_at, at))
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return members, at


def _indent_of(text: str) -> str:
    found = re.search(r"[{\[][ \t]*\r?\n([ \t]+)", text)
    return found[1] if found else "  "


def _dumped(value: Any, unit: str, level: int) -> str:
    return json.dumps(value, indent=unit, ensure_ascii=False).replace("\n", "\n" + unit * level)


def set_value(text: str, path: Sequence[str | int], value: Any) -> str:
    """The text with `value` at `path`; objects on the way that are missing are made. An index past the end appends."""
    if not text.strip():
        text = "{}\n"
    json.loads(text)
    return _set(text, _skip(text, 0), list(path), value, _indent_of(text), 1)


def _set(text: str, at: int, path: list[str | int], value: Any, unit: str, level: int) -> str:
    key, rest = path[0], path[1:]
    if at >= len(text) or text[at] != ("{" if isinstance(key, str) else "["):
        raise ValueError(f"{'an object' if isinstance(key, str) else 'an array'} was expected for {key!r}")
    members, close = _members(text, at)
    member = next((member for member in members if member.key == key), None)
    if member is not None and rest:
        return _set(text, member.value_at, rest, value, unit, level + 1)
    if member is not None:
        return text[:member.value_at] + _dumped(value, unit, level) + text[member.end:]
    for part in reversed(rest):
        value = {part: value} if isinstance(part, str) else [value]
    new = _dumped(value, unit, level)
    if isinstance(key, str):
        new = f"{json.dumps(key, ensure_ascii=False)}: {new}"
    if members:
        before = text[at + 1:members[0].begin]
        return text[:members[-1].end] + "," + (before or " ") + new + text[members[-1].end:]
    return f"{text[:at + 1]}\n{unit * level}{new}\n{unit * (level - 1)}{text[close:]}"


def remove(text: str, path: Sequence[str | int]) -> str:
    """The text without the member at `path`. Raises KeyError where there is none."""
    at = _skip(text, 0)
    for part in path[:-1]:
        member = next((member for member in _members(text, at)[0] if member.key == part), None)
        if member is None:
            raise KeyError(part)
        at = member.value_at
    members, close = _members(text, at)
    index = next((number for number, member in enumerate(members) if member.key == path[-1]), None)
    if index is None:
        raise KeyError(path[-1])
    if len(members) == 1:
        return text[:at + 1] + text[close:]
    if index:
        return text[:members[index - 1].end] + text[members[index].end:]
    return text[:members[0].begin] + text[members[1].begin:]
