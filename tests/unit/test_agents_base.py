"""Finding agent classes, and one worker's handling of their instances. Starts no process but to measure an import."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, ClassVar

import cloudpickle
import pytest

from agentpool_worker.agents import base
from agentpool_worker.agents.base import STOCK, Agent, close_all, kind_name, resolve, run_agent

LOG: list[str] = []


@pytest.fixture(autouse=True)
def _fresh_worker() -> Iterator[None]:
    LOG.clear()
    yield
    close_all()
    assert not base._instances
    assert base._runner is None


class Recorder(Agent):
    def setup(self) -> None:
        LOG.append("setup")

    def run(self, prompt: str, *, times: int = 1) -> str:
        LOG.append("run")
        return prompt * times

    def close(self) -> None:
        LOG.append("close")


class Bare:
    def run(self, prompt: str) -> str:
        return f"bare {prompt}"


class Outer:
    class Inner:
        def run(self, prompt: str) -> str:
            return prompt


NOT_A_CLASS = Bare()
FULL_NAME = f"{__name__}:Recorder"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    """This module under a name that `import` finds (pytest's importlib mode gives it one that it does not)."""
    monkeypatch.setitem(sys.modules, "agents_of_this_test", sys.modules[__name__])
    return "agents_of_this_test"


class TestResolve:
    @pytest.mark.parametrize("name", sorted(STOCK))
    def test_stock_names_lead_to_agents_that_know_their_name(self, name: str) -> None:
        """Those that only look are idempotent; programs may have effects."""
        cls = resolve(name)
        assert issubclass(cls, Agent)
        assert cls.name == name
        assert cls.idempotent is (name in {"security-analyst", "performance-auditor", "test-generator"})
        assert kind_name(cls) == name

    def test_a_class_is_itself(self) -> None:
        assert resolve(Bare) is Bare

    def test_module_and_class(self, importable: str) -> None:
        assert resolve(f"{importable}:Recorder") is Recorder
        assert resolve(f"{importable}:Outer.Inner") is Outer.Inner

    @pytest.mark.parametrize("kind", ["security", "", ":Class", "module:", "no.colon"])
    def test_unknown_names_list_the_known(self, kind: str) -> None:
        with pytest.raises(LookupError, match=r"unknown agent.*command,.* performance-auditor, security-analyst"):
            resolve(kind)

    def test_missing_module_is_named(self) -> None:
        with pytest.raises(LookupError, match="no module 'surely_not_there'"):
            resolve("surely_not_there.sub:Agent")

    def test_missing_class_is_named(self, importable: str) -> None:
        with pytest.raises(LookupError, match="has no 'Nobody'"):
            resolve(f"{importable}:Nobody")

    def test_class_of_main_by_name_says_to_pass_the_class(self) -> None:
        with pytest.raises(LookupError, match="pass the class itself"):
            resolve("__main__:SurelyNotThere")

    def test_an_import_error_inside_the_module_is_not_a_wrong_name(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "needs_something.py").write_text("import surely_not_there\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ModuleNotFoundError, match="surely_not_there") as caught:
            resolve("needs_something:Agent")
        assert not isinstance(caught.value, LookupError)

    def test_instances_are_refused(self) -> None:
        with pytest.raises(TypeError, match="pass the class, not an instance"):
            resolve(Bare())  # type: ignore[arg-type]

    def test_a_name_that_leads_to_no_class_is_refused(self, importable: str) -> None:
        with pytest.raises(TypeError, match="not a class but a Bare"):
            resolve(f"{importable}:NOT_A_CLASS")

    def test_a_class_without_run_is_refused(self) -> None:
        with pytest.raises(TypeError, match="no run"):
            resolve(dict)


class TestKindName:
    def test_names_are_their_own_label_and_import_nothing(self) -> None:
        assert kind_name("security-analyst") == "security-analyst"
        assert kind_name("surely.not.there:Agent") == "surely.not.there:Agent"

    def test_class_and_name_have_the_same_label(self, importable: str) -> None:
        assert kind_name(Recorder) == FULL_NAME
        assert kind_name(STOCK["test-generator"]) == "test-generator"

    def test_anything_else_is_refused(self) -> None:
        with pytest.raises(TypeError, match="known names are"):
            kind_name(3)  # type: ignore[arg-type]


class TestRunAgent:
    def test_set_up_once_run_often_closed_once(self) -> None:
        assert run_agent(Recorder, "a", {}) == "a"
        assert run_agent(Recorder, "b", {"times": 2}) == "bb"
        close_all()
        assert LOG == ["setup", "run", "run", "close"]

    def test_after_close_all_a_kind_is_set_up_anew(self) -> None:
        run_agent(Recorder, "a", {})
        close_all()
        run_agent(Recorder, "a", {})
        assert LOG == ["setup", "run", "close", "setup", "run"]

    def test_neither_base_class_nor_setup_nor_close_is_needed(self) -> None:
        assert run_agent(Bare, "x", {}) == "bare x"

    def test_the_same_instance_by_name_and_by_class(self, importable: str) -> None:
        run_agent(Recorder, "a", {})
        run_agent(f"{importable}:Recorder", "a", {})
        assert LOG.count("setup") == 1

    def test_without_run_the_error_names_the_class(self) -> None:
        class Empty(Agent):
            pass

        with pytest.raises(NotImplementedError, match="Empty has no run"):
            run_agent(Empty, "x", {})

    def test_an_instance_whose_setup_raised_is_not_kept(self) -> None:
        class Flaky(Agent):
            attempts: ClassVar[int] = 0

            def setup(self) -> None:
                Flaky.attempts += 1
                if Flaky.attempts == 1:
                    raise OSError("not yet")

            def run(self, prompt: str) -> int:
                return Flaky.attempts

        with pytest.raises(OSError, match="not yet"):
            run_agent(Flaky, "x", {})
        assert run_agent(Flaky, "x", {}) == 2
        assert run_agent(Flaky, "x", {}) == 2

    def test_an_instance_whose_run_raised_is_kept(self) -> None:
        class Moody(Recorder):
            def run(self, prompt: str) -> str:  # type: ignore[override]
                raise ValueError(prompt)

        for _ in range(2):
            with pytest.raises(ValueError, match="x"):
                run_agent(Moody, "x", {})
        assert LOG == ["setup"]

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_an_instance_that_was_broken_off_is_closed_and_replaced(self, kind: type[BaseException]) -> None:
        class BrokenOff(Recorder):
            def run(self, prompt: str) -> str:  # type: ignore[override]
                raise kind

        with pytest.raises(kind):
            run_agent(BrokenOff, "x", {})
        assert LOG == ["setup", "close"]

    def test_a_constructor_with_arguments_is_explained(self) -> None:
        class Demanding(Recorder):
            def __init__(self, model: str) -> None: ...

        with pytest.raises(TypeError) as caught:
            run_agent(Demanding, "x", {})
        assert "without arguments" in caught.value.__notes__[0]

    def test_a_class_sent_by_value_twice_is_one_class(self) -> None:
        namespace: dict[str, Any] = {"__name__": "__main__", "LOG": LOG}
        code = "class Local:\n    def setup(self): self.runs = 0\n    def run(self, prompt):\n"
        exec(code + "        self.runs += 1\n        return self.runs\n", namespace)
        sent = cloudpickle.dumps(namespace["Local"])
        assert [run_agent(cloudpickle.loads(sent), "x", {}) for _ in range(3)] == [1, 2, 3]

    def test_a_new_definition_closes_the_instance_of_the_old(self) -> None:
        def define() -> type[Any]:
            return type("Cell", (Recorder,), {"__module__": "__main__", "__qualname__": "Cell"})

        run_agent(define(), "x", {})
        run_agent(define(), "x", {})
        assert LOG == ["setup", "run", "close", "setup", "run"]
        assert len(base._instances) == 1

    def test_classes_made_by_a_function_live_side_by_side(self) -> None:
        def define() -> type[Any]:
            class Made(Recorder):
                pass

            return Made

        first, second = define(), define()
        for cls in (first, second, first, second):
            run_agent(cls, "x", {})
        assert LOG.count("setup") == 2
        assert "close" not in LOG


class TestAsync:
    def test_all_methods_may_be_coroutines_and_share_one_loop(self) -> None:
        loops = []

        class Async:
            async def setup(self) -> None:
                loops.append(asyncio.get_running_loop())
                self.event = asyncio.Event()
                self.event.set()

            async def run(self, prompt: str) -> str:
                loops.append(asyncio.get_running_loop())
                await self.event.wait()
                return prompt

            async def close(self) -> None:
                loops.append(asyncio.get_running_loop())

        assert run_agent(Async, "a", {}) == "a"
        assert run_agent(Async, "b", {}) == "b"
        close_all()
        assert len(loops) == 4
        assert len(set(loops)) == 1
        assert loops[0].is_closed()

    def test_errors_come_through(self) -> None:
        class Failing:
            async def run(self, prompt: str) -> str:
                await asyncio.sleep(0)
                raise LookupError(prompt)

        with pytest.raises(LookupError, match="x"):
            run_agent(Failing, "x", {})

    def test_a_run_that_is_broken_off_leaves_no_task_and_a_loop_for_the_next(self) -> None:
        cancelled = []

        class BrokenOff:
            async def run(self, prompt: str) -> str:
                asyncio.get_running_loop().call_soon(self.interrupt)
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(prompt)
                    raise
                return ""

            def interrupt(self) -> None:
                raise KeyboardInterrupt

        class Fine:
            async def run(self, prompt: str) -> int:
                return len(asyncio.all_tasks())

        with pytest.raises(KeyboardInterrupt):
            run_agent(BrokenOff, "x", {})
        assert cancelled == ["x"]
        assert run_agent(Fine, "y", {}) == 1


class TestCloseAll:
    def test_a_close_that_fails_is_reported_and_stops_no_other(self, capsys: pytest.CaptureFixture[str]) -> None:
        class Stubborn(Agent):
            def run(self, prompt: str) -> str:
                return prompt

            def close(self) -> None:
                raise OSError("will not close")

        run_agent(Recorder, "x", {})
        run_agent(Stubborn, "x", {})
        close_all()
        assert LOG == ["setup", "run", "close"]
        said = capsys.readouterr().err
        assert "Stubborn.close() failed" in said
        assert "OSError: will not close" in said

    def test_without_agents_it_does_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        close_all()
        close_all()
        assert capsys.readouterr() == ("", "")


def test_importing_the_stock_agents_loads_none_of_their_tools() -> None:
    code = """
        import sys
        from agentpool_worker.agents import base
        light = {"asyncio", "importlib.util", "inspect", "traceback"} & set(sys.modules) - BEFORE
        assert not light, light
        for name in sorted(base.STOCK):
            base.resolve(name)
        heavy = {"bandit", "ruff", "hypothesis", "yaml", "rich", "psutil", "tenacity", "agentpool"} & set(sys.modules)
        assert not heavy, heavy
    """
    code = "import sys; BEFORE = set(sys.modules)\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
