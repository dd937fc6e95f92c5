"""Kinds of agents and their registry, the sub-agent files of Claude Code, and the retry policy: no process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agentpool import Agent, AgentKind, AgentRegistry, SettingsError, WorkerCrashedError
from agentpool.agents import AgentFileError, AgentRejectedError, AgentStalledError, AgentUnavailableError, agent_retry
from agentpool.agents.markdown import parse_agent, read_directory
from agentpool_worker.agents.base import Configured


class Summarizer(Agent):
    """Makes texts short.

    And more.
    """

    def run(self, prompt: str, *args: Any, **kwargs: Any) -> str:
        return prompt[:3]


class TestKind:
    def test_its_options_are_those_that_it_sets(self) -> None:
        kind = AgentKind(name="s", agent=Summarizer, memory_limit_mb=300, timeout=5, priority=2, retry=3)
        assert kind.options == {"memory_limit_mb": 300, "timeout": 5, "priority": 2, "retry": 3}
        assert AgentKind(name="s", agent=Summarizer).options == {}

    def test_its_output_and_logging_can_be_captured(self) -> None:
        kind = AgentKind(name="s", agent=Summarizer, capture_output=True, capture_logging="INFO")
        assert kind.options == {"capture_output": True, "capture_logging": "INFO"}
        with pytest.raises(SettingsError, match="agent kind 's': capture_logging must be None, a level's number or"):
            AgentKind(name="s", agent=Summarizer, capture_logging="LOUD")

    def test_its_concurrency_is_the_limit_of_its_group(self) -> None:
        kind = AgentKind(name="s", agent=Summarizer, concurrency=2, expected_memory_mb=300, memory_growth_mb=50)
        assert kind.options == {"group": "s", "group_limit": 2, "expected_memory_mb": 300, "memory_growth_mb": 50}
        with pytest.raises(SettingsError, match="agent kind 's': concurrency must be greater than 0"):
            AgentKind(name="s", agent=Summarizer, concurrency=0)

    def test_a_program_keeps_to_its_timeout_itself_and_the_pools_is_the_net(self) -> None:
        kind = AgentKind(name="c", agent="claude", timeout=60)
        assert kind.options == {"timeout": 70.0}
        assert isinstance(kind.target, Configured)
        assert kind.target.config == {"timeout": 60}

    def test_what_a_worker_is_told(self) -> None:
        assert AgentKind(name="claude", agent="claude").target == "claude"
        target = AgentKind(name="mine", agent="claude", config={"model": "x"}).target
        assert isinstance(target, Configured)
        assert (target.name, target.target, target.config) == ("mine", "claude", {"model": "x"})

    @pytest.mark.parametrize(("given", "words"), [
        ({"name": ""}, "needs a name"),
        ({"agent": 3}, "agent kind 'k': agent must be a class or a name"),
        ({"config": ["x"]}, "config must map keywords"),
        ({"memory_limit_mb": -1}, "agent kind 'k': memory_limit_mb must be greater than 0"),
        ({"timeout": "5"}, "agent kind 'k': timeout must be a number"),
        ({"hard_memory_limit_mb": 10, "memory_limit_mb": 20}, "below memory_limit_mb"),
        ({"priority": 1.5}, "priority must be a whole number"),
    ])
    def test_what_makes_no_sense_is_refused_with_the_kinds_name(self, given: dict[str, Any], words: str) -> None:
        with pytest.raises(SettingsError, match=words):
            AgentKind(**{"name": "k", "agent": Summarizer, **given})

    def test_it_can_be_changed_only_into_another(self) -> None:
        kind = AgentKind(name="s", agent=Summarizer)
        assert kind.updated(timeout=3).timeout == 3
        with pytest.raises(SettingsError, match=r"has no tmeout; it has .*timeout"):
            kind.updated(tmeout=3)
        with pytest.raises(AttributeError):
            kind.timeout = 3  # type: ignore[misc]


class TestRegistry:
    def test_the_decorator_registers_a_class_and_leaves_it_as_it_is(self) -> None:
        registry = AgentRegistry()
        assert registry.agent("summarizer", memory_limit_mb=300)(Summarizer) is Summarizer
        kind = registry.get("summarizer")
        assert (kind.agent, kind.memory_limit_mb, kind.description) == (Summarizer, 300, "Makes texts short.")
        assert registry.get(Summarizer) is kind
        assert "summarizer" in registry
        assert [other.name for other in registry] == ["summarizer"]

    def test_stock_agents_are_in_every_registry(self) -> None:
        registry = AgentRegistry()
        assert {"claude", "codex", "command", "security-analyst"} <= set(registry.names())
        assert registry.get("codex").agent == "codex"
        assert len(registry) == 0

    def test_one_name_has_one_kind(self) -> None:
        registry = AgentRegistry()
        registry.register(AgentKind(name="a", agent="claude", source="one.md"))
        with pytest.raises(SettingsError, match=r"agent kind 'a' already \(one.md\); give this one \(two.md\)"):
            registry.register(AgentKind(name="a", agent="claude", source="two.md"))
        other = AgentKind(name="a", agent="codex")
        assert registry.register(other, replace=True) is registry.get("a") is other

    def test_a_class_that_is_defined_again_takes_its_own_place(self) -> None:
        """A notebook cell that is run again, a module that is loaded again."""
        registry = AgentRegistry()
        for timeout in (1, 2):
            registry.agent("s", timeout=timeout)(type("Summarizer", (Summarizer,), {"__module__": "m"}))
        assert registry.get("s").timeout == 2

    def test_wrong_uses_say_so(self) -> None:
        registry = AgentRegistry()
        with pytest.raises(LookupError, match=r"unknown agent kind 'nobody'; known are aider, claude"):
            registry.get("nobody")
        with pytest.raises(SettingsError, match=r"has no tmeout; known are .*timeout"):
            registry.agent("s", tmeout=1)
        with pytest.raises(TypeError, match="the first argument of agent"):
            registry.agent(Summarizer)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="no run"):
            registry.agent("x")(int)


FILE = """---
name: security-reviewer
description: "Reviews code: for holes"
tools: Read, Grep, Agent(explorer, planner)
model: sonnet
color: red
maxTurns: 5
mcpServers:
  - github
