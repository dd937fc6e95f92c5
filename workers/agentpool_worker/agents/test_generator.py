"""test-generator: hypothesis' ghostwriter for the importable modules of a directory, written as pytest files.

The modules are imported in children of a process of their own (see `ghostwriting`), never in the worker. This module
decides which files are modules, starts and watches that process, and writes the results.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any, ClassVar, Final

from agentpool_worker.agents.base import Agent
from agentpool_worker.agents.sources import (
    Module,
    SourceFiles,
    chunks,
    count,
    find_ruff,
    find_sources,
    locate_module,
    missing_tool,
)

__all__ = ["TestGenerator"]

#: A file that begins with this was written here, and may be written anew. Without it, it is the user's.
MARKER: Final = "# Written by agentpool's test-generator"
#: Beyond a job's own time: for the process that holds the children to notice, kill and answer.
_ANSWER_GRACE_SECONDS: Final = 15.0
_START_SECONDS: Final = 60.0

#: Goes with the tests. Whatever waits, sleeps or counts as long as its argument says would else hold pytest for ever.
#: A BaseException, since hypothesis takes an Exception for a finding, and would call the function again to make sure.
_CONFTEST: Final = f'''\
{MARKER}: it is written anew while this line stays.

import signal

import pytest

SECONDS = 20


class TookTooLong(BaseException):
    pass


@pytest.fixture(autouse=True)
def time_limit():
    """Stop a test that an input makes wait: it needs a narrower strategy."""

    def stop(signum, frame):
        raise TookTooLong(f"stopped after {{SECONDS}} s: narrow the strategies, or skip this test")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
'''


class TestGenerator(Agent):
    """Writes property-based tests with hypothesis' ghostwriter, which need no model.

    It imports the modules it writes tests for, and **importing a module executes it**: use it on code that you would
    run. Each import happens in a process of its own, with a bounded time, no input, its output discarded and a
    temporary working directory; that protects the agent from the module, not the machine. The tests are not run here:
    they call functions with whatever input fits, which may be anything from harmless to expensive.
    """

    __test__: ClassVar[bool] = False  # for pytest: this is no test class
    name: ClassVar[str] = "test-generator"
    idempotent: ClassVar[bool] = True

    def __init__(self) -> None:
        self._process: _GhostwritingProcess | None = None

    def setup(self) -> None:
        """Start the process that writes. Raises ModuleNotFoundError, with the cure, where hypothesis is missing."""
        from importlib.util import find_spec

        if find_spec("hypothesis") is None:
            missing_tool(self.name, "hypothesis")
        self._process = _GhostwritingProcess()

    def run(
        self, prompt: str, *, path: str, out: str | None = None, module_timeout: float = 20.0
    ) -> dict[str, Any]:
        """Write tests for every importable module of `path`: a file, a package's directory, or a project's.

        prompt: not interpreted; all modules are treated alike.
        out: the directory for the test files; made if missing, and itself left out of the search. None: nothing is
            written, only counted. A file there is overwritten only while its first line says that it came from here.
        module_timeout: seconds for importing and ghostwriting one module.
        Raises FileNotFoundError where `path` does not exist, NotADirectoryError where `out` is a file. Returns
        JSON-able data: `agent`, `summary`; `tests`, one entry per module (`module`, `file`, `test_file`, `tests`,
        `needs_work`: how many of those are marked to be skipped until they are given a strategy); `needs_work` and
        `skipped` (`module`, `file`, `test`, empty for a whole module, `reason`); `totals`, `files`, `errors`, `out`.
        `pytest OUT` collects all of the tests; a `conftest.py` there stops a test that hangs.
        """
        sources = find_sources(path, leave_out=out)
        if out is not None and os.path.exists(out) and not os.path.isdir(out):
            raise NotADirectoryError(f"out must be a directory for the tests to be written to, but {out!r} is a file")
        generation = _Generation(sources, None if out is None else os.path.abspath(out))
        for file, module in generation.choose_modules():
            generation.add(file, module, self._ask(file, module, module_timeout), self._default_path())
        generation.write()
        return generation.result(self.name)

    def close(self) -> None:
        """Stop the process that writes."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def _default_path(self) -> list[str]:
        return self._process.default_path if self._process is not None else []

    def _ask(self, file: str, module: Module, timeout: float) -> dict[str, Any]:
        job = {"name": module.name, "root": module.root, "path": file, "timeout": timeout}
        if self._process is None:  # it was lost with an earlier module
            self._process = _GhostwritingProcess()
        try:
            return self._process.ask(job, timeout + _ANSWER_GRACE_SECONDS)
        except _ProcessLost as error:
            self.close()
            return {"reason": str(error)}
        except BaseException:
            self.close()  # its answer to this job would be taken for that to the next
            raise


