"""The real manager on an imaginary machine: `agentpool.runtime` as it is, with other things below it.

`agentpool.runtime.manager` with the rooms below it, `reception` and `links` are loaded once more, as private copies
that import fakes of what touches the world (time, threads, descriptors, processes). So every line of the manager's
logic runs unchanged, in one thread and in virtual time, and a real pool in the same process notices nothing.

What is not covered: real threads. The places where another thread may come in between are the manager's acquisitions of
its lock, and there a schedule lets others run (`Stage.between`); what `submit` does without the lock is atomic here.
Nor are covered: bytes (`FrameReader`, `encode`), `interrupts` (Ctrl-C), the fork of the parent, interpreter exit.
"""

from __future__ import annotations

import builtins
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, Final

from agentpool import io, runtime
from agentpool.config import PoolSettings
from agentpool.core import scheduler as core_scheduler
from agentpool.core.scheduler import Scheduler
from agentpool.errors import InternalError
from agentpool.io import channel as io_channel
from agentpool.io import host as io_host
from agentpool.io import processes
from agentpool.io import reactor as io_reactor
from agentpool.io import sampler as io_sampler
from agentpool.io import stderr as io_stderr
from agentpool.runtime import (
    changes,
    ending,
    intake,
    interrupts,
    lifecycle,
    links,
    manager,
    orders,
    outcomes,
    performing,
    reception,
)
from agentpool.runtime.manager import Manager
from agentpool.testing.channel import FakeChannel
from agentpool.testing.clock import VirtualClock
from agentpool.testing.keeper import FakeKeeper
from agentpool.testing.machine import Machine, Witness
from agentpool.testing.reactor import FakeReactor
from agentpool.testing.sampler import FakeHostSampler, FakeTreeSampler

__all__ = ["MANAGER", "USER", "Blocked", "Stage"]

#: What `threading.get_ident()` says in the manager's thread and in all others.
MANAGER: Final = 1
USER: Final = 2


class Blocked(BaseException):
    """A user's thread would wait here for room in the queue. It is to try again when `Stage.notified` grew."""


class _Instead:
    """A module with some names replaced; all others are the module's own."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Lock:
    """A lock that one thread can take only once: a second time would hang the real one."""

    __slots__ = ("_stage", "is_held")

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.is_held = False

    def __enter__(self) -> None:
        stage = self._stage
        if stage.countdown and stage.thread == MANAGER:
            stage.countdown -= 1
            if not stage.countdown:
                stage.let_others_in()
        if self.is_held:
            raise InternalError("the pool's lock is taken twice by one thread")
        self.is_held = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.is_held = False


class _Condition:
    """Room in the queue. Whoever waits for it comes back with the next notification."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def wait(self) -> None:
        raise Blocked

    def notify_all(self) -> None:
        self._stage.notified += 1


class _AsUser:
    """Written out, as `contextmanager` costs more than most of what is done in such a block."""

    __slots__ = ("_before", "_stage")

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        self._before, self._stage.thread = self._stage.thread, USER

    def __exit__(self, *_: object) -> None:
        self._stage.thread = self._before


class _Thread:
    """The manager's thread: its turns are taken by whoever drives the stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def start(self) -> None:
        self._stage.is_started = True


class _Log:
    """What is logged is kept where it matters: an exception in the manager's own code."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def critical(self, message: str, *_: object, **__: object) -> None:
        self.failures.append(message)

    exception = critical

    def log(self, *_: object, **__: object) -> None:
        """Nobody reads it."""

    error = warning = info = debug = log


class _Forwarder:
    """Nobody reads what workers write to standard error."""

    is_waiting = False
    is_full = False

    def push(self, data: bytes = b"") -> None:
        """Pass on."""

    def drain(self) -> None:
        """Pass on what waits."""


class _Held:
    def __enter__(self) -> None:
        """Nobody presses Ctrl-C."""

    def __exit__(self, *_: object) -> None:
        """Nobody pressed it."""


