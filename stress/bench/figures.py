"""Arithmetic on the cells of a run, and how a figure is written. Knows no case and no goal.

A ratio is to the baseline in the same round; over the rounds their median counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stress.bench.contenders import BASELINE
from stress.bench.meters import median

if TYPE_CHECKING:
    from stress.bench.runner import Cell


def column(cells: list[Cell], key: str) -> list[Any]:
    """A metric over the rounds; None where a round has none."""
    return [cell.get("metrics", {}).get(key) for cell in cells]


def numbers(cells: list[Cell], key: str) -> list[float]:
    """Those of the column that are numbers."""
    return [value for value in column(cells, key) if is_number(value)]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def ratios(cells: dict[str, list[Cell]], contender: str, key: str) -> list[float]:
    """To the baseline, round by round."""
    mine, base = column(cells.get(contender, []), key), column(cells.get(BASELINE, []), key)
    return [a / b for a, b in zip(mine, base, strict=False) if is_number(a) and is_number(b) and b]


def written(value: float, digits: int) -> str:
    """With thousands separators."""
    return f"{value:,.{digits}f}"


def spread(values: list[float], digits: int) -> str:
    """Median and, where they differ, least and most."""
    low, high = written(min(values), digits), written(max(values), digits)
    text = written(median(values), digits)
    return text if low == high else f"{text} [{low} to {high}]"


def entry(values: list[Any], digits: int) -> str:
    """A table's cell: the numbers, and words with their counts."""
    given = [value for value in values if value is not None]
    found = [value for value in given if is_number(value)]
    words = [value for value in given if isinstance(value, str)]
    parts = [spread(found, digits)] if found else []
    for word in dict.fromkeys(words):
        count = words.count(word)
        parts.append(word if count == len(given) else f"{word} {count}/{len(given)}")
    return ", ".join(parts) or "-"


def ratio_text(values: list[float]) -> str:
    """Two digits are enough for what varies by a few per cent."""
    if not values:
        return "-"
    middle = median(values)
    return f"{middle:.0f} x" if middle >= 100 else f"{middle:.1f} x" if middle >= 10 else f"{middle:.2f} x"


def mishaps(cells: list[Cell]) -> str:
    """What went wrong, with counts."""
    said: list[str] = []
    for cell in cells:
        said += [text for text in (cell.get("status"), cell.get("note")) if text]
        if cell.get("left"):
            said.append(f"left {cell['left']} processes running")
    return "; ".join(f"{text} {said.count(text)}/{len(cells)}" for text in dict.fromkeys(said))
