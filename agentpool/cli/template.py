"""The command of `agentpool run`: words with placeholders, filled in for each job. Pure.

    {}    the argument               {.}   without its extension
    {/}   its last path component    {//}  its directory             {/.}  last component without extension
    {1}   the argument of the first source, with the same endings: {1/}, {1.}, ...; {-1} that of the last
    {#}   the job's number
    {name}  with JSON lines: a field, {a.b} a field of a field, with the same endings

Without any placeholder the arguments are appended. A value stays one argument whatever is in it: in a list of
arguments it is put in as it is, in a shell line it is quoted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agentpool.cli.quoting import unsafe_place
from agentpool.cli.terminal import UsageProblem

__all__ = ["MissingField", "Placeholder", "Template"]

_ENDINGS: Final = r"(?P<ending>//|/\.|/|\.)?"
_POSITIONAL: Final = rf"\{{(?:(?P<number>\#)|(?P<position>-?[1-9][0-9]*)?{_ENDINGS})\}}"
_WITH_FIELDS: Final = re.compile(
    rf"{_POSITIONAL}|\{{(?P<field>[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*){_ENDINGS.replace('ending', 'field_ending')}\}}"
)
_WITHOUT_FIELDS: Final = re.compile(_POSITIONAL)


def _no_extension(value: str) -> str:
    return re.sub(r"\.[^/.]*\Z", "", value)


def _last_component(value: str) -> str:
    return value.rpartition("/")[2]


def _directory(value: str) -> str:
    stripped = value.rstrip("/")
    if not stripped:
        return "/" if value else "."
    return os.path.dirname(stripped) or "."


_CHANGES: Final[Mapping[str, Callable[[str], str]]] = {
    "": lambda value: value,
    ".": _no_extension,
    "/": _last_component,
    "//": _directory,
    "/.": lambda value: _no_extension(_last_component(value)),
}


class MissingField(LookupError):
    """A JSON line has no such field."""


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One `{...}`. position 0: all arguments; field: of a JSON line; is_number: the job's number."""

    text: str
    position: int = 0
    field: str | None = None
    ending: str = ""
    is_number: bool = False

    def values(self, number: int, arguments: Sequence[str], record: object) -> list[str]:
        if self.is_number:
            return [str(number)]
        if self.field is not None:
            found = [_field(record, self.field)]
        elif self.position:
            found = [arguments[self.position - (self.position > 0)]]
        else:
            found = list(arguments)
        return [_CHANGES[self.ending](value) for value in found]


def _field(record: object, path: str) -> str:
    value = record
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise MissingField(f"no field {path!r}")
        value = value[name]
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


_Word = tuple[str | Placeholder, ...]


class Template:
    """A parsed command.

    words: the command. sources: how many arguments each job has. fields: `{name}` means a field of a JSON line.
    shell: the words, joined by blanks, are a shell line. Raises UsageProblem for what cannot be right for any job.
    """

    def __init__(self, words: Sequence[str], *, sources: int = 1, fields: bool = False, shell: bool = False) -> None:
        if not words or not any(words):
            raise UsageProblem("no command was given: agentpool run [OPTIONS] -- COMMAND {} ::: ARGUMENT...")
        pattern = _WITH_FIELDS if fields else _WITHOUT_FIELDS
        self.text = " ".join(words) if shell else shlex.join(words)
        self._shell = shell
        self._words = [_parsed(word, pattern) for word in ([self.text] if shell else words)]
        if not any(isinstance(part, Placeholder) for word in self._words for part in word):
            self._append_arguments()
        self._check(sources)

    def _append_arguments(self) -> None:
        if self._shell:
            self._words = [(*self._words[0], " ", Placeholder("{}"))]
        else:
            self._words.append((Placeholder("{}"),))

    def _check(self, sources: int) -> None:
        for part in (part for word in self._words for part in word):
            if isinstance(part, Placeholder) and abs(part.position) > sources:
                raise UsageProblem(
                    f"{part.text} names input source {abs(part.position)}, but there "
                    f"{'is only one' if sources == 1 else f'are only {sources}'}"
                )
        if self._shell and (place := unsafe_place(self._words[0])):
            raise UsageProblem(
                f"a placeholder of the shell line stands {place}, where its value could be run as a command. "
                "Values are quoted already: write {} outside of any quotes"
            )

    def arguments(self, number: int, arguments: Sequence[str], record: object = None) -> list[str]:
        """The list of arguments of one job. A word that is `{}` alone becomes as many as there are sources."""
        filled: list[str] = []
        for word in self._words:
            first = word[0]
            if len(word) == 1 and isinstance(first, Placeholder):
                filled.extend(first.values(number, arguments, record))
            else:
                filled.append(self._joined(word, lambda value: value, number, arguments, record))
        return filled

    def shell_line(self, number: int, arguments: Sequence[str], record: object = None) -> str:
        """The shell line of one job, every value quoted."""
        return self._joined(self._words[0], shlex.quote, number, arguments, record)

    @staticmethod
    def _joined(
        word: _Word, change: Callable[[str], str], number: int, arguments: Sequence[str], record: object
    ) -> str:
        return "".join(
            part if isinstance(part, str) else " ".join(map(change, part.values(number, arguments, record)))
            for part in word
        )


def _parsed(word: str, pattern: re.Pattern[str]) -> _Word:
    parts: list[str | Placeholder] = []
    end = 0
    for match in pattern.finditer(word):
        if match.start() > end:
            parts.append(word[end : match.start()])
        groups = match.groupdict()
        parts.append(
            Placeholder(
                match.group(),
                position=int(groups["position"] or 0),
                field=groups.get("field"),
                ending=groups["ending"] or groups.get("field_ending") or "",
                is_number=groups["number"] is not None,
            )
        )
        end = match.end()
    if end < len(word) or not parts:
        parts.append(word[end:])
    return tuple(parts)
