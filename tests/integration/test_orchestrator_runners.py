"""The agents of `.claude/agents` on a coding agent's command line: which run, on what, and when nothing is looked at.

The program is the tests' own script, called claude; it says with what words it was started.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentpool import AgentPool, PlanError
from agentpool.agents import AgentKind
from agentpool.orchestrator import (
    REVIEWERS,
    OrchestrationReport,
    PlannedAgent,
    kinds_for,
    orchestrate_with_memory_management,
    plan_from_mapping,
    run_plan,
)

SECURITY, PERFORMANCE, TESTS = REVIEWERS

#: Says which agent it is, by what it was given; fails where the prompt says so.
PROGRAM = """#!{python}
import json, os, sys
if "--version" in sys.argv:
    open(os.path.join(os.path.dirname(__file__), "looked-at"), "a").write("x")
    print("2.1.330 (Claude Code)")
    sys.exit(0)
words = dict(zip(sys.argv, sys.argv[1:]))
prompt = sys.stdin.read() or words.get("-p", "")
agent = words.get("--agent")
definition = json.loads(words["--agents"])[agent]
failed = "FAIL" in prompt
text = "out of order" if failed else f"{{agent}} [{{definition['prompt']}}] was asked: {{prompt}}"
print(json.dumps({{"type": "system", "subtype": "init", "model": "scripted"}}))
print(json.dumps({{"type": "result", "subtype": "success", "is_error": failed, "result": text, "num_turns": 1,
                  "session_id": "s", "total_cost_usd": 0.25, "usage": {{"input_tokens": 10, "output_tokens": 3}}}}))
"""


def write_agent(folder: Path, name: str, body: str = "Be thorough.", **more: str) -> None:
    directory = folder / ".claude" / "agents"
    directory.mkdir(parents=True, exist_ok=True)
    keys = {"name": name, "description": f"what {name} does", **more}
    front = "\n".join(f"{key}: {value}" for key, value in keys.items())
    (directory / f"{name}.md").write_text(f"---\n{front}\n---\n{body}\n")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with code in it, as the current directory, a home, and a PATH where no agent program is."""
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    project = tmp_path / "project"
    project.mkdir()
    (project / "code.py").write_text("def add(a: int, b: int) -> int:\n    return a + b\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:/usr/bin:/bin")
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def claude(place: Path) -> Path:
    """An installed claude; the file of which it makes a note where somebody asks for its version."""
    program = place.parent / "bin" / "claude"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program.parent / "looked-at"


@pytest.fixture
def orchestrate(place: Path) -> Iterator[Callable[..., OrchestrationReport]]:
    with AgentPool() as pool:
        yield lambda prompt, **given: orchestrate_with_memory_management(prompt, pool=pool, **given)


def kinds(report: OrchestrationReport) -> dict[str, str]:
    return {agent.name: agent.kind for agent in report.agents}


def test_without_a_program_everything_is_as_it_was(place: Path, orchestrate: Any) -> None:
    write_agent(place, SECURITY)
    report = orchestrate("Review this code")
    assert report.ok
    assert kinds(report) == {name: name for name in REVIEWERS}
    assert all(len(agent.tries) == 1 for agent in report.agents)


def test_without_files_no_program_is_looked_for(claude: Path, orchestrate: Any) -> None:
    report = orchestrate("Look for vulnerabilities")
    assert kinds(report) == {SECURITY: SECURITY}
    assert not claude.exists()


def test_the_projects_agents_run_on_the_program(place: Path, claude: Path, orchestrate: Any) -> None:
    write_agent(place, SECURITY, "Look twice.")
    write_agent(place, "docs-writer")
    write_agent(place.parent / "home", SECURITY, "The user's own.")
    write_agent(place.parent / "home", "gardener")
    report = orchestrate("Review this code")
    assert report.ok, report
    assert kinds(report) == {"docs-writer": "docs-writer (claude)", SECURITY: f"{SECURITY} (claude)"}
    answer = report.results[SECURITY]["answer"]
    assert answer.startswith(f"{SECURITY} [Look twice.] was asked: Review this code")
    assert str(place) in answer  # the path
    assert report.cost_usd == 0.5
    assert report.usage == {"input_tokens": 20, "output_tokens": 6}
    assert f"  {SECURITY} [Look twice.] was asked" in report.to_text()


