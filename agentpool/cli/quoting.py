"""Finds placeholders of a shell line that stand where quoting their value cannot protect it.

A value is inserted quoted for a place outside of quotes. Inside of quotes of the template the quotes would end each
other, and a value like `$(rm -rf /)` would run. So such a template is refused, with words on how to write it.
Pure; knows just enough of the shell's grammar to err on the safe side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["unsafe_place"]

_PLAIN: Final = "plain"
_SUBSTITUTION: Final = "$("
_SINGLE: Final = "'"
_DOUBLE: Final = '"'
_BACKTICK: Final = "`"
_ARITHMETIC: Final = "(("
_COMMENT: Final = "#"

_WORDS: Final = {
    _SINGLE: "inside single quotes",
    _DOUBLE: "inside double quotes",
    _BACKTICK: "inside backticks (write $(...) for them)",
    _ARITHMETIC: "inside ((...))",
    _COMMENT: "in a comment",
}


def unsafe_place(parts: Sequence[object]) -> str | None:
    """The first place where a placeholder is not safe, in words; None: all are.

    parts: the shell line as literal strings and placeholders (any other object), in order.
    """
    scanner = _Scanner()
    for part in parts:
        if isinstance(part, str):
            scanner.read(part)
        elif (place := scanner.place()) is not None:
            return place
        else:
            scanner.skip_value()
    return None


class _Scanner:
    """Follows the quotes of a shell line."""

    def __init__(self) -> None:
        self._stack = [_PLAIN]
        self._previous = ""
        self._is_escaped = False
        self._has_here_document = False

    def place(self) -> str | None:
        """Where a placeholder would stand now, in words, if its value were not safe there."""
        if self._is_escaped:
            return "after a backslash"
        if self._previous == "$":
            return "after a dollar sign"
        if self._has_here_document:
            return "behind the start of a here-document (<<)"
        for surrounding in (_BACKTICK, _ARITHMETIC):
            if surrounding in self._stack:
                return _WORDS[surrounding]
        return _WORDS.get(self._stack[-1])

    def skip_value(self) -> None:
        """A placeholder stood here."""
        self._previous = "x"

    def read(self, text: str) -> None:
        """The next literal part of the line."""
        for character in text:
            if self._is_escaped:
                self._is_escaped = False
                self._previous = "x"
                continue
            inside = self._stack[-1]
            if inside in (_SINGLE, _COMMENT):
                if character == ("'" if inside == _SINGLE else "\n"):
                    self._stack.pop()
            elif character == "\\":
                self._is_escaped = True
            elif character == "`":
                self._toggle_backtick()
            elif inside == _DOUBLE:
                self._read_double(character)
            else:
                self._read_plain(character)
            self._previous = character

    def _read_plain(self, character: str) -> None:
        stack = self._stack
        if character in "'\"":
            stack.append(character)
        elif character == "(":
            if self._previous == "(":  # arithmetic, up to the second parenthesis that closes
                stack[-1] = _ARITHMETIC
            stack.append(stack[-1] if stack[-1] == _ARITHMETIC else _SUBSTITUTION)
        elif character == ")" and stack[-1] in (_SUBSTITUTION, _ARITHMETIC):
            stack.pop()
        elif character == "#" and (not self._previous or self._previous in " \t\n;&|("):
            stack.append(_COMMENT)
        elif character == "<" and self._previous == "<" and _ARITHMETIC not in stack:
            self._has_here_document = True

    def _read_double(self, character: str) -> None:
        if character == '"':
            self._stack.pop()
        elif character == "(" and self._previous == "$":
            self._stack.append(_SUBSTITUTION)

    def _toggle_backtick(self) -> None:
        if _BACKTICK in self._stack:
            while self._stack.pop() != _BACKTICK:
                pass
        else:
            self._stack.append(_BACKTICK)
