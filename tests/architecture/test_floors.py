"""The floors of the house: imports go downwards only. Static: the source is parsed, nothing is imported.

    agentpool_worker < errors, config, events < core | io (which do not know each other) < runtime
    < pool, futures, history, streams, breaker, monitor, control < orchestrator < the package's own __init__ < cli
    testing stands beside, and nobody imports it

An import inside a function counts like any other. What stands under `if TYPE_CHECKING:` does not count, as nothing is
loaded for it, nor what stands under `if __name__ == "__main__":`, which is a program above the house.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"agentpool": ROOT / "agentpool", "agentpool_worker": ROOT / "workers" / "agentpool_worker"}

#: What comes first in a module's name -> its floor. Longest match wins; every module must have one.
FLOORS = {
    "agentpool_worker": 0,
    "agentpool.errors": 1,
    "agentpool.config": 1,
    "agentpool.events": 1,
    "agentpool.core": 2,
    "agentpool.io": 2,
    "agentpool.runtime": 3,
    "agentpool.bars": 4,
    "agentpool.breaker": 4,
    "agentpool.pool": 4,
    "agentpool.agents": 3,
    "agentpool.submitting": 4,
    "agentpool.sessions": 4,
    "agentpool.operating": 4,
    "agentpool.futures": 4,
    "agentpool.history": 4,
    "agentpool.streams": 4,
    "agentpool.monitor": 4,
    "agentpool.control": 4,
    "agentpool.orchestrator": 5,
    "agentpool": 6,  # the public names: may look at all that it names, and nobody below may look at it
    "agentpool.__main__": 7,
    "agentpool.cli": 7,
    "agentpool.testing": 8,
}

#: Of the child's package, what the parent must not import: it is the child's process. The wire format, the agents with
#: what they return, and what explains a pickling fault are for both sides.
CHILDS_OWN = {"agentpool_worker.keeper", "agentpool_worker.main", "agentpool_worker.context",
              "agentpool_worker.streaming"}

#: What the core must not know: clocks, threads, files, processes, the network, chance without a seed, and output.
IMPURE = {
    "_thread", "asyncio", "concurrent", "ctypes", "datetime", "fcntl", "glob", "io", "logging", "mmap",
    "multiprocessing", "os", "pathlib", "psutil", "queue", "sched", "secrets", "select", "selectors", "shutil",
    "socket", "subprocess", "tempfile", "threading", "time", "uuid",
}
#: Of these modules the core may use what is pure in them: a generator that has a seed, the names of signals.
PURE_PARTS = {"random": {"Random"}, "signal": {"Signals"}}
IMPURE_BUILTINS = {"open", "print", "input", "exec", "eval"}


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), filename=str(path)) for name, path in MODULES.items()}


NOT_THE_MODULES_OWN = {"TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'"}


def _statements(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node that can run, and whether it is in a function; see the module's docstring for what is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in NOT_THE_MODULES_OWN:
            for other in child.orelse:
                yield other, in_function
                yield from _statements(other, in_function)
            continue
        yield child, in_function
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _statements(child, inside)


def _resolve(importer: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = MODULES[importer].name == "__init__.py"
    base = importer.split(".")
    base = base[: len(base) - node.level + (1 if is_package else 0)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _imports(name: str) -> Iterator[Import]:
    for node, in_function in _statements(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            source = _resolve(name, node)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield Import(name, whole if whole in MODULES else source, node.lineno, in_function)


IMPORTS = [found for name in MODULES for found in _imports(name)]
OURS = [found for found in IMPORTS if found.imported.partition(".")[0] in SOURCES]


def _floor(module: str) -> int:
    name = module
    while name not in FLOORS:
        name, _, _ = name.rpartition(".")
    # `agentpool` is the floor of the package's __init__ alone: a new module of the package wants a floor of its own.
    if name == "agentpool" != module:
        raise LookupError(f"{module} has no floor: give it one in FLOORS, and in the design")
    return FLOORS[name]


def test_every_module_has_a_floor() -> None:
    assert {"agentpool.config", "agentpool_worker"} <= MODULES.keys(), "the source is not where this test looks"
    for module in MODULES:
        _floor(module)


def test_imports_go_downwards() -> None:
    wrong = [str(found) for found in OURS
             if found.importer.partition(".")[0] == "agentpool"
             and not found.imported.startswith("agentpool.testing")
             and _floor(found.imported) > _floor(found.importer)]
    assert not wrong


def test_core_and_io_do_not_know_each_other() -> None:
    sides = ("agentpool.core", "agentpool.io")
    wrong = [str(found) for found in OURS for mine, other in (sides, sides[::-1])
             if f"{found.importer}.".startswith(f"{mine}.") and f"{found.imported}.".startswith(f"{other}.")]
    assert not wrong


def test_the_child_imports_nothing_of_the_parent() -> None:
    wrong = [str(found) for found in OURS if found.importer.startswith("agentpool_worker")
             and not found.imported.startswith("agentpool_worker")]
    assert not wrong


def test_the_parent_does_not_import_the_childs_process() -> None:
    wrong = [str(found) for found in OURS if not found.importer.startswith("agentpool_worker")
             and found.imported in CHILDS_OWN]
    assert not wrong
    assert MODULES.keys() >= CHILDS_OWN, "renamed without this test?"


def test_nobody_imports_the_test_kit() -> None:
    wrong = [str(found) for found in OURS if found.imported.startswith("agentpool.testing")
             and not found.importer.startswith("agentpool.testing")]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    """Counting what is loaded at import time only: a circle there is decided by who is imported first."""
    below = {name: {found.imported for found in OURS if found.importer == name and not found.in_function
                    and found.imported in MODULES} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path[path.index(name):], name))}"
        if name not in done:
            for other in below[name]:
                visit(other, (*path, name))
            done.add(name)

    for module in MODULES:
        visit(module, ())


def _core() -> list[str]:
    return [name for name in MODULES if f"{name}.".startswith("agentpool.core.")]


def test_the_core_is_pure() -> None:
    core = _core()
    wrong = [str(found) for found in IMPORTS if found.importer in core and found.imported.partition(".")[0] in IMPURE]
    for name in core:
        for node, _ in _statements(TREES[name]):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in IMPURE_BUILTINS:
                wrong.append(f"{name}:{called.lineno} calls {called.id}()")
    assert not wrong


def test_the_core_uses_only_what_is_pure_of_a_mixed_module() -> None:
    """Chance comes from a `Random` with a seed, so that a failure replays; a signal has a name and is not sent."""
    wrong = []
    for name in _core():
        for node, _ in _statements(TREES[name]):
            if isinstance(node, ast.ImportFrom) and node.module in PURE_PARTS:
                parts = {alias.name for alias in node.names} - PURE_PARTS[node.module]
                wrong += [f"{name}:{node.lineno} imports {part} of {node.module}" for part in sorted(parts)]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PURE_PARTS:
                if node.attr not in PURE_PARTS[node.value.id]:
                    wrong.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("Random", "random.Random") and not (
                node.args or node.keywords
            ):
                wrong.append(f"{name}:{node.lineno} makes a Random without a seed")
    assert not wrong


ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}


def _environment_readings(tree: ast.AST) -> Iterator[int]:
    """Lines that look something up in the environment. To hand over a copy of the whole is no reading."""
    whole: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in ("dict", "os.environ.copy"):
                whole |= {*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])}
        elif isinstance(node, ast.Dict):
            whole |= {value for key, value in zip(node.keys, node.values, strict=True) if key is None}
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            whole |= {node.left, node.right}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and ast.unparse(node.value) == "os":
            if node not in whole:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in ENVIRONMENT)


#: The command line, tests, and what has to know where this session's sockets belong: docs/decisions/0046.
READS_THE_ENVIRONMENT = ("agentpool.cli", "agentpool.testing", "agentpool.control.folder")


def test_only_the_command_line_reads_the_environment() -> None:
    wrong = [f"{name}:{line} reads the environment" for name, tree in TREES.items()
             if name.startswith("agentpool.") and not name.startswith(READS_THE_ENVIRONMENT)
             for line in _environment_readings(tree)]
    assert not wrong


@pytest.mark.parametrize(("source", "lines"), [
    ("import os\nx = os.environ['A']", [2]),
    ("import os\nx = os.environ.get('A')", [2]),
    ("import os\nx = os.getenv('A')", [2]),
    ("from os import environ", [1]),
    ("import os\nx = 'A' in os.environ", [2]),
    ("import os\nx = dict(os.environ)", []),
    ("import os\nx = os.environ.copy()", []),
    ("import os\nx = {**os.environ, 'A': '1'}", []),
    ("import os\nx = os.environ | {'A': '1'}", []),
])
def test_what_counts_as_reading_the_environment(source: str, lines: list[int]) -> None:
    assert list(_environment_readings(ast.parse(source))) == lines


def test_which_imports_count() -> None:
    source = """
if TYPE_CHECKING:
    import a
else:
    import b
def f():
    import c
if __name__ == "__main__":
    import d
"""
    found = [(alias.name, in_function) for node, in_function in _statements(ast.parse(source))
             if isinstance(node, ast.Import) for alias in node.names]
    assert found == [("b", False), ("c", True)]
