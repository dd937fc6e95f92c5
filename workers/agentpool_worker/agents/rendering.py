"""The results of the stock agents as plain text: their lists as aligned tables, the worst first.

Formats, and nothing else. The parent's side calls it; the shapes are those that the agents here return. Results of
other agents are shown as far as they look alike, and as their repr where they do not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

__all__ = ["jsonable", "printable", "render_result", "shortened", "words_of"]

#: Rows of a table in the text; the data have all of them.
_ROWS: Final = 10
#: Characters per line of the text.
_WIDTH: Final = 120
#: Characters of a cell, the last column's excepted, which takes what is left of the line.
_CELL: Final = 44
#: Lines of an answer in words.
_LINES: Final = 40
#: Nested deeper than this, a value becomes its repr.
_DEPTH: Final = 40


_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e\xa1-\U0010ffff]")


class _Column(NamedTuple):
    """`key` of a row, or "where" for its file and line together."""

    key: str
    title: str
    is_number: bool = False


class _Table(NamedTuple):
    key: str
    title: str
    columns: tuple[_Column, ...]


#: The lists of the stock agents' results, in the order in which they are shown.
_TABLES: Final = (
    _Table("functions", "Worst functions", (
        _Column("score", "score", True), _Column("complexity", "complexity", True),
        _Column("findings", "findings", True), _Column("function", "function"), _Column("where", "where"),
    )),
    _Table("findings", "Findings", (
        _Column("severity", "severity"), _Column("confidence", "confidence"), _Column("rule", "rule"),
        _Column("where", "where"), _Column("message", "message"),
    )),
    _Table("tests", "Tests", (
        _Column("tests", "tests", True), _Column("needs_work", "need work", True), _Column("module", "module"),
        _Column("test_file", "written to"),
    )),
    _Table("skipped", "Skipped", (_Column("module", "module"), _Column("test", "test"), _Column("reason", "reason"))),
    _Table("errors", "Not checked", (_Column("file", "file"), _Column("message", "message"))),
)  # fmt: skip


def render_result(result: Any) -> list[str]:
    """The lines of a result: its summary, then a table of each list that is known, ten rows of it at most.

    Where it is words, as an agent program's or a command's, forty lines of them.
    """
    if (words := words_of(result)) is not None:
        return _lines_of(words)
    if not isinstance(result, dict):
        return [_shortened_repr(result)]
    lines = [printable(str(result["summary"]))] if "summary" in result else []
    tables = [(table, result[table.key]) for table in _TABLES if _is_table(result.get(table.key))]
    for table, rows in tables:
        lines += ["", *_table(table, rows)]
    return lines or [_shortened_repr(result)]


def words_of(result: Any) -> str | None:
    """A text, what an agent program answered, or what a command printed; None: it is none of these."""
    if not isinstance(result, dict):
        return result if isinstance(result, str) else None
    answer, printed = result.get("answer"), result.get("stdout")
    if isinstance(answer, str):
        return answer
    return printed.decode("utf-8", "replace") if isinstance(printed, bytes) else None


def _lines_of(words: str) -> list[str]:
    lines = words.strip().splitlines()
    more = [f"({len(lines) - _LINES} more lines)"] if len(lines) > _LINES else []
    # Not `printable`, which would take the indentation out.
    return [*(_visible(line.expandtabs()) for line in lines[:_LINES]), *more]


def _shortened_repr(value: Any) -> str:
    return shortened(printable(repr(value)), _WIDTH)


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _table(table: _Table, rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = rows[:_ROWS]
    columns = [column for column in table.columns if any(_cell(row, column.key) for row in shown)]
    cells = [[_cell(row, column.key) for column in columns] for row in shown]
    lines = [f"{table.title} ({len(rows)})" if len(rows) <= _ROWS else f"{table.title} (first {_ROWS} of {len(rows)})"]
    if not columns:
        return lines
    titles = [column.title for column in columns]
    widths = [min(_CELL, max(map(len, texts))) for texts in zip(titles, *cells, strict=True)]
    widths[-1] = max(_WIDTH - 4 - sum(widths[:-1]) - 2 * (len(widths) - 1), 20)
    for texts in (titles, *cells):
        parts = [
            shortened(text, width).rjust(width) if column.is_number else shortened(text, width).ljust(width)
            for text, width, column in zip(texts, widths, columns, strict=True)
        ]
        lines.append(f"  {'  '.join(parts)}".rstrip())
    return lines


def _cell(row: dict[str, Any], key: str) -> str:
    if key == "where":
        file, line = row.get("file"), row.get("line")
        value = None if file is None else f"{file}:{line}" if line is not None else file
    else:
        value = row.get(key)
    return "" if value is None else printable(str(value))


def printable(text: str) -> str:
    """`text` in one line, with what could move a terminal's cursor made visible: anyone may choose a file's name."""
    return _visible(" ".join(text.split()))


def _visible(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def shortened(text: str, width: int) -> str:
    """`text`, or its beginning and a mark that there was more."""
    return text if len(text) <= width else text[: width - 1] + "…"


def jsonable(value: Any, depth: int = 0) -> Any:
    """`value` as `json.dumps` takes it, strictly; what JSON does not know becomes its repr."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)  # JSON has no infinities and no NaN
    if depth < _DEPTH:
        if isinstance(value, dict):
            return {str(key): jsonable(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [jsonable(item, depth + 1) for item in value]
    return repr(value)
