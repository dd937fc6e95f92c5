"""The key with which `multiprocessing` authenticates, for the keeper and the workers: the parent's.

Proxies of the parent's multiprocessing managers, as arguments, need it. To import `multiprocessing` just for that would
take 9 ms of each start, and most tasks never need it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

__all__ = ["set_authkey"]


class _Authkey:
    """Gives `multiprocessing` the key when somebody imports it."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """For `sys.meta_path`: the module as it is found without us, with the key set once it is loaded."""
        if name != "multiprocessing.process":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                module.current_process().authkey = self.key

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def set_authkey(key: bytes) -> None:
    """What `multiprocessing` authenticates with, now or once it is imported."""
    loaded = sys.modules.get("multiprocessing.process")
    if loaded is not None:
        loaded.current_process().authkey = key
    elif sys.meta_path and isinstance(sys.meta_path[0], _Authkey):
        sys.meta_path[0].key = key
    else:
        sys.meta_path.insert(0, _Authkey(key))
