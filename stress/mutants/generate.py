"""Which mutants there are: mutmut changes the functions; and one of them put in the place of its function.

A mutant is named by its function, by what stands in that function today (a digest), and by its number there, so that a
result stays good for as long as the function is what it was.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Final

import agentpool.core

CORE: Final = Path(agentpool.core.__file__).parent
_Key = tuple[str, str, int]


@dataclass(frozen=True)
class Mutant:
    """One change. `function` is `module.Class.method`; `before` and `after` are the lines that differ."""

    function: str
    digest: str
    number: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> _Key:
        return self.function, self.digest, self.number

    @property
    def module(self) -> str:
        return self.function.partition(".")[0]


def of_core() -> list[Mutant]:
    """All mutants of `agentpool/core` as it is, by module and function; half a minute of work."""
    return [mutant for path in sorted(CORE.glob("*.py")) for mutant in of_source(path.stem, path.read_text())]


def of_source(module: str, source: str) -> Iterator[Mutant]:
    """Those of one module."""
    from mutmut.mutation.file_mutation import mutate_file_contents  # installed by the extra `mutants` only

    mutated = mutate_file_contents(f"{module}.py", source)
    lines = mutated.code.split("\n")
    found: dict[str, str] = {}
    for name, span in mutated.line_span_by_function_name.items():
        found[name] = "\n".join(lines[span.start - 1:span.end]).strip("\n")
    for name in mutated.mutant_names:
        mangled, number = name.rsplit("__mutmut_", 1)
        original = _renamed(found[f"{mangled}__mutmut_orig"], f"{mangled}__mutmut_orig", mangled)
        changed = _renamed(found[name], name, mangled)
        digest = hashlib.sha256(original.encode()).hexdigest()[:12]
        path = mangled.removeprefix("x_") if mangled.startswith("x_") else mangled[2:].replace("ǁ", ".")
        yield Mutant(f"{module}.{path}", digest, int(number), *_change(original, changed), changed)


def _renamed(source: str, name: str, mangled: str) -> str:
    return source.replace(name, mangled.removeprefix("x_").rpartition("ǁ")[2], 1)


def _change(old: str, new: str) -> tuple[str, str]:
    lines = list(difflib.unified_diff(old.split("\n"), new.split("\n"), n=0, lineterm=""))[2:]
    before, after = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return before, after


def put_in_place(mutant: Mutant, package: str = "agentpool.core") -> None:
    """From now on the function does what the mutant does, for everybody who holds it. Not to be undone: fork before.

    The function object stays, as other modules have imported it by name, and gets another code and other defaults.
    """
    module = importlib.import_module(f"{package}.{mutant.module}")
    *classes, name = mutant.function.split(".")[1:]  # one class at most: mutmut looks into no other
    owner: Any = vars(module)[classes[0]] if classes else module
    target, changed = _bare(vars(owner)[name]), _bare(_compiled(mutant, classes, name, dict(vars(module))))
    target.__code__ = changed.__code__
    target.__defaults__ = changed.__defaults__
    target.__kwdefaults__ = changed.__kwdefaults__


def _compiled(mutant: Mutant, classes: list[str], name: str, names: dict[str, Any]) -> Any:
    """Compiled within a class of that name, as `super()` and private names need it."""
    source = "".join(f"class {one}:\n" for one in classes) + mutant.source
    exec(compile(source, f"<{mutant.function}>", "exec", annotations.compiler_flag, True), names)
    return vars(names[classes[0]])[name] if classes else names[name]


def _bare(function: Any) -> FunctionType:
    """Without `staticmethod` or `classmethod`."""
    found = getattr(function, "__func__", function)
    assert isinstance(found, FunctionType)
    return found
