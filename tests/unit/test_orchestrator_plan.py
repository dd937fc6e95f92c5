"""What a prompt is planned into, and how a report reads. No pool is made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentpool.orchestrator import REVIEWERS, AgentOutcome, AgentTry, OrchestrationReport, Plan, plan
from agentpool_worker.agents.base import Agent
from agentpool_worker.agents.rendering import jsonable, printable, render_result, shortened

SECURITY, PERFORMANCE, TESTS = REVIEWERS


class Reviewer(Agent):
    def run(self, prompt: str, *, path: str, out: str | None = None) -> str:
        return prompt


def names(prompt: str, **given: Any) -> list[str]:
    return [agent.name for agent in plan(prompt, path=Path(__file__).parent, **given).agents]


class TestWords:
    @pytest.mark.parametrize(
        "prompt",
        [
            "Review this code",
            "",
            "Please look at it.",
            "Perform a review of this FastAPI app",
            "Review everything, especially the security",
            "Review this and write tests",
            "Audit the package, then generate property-based tests for it.",
            "a security, performance and test review",
            "There is no test here, what do you say?",
        ],
    )
    def test_a_general_review_is_all_three(self, prompt: str) -> None:
        assert names(prompt) == list(REVIEWERS)

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("Look for vulnerabilities", [SECURITY]),
            ("Is this secure?", [SECURITY]),
            ("SECURITY review", [SECURITY]),
            ("why is it so slow", [PERFORMANCE]),
            ("Find bottlenecks and complexity", [PERFORMANCE]),
            ("optimise the hot loop", [PERFORMANCE]),
            ("write tests", [TESTS]),
            ("increase the coverage", [TESTS]),
            ("security and performance", [SECURITY, PERFORMANCE]),
            ("Write tests and check the performance", [PERFORMANCE, TESTS]),
        ],
    )
    def test_named_subjects_narrow_it(self, prompt: str, expected: list[str]) -> None:
        assert names(prompt) == expected

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("Review this without tests", [SECURITY, PERFORMANCE]),
            ("Review everything except the performance", [SECURITY, TESTS]),
            ("skip tests and performance", [SECURITY]),
            ("without tests, but security", [SECURITY]),
            ("Without tests; how is the performance?", [PERFORMANCE]),
            ("Review this, no tests", list(REVIEWERS)),
            ("it is not slow, but is it secure", [SECURITY]),
        ],
    )
    def test_what_is_not_wanted(self, prompt: str, expected: list[str]) -> None:
        assert names(prompt) == expected

    def test_the_reason_quotes_the_word(self) -> None:
        assert plan("any Exploits?", path=".").agents[0].reason == "the prompt says 'exploits'"
        assert plan("hello", path=".").agents[0].reason == "a general review"

    def test_a_prompt_that_leaves_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no agent is left"):
            names("skip security, skip performance, skip tests")


class TestNamedAgents:
    def test_they_win_over_the_words(self) -> None:
        assert names("write tests", agents=[SECURITY]) == [SECURITY]

    def test_order_is_kept_and_duplicates_are_one(self) -> None:
        assert names("x", agents=[TESTS, SECURITY, TESTS]) == [TESTS, SECURITY]

    def test_classes_are_taken(self) -> None:
        planned = plan("x", path=".", agents=[Reviewer]).agents[0]
        assert planned.kind is Reviewer
        assert planned.name.endswith(":Reviewer")

    def test_a_stock_agent_by_its_class_is_the_same_agent(self) -> None:
        module_and_class = "agentpool_worker.agents.security_analyst:SecurityAnalyst"
        assert names("x", agents=[SECURITY, module_and_class]) == [SECURITY]

    @pytest.mark.parametrize("unknown", ["security", "security_analyst", ""])
    def test_unknown_names_are_refused_with_the_known(self, unknown: str) -> None:
        with pytest.raises(LookupError, match="security-analyst, performance-auditor, test-generator"):
            names("x", agents=[unknown])

    def test_unknown_modules_are_refused_before_anything_runs(self) -> None:
        with pytest.raises(LookupError, match="no module 'surely_not_there'"):
            names("x", agents=["surely_not_there:Agent"])

    def test_the_command_agent_is_no_reviewer(self) -> None:
        with pytest.raises(LookupError, match="agentpool run"):
            names("x", agents=["command"])

    def test_no_agents_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no agent is left"):
            names("x", agents=[])

    def test_a_string_is_not_taken_for_a_list(self) -> None:
        with pytest.raises(TypeError, match=r"write \['security-analyst'\]"):
            names("x", agents="security-analyst")

    def test_what_is_no_agent_is_refused(self) -> None:
        with pytest.raises(TypeError, match="no agent"):
            names("x", agents=[dict])


class TestPaths:
    def test_they_become_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        planned = plan("x", path=".", out=Path("tests/new"))
        assert planned.path == str(tmp_path)
        assert planned.out == str(tmp_path / "tests" / "new")
        assert not (tmp_path / "tests").exists()

    def test_a_missing_path_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            plan("x", path=tmp_path / "nowhere")

    def test_out_must_be_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match="file"):
            plan("x", path=tmp_path, out=tmp_path / "file")

    def test_plans_are_frozen(self) -> None:
        planned = plan("x", path=".")
        assert isinstance(planned, Plan)
        with pytest.raises(AttributeError):
            planned.prompt = "y"  # type: ignore[misc]


def outcome(**given: Any) -> AgentOutcome:
    """One that was run once; what it cost and its error, if any, are those of that try."""
    names = ("attempts", "elapsed_seconds", "peak_rss_bytes", "error", "usage", "cost_usd")
    tried = AgentTry(kind="a", **{"attempts": 1} | {name: given.pop(name) for name in names if name in given})
    usual = {"name": "a", "kind": "a", "state": "failed" if tried.error else "succeeded", "tries": (tried,)}
    return AgentOutcome(**{**usual, "result": None if tried.error else {"summary": "all well"}, **given})


def report(*agents: AgentOutcome) -> OrchestrationReport:
    return OrchestrationReport(
        prompt="Review", path="/some/code", out=None, agents=agents, wall_seconds=1.234, health={"status": "ok"}
    )


FINDING = {"file": "a.py", "line": 3, "severity": "high", "confidence": "low", "rule": "B1", "message": "bad"}


class TestReport:
    def test_ok_only_when_every_agent_is(self) -> None:
        assert report(outcome(), outcome()).ok
        assert not report(outcome(), outcome(error="X")).ok

    def test_text_has_a_section_for_each_agent(self) -> None:
        text = report(
            outcome(name="one", elapsed_seconds=0.5, peak_rss_bytes=30 * 1024 * 1024),
            outcome(name="two", attempts=3, error="WorkerCrashedError: died\nof a signal"),
        ).to_text()
        assert "1 of 2 agents succeeded, in 1.23 s" in text
        assert "\none: ok (1 attempt, 0.50 s, peak memory 30 MB)\n  all well\n" in text
        assert "\ntwo: FAILED (3 attempts, 0.00 s)\n  WorkerCrashedError: died\n  of a signal" in text

    def test_str_is_the_text(self) -> None:
        assert str(report(outcome())) == report(outcome()).to_text()

    def test_the_table_has_the_first_ten_and_is_aligned(self) -> None:
        findings = [{**FINDING, "line": line, "rule": "B" * (1 + line % 3)} for line in range(25)]
        lines = report(outcome(result={"summary": "s", "findings": findings})).to_text().splitlines()
        table = lines[lines.index("  Findings (first 10 of 25)") + 1 :]
        assert len(table) == 11
        assert table[0].split() == ["severity", "confidence", "rule", "where", "message"]
        assert {line.index("bad") for line in table[1:]} == {table[0].index("message")}

    def test_no_line_is_wider_than_a_terminal(self) -> None:
        finding = {**FINDING, "message": "long " * 100, "file": "very/" * 30 + "long.py"}
        text = report(outcome(result={"findings": [finding]})).to_text()
        assert max(map(len, text.splitlines())) <= 120
        assert "…" in text

    def test_control_characters_cannot_reach_the_terminal(self) -> None:
        text = report(outcome(result={"findings": [{**FINDING, "file": "\x1b[2J\u009bevil\n.py"}]})).to_text()
        assert "\\x1b[2J\\x9bevil .py" in text
        assert "\x1b" not in text

    def test_dict_is_strict_json_whatever_an_agent_returns(self) -> None:
        cyclic: list[Any] = []
        cyclic.append(cyclic)
        result = {"path": Path("/x"), 3: {1}, "nan": float("nan"), "tuple": (1, None, True), "cyclic": cyclic}
        data = report(outcome(result=result, peak_rss_bytes=1024 * 1024)).to_dict()
        read = json.loads(json.dumps(data, allow_nan=False))
        assert read["ok"] is True
        assert read["wall_seconds"] == 1.234
        assert read["health"] == {"status": "ok"}
        assert read["agents"][0]["peak_rss_mb"] == 1.0
        assert read["agents"][0]["result"]["3"] == "{1}"
        assert read["agents"][0]["result"]["tuple"] == [1, None, True]
        assert read["agents"][0]["result"]["nan"] == "nan"


class TestRendering:
    @pytest.mark.parametrize("result", [None, 3, [1, 2], {"answer": 42}, {"stdout": None}])
    def test_results_of_other_agents_are_shown_as_they_are(self, result: Any) -> None:
        assert render_result(result) == [repr(result)]

    @pytest.mark.parametrize(
        "result", ["one\n  two\x1b[2J", {"answer": "one\n  two\x1b[2J\n"}, {"stdout": b"one\n  two\x1b[2J\n"}]
    )
    def test_words_are_lines(self, result: Any) -> None:
        assert render_result(result) == ["one", "  two\\x1b[2J"]

    def test_many_words_are_cut(self) -> None:
        assert render_result("x\n" * 45) == ["x"] * 40 + ["(5 more lines)"]
        assert render_result("") == []

    def test_a_list_that_is_no_table_is_not_taken_for_one(self) -> None:
        assert render_result({"summary": "s", "findings": ["text"], "errors": [], "tests": 3}) == ["s"]

    def test_a_table_of_unknown_rows_is_a_title(self) -> None:
        assert render_result({"findings": [{"odd": 1}]}) == ["", "Findings (1)"]

    def test_empty_columns_are_left_out(self) -> None:
        lines = render_result({"tests": [{"module": "m", "tests": 2, "needs_work": 0, "test_file": None}]})
        assert lines[2].split() == ["tests", "need", "work", "module"]

    def test_helpers(self) -> None:
        assert printable("a\tb\n c") == "a b c"
        assert printable("naïve 日本") == "naïve 日本"
        assert shortened("abcdef", 4) == "abc…"
        assert shortened("abcd", 4) == "abcd"
        assert jsonable(float("-inf")) == "-inf"