def _loaded_with(module: ModuleType, instead: dict[str, Any]) -> Any:
    """The module once more, for which each import of a name in `instead` brings what stands there.

    Imports are where a module gets hold of the world, at its top or, for what is loaded late, in a function. They ask
    the `__import__` of the module's own builtins; so nothing outside of this copy is changed.
    """
    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and name in instead and (fromlist or "." not in name):
            return instead[name]
        return __import__(name, globals, locals, fromlist, level)

    spec = importlib.util.find_spec(module.__name__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    copy.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
    spec.loader.exec_module(copy)
    return copy


class Stage:
    """Copies of the runtime's modules, and the machine on which its next manager will run."""

    def __init__(self, scheduler: type[Scheduler] = Scheduler) -> None:
        self.machine = Machine()
        #: whose turn it is to be the thread that calls
        self.thread = USER
        #: with so many acquisitions of the lock by the manager others come in between; 0: they do not
        self.countdown = 0
        #: what others do then
        self.between: Callable[[], None] | None = None
        #: notifications of those who wait for room
        self.notified = 0
        #: the manager wants its thread to run: take its turns
        self.is_started = False
        self.log = _Log()
        self._scheduler = scheduler
        self._manager_module = self._load()

    def _load(self) -> Any:
        held = _Held()
        log = _Instead(logging, getLogger=lambda *_: self.log)
        fake_processes = _Instead(
            processes,
            KeeperClient=lambda setup, environment, cwd: FakeKeeper(self.machine, setup, environment, cwd),
            send=lambda pidfd, pid, number: self.machine.signal(pidfd, pid, number),
            has_ended=lambda pidfd: self.machine.has_ended(pidfd),
            environment=lambda added, allowed: {},
        )
        instead: dict[str, Any] = {
            "agentpool.core.scheduler": _Instead(core_scheduler, Scheduler=self._scheduler),
            "agentpool.io": _Instead(io, processes=fake_processes),
            "agentpool.io.processes": fake_processes,
            "agentpool.io.channel": _Instead(io_channel, Channel=lambda *_: FakeChannel(self.machine)),
            "agentpool.io.reactor": _Instead(io_reactor, Reactor=lambda: FakeReactor(self.machine)),
            "agentpool.io.host": _Instead(io_host, HostSampler=lambda: FakeHostSampler(self.machine)),
            "agentpool.io.sampler": _Instead(
                io_sampler, TreeSampler=lambda pid, metric: FakeTreeSampler(self.machine, pid, metric)
            ),
            "agentpool.io.stderr": _Instead(io_stderr, Forwarder=_Forwarder),
            "agentpool.runtime": _Instead(
                runtime,
                interrupts=_Instead(
                    interrupts, hold=lambda *_: False, release=lambda: None, held=lambda: held
                ),
                lifecycle=_Instead(lifecycle, fill_standard_descriptors=lambda: None, is_exiting=lambda: False),
                outcomes=outcomes,
            ),
            "logging": log,
            "os": _Instead(os, close=lambda descriptor: self.machine.close(descriptor), cpu_count=lambda: 2),
            "time": _Instead(time, monotonic=lambda: self.machine.clock.now),
            "threading": _Instead(
                threading,
                Lock=lambda: _Lock(self),
                Condition=lambda lock: _Condition(self),
                Thread=lambda **_: _Thread(self),
                get_ident=lambda: self.thread,
            ),
        }
        fake_links = _loaded_with(links, instead)
        fake_links.Staff._setup = lambda staff: {"path": []}  # the real one lists sys.path, at 5 us a start
        instead["agentpool.runtime.links"] = fake_links
        instead["agentpool.runtime.reception"] = _loaded_with(reception, instead)
        for room in (changes, orders, intake, ending, performing):
            instead[room.__name__] = _loaded_with(room, instead)
        return _loaded_with(manager, instead)

    def manager(self, settings: PoolSettings, *, seed: int = 0, witness: Witness | None = None) -> Manager:
        """A manager on a new machine, with a clock of its own. Its turns are `turn`."""
        self.machine = Machine(VirtualClock(), witness)
        self.thread = USER
        self.countdown = self.notified = 0
        self.is_started = False
        self.log.failures.clear()
        made: Manager = self._manager_module.Manager(settings, (b"", ()), "imagined", seed)
        made._thread_id = MANAGER
        return made

    def turn(self, pool: Manager) -> None:
        """What the manager's thread does in one go: wait, listen, tell the core, perform its actions.

        Raises what would have made the real thread fail.
        """
        self.thread = MANAGER
        try:
            pool._turn()
        finally:
            self.thread = USER

    def as_user(self) -> _AsUser:
        """In the block another thread than the manager's calls."""
        return _AsUser(self)

    def let_others_in(self) -> None:
        """The manager is about to take its lock: others are quicker."""
        if self.between is not None:
            with self.as_user():
                self.between()
