"""What can go wrong with an agent program, in classes: what is worth another try, and what is not.

Both sides import this: the worker raises these, and a retry policy in the parent looks at them. Standard library only.
Decides from what the program said; starts and reads nothing.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

__all__ = [
    "AgentAnswerError",
    "AgentError",
    "AgentNotInstalledError",
    "AgentProgramError",
    "AgentRejectedError",
    "AgentStalledError",
    "AgentTimeoutError",
    "AgentUnavailableError",
    "classify",
    "retry_after_seconds",
    "status_in",
]


def _rebuild(cls: type[AgentError], message: str, details: dict[str, Any]) -> AgentError:
    error = cls(message)
    error.__dict__.update(details)
    return error


class AgentError(Exception):
    """An agent program did not give a usable answer. Root of the classes here.

    program: its name. status: the HTTP status of the model's API, where it is known. retry_after: seconds that the API
    asked to wait, where it did. stderr_tail: the last that the program wrote to standard error. answer: what it said
    before it failed. session_id: by which some programs can resume. usage, cost_usd: what it cost all the same, where
    the program says so.
    """

    #: Whether the same prompt may well succeed a little later.
    is_transient: ClassVar[bool] = False

    program: str = ""
    status: int | None = None
    retry_after: float | None = None
    stderr_tail: str = ""
    answer: str = ""
    session_id: str | None = None
    usage: dict[str, Any] | None = None
    cost_usd: float | None = None

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.__dict__.update(details)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), dict(self.__dict__))


class AgentUnavailableError(AgentError):
    """The model's API was overloaded, limited the rate, timed out or could not be reached: 429, 5xx, 529, network."""

    is_transient = True


class AgentRejectedError(AgentError):
    """The model's API refused the request as such: no valid key, no permission, a bad request. Again is in vain."""


class AgentTimeoutError(AgentError, TimeoutError):
    """The agent took longer than its `timeout`, and was interrupted."""


class AgentStalledError(AgentTimeoutError):
    """The agent wrote nothing for `stall_timeout` seconds, and was interrupted."""

    is_transient = True


class AgentAnswerError(AgentError):
    """The agent ended by itself and marked its answer as an error, such as a turn limit."""


class AgentProgramError(AgentError):
    """The program ended without an answer, or said what cannot be understood."""


class AgentNotInstalledError(AgentError):
    """The program is not installed, or in a version that is too old."""


#: Where a status stands in the words of the programs: "API Error: 529", "unexpected status 401", "Error code: 429".
_STATUS: Final = re.compile(
    r"(?:api error|status(?: code)?|error(?: code)?|http(?:/\d(?:\.\d)?)?|code)\W{0,4}\b([45]\d\d)\b|"
    r"\b([45]\d\d) (?:too many|internal server|bad gateway|service unavailable|gateway time|unauthorized|forbidden|"
    r"bad request|not found)",
    re.IGNORECASE,
)
_TRANSIENT: Final = re.compile(
    r"overloaded|rate.?limit|too many requests|timed? ?out|time-out|temporarily unavailable|service unavailable|"
    r"bad gateway|econn(?:refused|reset|aborted)|etimedout|enetunreach|eai_again|enotfound|"
    r"connection (?:error|refused|reset|closed|failed|aborted)|network error|socket hang ?up|fetch failed",
    re.IGNORECASE,
)
_REFUSED: Final = re.compile(
    r"invalid (?:x-)?api.?key|incorrect api key|authentication|unauthorized|not logged in|please run /login|"
    r"permission denied by the api|credit balance is too low|invalid_request|no key found|api key (?:is )?missing",
    re.IGNORECASE,
)
_RETRY_AFTER: Final = re.compile(
    r"retry[-_ ]after(?:[-_ ]?(?P<ms>ms))?\W{1,4}(?P<after>\d+(?:\.\d+)?)|"
    r"(?:try again|retry) in (?P<in>\d+(?:\.\d+)?) ?(?P<unit>ms|s|seconds?|m|minutes?)\b",
    re.IGNORECASE,
)


def status_in(text: str) -> int | None:
    """The HTTP status of an error that a program words in its own way; None: it names none."""
    found = _STATUS.search(text)
    return int(found[1] or found[2]) if found else None


def retry_after_seconds(text: str) -> float | None:
    """How long the API asked to wait, where the program says so."""
    found = _RETRY_AFTER.search(text)
    if found is None:
        return None
    if found["after"] is not None:
        return float(found["after"]) / (1000 if found["ms"] else 1)
    unit = found["unit"].lower()
    return float(found["in"]) * (0.001 if unit == "ms" else 60 if unit.startswith("m") else 1)


def classify(status: int | None, text: str) -> type[AgentError] | None:
    """The class of an error with this status and these words; None: they tell nothing.

    A status outweighs words. 408 (time-out), 409 (conflict), 425 and 429 pass by themselves, as do all of 5xx.
    """
    if status is None:
        status = status_in(text)
    if status is not None and 400 <= status <= 599:
        return AgentUnavailableError if status >= 500 or status in (408, 409, 425, 429) else AgentRejectedError
    if _REFUSED.search(text):
        return AgentRejectedError
    return AgentUnavailableError if _TRANSIENT.search(text) else None
