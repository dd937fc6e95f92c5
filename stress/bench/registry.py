"""What a case and its columns are, and the decorator that enters one. Knows no case and no contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from stress.bench.contenders import Contender

    #: What a cell measured: by the name of the column a number, or a word such as "never".
    Found = dict[str, float | str | None]
    Run = Callable[[Contender, "Setting"], Found]


class Metric(NamedTuple):
    """A column."""

    heading: str
    digits: int = 0
    #: Whether the ratio to the baseline says something.
    ratio: bool = False


class Setting(NamedTuple):
    """What the runner tells a cell."""

    scratch: str  # a folder of its own
    quick: bool = False


class Case(NamedTuple):
    """How to run it, how long at most, in how many rounds unless told."""

    name: str
    run: Run
    title: str
    limit_seconds: float
    rounds: int
    #: The cell ends without shutting its pool down: it could not, or not soon.
    abrupt: bool
    #: Only contenders that have this attribute set take part.
    wants: str
    metrics: dict[str, Metric]

    @property
    def note(self) -> str:
        """What stands under its table."""
        return " ".join((self.run.__doc__ or "").split())


CASES: dict[str, Case] = {}


def case(
    name: str,
    title: str,
    *,
    limit_seconds: float = 60,
    rounds: int = 3,
    abrupt: bool = False,
    wants: str = "",
    metrics: dict[str, Metric],
) -> Callable[[Run], Run]:
    """Enters a case; its docstring is the note under the table."""

    def register(run: Run) -> Run:
        CASES[name] = Case(name, run, title, limit_seconds, rounds, abrupt, wants, metrics)
        return run

    return register
