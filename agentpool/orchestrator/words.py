"""Which stock agents a prompt's words ask for: a table of words, not a model. Pure."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["GENERAL", "REVIEWERS", "asked_for"]

#: The agents of a general review, in the order of its report.
REVIEWERS: Final = ("security-analyst", "performance-auditor", "test-generator")

#: The reason of those that were chosen since nothing was asked for.
GENERAL: Final = "a general review"

#: The words that ask for an agent, each as a pattern for a whole word in lower case. Words that say other things just
#: as often ("perform", "fast" as in FastAPI, "memory") are left out on purpose.
_WORDS: Final[dict[str, re.Pattern[str]]] = {
    "security-analyst": re.compile(
        r"(in)?secur(e|ely|ity|ing)|vulnerab(le|ility|ilities)|exploit(s|able)?|cves?|injections?|secrets|unsafe|"
        r"harden(ed|ing)?|bandit"
    ),
    "performance-auditor": re.compile(
        r"performan(ce|t)|perf|slow(er|est|ly|ness)?|speed(s|ing|up)?|faster|fastest|optimi[sz](e|ed|ing|ation|ations)|"
        r"(in)?efficien(t|tly|cy)|bottlenecks?|complex(ity)?|latency|profiling|ruff"
    ),
    "test-generator": re.compile(r"tests?|testing|untested|coverage|fuzz(ing)?|hypothesis|ghostwriter|pytest"),
}
_REVIEW: Final = re.compile(r"(review|audit|inspect|assess|analy[sz]e|check)(s|ed|ing)?")
_MAKE: Final = re.compile(r"(write|generate|add|create|make|produce)(s)?")
#: Words after which everything is meant, whatever is named beside it.
_ALL: Final = frozenset({"everything", "overall", "comprehensive", "especially", "particularly", "including"})
#: The words that follow, up to a pause, name what is not wanted.
_EXCLUDING: Final = frozenset({"without", "except", "excluding", "skip", "skipping", "omit"})
#: The words that follow are not a wish: "no tests" may be an order as well as a complaint.
_DENYING: Final = frozenset({"no", "not", "never", "isn't", "don't", "doesn't"})
_PAUSE: Final = frozenset({".", ",", ";", ":", "!", "?", "but", "then"})
#: How many words such a word reaches.
_REACH: Final = 3


def asked_for(prompt: str) -> list[tuple[str, str]]:
    """The stock agents that `prompt` asks for, in the order of REVIEWERS, each with the reason."""
    words = re.findall(r"[\w']+|[.,;:!?]", prompt.lower())
    wanted, excluded = _read_wishes(words)
    only_tests = set(wanted) == {"test-generator"}
    is_review = any(_REVIEW.fullmatch(word) for word in words)
    if only_tests and is_review and any(_MAKE.fullmatch(word) for word in words):
        wanted = {}  # "review this and write tests": the tests are asked for beside the review, not instead
    if _ALL.intersection(words):
        wanted = {}
    return [
        (name, f"the prompt says {wanted[name]!r}" if wanted else GENERAL)
        for name in REVIEWERS
        if name not in excluded and (not wanted or name in wanted)
    ]


def _read_wishes(words: list[str]) -> tuple[dict[str, str], set[str]]:
    """The agents that are asked for, each with the word that does, and those that are to be left out."""
    wanted: dict[str, str] = {}
    excluded: set[str] = set()
    reversing = ""
    reach = 0
    for word in words:
        if word in _EXCLUDING or word in _DENYING:
            reversing, reach = word, _REACH
            continue
        if word in _PAUSE:
            reach = 0
        for name, pattern in _WORDS.items():
            if not pattern.fullmatch(word):
                continue
            if reach <= 0:
                wanted.setdefault(name, word)
            elif reversing in _EXCLUDING:
                excluded.add(name)
                reach = _REACH + 1  # the list may go on: "without tests and performance"
        reach -= 1
    return wanted, excluded