class _ProcessLost(RuntimeError):
    """The ghostwriting process ended, or did not answer in time."""


class _GhostwritingProcess:
    """Our end of `ghostwriting`. Not thread-safe; one question at a time."""

    def __init__(self) -> None:
        # The worker's own sys.path, so that the child finds what the worker would.
        package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        code = (
            f"import sys; default_path = list(sys.path); sys.path.append({package_root!r}); "
            "from agentpool_worker.agents.ghostwriting import main; main(default_path)"
        )
        self._buffer = bytearray()
        self._scratch: str | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # this process outlives the task, and must not hold the task's stderr open
            bufsize=0,
        )
        try:
            ready = self._read(_START_SECONDS)
            if "error" in ready:
                raise RuntimeError(f"hypothesis' ghostwriter cannot be loaded: {ready['error']}")
        except BaseException:
            self.stop()
            raise
        self._scratch = ready["scratch"]
        self.default_path: list[str] = [os.path.realpath(entry) for entry in ready["default_path"] if entry]

    def ask(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to one job. Raises _ProcessLost where the process ended or did not answer in `timeout` seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
        except BrokenPipeError:
            raise _ProcessLost("the process that imports modules had ended") from None
        return self._read(timeout)

    def _read(self, timeout: float) -> dict[str, Any]:
        import select
        import time

        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _ProcessLost(f"the process that imports modules did not answer in {timeout:g} s; it was stopped")
            block = os.read(descriptor, 65536)
            if not block:
                raise _ProcessLost("the process that imports modules ended without an answer")
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process: asked by the end of its input, killed where it does not listen."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._process.stdout.close()
            if self._scratch is not None:  # already gone, unless the process was killed, here or elsewhere
                shutil.rmtree(self._scratch, ignore_errors=True)


class _Generation:
    """One run: which modules, what became of each, and the files."""

    def __init__(self, sources: SourceFiles, out: str | None) -> None:
        self._sources = sources
        self._out = out
        self._tests: list[dict[str, Any]] = []
        self._skipped: list[dict[str, str]] = []
        self._needs_work: list[dict[str, str]] = []
        self._texts: dict[str, str] = {}
        self._errors = list(sources.errors)

    def choose_modules(self) -> list[tuple[str, Module]]:
        """The files that can be imported, with their modules. The others are noted as skipped."""
        chosen: dict[str, tuple[str, Module]] = {}
        for file in self._sources.paths:
            module = locate_module(file)
            if module is None:
                self._skip(file, os.path.basename(file), "its name is no module name, so it cannot be imported")
            elif reason := _reason_to_pass_over(module.name):
                self._skip(file, module.name, reason)
            elif module.name in chosen:
                other = self._sources.relative(chosen[module.name][0])
                self._skip(file, module.name, f"{other} is imported under the same name")
            else:
                chosen[module.name] = (file, module)
        return list(chosen.values())

    def add(self, file: str, module: Module, answer: dict[str, Any], default_path: list[str]) -> None:
        """Take the answer of the ghostwriting process for one module."""
        if "text" not in answer:
            self._skip(file, module.name, answer["reason"])
            return
        name = f"test_ghost_{module.name.replace('.', '_')}.py"
        while name in self._texts:
            name = name.removesuffix(".py") + "_.py"
        text = self._head(module, default_path) + answer["text"]
        try:
            compile(text, name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            self._skip(file, module.name, f"what was written is no valid Python: {error}")
            return
        if self._out is not None and not _is_ours(os.path.join(self._out, name)):
            self._skip(file, module.name, f"{name} is there already, and its first line does not say it came from here")
            return
        self._texts[name] = text
        for item in answer["dropped"]:
            self._skip(file, module.name, item["reason"], item["test"])
        self._needs_work += [_note(self._sources.relative(file), module.name, **item) for item in answer["needs_work"]]
        self._tests.append(
            {
                "module": module.name,
                "file": self._sources.relative(file),
                "test_file": None if self._out is None else name,
                "tests": answer["tests"],
                "needs_work": len(answer["needs_work"]),
            }
        )

    def write(self) -> None:
        """Write the test files, formatted where ruff is there to do it."""
        if self._out is None or not self._texts:
            return
        os.makedirs(self._out, exist_ok=True)
        if _is_ours(os.path.join(self._out, "conftest.py")):
            _write(os.path.join(self._out, "conftest.py"), _CONFTEST)
        else:
            message = "it is yours and was left alone, so the tests have no time limit"
            self._errors.append({"file": "conftest.py", "message": message})
        for name, text in _formatted(self._texts).items():
            compile(text, name, "exec", dont_inherit=True)
            _write(os.path.join(self._out, name), text)

    def result(self, agent: str) -> dict[str, Any]:
        """The agent's result."""
        skipped_modules = sum(not item["test"] for item in self._skipped)
        totals = {
            "modules": len(self._tests) + skipped_modules,
            "modules_with_tests": len(self._tests),
            "modules_skipped": skipped_modules,
            "tests": sum(item["tests"] for item in self._tests),
            "tests_that_need_work": len(self._needs_work),
            "tests_dropped": len(self._skipped) - skipped_modules,
        }
        written = f"written to {self._out}" if self._out else "counted only, for no output directory was given"
        summary = (
            f"{count(totals['tests'], 'test')} for {totals['modules_with_tests']} of "
            f"{count(totals['modules'], 'module')}, {written}; "
            f"{totals['tests_that_need_work']} of them need a strategy or an await from you; "
            f"{count(skipped_modules, 'module')} skipped"
        )
        return {
            "agent": agent,
            "summary": summary,
            "tests": sorted(self._tests, key=lambda item: (-item["tests"], item["module"])),
            "needs_work": self._needs_work,
            "skipped": self._skipped,
            "totals": totals,
            "files": len(self._sources.paths),
            "errors": self._errors,
            "out": self._out,
        }

    def _skip(self, file: str, module: str, reason: str, test: str = "") -> None:
        self._skipped.append(_note(self._sources.relative(file), module, reason, test))

    def _head(self, module: Module, default_path: list[str]) -> str:
        head = (
            f"{MARKER}: it is written anew while this line stays.\n"
            f"# Tests for {module.name}, by hypothesis.extra.ghostwriter.\n"
            "# Provided under the Creative Commons Zero public domain dedication.\n"
            "# Read before you run: they call the functions with whatever input fits.\n\n"
        )
        if os.path.realpath(module.root) in default_path:
            return head
        where = repr(module.root)
        if self._out is not None and any(
            os.path.commonpath([above, self._out]) == above for above in (module.root, self._sources.base)
        ):  # the tests are within the project, so they may move with it
            relative = os.path.relpath(module.root, self._out)
            where = f"os.path.abspath(os.path.join(os.path.dirname(__file__), {relative!r}))"
        return f"{head}import os\nimport sys\n\nsys.path.insert(0, {where})\n\n"


def _note(file: str, module: str, reason: str, test: str = "") -> dict[str, str]:
    return {"module": module, "test": test, "file": file, "reason": reason}


def _reason_to_pass_over(module: str) -> str:
    last = module.rpartition(".")[2]
    if last == "__main__":
        return "a program's entry point: to import it is to run it"
    if module == "setup":
        return "a set-up script: to import it is to run it"
    if last == "conftest" or last.startswith("test_") or last.endswith("_test"):
        return "is itself a test"
    return ""


def _is_ours(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().startswith(MARKER)
    except FileNotFoundError:
        return True


def _write(path: str, text: str) -> None:
    # Renamed into place, so that a worker that is lost now leaves either the old file or the new one.
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def _formatted(texts: dict[str, str]) -> dict[str, str]:
    """The same, through `ruff format`; unchanged without ruff, for looks are all that it changes."""
    try:
        ruff = find_ruff()
    except ModuleNotFoundError:
        return texts
    with tempfile.TemporaryDirectory(prefix="agentpool-tests-") as directory:
        paths = {name: os.path.join(directory, name) for name in texts}
        for name, path in paths.items():
            with open(path, "w", encoding="utf-8") as file:
                file.write(texts[name])
        for part in chunks(list(paths.values()), 100_000):
            command = [*ruff, "format", "--isolated", "--no-cache", "--quiet", "--", *part]
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        formatted: dict[str, str] = {}
        for name, path in paths.items():
            with open(path, encoding="utf-8") as file:
                formatted[name] = file.read()
        return formatted
