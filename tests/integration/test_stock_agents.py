"""The stock agents with the real bandit, ruff and hypothesis: on code this project did not write, and on bad code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity

import agentpool_worker
from agentpool_worker.agents.performance_auditor import WEIGHTS, PerformanceAuditor
from agentpool_worker.agents.security_analyst import SecurityAnalyst
from agentpool_worker.agents.sources import find_sources, locate_module
from agentpool_worker.agents.test_generator import MARKER, TestGenerator

TENACITY = Path(tenacity.__file__).parent
FILES = len(list(TENACITY.rglob("*.py")))

Tree = Callable[[dict[str, str | bytes]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """`tree({"a.py": source, ...})` writes files and returns their directory."""

    def write(files: dict[str, str | bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / "code" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())
        return tmp_path / "code"

    return write


@pytest.fixture
def security() -> Iterator[SecurityAnalyst]:
    agent = SecurityAnalyst()
    agent.setup()
    yield agent
    agent.close()


@pytest.fixture
def performance() -> PerformanceAuditor:
    agent = PerformanceAuditor()
    agent.setup()
    return agent


@pytest.fixture
def generator() -> Iterator[TestGenerator]:
    agent = TestGenerator()
    agent.setup()
    yield agent
    agent.close()


def run_pytest(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(directory)],
        cwd=directory, capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def by_module(items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {item["module"]: item for item in items}


class TestSources:
    def test_only_the_projects_own_python_files(self, tree: Tree) -> None:
        names = (
            "a.py", "pkg/__init__.py", "pkg/b.py", "notes.txt", ".hidden/c.py", "node_modules/d.py", "env/pyvenv.cfg",
            "env/lib/e.py", "build/lib/f.py", "dist/__init__.py", "out/test_g.py", "pkg/__pycache__/h.py",
        )  # fmt: skip
        root = tree(dict.fromkeys(names, ""))
        sources = find_sources(root, leave_out=root / "out")
        assert [sources.relative(path) for path in sources.paths] == [
            "a.py", "dist/__init__.py", "pkg/__init__.py", "pkg/b.py",
        ]  # fmt: skip

    def test_a_path_that_would_be_passed_over_is_searched_when_it_is_asked_for(self, tree: Tree) -> None:
        root = tree({".hidden/c.py": ""})
        assert len(find_sources(root / ".hidden").paths) == 1

    def test_one_file(self, tree: Tree) -> None:
        root = tree({"script": ""})
        sources = find_sources(root / "script")
        assert (sources.base, sources.paths) == (str(root), [str(root / "script")])

    def test_module_names_follow_the_packages(self, tree: Tree) -> None:
        root = tree(dict.fromkeys(("src/p/__init__.py", "src/p/q/__init__.py", "src/p/q/m.py", "my-script.py"), ""))
        assert locate_module(str(root / "src/p/q/m.py")) == ("p.q.m", str(root / "src"))
        assert locate_module(str(root / "src/p/q/__init__.py")) == ("p.q", str(root / "src"))
        assert locate_module(str(root / "my-script.py")) is None


@pytest.mark.parametrize("agent_class", [SecurityAnalyst, PerformanceAuditor, TestGenerator])
class TestAll:
    def test_missing_path(self, agent_class: type[Any], tmp_path: Path) -> None:
        agent = agent_class()
        agent.setup()
        try:
            with pytest.raises(FileNotFoundError, match="nowhere"):
                agent.run("x", path=str(tmp_path / "nowhere"))
        finally:
            agent.close()

    def test_no_python_files(self, agent_class: type[Any], tmp_path: Path) -> None:
        agent = agent_class()
        agent.setup()
        try:
            result = agent.run("x", path=str(tmp_path))
        finally:
            agent.close()
        assert result["files"] == 0
        assert result["errors"] == []

    def test_results_are_json_and_the_same_each_time(self, agent_class: type[Any], tmp_path: Path) -> None:
        agent = agent_class()
        agent.setup()
        try:
            results = [json.dumps(agent.run("x", path=str(TENACITY)), allow_nan=False) for _ in range(2)]
        finally:
            agent.close()
        assert results[0] == results[1]
        result = json.loads(results[0])
        assert result["agent"] == agent_class.name
        assert result["files"] == FILES
        assert result["errors"] == []
        assert "\n" not in result["summary"]


@pytest.mark.parametrize(
    ("agent", "tool"),
    [("security-analyst", "bandit"), ("performance-auditor", "ruff"), ("test-generator", "hypothesis")],
)
def test_a_missing_tool_is_named_with_its_cure(agent: str, tool: str) -> None:
    code = f"from agentpool_worker.agents.base import resolve; resolve({agent!r})().setup()"
    source = str(Path(agentpool_worker.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],  # without site-packages
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: {agent} needs {tool}, which is not installed here. "
        "Cure: pip install 'agentpool-runtime[agents]'"
    )


class TestSecurityAnalyst:
    def test_worst_first(self, security: SecurityAnalyst, tree: Tree) -> None:
        root = tree({
            "a.py": "assert input()\n",
            "b.py": "import subprocess\nsubprocess.call(input(), shell=True)\nassert True  # nosec\n",
            "c/d.py": "import yaml\nyaml.load(input())\n",
        })
        result = security.run("x", path=str(root))
        severities = [finding["severity"] for finding in result["findings"]]
        assert severities == sorted(severities, key=["high", "medium", "low"].index)
        assert result["findings"][0] == {
            "file": "b.py", "line": 2, "severity": "high", "confidence": "high", "rule": "B602",
            "message": result["findings"][0]["message"],
        }  # fmt: skip
        assert {finding["file"] for finding in result["findings"]} == {"a.py", "b.py", "c/d.py"}
        assert result["totals"]["by_severity"] == {"high": 1, "medium": 1, "low": 2}
        assert result["totals"]["suppressed_by_comment"] == 1
        assert result["summary"] == "4 findings in 3 files (1 high, 1 medium, 2 low)"

    def test_files_that_cannot_be_read_are_listed(self, security: SecurityAnalyst, tree: Tree) -> None:
        root = tree({"good.py": "x = 1\n", "bad.py": "def f(:\n", "nul.py": b"x = 1\0", "escape.py": 'x = "\\d"\n'})
        result = security.run("x", path=str(root))
        assert [error["file"] for error in result["errors"]] == ["bad.py", "nul.py"]
        assert result["files"] == 2
        assert "2 files could not be checked" in result["summary"]

    def test_one_file_and_out(self, security: SecurityAnalyst, tree: Tree) -> None:
        root = tree({"a.py": "assert 1\n", "out/test_b.py": "assert 1\n"})
        assert security.run("x", path=str(root / "a.py"))["files"] == 1
        assert security.run("x", path=str(root), out=str(root / "out"))["files"] == 1


COMPLEX = "def branchy(x):\n" + "".join(f"    if x == {n}:\n        return {n}\n" for n in range(24))


class TestPerformanceAuditor:
    def test_findings_are_in_their_functions_and_the_worst_come_first(
        self, performance: PerformanceAuditor, tree: Tree
    ) -> None:
        root = tree({
            "a.py": COMPLEX,
            "b.py": """
                import time

                FLAG = dict(a=1)

                class Service:
                    async def serve(self):
                        time.sleep(1)

                    def collect(self, items):
                        def inner(more):
                            result = []
                            for item in more:
                                result.append(item)
                            return result
                        return inner(items)
            """,
        })
        result = performance.run("x", path=str(root))
        found = [(f["function"], f["file"], f["complexity"], f["score"], f["rules"]) for f in result["functions"]]
        assert found[:4] == [
            ("branchy", "a.py", 25, 25, {"C901": 1}),
            ("Service.serve", "b.py", 1, 1 + WEIGHTS["ASYNC"], {"ASYNC251": 1}),
            ("Service.collect.inner", "b.py", 2, 2 + WEIGHTS["PERF"], {"PERF402": 1}),
            ("Service.collect", "b.py", 3, 3, {}),
        ]
        assert found[4] == ("(module)", "b.py", 0, WEIGHTS["C4"], {"C408": 1})
        assert [finding["function"] for finding in result["findings"]] == [
            "branchy", "Service.serve", "Service.collect.inner", "(module)",
        ]  # fmt: skip
        assert [finding["severity"] for finding in result["findings"]] == ["high", "high", "medium", "low"]
        assert result["findings"][0]["message"] == "cyclomatic complexity 25, above 10"
        assert result["totals"]["by_rule"] == {"ASYNC251": 1, "C408": 1, "C901": 1, "PERF402": 1}
        assert result["totals"]["highest_complexity"] == 25
        assert result["totals"]["functions"] == 4

    def test_every_function_is_measured(self, performance: PerformanceAuditor) -> None:
        result = performance.run("x", path=str(TENACITY))
        assert result["totals"]["functions"] > 100
        assert len(result["functions"]) == 50
        scores = [function["score"] for function in result["functions"]]
        assert scores == sorted(scores, reverse=True)

    def test_comments_count_and_the_projects_settings_do_not(self, performance: PerformanceAuditor, tree: Tree) -> None:
        root = tree({
            "a.py": "x = dict(a=1)\ny = dict(b=2)  # noqa: C408\n",
            "ruff.toml": "exclude = ['*.py']\nlint.ignore = ['ALL']\n",
        })
        result = performance.run("x", path=str(root))
        assert [(finding["line"], finding["rule"]) for finding in result["findings"]] == [(1, "C408")]

    def test_files_that_cannot_be_read_are_listed_once(self, performance: PerformanceAuditor, tree: Tree) -> None:
        root = tree({
            "bad.py": "def f(:\n  )\n",
            "latin.py": b"# coding: latin-1\nx = '\xe9'\n",
            "good.py": "def f():\n    return 1\n",
        })
        result = performance.run("x", path=str(root))
        assert [error["file"] for error in result["errors"]] == ["bad.py", "latin.py"]
        assert "not UTF-8" in result["errors"][1]["message"]
        assert (result["files"], result["totals"]["functions"]) == (1, 1)

    def test_many_files_take_several_calls(
        self, performance: PerformanceAuditor, tree: Tree, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tree({f"m{n}.py": f"def f{n}(): return dict(a=1)\n" for n in range(20)})
        whole = performance.run("x", path=str(root))
        monkeypatch.setattr("agentpool_worker.agents.performance_auditor.COMMAND_LINE_CHARACTERS", 1)
        assert performance.run("x", path=str(root)) == whole
        assert whole["totals"]["findings"] == 20

    def test_a_ruff_that_fails_is_quoted(self, performance: PerformanceAuditor, tree: Tree) -> None:
        performance._ruff = [sys.executable, "-c", "import sys; sys.exit('no such luck')"]
        with pytest.raises(RuntimeError, match=r"ruff failed.*no such luck"):
            performance.run("x", path=str(tree({"a.py": ""})))


class TestTestGenerator:
    def test_tenacity(self, generator: TestGenerator, tmp_path: Path) -> None:
        out = tmp_path / "generated" / "tests"
        result = generator.run("x", path=str(TENACITY), out=str(out))
        assert "tenacity.retry" not in result["skipped"]
        assert result["totals"]["modules"] == FILES
        assert by_module(result["skipped"])["tenacity.tornadoweb"]["reason"].startswith("cannot be imported")
        written = by_module(result["tests"])
        assert written["tenacity.retry"]["test_file"] == "test_ghost_tenacity_retry.py"
        assert sorted(path.name for path in out.iterdir()) == sorted(
            ["conftest.py", *(item["test_file"] for item in result["tests"])]
        )
        for path in out.iterdir():
            compile(path.read_text(), path.name, "exec")
            assert path.read_text().startswith(MARKER)
            assert "sys.path" not in path.read_text()  # the package is installed
        collected = run_pytest(out, "--collect-only", "-W", "error")
        assert collected.returncode == 0, collected.stdout + collected.stderr
        assert f"{result['totals']['tests']} tests collected" in collected.stdout

    def test_a_project_that_is_not_installed(self, generator: TestGenerator, tree: Tree) -> None:
        root = tree({
            "src/shop/__init__.py": "",
            "src/shop/prices.py": """
                import asyncio
                from .helpers import clean

                def total(price: int, count: int) -> int:
                    return price * count

                async def fetch(url: str) -> str:
                    return url

                def odd(thing: "asyncio.Event", other) -> None: ...

                def _private(x: int) -> int: ...
            """,
            "src/shop/helpers.py": "def clean(text: str) -> str:\n    return text.strip()\n",
        })
        out = root / "tests" / "ghost"
        result = generator.run("x", path=str(root), out=str(out))
        written = by_module(result["tests"])
        assert set(written) == {"shop.prices", "shop.helpers"}
        assert written["shop.prices"]["tests"] >= 3
        reasons = {item["test"]: item["reason"] for item in result["needs_work"]}
        assert reasons["test_fuzz_fetch"] == "shop.prices.fetch is async: await it"
        assert "other" in reasons["test_fuzz_odd"]
        text = (out / "test_ghost_shop_prices.py").read_text()
        assert "clean" not in text  # imported there, but tested where it is defined
        assert "_private" not in text
        assert str(root) not in text  # the path is relative: the project may be moved
        moved = root.rename(root.with_name("moved"))
        done = run_pytest(moved / "tests" / "ghost", "-W", "error")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{result['totals']['tests'] - 2} passed, 2 skipped" in done.stdout

    def test_the_reviewed_code_is_left_as_it_was(self, generator: TestGenerator, tree: Tree) -> None:
        root = tree({"noisy.py": "open('beside.txt', 'w').write('x')\nprint('hello')\ndef f(x: int): ...\n"})
        result = generator.run("x", path=str(root))
        assert result["totals"]["tests"] == 1
        assert [path.name for path in root.iterdir()] == ["noisy.py"]
        assert "noisy" not in sys.modules
        assert "counted only" in result["summary"]
        assert result["tests"][0]["test_file"] is None

    def test_modules_that_misbehave_are_skipped_with_the_reason(
        self, generator: TestGenerator, tree: Tree, is_alive: Callable[[int], bool], wait_until: Callable[..., None]
    ) -> None:
        pid_file = tree({}).parent / "pid"
        leave = (
            "import subprocess, sys\nleft = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1)\n"
            f"open({str(pid_file)!r}, 'w').write(str(left.pid))\ndef f(x: int): ...\n"
        )
        root = tree({
            "a_exits.py": "import sys\nsys.exit('bye')\n",
            "b_ends.py": "import os\nos._exit(7)\n",
            "c_dies.py": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
            "d_hangs.py": "import threading\nthreading.Event().wait()\n",
            "e_ignores.py": "import signal\nsignal.pthread_sigmask(0, range(1, 32))\nwhile True: pass\n",
            "f_raises.py": "raise LookupError('of its own')\n",
            "g_interrupts.py": "raise KeyboardInterrupt\n",
            "h_closes.py": "import os\nos.closerange(0, 200)\ndef f(x: int): ...\n",
            "i_leaves.py": leave,
            "j_syntax.py": "def f(:\n",
            "json.py": "def f(x: int): ...\n",
            "k_nothing.py": "X = 1\n",
            "z_good.py": "def f(x: int): ...\n",
        })
        result = generator.run("x", path=str(root), module_timeout=2.0)
        reasons = {item["module"]: item["reason"] for item in result["skipped"]}
        assert reasons == {
            "a_exits": "calls sys.exit('bye') when it is imported",
            "b_ends": "importing or ghostwriting it ended the process (exit code 7)",
            "c_dies": "importing or ghostwriting it ended the process (signal 11)",
            "d_hangs": "took longer than 2 s, imported or ghostwritten; it was stopped",
            "e_ignores": "took longer than 2 s, imported or ghostwritten; it was stopped",
            "f_raises": "cannot be imported: LookupError: of its own",
            "g_interrupts": "cannot be imported: KeyboardInterrupt",
            "h_closes": reasons["h_closes"],
            "j_syntax": reasons["j_syntax"],
            "json": reasons["json"],
            "k_nothing": "it defines no public function with arguments",
        }
        assert "ended the process" in reasons["h_closes"]
        assert reasons["j_syntax"].startswith("cannot be imported: SyntaxError")
        assert "is already that of" in reasons["json"]
        assert set(by_module(result["tests"])) == {"i_leaves", "z_good"}
        pid = int(pid_file.read_text())
        wait_until(lambda: not is_alive(pid), "the process that a module had started is still there")

    def test_programs_and_tests_are_not_imported(self, generator: TestGenerator, tree: Tree) -> None:
        touch = "import pathlib\npathlib.Path(__file__ + '.was-run').touch()\ndef f(x: int): ...\n"
        names = ["setup.py", "conftest.py", "test_x.py", "x_test.py", "p/__init__.py", "p/__main__.py", "my-script.py"]
        root = tree({**dict.fromkeys(names, touch), "p/__init__.py": "", "a/util.py": touch, "b/util.py": touch})
        result = generator.run("x", path=str(root))
        assert sorted(path.name for path in root.rglob("*.was-run")) == ["util.py.was-run"]
        reasons = {item["file"]: item["reason"] for item in result["skipped"]}
        assert reasons["b/util.py"] == "a/util.py is imported under the same name"
        assert "module name" in reasons["my-script.py"]
        assert set(reasons) == {*names, "b/util.py"}

    def test_only_its_own_files_are_overwritten(self, generator: TestGenerator, tree: Tree, tmp_path: Path) -> None:
        root = tree({"a.py": "def f(x: int): ...\n", "b.py": "def g(x: int): ...\n"})
        out = tmp_path / "out"
        out.mkdir()
        (out / "conftest.py").write_text("# mine\n")
        (out / "test_ghost_a.py").write_text("# mine too\n")
        (out / "test_ghost_b.py").write_text(f"{MARKER}: whatever\nold\n")
        result = generator.run("x", path=str(root), out=str(out))
        assert (out / "conftest.py").read_text() == "# mine\n"
        assert (out / "test_ghost_a.py").read_text() == "# mine too\n"
        assert "test_fuzz_g" in (out / "test_ghost_b.py").read_text()
        assert "is there already" in by_module(result["skipped"])["a"]["reason"]
        assert "no time limit" in result["errors"][0]["message"]

    def test_out_inside_the_project_is_not_ghostwritten_in_turn(self, generator: TestGenerator, tree: Tree) -> None:
        root = tree({"a.py": "def f(x: int): ...\n"})
        first = generator.run("x", path=str(root), out=str(root))
        second = generator.run("x", path=str(root), out=str(root))
        assert first["totals"]["tests"] == second["totals"]["tests"] == 1
        assert run_pytest(root, "-W", "error").returncode == 0

    def test_out_that_is_a_file(self, generator: TestGenerator, tree: Tree) -> None:
        root = tree({"a.py": ""})
        with pytest.raises(NotADirectoryError, match=r"a\.py"):
            generator.run("x", path=str(root), out=str(root / "a.py"))

    def test_a_test_that_hangs_is_stopped(self, generator: TestGenerator, tree: Tree, tmp_path: Path) -> None:
        root = tree({"naps.py": "import time\ndef nap(seconds: int):\n    time.sleep(abs(seconds) + 100)\n"})
        out = tmp_path / "out"
        generator.run("x", path=str(root), out=str(out))
        conftest = out / "conftest.py"
        conftest.write_text(conftest.read_text().replace("SECONDS = 20", "SECONDS = 1"))
        done = run_pytest(out)
        assert done.returncode == 1
        assert "TookTooLong: stopped after 1 s" in done.stdout

    def test_a_lost_process_costs_one_module_and_is_replaced(self, generator: TestGenerator, tree: Tree) -> None:
        root = tree({"a.py": "def f(x: int): ...\n", "b.py": "def f(x: int): ...\n"})
        assert generator._process is not None
        os.kill(generator._process._process.pid, signal.SIGKILL)
        result = generator.run("x", path=str(root))
        assert set(by_module(result["tests"])) == {"b"}
        assert "ended" in by_module(result["skipped"])["a"]["reason"]
        assert generator.run("x", path=str(root))["totals"]["tests"] == 2

    def test_broken_lines_of_the_ghostwriter_are_mended_or_dropped(self, generator: TestGenerator, tree: Tree) -> None:
        root = tree({"m.py": """
            from collections.abc import Callable
            from types import NoneType
            from typing import Optional, TypeVar

            F = TypeVar("F", bound=Callable[..., int])

            def same(x: F) -> F:
                return x

            def maybe(x: Optional[int], y: NoneType = None) -> None: ...

            class Lying:
                def __init__(self, value: int) -> None: ...

            Lying.__qualname__ = "Elsewhere"
        """})
        out = root / "out"
        result = generator.run("x", path=str(root), out=str(out))
        assert {item["test"] for item in result["skipped"]} <= {"test_fuzz_Elsewhere", "Lying"}
        text = (out / "test_ghost_m.py").read_text()
        assert "~F" not in text
        assert "test_fuzz_same" in text
        assert "test_fuzz_maybe" in text
        done = run_pytest(out, "--collect-only")
        assert done.returncode == 0, done.stdout
