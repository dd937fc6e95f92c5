"""What happens to pools when the process around them changes: interpreter exit, fork, garbage collection.

Pools register here as they are made. Importing this module installs the hooks.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from agentpool.errors import TaskKilledError

if TYPE_CHECKING:
    from agentpool.runtime.manager import Manager

__all__ = ["fill_standard_descriptors", "is_exiting", "live_pools", "register"]

_managers: weakref.WeakSet[Manager] = weakref.WeakSet()
_pools: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_is_exiting = False


def register(pool: Any, manager: Manager) -> None:
    """Finish the manager's work when the pool is collected or the interpreter ends."""
    _managers.add(manager)
    _pools[id(manager)] = pool
    finalizer = weakref.finalize(pool, manager.drop)
    finalizer.atexit = False  # _at_exit sees to it


def live_pools() -> list[Any]:
    """The pools of this process that are not closed, oldest first."""
    return sorted((pool for pool in list(_pools.values()) if not pool.closed), key=lambda pool: pool.created_at)


def is_exiting() -> bool:
    """Has the interpreter begun to end?"""
    return _is_exiting


def fill_standard_descriptors() -> None:
    """Open /dev/null where the program was started without standard input, output or error (as some daemons are).

    Otherwise a pipe of ours would get that number, and be written into by whoever writes to standard error.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)


def _was_interrupted() -> bool:
    """Did KeyboardInterrupt end the script? (At a prompt the last error may be from long ago.)"""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return isinstance(error, KeyboardInterrupt) and not hasattr(sys, "ps1")


def _at_exit() -> None:
    """As concurrent.futures does: what was accepted is finished, then everything ends.

    Only where Ctrl-C ended the script, nobody waits for what it was to be stopped by: docs/decisions/0010.
    """
    global _is_exiting
    _is_exiting = True
    if _was_interrupted():
        error = TaskKilledError("the program was ended by KeyboardInterrupt")
        for manager in list(_managers):
            manager.stop_all(error, "the program was interrupted", wait=False)
    for manager in list(_managers):
        manager.shutdown(wait=False, cancel_futures=False)
    for manager in list(_managers):
        manager.shutdown(wait=True, cancel_futures=False)


def _before_fork() -> None:
    for manager in list(_managers):
        manager.before_fork()


def _after_fork_in_child() -> None:
    for manager in list(_managers):
        manager.abandon()


# concurrent.futures uses the same hook: it runs before the interpreter joins threads and refuses to start new ones.
_register_atexit = getattr(threading, "_register_atexit", None)
if _register_atexit is not None:
    _register_atexit(_at_exit)
else:
    import atexit

    atexit.register(_at_exit)
os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
