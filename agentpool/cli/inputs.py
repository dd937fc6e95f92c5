"""Where `agentpool run` has its arguments from: `:::` lists, files, standard input; all read lazily.

Knows nothing of jobs and pools. The iterators are used by the reading thread alone.
"""

from __future__ import annotations

import itertools
import os
import select
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from agentpool.cli.terminal import UsageProblem

__all__ = ["ListSource", "Source", "StreamSource", "combine", "open_sources", "split_command_line"]

_CHUNK: Final = 64 * 1024
#: No operating system passes an argument this long; a stream without a separator must not fill the memory.
_LONGEST: Final = 64 * 1024 * 1024

_LISTS: Final = (":::", "::::")
_LINKED: Final = (":::+", "::::+")


@dataclass(frozen=True, slots=True)
class ListSource:
    """The values of one `:::`."""

    values: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


@dataclass(frozen=True, slots=True)
class StreamSource:
    """The records of a file or of standard input, read as they are asked for."""

    fd: int
    separator: bytes
    name: str

    def __iter__(self) -> Iterator[str]:
        return _records(self.fd, self.separator, self.name)


Source = ListSource | StreamSource


def split_command_line(tokens: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """`COMMAND... ::: A B :::: FILE` as the command's words and the groups: (":::", [A, B]), ("::::", [FILE])."""
    command: list[str] = []
    groups: list[tuple[str, list[str]]] = []
    for token in tokens:
        if token in _LINKED:
            raise UsageProblem(f"{token} (linked input) is not supported; several ::: give every combination")
        if token in _LISTS:
            groups.append((token, []))
        elif groups:
            groups[-1][1].append(token)
        else:
            command.append(token)
    return command, groups


def open_sources(files: Sequence[str], groups: Sequence[tuple[str, list[str]]], *, null: bool) -> list[Source]:
    """One source per `-a` file, per `:::` and per file of a `::::`; standard input where there are none.

    Files are opened here, so that a wrong name is known before anything runs; "-" is standard input.
    """
    separator = b"\0" if null else b"\n"
    sources: list[Source] = [_open(name, separator) for name in files]
    for kind, values in groups:
        if kind == ":::":
            sources.append(ListSource(tuple(values)))
        elif values:
            sources.extend(_open(name, separator) for name in values)
        else:
            raise UsageProblem(":::: needs the name of a file")
    if not sources:
        sources.append(_open("-", separator))
    if sum(isinstance(source, StreamSource) and source.fd == 0 for source in sources) > 1:
        raise UsageProblem("standard input (-) can be read only once")
    return sources


def _open(name: str, separator: bytes) -> StreamSource:
    if name == "-":
        return StreamSource(0, separator, "standard input")
    try:
        return StreamSource(os.open(name, os.O_RDONLY | os.O_CLOEXEC), separator, name)
    except OSError as error:
        raise UsageProblem(f"cannot read {name}: {error.strerror}") from error


def combine(sources: Sequence[Source]) -> Iterator[tuple[str, ...]]:
    """Every combination, the last source changing fastest. The first is read lazily, the others are kept in memory."""
    if len(sources) == 1:
        for value in sources[0]:
            yield (value,)
        return
    others = [tuple(source) for source in sources[1:]]
    for value in sources[0]:
        for rest in itertools.product(*others):
            yield (value, *rest)


def _records(fd: int, separator: bytes, name: str) -> Iterator[str]:
    # Bare reads, no buffered file object: its lock, held by a thread that waits for input, would abort the
    # interpreter's exit.
    rest = bytearray()
    while chunk := _read(fd, name):
        head, *tail = chunk.split(separator)
        rest += head
        if tail:
            yield os.fsdecode(bytes(rest))
            for record in tail[:-1]:
                yield os.fsdecode(record)
            rest = bytearray(tail[-1])
        if len(rest) > _LONGEST:
            raise UsageProblem(f"{name} has a line longer than {_LONGEST // (1024 * 1024)} MB")
    if rest:
        yield os.fsdecode(bytes(rest))


def _read(fd: int, name: str) -> bytes:
    while True:
        try:
            return os.read(fd, _CHUNK)
        except BlockingIOError:  # the descriptor is shared with somebody who made it non-blocking
            select.select([fd], [], [])
        except OSError as error:
            raise UsageProblem(f"cannot read {name}: {error.strerror}") from error
