"""Decisions about agent programs, without one: what their output means, which errors pass, when a turn is done."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from agentpool_worker.agents.failures import (
    AgentError,
    AgentRejectedError,
    AgentStalledError,
    AgentUnavailableError,
    classify,
    retry_after_seconds,
)
from agentpool_worker.agents.presets import PRESETS
from agentpool_worker.agents.reading import OutputReader, Rule
from agentpool_worker.agents.session import DOUBT_SECONDS, SETTLE_SECONDS, Turn
from agentpool_worker.agents.tokens import token_counts


def lines(*objects: dict[str, Any]) -> list[bytes]:
    return [json.dumps(item).encode() for item in objects]


def read(preset: str, output: list[bytes]) -> tuple[OutputReader, list[Any]]:
    chosen = PRESETS[preset]
    reader = OutputReader(chosen.form, chosen.rules, chosen.events)
    events = [event for line in output for event in reader.feed(line)]
    return reader, events + reader.finish()


class TestTokens:
    """One set of names, whatever the programs call them."""

    @pytest.mark.parametrize(("usage", "counts"), [
        ({"input_tokens": 9, "output_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2},
         {"input_tokens": 9, "output_tokens": 5, "cache_read_tokens": 3, "cache_write_tokens": 2}),  # claude
        ({"input_tokens": 9, "cached_input_tokens": 3, "output_tokens": 5},
         {"input_tokens": 6, "output_tokens": 5, "cache_read_tokens": 3}),  # codex
        ({"input": 9, "output": 5, "reasoning": 1, "cache": {"read": 3, "write": 0}},
         {"input_tokens": 9, "output_tokens": 5, "cache_read_tokens": 3, "cache_write_tokens": 0}),  # opencode
        ({"gemini-2.5-pro": {"api": {}, "tokens": {"prompt": 8, "candidates": 5, "total": 13, "cached": 2}},
          "gemini-2.5-flash": {"tokens": {"prompt": 1, "candidates": 1, "total": 2}}},
         {"input_tokens": 7, "output_tokens": 6, "cache_read_tokens": 2, "total_tokens": 15}),
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14},
         {"input_tokens": 9, "output_tokens": 5, "total_tokens": 14}),
        ({"input_tokens": True, "output_tokens": "many"}, {}),
        ({}, {}), (None, {}), ("usage", {}), ([1], {}),
    ])
    def test_counts(self, usage: object, counts: dict[str, int]) -> None:
        assert token_counts(usage) == counts


class TestReading:
    def test_codex_as_recorded_from_0_169(self) -> None:
        reader, events = read("codex", [
            b"WARNING: proceeding, even though we could not create PATH aliases",
            *lines(
                {"type": "thread.started", "thread_id": "01a2"},
                {"type": "item.completed", "item": {"id": "item_0", "type": "error", "message": "no metadata"}},
                {"type": "turn.started"},
                {"type": "error", "message": "Reconnecting... waiting for network"},
                {"type": "item.completed", "item": {"id": "item_1", "type": "agent_message", "text": "Hello."}},
                {"type": "turn.completed", "usage": {"input_tokens": 10, "output_tokens": 5}},
            ),
        ])
        reading = reader.reading
        assert (reading.answer, reading.failed, reading.session_id) == ("Hello.", None, "01a2")
        assert reading.usage == {"input_tokens": 10, "output_tokens": 5}
        assert [kind for kind, _ in events] == ["retry", "text", "usage"]

    def test_codex_that_failed(self) -> None:
        reader, _ = read("codex", lines({"type": "turn.failed", "error": {"message": "unexpected status 401"}}))
        assert (reader.reading.failed, reader.reading.error) == (True, "unexpected status 401")

    def test_opencode_adds_up_its_steps(self) -> None:
        step = {"type": "step_finish", "part": {"cost": 0.5, "tokens": {"input": 3, "cache": {"read": 1}}}}
        reader, _ = read("opencode", lines(
            {"type": "text", "sessionID": "s", "part": {"text": "one "}}, step,
            {"type": "text", "sessionID": "s", "part": {"text": "two"}}, step,
        ))
        reading = reader.reading
        assert (reading.answer, reading.cost_usd, reading.session_id) == ("one two", 1.0, "s")
        assert reading.usage == {"input": 6, "cache": {"read": 2}}

    def test_gemini_after_a_warning(self) -> None:
        reader, _ = read("gemini", [b"Loaded cached credentials.", b'{"response": "Hi",', b' "stats": {"models": {}}}'])
        assert (reader.reading.answer, reader.reading.failed) == ("Hi", None)

    def test_gemini_that_failed(self) -> None:
        reader, _ = read("gemini", lines({"error": {"type": "Error", "message": "quota", "code": 429}}))
        assert (reader.reading.failed, reader.reading.status, reader.reading.error) == (True, 429, "quota")

    def test_an_empty_result_takes_no_answer_back(self) -> None:
        """The result that claude 2.1.330 sends as a background task ends has no words."""
        reader, events = read("claude", lines(
            {"type": "result", "result": "All done.", "is_error": False, "num_turns": 3, "total_cost_usd": 1.0,
             "usage": {"input_tokens": 20}},
            {"type": "result", "result": "", "is_error": False, "num_turns": 0, "total_cost_usd": 1.5,
             "usage": {"input_tokens": 1}},
        ))
        reading = reader.reading
        assert (reading.answer, reading.turns, reading.cost_usd) == ("All done.", 3, 1.5)
        assert reading.usage == {"input_tokens": 21}
        assert [kind for kind, _ in events] == ["usage", "usage"]

    @pytest.mark.parametrize("junk", [b"", b"[1]", b"{", b'"text"', b"\xff\xfe", b"null", b'{"type": ["odd"]}'])
    @pytest.mark.parametrize("preset", sorted(PRESETS))
    def test_nothing_that_is_said_breaks_it(self, preset: str, junk: bytes) -> None:
        read(preset, [junk])

    @pytest.mark.parametrize(("rule", "words"), [
        ("a.b [type=x", "no closing bracket"), ("a [type]", "no condition"), ("[type=x]", "names nothing"),
    ])
    def test_a_wrong_rule_is_quoted(self, rule: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Rule.parse(rule)

    def test_unknown_forms_and_fields_are_refused(self) -> None:
        with pytest.raises(ValueError, match="the form"):
            OutputReader("xml", {})
        with pytest.raises(ValueError, match="unknown rule answr; known are answer"):
            OutputReader("json", {"answr": "x"})


class TestClassify:
    @pytest.mark.parametrize(("status", "text", "kind"), [
        (529, "", AgentUnavailableError), (429, "", AgentUnavailableError), (503, "", AgentUnavailableError),
        (408, "", AgentUnavailableError), (401, "overloaded", AgentRejectedError), (400, "", AgentRejectedError),
        (None, "API Error: 529 overloaded", AgentUnavailableError),
        (None, "unexpected status 401 Unauthorized: bad key", AgentRejectedError),
        (None, "Error code: 500 - {'error': ...}", AgentUnavailableError),
        (None, "exceeded retry limit, last status: 429 Too Many Requests", AgentUnavailableError),
        (None, "Request timed out.", AgentUnavailableError),
        (None, "connect ECONNREFUSED 127.0.0.1:1", AgentUnavailableError),
        (None, "Invalid API key · Please run /login", AgentRejectedError),
        (None, "wrote 529 lines to disk", None), (None, "No such file", None), (None, "", None),
    ])
    def test_what_is_worth_another_try(self, status: int | None, text: str, kind: type[AgentError] | None) -> None:
        assert classify(status, text) is kind

    @pytest.mark.parametrize(("text", "seconds"), [
        ("Retry-After: 2", 2.0), ("retry_after_ms: 1500", 1.5), ('{"retry-after": "7"}', 7.0),
        ("Please try again in 1.5s", 1.5), ("try again in 20ms", 0.02), ("retry in 2 minutes", 120.0),
        ("try again in a moment", None), ("", None),
    ])
    def test_how_long_it_asked_to_wait(self, text: str, seconds: float | None) -> None:
        assert retry_after_seconds(text) == (None if seconds is None else pytest.approx(seconds))

    def test_errors_survive_the_way_to_the_parent(self) -> None:
        error = pickle.loads(pickle.dumps(AgentStalledError("silent", status=529, retry_after=2.0, program="claude")))
        assert (type(error), str(error)) == (AgentStalledError, "silent")
        assert (error.status, error.retry_after, error.program, error.is_transient) == (529, 2.0, "claude", True)
        assert isinstance(error, TimeoutError)


RESULT = {"type": "result", "queued_turn_count": 0}
FOLLOW_UP = {**RESULT, "origin": {"kind": "task-notification"}}


def started(task: str) -> dict[str, Any]:
    return {"type": "system", "subtype": "task_started", "task_id": task}


def notified(task: str) -> dict[str, Any]:
    return {"type": "system", "subtype": "task_notification", "task_id": task}


def listed(*tasks: str) -> dict[str, Any]:
    return {"type": "system", "subtype": "background_tasks_changed", "tasks": [{"task_id": task} for task in tasks]}


class TestTurn:
    def done_after(self, *messages: dict[str, Any]) -> list[bool]:
        turn = Turn()
        states = []
        for message in messages:
            turn.feed(message)
            states.append(turn.is_done)
        return states

    def test_one_result(self) -> None:
        assert self.done_after({"type": "assistant"}, RESULT) == [False, True]

    def test_two_sub_agents_as_2_1_330_runs_them(self) -> None:
        """The first result comes at once, and each notification is answered by a result of its own."""
        assert self.done_after(
            listed("a"), started("a"), listed("a", "b"), started("b"), RESULT,
            notified("a"), listed("b"), notified("b"), listed(), FOLLOW_UP, FOLLOW_UP,
        ) == [False] * 10 + [True]

    def test_a_background_shell_as_2_1_197_runs_it(self) -> None:
        old = {"type": "result"}
        assert self.done_after(started("a"), old, notified("a"), old) == [False, False, False, True]

    def test_a_sub_agent_in_the_foreground_leaves_a_doubt_that_silence_settles(self) -> None:
        turn = Turn()
        for message in (started("a"), notified("a"), RESULT):
            turn.feed(message)
        assert not turn.is_done
        assert turn.patience == DOUBT_SECONDS

    def test_a_follow_up_that_never_comes_is_waited_for_no_longer_than_that(self) -> None:
        turn = Turn()
        for message in (started("a"), RESULT, notified("a")):
            turn.feed(message)
        assert turn.patience == SETTLE_SECONDS

    def test_what_is_queued_is_waited_for(self) -> None:
        assert self.done_after({**RESULT, "queued_turn_count": 1}, RESULT) == [False, True]

    def test_while_a_background_task_runs_there_is_no_end_to_patience(self) -> None:
        turn = Turn()
        for message in (started("a"), RESULT):
            turn.feed(message)
        assert turn.patience is None
        assert turn.has_background_tasks
