"""The pool's side of the control socket: one thread of its own, from the first client that comes to the pool's end.

Until then the pool's manager thread merely has the listening descriptor among those that it waits for, so that a pool
that nobody operates pays for one socket and for nothing else. The thread never waits for a peer (all sockets are
non-blocking, all buffers bounded) nor for the pool (no verb waits), and takes at most a fifth of a processor, whatever
peers send: a request costs the one who asks. What is asked is carried out in `agentpool.control.verbs`.

`start`, `show_breaker`, `close` and `abandon` are the manager thread's; everything else belongs to the thread.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from agentpool.control import folder
from agentpool.control.notice import BreakerNotice
from agentpool.control.wire import LONGEST_REQUEST, ControlError, decode, encode

__all__ = ["ControlServer", "Following", "Operator"]

log = logging.getLogger("agentpool")

_MOST_PEERS: Final = 256
_MOST_FOLLOWINGS: Final = 8
#: A peer that asks nothing for so long, and follows nothing, makes room for others.
_IDLE_SECONDS: Final = 300.0
#: Answers that a peer did not read yet; beyond that it is taken for one that never will.
_MOST_UNREAD: Final = 8 * 1024 * 1024
#: After work that took a second, four seconds of rest: see the module.
_REST: Final = 4.0
_LONGEST_REST: Final = 0.25
#: No descriptor was free for a client: it is tried again after so many seconds.
_ACCEPT_AGAIN: Final = 1.0
#: At the end, answers are given so many seconds to be read.
_LAST_WORDS: Final = 1.0
#: Seconds that the end waits for the thread, which is in a verb at most.
_JOIN: Final = 5.0

_READ: Final = select.POLLIN
_WRITE: Final = select.POLLOUT
_GONE: Final = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Following(Protocol):
    """Something that goes on telling. Used by the control thread alone."""

    due: float

    def take(self, now: float) -> tuple[list[dict[str, Any]], str | None]:
        """What is new, and why this was the last of it (None: it was not). Sets `due` for the next time."""

    def close(self) -> None:
        """The peer is gone, or wants no more."""


class Operator(Protocol):
    """What the server needs of `agentpool.control.verbs`."""

    def hello(self) -> dict[str, Any]:
        """The first line that each peer gets."""

    def ask(self, verb: str, arguments: Mapping[str, Any]) -> tuple[Any, Following | None]:
        """Do it and return the answer. Never waits. Raises ControlError."""


class _Peer:
    """One connection."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.connection = connection
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.followings: dict[object, Following] = {}
        self.asked_at = now
        #: it sends no more (it may still read), or is not listened to any more
        self.is_deaf = False
        self.is_over = False

    @property
    def has_request(self) -> bool:
        return b"\n" in self.incoming

    def interest(self) -> int:
        wants_more = not self.is_deaf and len(self.incoming) <= LONGEST_REQUEST
        return (_READ if wants_more else 0) | (_WRITE if self.outgoing else 0)

    def send(self, message: dict[str, Any]) -> None:
        self.outgoing += encode(message)
        self.flush()
        if len(self.outgoing) > _MOST_UNREAD:
            self.is_over = True

    def flush(self) -> None:
        try:
            while self.outgoing:
                del self.outgoing[: self.connection.send(self.outgoing)]
        except BlockingIOError:
            return
        except OSError:  # it is gone
            self.outgoing.clear()
            self.is_over = True

    def refuse(self, error: ControlError, request: object = None) -> None:
        self.send({"id": request, "ok": False, "error": {"code": error.code, "message": str(error)}})

    def close(self) -> None:
        for following in self.followings.values():
            following.close()
        self.followings.clear()
        self.connection.close()


