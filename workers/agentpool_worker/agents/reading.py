"""What an agent program says: its answer, error, cost and usage, and what happens meanwhile, out of its output.

Pure: text comes in, a `Reading` and events come out. Knows no process. A program's output is described by rules, so
that a program that nobody here has heard of needs no code.

A rule is a path with conditions: "item.text [type=item.completed item.type=agent_message]" is `text` of `item` in each
JSON object whose `type` and `item.type` are these. "+" before it adds up what it finds (texts are joined, numbers and
the numbers in objects are summed); without it the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

__all__ = ["FIELDS", "Event", "OutputReader", "Reading", "Rule"]

#: What rules may fill in.
FIELDS: Final = ("answer", "failed", "error", "status", "cost_usd", "usage", "session_id", "turns", "stop_reason",
                 "model")
#: Events that rules may name: a piece of the answer, a tool that is used, another try at the API. What is read of the
#: field `usage` is an event as well.
EVENTS: Final = ("text", "tool_use", "retry")

#: A kind of event, and what belongs to it as plain data.
Event = tuple[str, dict[str, Any]]


class Reading:
    """What was read so far. `failed`: the program marked its answer as an error; None: it said nothing of it."""

    def __init__(self) -> None:
        self.answer = ""
        self.failed: bool | None = None
        self.error = ""
        self.status: int | None = None
        self.cost_usd: float | None = None
        self.usage: dict[str, Any] = {}
        self.session_id: str | None = None
        self.turns: int | None = None
        self.stop_reason: str | None = None
        self.model: str | None = None


class Rule(NamedTuple):
    """One rule, see the module."""

    path: tuple[str, ...]
    conditions: tuple[tuple[tuple[str, ...], str], ...]
    adds: bool

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Raises ValueError, which quotes the rule."""
        adds = text.startswith("+")
        path, bracket, rest = text.removeprefix("+").partition("[")
        conditions = []
        if bracket:
            if not rest.rstrip().endswith("]"):
                raise ValueError(f"the rule {text!r} has no closing bracket")
            for word in rest.rstrip()[:-1].split():
                name, equals, value = word.partition("=")
                if not equals:
                    raise ValueError(f"the rule {text!r}: {word!r} is no condition; write key.key=value")
                conditions.append((tuple(name.split(".")), value))
        if not path.strip():
            raise ValueError(f"the rule {text!r} names nothing to read; write a path such as result.text")
        return cls(tuple(path.strip().split(".")), tuple(conditions), adds)

    def find(self, said: Any) -> Any:
        """What the rule means in this object; None: nothing."""
        if any(str(_at(said, path)) != value for path, value in self.conditions):
            return None
        return _at(said, self.path)


def _at(said: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if isinstance(said, list) and part.lstrip("-").isdigit() and -len(said) <= int(part) < len(said):
            said = said[int(part)]
        elif isinstance(said, dict):
            said = said.get(part)
        else:
            return None
    return said


class OutputReader:
    """Reads one run of a program.

    form: "text" (all of it is the answer), "json" (one object) or "jsonl" (an object a line; other lines are ignored).
    rules: for each of FIELDS, and each of EVENTS, a rule or several of them. events: finds further events in an object.
    """

    def __init__(
        self,
        form: str,
        rules: Mapping[str, str | Sequence[str]],
        events: Callable[[dict[str, Any]], Iterator[Event]] | None = None,
    ) -> None:
        if form not in ("text", "json", "jsonl"):
            raise ValueError(f"the form of a program's output is 'text', 'json' or 'jsonl', got {form!r}")
        if unknown := sorted(set(rules) - {*FIELDS, *EVENTS}):
            raise ValueError(f"unknown rule {', '.join(unknown)}; known are {', '.join((*FIELDS, *EVENTS))}")
        self.reading = Reading()
        self.objects = 0
        self._form = form
        self._rules = [
            (field, Rule.parse(text))
            for field, texts in rules.items()
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        self._events = events
        self._text: list[str] = []

    def feed(self, line: bytes) -> list[Event]:
        """One line of output; the events that it is about."""
        if self._form != "jsonl":
            text = line.decode("utf-8", "replace")
            self._text.append(text)
            return [("text", {"text": text + "\n"})] if self._form == "text" else []
        return self._take(_parsed(line))

    def finish(self) -> list[Event]:
        """The output has ended."""
        text = "\n".join(self._text)
        if self._form == "text":
            self.reading.answer = text.strip()
        elif self._form == "json":
            # A program may print a warning before or after its object.
            start = text.find("{")
            try:
                return self._take(json.JSONDecoder().raw_decode(text, start)[0]) if start >= 0 else []
            except ValueError:
                return []
        return []

    def _take(self, said: Any) -> list[Event]:
        if not isinstance(said, dict):
            return []
        self.objects += 1
        events: list[Event] = list(self._events(said)) if self._events is not None else []
        for field, rule in self._rules:
            value = rule.find(said)
            if value is None:
                continue
            if field in EVENTS:
                events.append((field, value if isinstance(value, dict) else {field: value}))
                continue
            if field == "usage" and isinstance(value, dict):
                events.append((field, {field: value}))
            self._note(field, value, rule.adds)
        return events

    def _note(self, field: str, value: Any, adds: bool) -> None:
        reading = self.reading
        if field == "usage":
            if isinstance(value, dict):
                reading.usage = _sum(reading.usage, value) if adds else value
        elif field == "failed":
            reading.failed = bool(value)
        elif field in ("answer", "error"):
            text = value if isinstance(value, str) else json.dumps(value)
            if text:  # an empty one follows where a background task ended: it takes nothing back
                setattr(reading, field, getattr(reading, field) + text if adds else text)
        elif field in ("cost_usd", "turns", "status"):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(reading, field, value + (getattr(reading, field) or 0) if adds else value)
        else:
            setattr(reading, field, str(value))


def _sum(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    total = dict(one)
    for key, value in other.items():
        before = total.get(key)
        if isinstance(value, dict):
            total[key] = _sum(before if isinstance(before, dict) else {}, value)
        elif isinstance(value, (int, float)) and isinstance(before, (int, float)) and not isinstance(value, bool):
            total[key] = before + value
        else:
            total[key] = value
    return total


def _parsed(line: bytes) -> Any:
    if not line.lstrip().startswith(b"{"):
        return None  # a warning between the objects
    try:
        return json.loads(line)
    except ValueError:
        return None


def claude_events(said: dict[str, Any]) -> Iterator[Event]:
    """The events in one object of claude's stream."""
    if said.get("type") == "assistant":
        message = said.get("message")
        blocks = message.get("content") if isinstance(message, dict) else None
        for block in blocks if isinstance(blocks, list) else ():
            if not isinstance(block, dict):
                continue
            if block.get("type") == "text":
                yield "text", {"text": block.get("text", "")}
            elif block.get("type") == "tool_use":
                yield "tool_use", {"name": block.get("name"), "input": block.get("input"), "id": block.get("id")}
    elif said.get("type") == "system" and said.get("subtype") == "api_retry":
        yield "retry", {key: said.get(key) for key in ("attempt", "max_retries", "retry_delay_ms", "error_status")}