---

You are a security reviewer.
Be brief.
"""


class TestFiles:
    def test_a_file_of_claude_code(self) -> None:
        kind = parse_agent(FILE, "agents/security-reviewer.md", config={"session": True}, timeout=60)
        assert (kind.name, kind.description) == ("security-reviewer", "Reviews code: for holes")
        assert (kind.agent, kind.source, kind.timeout) == ("claude", "agents/security-reviewer.md", 60)
        assert kind.extra["tools"] == ["Read", "Grep", "Agent(explorer, planner)"]
        assert kind.extra["color"] == "red"
        assert (kind.config["agent"], kind.config["session"]) == ("security-reviewer", True)
        definition = json.loads(kind.config["agents"])["security-reviewer"]
        assert definition["prompt"] == "You are a security reviewer.\nBe brief."
        assert (definition["maxTurns"], definition["mcpServers"], definition["model"]) == (5, ["github"], "sonnet")

    def test_another_program_gets_the_prompt_and_a_model_of_its_own(self) -> None:
        assert parse_agent(FILE, "f.md", program="codex").config == {
            "system_prompt": "You are a security reviewer.\nBe brief."}
        kind = parse_agent(FILE.replace("sonnet", "gpt-9"), "f.md", program="codex")
        assert kind.config["model"] == "gpt-9"

    @pytest.mark.parametrize(("text", "words"), [
        ("no front matter", r"f\.md:1: no front matter"),
        ("---\nname: a\n", r"f\.md:2: the front matter has no end"),
        ("---\nname: a\ndescription: b: c\n---\n", r"f\.md:3: the front matter is no YAML.*quote a text"),
        ("---\n- a\n---\n", r"f\.md:2: the front matter must be keys"),
        ("---\n---\n", r"f\.md:2: the front matter must be keys"),
        ("---\ndescription: b\n---\n", r"f\.md:1: the front matter has no name"),
        ("---\nname: a\ndescription:\n---\n", r"f\.md:3: the front matter has no description"),
        ("---\ndescription: b\nname: 7\n---\n", r"f\.md:3: name must be a text, got 7"),
        ("---\nname: a/b\ndescription: b\n---\n", r"f\.md:2: the name 'a/b' has blanks or slashes"),
        ("---\nname: a\ndescription: b\ntools: {x: 1}\n---\n", r"f\.md:4: tools must be names"),
        ("---\nname: a\ndescription: !!python/object:os.system b\n---\n", r"f\.md:3: the front matter is no YAML"),
    ])
    def test_errors_name_file_and_line(self, text: str, words: str) -> None:
        with pytest.raises(AgentFileError, match=words):
            parse_agent(text, "f.md")

    def test_the_project_goes_before_the_user(self, tmp_path: Path) -> None:
        project, user = tmp_path / "project", tmp_path / "user"
        for folder, names in ((project, ("a",)), (user, ("a", "b"))):
            folder.mkdir()
            for name in names:
                (folder / f"{name}.md").write_text(f"---\nname: {name}\ndescription: from {folder.name}\n---\nx\n")
        registry = AgentRegistry.from_directory(project, user, tmp_path / "missing", memory_growth_mb=200)
        assert [(kind.name, kind.description) for kind in registry] == [("a", "from project"), ("b", "from user")]
        assert registry.get("a").memory_growth_mb == 200
        assert registry.get("a").source == str(project / "a.md")

    def test_two_files_of_one_name_are_an_error(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / f"{name}.md").write_text("---\nname: a\ndescription: b\n---\nx\n")
        with pytest.raises(AgentFileError, match=r"two\.md:1: the agent 'a' is in .*one\.md already"):
            read_directory(tmp_path)

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_bytes(b"---\nname: \xff\n---\n")
        with pytest.raises(AgentFileError, match="not UTF-8"):
            read_directory(tmp_path)

    def test_without_pyyaml_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "yaml", None)
        with pytest.raises(ModuleNotFoundError, match=r"agentpool-runtime\[agents\]"):
            parse_agent(FILE, "f.md")


class TestRetry:
    def decide(self, policy: Any, error: BaseException, attempt: int = 1) -> float | None:
        seconds: float | None = policy.decide(attempt=attempt, error=error, value=None, started_at=0.0, now=1.0)
        return seconds

    def test_what_passes_by_itself_is_asked_again_with_a_growing_wait(self) -> None:
        policy = agent_retry(4)
        first = self.decide(policy, AgentUnavailableError("busy", status=529))
        third = self.decide(policy, AgentStalledError("silent"), attempt=3)
        assert first is not None
        assert third is not None
        assert 1 <= first <= 1.5
        assert 4 <= third <= 4.5

    def test_retry_after_is_honoured_within_reason(self) -> None:
        assert self.decide(agent_retry(), AgentUnavailableError("busy", retry_after=20.0)) == 20.0
        assert self.decide(agent_retry(longest=30), AgentUnavailableError("busy", retry_after=3600.0)) == 30.0

    @pytest.mark.parametrize("error", [AgentRejectedError("no key"), ValueError("x"), WorkerCrashedError("gone")])
    def test_what_does_not_is_not(self, error: BaseException) -> None:
        assert self.decide(agent_retry(), error) is None

    def test_it_ends(self) -> None:
        assert self.decide(agent_retry(3), AgentUnavailableError("busy"), attempt=3) is None

    def test_a_lost_worker_where_that_was_asked_for(self) -> None:
        assert self.decide(agent_retry(lost_workers=True), WorkerCrashedError("gone")) is not None