class ControlServer:
    """See the module. Raises OSError where no socket can be made in that folder."""

    def __init__(self, path: str, serial: int, operator: Callable[[], Operator]) -> None:
        self._make_operator = operator
        self._operator: Operator | None = None
        self._listener, self.path = folder.listen(path, serial)
        self._notice = BreakerNotice(self.path)
        #: guards the two descriptors below: who ends the pool may write to one while the thread ends, and closes it
        self._wake_lock = threading.Lock()
        self._wake_read = self._wake_write = -1
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._is_abandoned = False
        self._peers: dict[int, _Peer] = {}
        self._accepts_at = 0.0

    def fileno(self) -> int:
        """Readable when the first client is there: call `start`, and watch it no longer."""
        return self._listener.fileno()

    def start(self) -> None:
        """Serve from now on. Raises RuntimeError or OSError where there is no thread or descriptor to be had."""
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        thread = threading.Thread(target=self._run, name=f"agentpool-control-{self._listener.fileno()}", daemon=True)
        thread.start()
        self._thread = thread

    def show_breaker(self, pool: str, state: str, reason: str) -> None:
        """See `BreakerNotice.show`."""
        self._notice.show(pool, state, reason)

    def close(self) -> None:
        """The pool is over: remove the socket, tell those who follow it, end the thread. May be called twice."""
        if self._is_closing or self._is_abandoned:
            return
        self._is_closing = True
        self._notice.remove()
        try:
            os.unlink(self.path)
        except OSError as error:  # the folder was removed meanwhile, perhaps with the session
            log.debug("the control socket %s was not there to be removed: %s", self.path, error)
        thread = self._thread
        if thread is None:
            self._close_all()
        elif thread is not threading.current_thread():
            self._wake()
            thread.join(_JOIN)

    def _wake(self) -> None:
        with self._wake_lock:
            if self._wake_write >= 0:  # else the thread has ended
                os.write(self._wake_write, b"x")

    def abandon(self) -> None:
        """In a forked copy of the process: let go of all descriptors. The socket stays the parent's."""
        self._is_abandoned = True
        self._notice.abandon()
        self._wake_lock = threading.Lock()  # a thread that is not here may have held it
        self._close_all()

    def _close_all(self) -> None:
        for peer in list(self._peers.values()):
            peer.connection.close()
        self._peers.clear()
        self._listener.close()
        with self._wake_lock:
            for descriptor in (self._wake_read, self._wake_write):
                if descriptor >= 0:
                    os.close(descriptor)
            self._wake_read = self._wake_write = -1

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._operator = self._make_operator()
            while not self._is_closing:
                self._turn()
            self._say_goodbye()
        except Exception:
            log.exception("the control socket %s is closed after an error; the pool goes on", self.path)
        finally:
            self._close_all()

    def _turn(self) -> None:
        events = self._wait()
        began = time.monotonic()
        for descriptor, mask in events:
            if descriptor == self._listener.fileno():
                self._accept(began)
            elif peer := self._peers.get(descriptor):
                self._attend(peer, mask)
        for peer in list(self._peers.values()):
            self._serve(peer, began)
            if peer.is_over or (peer.is_deaf and not (peer.outgoing or peer.followings or peer.has_request)):
                del self._peers[peer.connection.fileno()]
                peer.close()
        self._rest(min(_LONGEST_REST, _REST * (time.monotonic() - began)))

    def _wait(self) -> list[tuple[int, int]]:
        now = time.monotonic()
        poll = select.poll()
        poll.register(self._wake_read, _READ)
        if len(self._peers) < _MOST_PEERS and now >= self._accepts_at:
            poll.register(self._listener, _READ)
        due = [self._accepts_at] if now < self._accepts_at else []
        for descriptor, peer in self._peers.items():
            poll.register(descriptor, peer.interest())
            if peer.has_request:
                due.append(now)
            if not peer.outgoing:
                due += [following.due for following in peer.followings.values()]
            if not peer.followings:
                due.append(peer.asked_at + _IDLE_SECONDS)
        return poll.poll(max(0.0, min(due) - now) * 1000 if due else None)

    def _rest(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._wake_read, _READ)
        poll.poll(seconds * 1000)

    def _accept(self, now: float) -> None:
        assert self._operator is not None
        while len(self._peers) < _MOST_PEERS:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if not self._accepts_at:
                    log.warning("the control socket cannot accept a client, and goes on trying: %s", error)
                self._accepts_at = now + _ACCEPT_AGAIN
                return
            self._accepts_at = 0.0
            connection.setblocking(False)
            peer = _Peer(connection, now)
            self._peers[connection.fileno()] = peer
            if is_trusted(connection):
                peer.send(self._operator.hello())
            else:
                peer.refuse(ControlError("this pool belongs to another user", "refused"))
                peer.is_over = True

    def _attend(self, peer: _Peer, mask: int) -> None:
        """Move bytes."""
        if mask & _WRITE:
            peer.flush()
        if mask & _READ:
            try:
                data = peer.connection.recv(LONGEST_REQUEST)
            except BlockingIOError:
                return
            except OSError:
                peer.is_over = True
                return
            peer.incoming += data
            if not data:
                peer.is_deaf = True
        elif mask & _GONE:
            peer.is_over = True

    def _serve(self, peer: _Peer, now: float) -> None:
        """One request at most, so that the next peer has its turn, and what it follows."""
        line, newline, rest = peer.incoming.partition(b"\n")
        try:
            if not newline and len(line) > LONGEST_REQUEST:
                raise ControlError(f"a request is longer than {LONGEST_REQUEST} bytes", "bad-request")
            if newline:
                peer.incoming = rest
                peer.asked_at = now
                self._ask(peer, decode(line), now)
        except ControlError as error:  # who does not speak JSON will not learn it
            peer.refuse(error)
            peer.incoming.clear()
            peer.is_deaf = True
        if not peer.followings and now - peer.asked_at > _IDLE_SECONDS:
            peer.is_over = True
        for request, following in list(peer.followings.items()):
            if now >= following.due and not peer.outgoing:  # who reads slowly gets fewer, not old ones
                self._follow(peer, request, following, now)

    def _ask(self, peer: _Peer, message: dict[str, Any], now: float) -> None:
        assert self._operator is not None
        request, verb, arguments = message.get("id"), message.get("verb"), message.get("arguments", {})
        if not (isinstance(verb, str) and isinstance(arguments, dict) and isinstance(request, (int, str, type(None)))):
            raise ControlError('a request is {"id": NUMBER, "verb": TEXT, "arguments": {...}}', "bad-request")
        try:
            if verb == "unfollow":
                answer, following = self._unfollow(peer, arguments.get("id")), None
            else:
                answer, following = self._operator.ask(verb, arguments)
            if following is not None and len(peer.followings) >= _MOST_FOLLOWINGS:
                following.close()
                raise ControlError(f"a client may follow {_MOST_FOLLOWINGS} things at once", "bad-request")
        except ControlError as error:
            peer.refuse(error, request)
            return
        except Exception as error:
            log.exception("the control verb %s failed", verb)
            peer.refuse(ControlError(f"{type(error).__name__}: {error}", "internal"), request)
            return
        peer.send({"id": request, "ok": True, "result": answer})
        if following is not None:
            self._unfollow(peer, request)
            peer.followings[request] = following
            self._follow(peer, request, following, now)

    def _unfollow(self, peer: _Peer, request: object) -> bool:
        following = peer.followings.pop(request, None) if isinstance(request, (int, str, type(None))) else None
        if following is not None:
            following.close()
        return following is not None

    def _follow(self, peer: _Peer, request: object, following: Following, now: float) -> None:
        events, end = following.take(now)
        for event in events:
            peer.send({"id": request, "event": event})
        if end is not None:
            peer.send({"id": request, "end": end})
            self._unfollow(peer, request)

    def _say_goodbye(self) -> None:
        """Nobody waits for a pool that is gone: those who follow something are told, those who read slowly are not."""
        for peer in self._peers.values():
            for request, following in list(peer.followings.items()):
                following.due = 0.0
                if not peer.outgoing:
                    self._follow(peer, request, following, time.monotonic())
                if request in peer.followings:
                    peer.send({"id": request, "end": "the pool was closed"})
        deadline = time.monotonic() + _LAST_WORDS
        while (left := deadline - time.monotonic()) > 0:
            poll = select.poll()
            waiting = [peer for peer in self._peers.values() if peer.outgoing and not peer.is_over]
            if not waiting:
                break
            for peer in waiting:
                poll.register(peer.connection, _WRITE)
            poll.poll(left * 1000)
            for peer in waiting:
                peer.flush()
        for peer in self._peers.values():
            peer.close()


def is_trusted(connection: socket.socket) -> bool:
    """Does the peer belong to this user, or to root? Where the system does not say, the folder's mode must do."""
    if not sys.platform.startswith("linux"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user in (0, os.geteuid())
