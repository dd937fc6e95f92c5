"""The process in which test-generator lets hypothesis' ghostwriter look at other people's modules.

Importing a module runs it, and it may hang, exit, crash, print, or leave processes behind. So this process, which is
single-threaded and has loaded hypothesis once, forks a child for each module; the child leads its own session and is
killed when its time is up or its answer is there, whichever comes first. Asked and answering in lines of JSON on
standard input and output, one job at a time; the end of its input ends it. Standard library only until `main` runs.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from agentpool_worker.agents.ghosttext import Finisher, describe

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["main"]


def main(default_path: list[str]) -> None:
    """Serve until standard input ends. The one command-line argument is the sys.path to use, as JSON.

    default_path: what any interpreter here has on its sys.path; handed back to tell what the tests need added.
    """
    import gc
    import shutil
    import tempfile

    sys.path[:] = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed from here on must not get between the answers
    scratch = tempfile.mkdtemp(prefix="agentpool-ghostwriting-")
    try:
        # Else hypothesis would keep its database in the working directory, wherever that is.
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = scratch
        _spare_hypothesis_a_table(scratch)
        sys.dont_write_bytecode = True
        try:
            ghostwriter = _load_ghostwriter()
        except Exception as error:
            _answer(answers, {"error": describe(error)})
            return
        gc.freeze()  # the children share these pages as long as the collector does not write to them
        _answer(answers, {"default_path": default_path, "scratch": scratch})
        for line in sys.stdin.buffer:
            _answer(answers, _attempt(json.loads(line), ghostwriter, scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _spare_hypothesis_a_table(storage: str) -> None:
    """Put what UTF-8 can encode where hypothesis caches it: all code points but the surrogates, and each one back.

    Without it hypothesis finds that out by trying all 1,114,112 of them, which takes 0.9 s and 200 MB for a moment: the
    most of any process here. A hypothesis that looks elsewhere or expects other contents does just that, as ever.
    """
    import gzip
    import unicodedata

    directory = os.path.join(storage, "unicode_data", unicodedata.unidata_version)
    os.makedirs(directory)
    intervals = [[0, 0xD7FF], [0xE000, sys.maxunicode]]
    for name, content in (("codec-utf-8", intervals), ("codec-v2-utf-8", [intervals, []])):
        with gzip.open(os.path.join(directory, f"{name}.json.gz"), "wt") as file:
            json.dump(content, file)


def _load_ghostwriter() -> ModuleType:
    """Import the ghostwriter with a stand-in for `black`, which it uses for nothing but to format its text.

    Measured: black takes 15 MB, and 1.5 s for the first text. The files are formatted later, all at once, by ruff.
    """
    import types

    stand_in: Any = types.ModuleType("black")
    stand_in.Mode = lambda **_: None
    stand_in.format_str = lambda text, *, mode: text
    real = sys.modules.get("black")
    sys.modules["black"] = stand_in
    try:
        from hypothesis.extra import ghostwriter
    finally:
        del sys.modules["black"]  # a module to be looked at may want the real one
        if real is not None:
            sys.modules["black"] = real
    return ghostwriter


def _answer(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


# --- one child per module ----------------------------------------------------------------------------------------


def _attempt(job: dict[str, Any], ghostwriter: ModuleType, scratch: str) -> dict[str, Any]:
    """Answer one job: in a child, for `job["timeout"]` seconds at most."""
    import signal
    import time

    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_child(job, ghostwriter, scratch, writing)
    os.close(writing)
    try:
        answer = _read_answer(reading, started + job["timeout"])
    finally:
        os.close(reading)
        # First the group, while the child, dead or not, still keeps its number from being used again; then the child,
        # which may not have got as far as leading a group.
        for kill in (os.killpg, os.kill):
            try:
                kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _, status = os.waitpid(pid, 0)
    if answer is not None:
        return answer
    if time.monotonic() >= started + job["timeout"]:
        return {"reason": f"took longer than {job['timeout']:g} s, imported or ghostwritten; it was stopped"}
    code = os.waitstatus_to_exitcode(status)
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return {"reason": f"importing or ghostwriting it ended the process ({how})"}


def _read_answer(reading: int, deadline: float) -> dict[str, Any] | None:
    """A line of JSON from the child; None: it ended, or the time did, without one.

    Complete with its line end, not with the end of the pipe: a process that the module left behind may hold that open.
    """
    import select
    import time

    data = bytearray()
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        block = os.read(reading, 65536)
        if not block:
            return None
        data += block
    answer: dict[str, Any] = json.loads(data)
    return answer


def _be_child(job: dict[str, Any], ghostwriter: ModuleType, scratch: str, writing: int) -> NoReturn:
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.chdir(scratch)  # what an import writes beside itself is thrown away
        try:
            answer = _ghostwrite(job, ghostwriter)
        except BaseException as error:
            answer = {"reason": describe(error)}
        data = json.dumps(answer).encode() + b"\n"
        while data:
            data = data[os.write(writing, data) :]
    finally:
        os._exit(0)  # no exit handlers: neither this process' nor the module's


def _ghostwrite(job: dict[str, Any], ghostwriter: ModuleType) -> dict[str, Any]:
    import importlib
    import warnings

    warnings.simplefilter("ignore")
    if job["root"] not in sys.path:
        sys.path.insert(0, job["root"])
    try:
        module = importlib.import_module(job["name"])
    except SystemExit as error:
        return {"reason": f"calls sys.exit({error.code!r}) when it is imported"}
    except BaseException as error:
        return {"reason": f"cannot be imported: {describe(error)}"}
    origin = getattr(module, "__file__", None)
    if origin is None or not os.path.samefile(origin, job["path"]):
        return {"reason": f"the name {job['name']} is already that of {origin or 'a built-in module'}"}
    text, dropped = _write(module, ghostwriter)
    return Finisher(module, dropped).finish(text)


def _write(module: ModuleType, ghostwriter: ModuleType) -> tuple[str, list[dict[str, str]]]:
    """The ghostwriter's text for a module's functions; where one of them defeats it, for all that do not."""
    functions = _public_functions(module)
    if not functions:
        return "", []
    try:
        # Given the module itself, it would also write tests for what the module merely imports: the same ones again
        # for each module of a package.
        return ghostwriter.magic(*functions.values()), []
    except Exception as error:
        failure = error
    texts: list[str] = []
    dropped: list[dict[str, str]] = []
    for name, function in functions.items():
        try:
            texts.append(ghostwriter.magic(function))
        except Exception as error:
            dropped.append({"test": name, "reason": f"the ghostwriter failed: {describe(error)}"})
    if not texts:
        raise failure
    return "\n\n".join(texts), dropped


def _public_functions(module: ModuleType) -> dict[str, Any]:
    """Functions and classes that the module defines and, by its `__all__` or an underscore, does not keep to itself."""
    exported = getattr(module, "__all__", None)
    functions: dict[int, tuple[str, Any]] = {}  # by identity: an alias is not another function
    for name, value in sorted(vars(module).items()):
        is_public = name in exported if exported is not None else not name.startswith("_")
        if is_public and callable(value) and getattr(value, "__module__", None) == module.__name__:
            functions.setdefault(id(value), (name, value))
    return dict(functions.values())
