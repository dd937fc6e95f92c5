"""What has been tried: a line of JSON each, the latest of a mutant counts. Without pytest and mutmut."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """`state`: killed, timeout (ran too long: noticed), survived. `by`: which test. `is_quick`: quick ones only."""

    function: str
    digest: str
    number: int
    state: str
    by: str
    is_quick: bool
    seconds: float

    @property
    def is_half(self) -> bool:
        """The slow tests have not had their turn yet."""
        return self.is_quick and self.state == "survived"


def append(path: Path, result: Result) -> None:
    """One line in one write: an interrupted run leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(astuple(result)) + "\n")


def latest(path: Path) -> dict[tuple[str, str, int], Result]:
    """(function, digest, number) -> its last result; empty where there was no run."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Result(*json.loads(line)) for line in lines]
    return {(one.function, one.digest, one.number): one for one in found}