def test_the_prompts_words_choose_among_them(place: Path, claude: Path, orchestrate: Any) -> None:
    write_agent(place, "docs-writer")
    write_agent(place, "reviewer")
    write_agent(place.parent / "home", PERFORMANCE)
    assert kinds(orchestrate("Why is it slow?")) == {PERFORMANCE: f"{PERFORMANCE} (claude)"}
    assert kinds(orchestrate("Have the docs writer look at it")) == {"docs-writer": "docs-writer (claude)"}
    assert kinds(orchestrate("Ask @reviewer about it")) == {"reviewer": "reviewer (claude)"}
    # What no file describes is the stock agent's.
    assert kinds(orchestrate("Look for vulnerabilities")) == {SECURITY: SECURITY}


def test_the_stock_agent_takes_over_where_the_program_fails(place: Path, claude: Path, orchestrate: Any) -> None:
    write_agent(place, SECURITY)
    report = orchestrate("FAIL to look for vulnerabilities")
    [security] = report.agents
    assert security.ok
    assert [each.kind for each in security.tries] == [f"{SECURITY} (claude)", SECURITY]
    assert "out of order" in (security.tries[0].error or "")
    # Who names the program wants that one.
    [security] = orchestrate("FAIL to look for vulnerabilities", runner="claude").agents
    assert security.state == "failed"
    assert security.kind == f"{SECURITY} (claude)"


def test_stock_leaves_the_files_alone(place: Path, claude: Path, orchestrate: Any) -> None:
    write_agent(place, SECURITY)
    (place / ".claude" / "agents" / "broken.md").write_text("no front matter")
    for runner in ("stock", None):
        assert kinds(orchestrate("Look for vulnerabilities", runner=runner)) == {SECURITY: SECURITY}
    assert not claude.exists()
    with pytest.raises(ValueError, match=r"broken\.md:1: no front matter"):
        orchestrate("Look for vulnerabilities")


def test_agents_by_name_and_in_plans(place: Path, claude: Path, orchestrate: Any) -> None:
    write_agent(place, "docs-writer")
    report = orchestrate(
        "Look", agents=["docs-writer", PlannedAgent("docs-writer", "again", after=["docs-writer"], prompt="{results}")]
    )
    assert report.ok, report
    assert kinds(report) == {"docs-writer": "docs-writer (claude)", "again": "docs-writer (claude)"}
    assert "docs-writer [Be thorough.] was asked: docs-writer:" in report.results["again"]["answer"]
    with pytest.raises(LookupError, match=r"unknown agent 'doc-writer'; known are .*docs-writer"):
        orchestrate("Look", agents=["doc-writer"])


def test_classes_need_no_files(place: Path, claude: Path, orchestrate: Any) -> None:
    class Own:
        def run(self, prompt: str) -> str:
            return prompt

    write_agent(place, "docs-writer")
    assert orchestrate("Look", agents=[Own]).ok
    assert not claude.exists()


@pytest.mark.parametrize(
    ("runner", "said"),
    [("nobody", "runner must be 'auto', 'stock', None or a program"), ("codex", "'codex' cannot be used")],
)
def test_a_runner_that_is_not_there(place: Path, orchestrate: Any, runner: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        orchestrate("Review this code", runner=runner)


def test_another_users_directory_is_not_ours_to_run(place: Path, claude: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_agent(place, SECURITY)
    if os.geteuid() == 0:
        os.chown(place / ".claude" / "agents", 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert list(kinds_for("auto", project=str(place), home=os.environ["HOME"])) == []


def test_a_plan_says_whether_files_are_read(place: Path, claude: Path) -> None:
    write_agent(place, SECURITY)
    data = {"prompt": "x", "agents": {"a": {"kind": SECURITY}}}
    assert plan_from_mapping(data, base=place).agents[0].kind == SECURITY
    planned = plan_from_mapping({**data, "runner": "claude"}, base=place)
    spare = {"prompt": "x", "runner": "claude", "agents": {"a": {"kind": "command", "fallback": SECURITY}}}
    [kind] = plan_from_mapping(spare, base=place).agents[0].fallback
    assert isinstance(kind, AgentKind)
    with AgentPool() as pool:
        report = run_plan(planned, pool)
    assert kinds(report) == {"a": f"{SECURITY} (claude)"}
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["agents"][0]["cost_usd"] == 0.25
