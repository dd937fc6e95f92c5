"""What the stock agents share: which files of a directory are Python source, and how a result is worded.

Knows nothing of the tools. Every agent looks at the same files, found here, so that their reports agree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

__all__ = [
    "Module",
    "SourceFiles",
    "chunks",
    "count",
    "find_ruff",
    "find_sources",
    "locate_module",
    "missing_tool",
]

#: Directories that hold no source of the project: caches, other people's packages.
_SKIPPED_DIRECTORIES = frozenset({"__pycache__", "__pypackages__", "node_modules", "site-packages", "venv"})
#: Directories that usually hold build results, but may be packages of that name.
_BUILD_DIRECTORIES = frozenset({"build", "dist"})


class SourceFiles(NamedTuple):
    """Absolute `paths` in sorted order; `base`: what reports name files relative to; `errors`: directories not read."""

    base: str
    paths: list[str]
    errors: list[dict[str, str]]

    def relative(self, path: str) -> str:
        """`path` as reports name it."""
        return os.path.relpath(path, self.base)


class Module(NamedTuple):
    """A file as Python imports it: dotted `name`, with `root` on sys.path."""

    name: str
    root: str


def find_sources(path: str | os.PathLike[str], *, leave_out: str | os.PathLike[str] | None = None) -> SourceFiles:
    """The Python files of `path`, a directory (searched whole) or one file (taken whatever its name).

    Not looked into: hidden directories, virtual environments, caches, `node_modules`, `site-packages`, `build` and
    `dist` without an `__init__.py`, and `leave_out`. `path` itself may be any of those. Symbolic links to directories
    are not followed. Raises FileNotFoundError.
    """
    start = os.path.abspath(os.fspath(path))
    if not os.path.exists(start):
        raise FileNotFoundError(f"there is nothing at {start!r} to look at: path must be a Python file or a directory")
    if not os.path.isdir(start):
        return SourceFiles(os.path.dirname(start), [start], [])
    excluded = None if leave_out is None else os.path.realpath(leave_out)
    errors: list[dict[str, str]] = []

    def unreadable(error: OSError) -> None:
        errors.append({"file": os.path.relpath(str(error.filename), start), "message": f"not read: {error.strerror}"})

    paths: list[str] = []
    for directory, subdirectories, names in os.walk(start, onerror=unreadable):
        subdirectories[:] = sorted(
            name for name in subdirectories if _is_source_directory(os.path.join(directory, name), name, excluded)
        )
        paths.extend(os.path.join(directory, name) for name in names if name.endswith(".py"))
    return SourceFiles(start, sorted(p for p in paths if os.path.isfile(p)), errors)


def _is_source_directory(directory: str, name: str, excluded: str | None) -> bool:
    if name.startswith(".") or name in _SKIPPED_DIRECTORIES:
        return False
    if name in _BUILD_DIRECTORIES and not os.path.exists(os.path.join(directory, "__init__.py")):
        return False
    if os.path.exists(os.path.join(directory, "pyvenv.cfg")):
        return False
    return excluded is None or os.path.realpath(directory) != excluded


def locate_module(path: str) -> Module | None:
    """How the file at `path` is imported, by the `__init__.py` files above it; None: it cannot be, by its name."""
    directory, filename = os.path.split(os.path.abspath(path))
    stem, extension = os.path.splitext(filename)
    if extension != ".py":
        return None
    parts = [] if stem == "__init__" else [stem]
    while os.path.exists(os.path.join(directory, "__init__.py")):
        parent, package = os.path.split(directory)
        if parent == directory:
            break
        parts.insert(0, package)
        directory = parent
    if not parts or not all(_is_module_name(part) for part in parts):
        return None
    return Module(".".join(parts), directory)


def _is_module_name(part: str) -> bool:
    from keyword import iskeyword

    return part.isidentifier() and not iskeyword(part)


def count(number: int, noun: str, plural: str | None = None) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def missing_tool(agent: str, tool: str, error: ImportError | None = None) -> NoReturn:
    """Raise the error that says which tool is missing, and how to get it."""
    raise ModuleNotFoundError(
        f"{agent} needs {tool}, which is not installed here. Cure: pip install 'agentpool-runtime[agents]'", name=tool
    ) from error


def find_ruff() -> list[str]:
    """The command that starts ruff. Raises ModuleNotFoundError."""
    import ruff

    try:
        return [os.fspath(ruff.find_ruff_bin())]
    except (AttributeError, FileNotFoundError):
        # Older and repackaged ruffs have no such function, or look elsewhere; as a module it runs wherever it is.
        return [sys.executable, "-m", "ruff"]


def chunks(paths: list[str], characters: int) -> Iterator[list[str]]:
    """`paths` in parts that fit a command line of `characters`; a path longer than that goes alone."""
    part: list[str] = []
    used = 0
    for path in paths:
        if part and used + len(path) + 1 > characters:
            yield part
            part, used = [], 0
        part.append(path)
        used += len(path) + 1
    if part:
        yield part
