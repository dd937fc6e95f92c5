"""Finds the pools of this user and asks them things. Standard library only; one thread at a time for each client.

    for found in find_pools():
        with found.connect() as client:
            print(client.call("status"))

Every wait has a bound: a pool whose process is stopped accepts connections and answers nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

from agentpool.control import folder
from agentpool.control.wire import PROTOCOL, ControlError, decode, encode

__all__ = ["ControlClient", "FoundPool", "find_pools"]

#: How long an answer may take. A pool answers within milliseconds, also under load.
ANSWER_SECONDS: Final = 5.0
_LONGEST_ANSWER: Final = 64 * 1024 * 1024


class ControlClient:
    """A connection to one pool.

    path: the socket. seconds: how long each answer may take.
    `hello`: what the pool said of itself. Raises ControlError: nobody is there (code "gone"), no answer came in time
    ("silent"), it speaks another protocol ("protocol"), or it does not want us ("refused").
    """

    def __init__(self, path: str, seconds: float = ANSWER_SECONDS) -> None:
        self.path = path
        self._seconds = seconds
        self._incoming = bytearray()
        self._looked = 0
        self._last_id = 0
        self._connection = _connect(path, seconds)
        try:
            self.hello = self._read(time.monotonic() + seconds)
            self._check_hello()
        except BaseException:
            self.close()
            raise

    def _check_hello(self) -> None:
        if "error" in self.hello:
            raise ControlError(self.hello["error"].get("message", "refused"), "refused")
        protocol = self.hello.get("protocol")
        if protocol != PROTOCOL:
            raise ControlError(f"the pool behind {self.path} speaks protocol {protocol!r}, this program {PROTOCOL}: "
                               f"use agentpool {self.hello.get('agentpool')}, with which the pool runs", "protocol")

    def call(self, verb: str, **arguments: Any) -> Any:
        """Ask, and return the result. Arguments that are None are left out. Raises ControlError."""
        return self._result(self._ask(verb, arguments))

    def follow(self, verb: str, *, seconds: float | None = None, **arguments: Any) -> Iterator[dict[str, Any]]:
        """The events of a verb that goes on telling, until it ends.

        seconds: how long to wait for each event; None: without limit. Raises ControlError, with code "gone" when the
        pool died and "silent" when nothing came in that time.
        """
        request = self._ask(verb, arguments)
        self._result(request)
        while True:
            message = self._read(None if seconds is None else time.monotonic() + seconds)
            if message.get("id") != request:
                continue
            if "end" in message:
                return
            yield message["event"]

    def fileno(self) -> int:
        """Readable when something came."""
        return self._connection.fileno()

    def close(self) -> None:
        """May be called twice, and from another thread: it ends what waits for an answer there."""
        with suppress(OSError):  # the other end is gone
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, verb: str, arguments: dict[str, Any]) -> int:
        self._last_id += 1
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            self._connection.settimeout(self._seconds)
            self._connection.sendall(encode({"id": self._last_id, "verb": verb, "arguments": given}))
        except TimeoutError:
            raise self._silent(self._seconds) from None
        except OSError:  # what it said before it went may still be there
            return self._last_id
        return self._last_id

    def _result(self, request: int) -> Any:
        deadline = time.monotonic() + self._seconds
        while True:
            message = self._read(deadline)
            if message.get("id") == request and "ok" in message:
                break
        if message["ok"]:
            return message["result"]
        error = message["error"]
        raise ControlError(str(error["message"]), str(error["code"]))

    def _read(self, deadline: float | None) -> dict[str, Any]:
        while (end := self._incoming.find(b"\n", self._looked)) < 0:
            self._looked = len(self._incoming)
            if self._looked > _LONGEST_ANSWER:
                raise ControlError(f"what answers behind {self.path} is no pool: it sends no lines", "protocol")
            self._receive(deadline)
        line, self._looked = bytes(self._incoming[:end]), 0
        del self._incoming[: end + 1]
        return decode(line)

    def _receive(self, deadline: float | None) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise self._silent(self._seconds)
        self._connection.settimeout(left)
        try:
            data = self._connection.recv(256 * 1024)
        except TimeoutError:
            raise self._silent(self._seconds) from None
        except OSError:
            data = b""
        if not data:
            raise ControlError("the pool is gone: its process ended, or it was shut down", "gone")
        self._incoming += data

    def _silent(self, seconds: float) -> ControlError:
        return ControlError(f"the pool does not answer within {seconds:g} s: its process is stopped, or gets no "
                            "processor", "silent")


def _connect(path: str, seconds: float) -> socket.socket:
    directory, name = os.path.split(os.path.abspath(path))
    try:
        descriptor = folder.open_folder(directory)
        try:
            return folder.connect(descriptor, name, seconds)
        except ConnectionRefusedError:
            folder.remove_stale(descriptor, name)
            raise
        finally:
            os.close(descriptor)
    except TimeoutError:
        raise ControlError(f"the pool behind {path} accepts no connection", "silent") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise ControlError(f"no pool is behind {path}: its process ended, or it was shut down", "gone") from None
    except OSError as error:
        raise ControlError(f"{path}: {error.strerror}", "refused") from None


@dataclass(frozen=True, slots=True)
class FoundPool:
    """A socket, and what the pool behind it said of itself; or why it said nothing."""

    path: str
    pool: dict[str, Any] = field(default_factory=dict)
    agentpool: str = ""
    problem: str = ""

    def connect(self, seconds: float = ANSWER_SECONDS) -> ControlClient:
        """Raises ControlError."""
        return ControlClient(self.path, seconds)

    @property
    def id(self) -> str:
        """PID-NUMBER, which its socket's name has as well."""
        return "-".join(os.path.basename(self.path).split("-")[:2])

    def matches(self, wanted: str) -> bool:
        """Is that its id, name, process id or socket?"""
        return wanted in (self.id, self.id.partition("-")[0], self.pool.get("name"), self.path)


def find_pools(folders: Sequence[str] | None = None, seconds: float = 2.0) -> list[FoundPool]:
    """The pools of this user that live, those that do not answer included; sockets of dead ones are removed.

    folders: where to look; None: everywhere they may be. seconds: how long one may take to answer.
    """
    found = []
    for path in folder.candidates() if folders is None else folders:
        try:
            descriptor = folder.open_folder(path)
        except OSError:  # not there, or not this user's: no pool of this user has its socket there
            continue
        try:
            names = list(folder.socket_names(descriptor))
        finally:
            os.close(descriptor)
        found += [pool for name in names if (pool := _look(os.path.join(path, name), seconds)) is not None]
    return found


def _look(path: str, seconds: float) -> FoundPool | None:
    try:
        with ControlClient(path, seconds) as client:
            return FoundPool(path, dict(client.hello["pool"]), str(client.hello["agentpool"]))
    except ControlError as error:
        return None if error.code == "gone" else FoundPool(path, problem=str(error))
