"""Finds what in a value cannot be pickled, and says where: `args[1].client.lock`. Imported only when pickling failed.

Both sides use it; it knows nothing of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, Final

#: Values looked at before giving up: a hint is not worth a long wait.
_BUDGET: Final = 2_000


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"[{key!r}]", item
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif (closure := getattr(value, "__closure__", None)) and hasattr(value, "__code__"):
        for name, cell in zip(value.__code__.co_freevars, closure, strict=True):
            try:
                yield f" closure variable {name}", cell.cell_contents
            except ValueError:  # an empty cell
                continue
    elif hasattr(value, "__self__") and hasattr(value, "__func__"):
        yield ".__self__", value.__self__
    elif hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        yield ".func", value.func
        yield ".args", value.args
        yield ".keywords", value.keywords
    if isinstance(value, FunctionType) and value.__module__ == "__main__":
        for name in value.__code__.co_names:
            if name in value.__globals__:
                yield f" global variable {name}", value.__globals__[name]
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict) and not isinstance(value, type):
        for name, item in state.items():
            yield f".{name}", item
    for name in getattr(type(value), "__slots__", ()):
        if isinstance(name, str) and hasattr(value, name):
            yield f".{name}", getattr(value, name)


def find(value: Any, name: str, dumps: Callable[[Any], Any]) -> str:
    """The path to the deepest part that `dumps` refuses, with that part's type: "args[0].lock (a _thread.lock)".

    `name` is what the whole is called. Returns "" where the search is too long.
    """
    seen: set[int] = set()
    budget = _BUDGET
    path = name
    while True:
        seen.add(id(value))
        for step, part in _parts(value):
            budget -= 1
            if budget < 0:
                return ""
            if id(part) in seen:
                continue
            try:
                dumps(part)
            except BaseException as error:  # whatever its __reduce__ raises: that is the part that is looked for
                if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
                    return f"{path}{step} (nested too deeply)"
                path, value = path + step, part
                break
        else:
            kind = type(value)
            return f"{path} (a {kind.__module__}.{kind.__qualname__})"
