"""Sends what `__main__` defines by value, and gives it one lasting home in each worker.

cloudpickle gives every function that it sends globals of its own. So what an initializer stores in a global of
`__main__` would never reach a task, and a cache that a task keeps there would be gone for the next, although both work
with ProcessPoolExecutor. Here all functions of the parent's `__main__` share one dict in the worker, and a value in
it that the worker changed stays, as long as the parent still sends the value that it sent before.

Imported where something must be sent by value. Uses two inner methods of cloudpickle (3.0 to 3.1 have them); where they
are gone it falls back to cloudpickle as it is. Knows nothing of tasks and pipes.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from io import BytesIO
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final, Protocol

import cloudpickle

#: Kinds of values that are always sent afresh, so that a function redefined in a notebook is the new one.
_CODE: Final = (FunctionType, BuiltinFunctionType, ModuleType, type)

#: In the worker: the globals of all functions of the parent's __main__.
_globals: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
#: In the worker: what the parent sent last for a name, as (length, hash) of its pickle.
_sent: dict[str, tuple[int, int]] = {}


def main_globals() -> dict[str, Any]:
    """In the worker: the lasting home of what the parent's `__main__` defines."""
    return _globals


def restore_function(function: FunctionType, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """In the worker: fill in a function of the parent's `__main__`, and the globals it uses where they changed."""
    own, slots = state
    for name, pickled in slots.pop("_agentpool_values").items():
        mark = (len(pickled), hash(pickled))
        if _sent.get(name) != mark:
            _globals[name] = pickle.loads(pickled)
            _sent[name] = mark
    cloudpickle.cloudpickle._function_setstate(function, (own, slots))


class SupportsWrite(Protocol):
    """As much of a file as a pickler needs."""

    def write(self, data: bytes, /) -> object:
        """Take these bytes, which nobody changes any more."""


class _MainGlobals(dict[str, Any]):
    """Stands for the globals of `__main__` in a pickle."""

    def __reduce__(self) -> tuple[Callable[[], dict[str, Any]], tuple[()]]:
        return main_globals, ()


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, with one home for the functions of `__main__`."""

    def __init__(
        self,
        file: BytesIO | SupportsWrite,
        *,
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
        under_way: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        main = sys.modules.get("__main__")
        self._main = None if main is None else main.__dict__
        # Names whose values are being pickled further out: a value may refer, through functions, to itself.
        self._under_way = under_way
        if self._main is not None and hasattr(self, "globals_ref"):
            self.globals_ref[id(self._main)] = _MainGlobals()

    def _dynamic_function_reduce(self, func: FunctionType) -> Any:
        reduced = super()._dynamic_function_reduce(func)
        if func.__globals__ is not self._main or not hasattr(cloudpickle.cloudpickle, "_function_setstate"):
            return reduced
        make, arguments, (own, slots), *rest = reduced
        values = {name: value for name, value in slots["__globals__"].items() if not isinstance(value, _CODE)}
        slots["__globals__"] = {name: value for name, value in slots["__globals__"].items() if name not in values}
        slots["_agentpool_values"] = {
            name: self._pickle_value(name, value) for name, value in values.items() if name not in self._under_way
        }
        return make, arguments, (own, slots), *rest[:-1], restore_function

    def _pickle_value(self, name: str, value: object) -> bytes:
        with BytesIO() as file:
            Pickler(file, under_way=self._under_way | {name}).dump(value)
            return file.getvalue()
