"""The keeper, seen from the parent: starts it, has it fork workers, learns of every death.

Knows nothing of the core. Called by the manager thread alone: the keeper's parent-death signal fires when the thread
that started it ends.
"""

from __future__ import annotations

import errno
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

import agentpool_worker

__all__ = ["KeeperClient", "KeeperMessage", "environment", "has_ended", "send"]

_MAX_MESSAGE: Final = 128 * 1024
#: Looks for orphans at most: one that forks while it is being looked for is seen the next time.
_SWEEPS: Final = 20
#: (what, worker id, pid | exit code | text, pidfd or None)
KeeperMessage = tuple[str, int, int | str, int | None]

_MARK: Final = "AGENTPOOL_KEEPER"

#: The package is that of this process, whatever else is installed; nothing else comes from its folder by this.
_PROGRAM: Final = (
    "import sys; path = sys.path[:]; sys.path.insert(0, sys.argv[3]); import agentpool_worker; sys.path[:] = path; "
    "from agentpool_worker import keeper; keeper.main(sys.argv)"
)


class KeeperClient:
    """One keeper process. It lives until `stop`, or until it dies; then make another.

    It and all below it have this environment and start in this directory (None: this process's).
    """

    def __init__(self, setup: Mapping[str, object], environment: Mapping[str, str], cwd: str | None) -> None:
        if not sys.executable:
            raise OSError("sys.executable is not set, so no interpreter is known to start workers with; set it")
        kind = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_STREAM) if sys.platform == "linux" else socket.SOCK_STREAM
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self._outgoing: deque[tuple[bytes, Sequence[int]]] = deque()
        #: in the environment of the keeper and of everything below it
        self._mark = f"{os.getpid()}-{os.urandom(8).hex()}"
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]  # as multiprocessing does
                    "-P",
                    "-c",
                    _PROGRAM,
                    str(theirs.fileno()),
                    str(os.getpid()),
                    os.path.dirname(os.path.dirname(agentpool_worker.__file__)),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**environment, _MARK: self._mark},
                cwd=cwd,
                start_new_session=True,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._socket.setblocking(False)
        self._outgoing.append((marshal.dumps(("setup", dict(setup))), ()))
        self.flush()

    @property
    def pid(self) -> int:
        """The keeper's process id."""
        return self._process.pid

    def fileno(self) -> int:
        """The descriptor to watch: readable when there are messages, or the keeper is gone."""
        return self._socket.fileno()

    def spawn(self, worker_id: int, descriptors: Sequence[int]) -> bool:
        """Have a worker forked. False: the message waits for room, and `flush` must be called.

        The descriptors must stay open until they are sent; `waiting` tells.
        """
        self._outgoing.append((marshal.dumps(("spawn", worker_id)), tuple(descriptors)))
        return self.flush()

    def set_up(self, setup: Mapping[str, object]) -> bool:
        """Replace what workers are told of their surroundings."""
        self._outgoing.append((marshal.dumps(("setup", dict(setup))), ()))
        return self.flush()

    def flush(self) -> bool:
        """Send what waits. True: nothing waits any more."""
        while self._outgoing:
            data, descriptors = self._outgoing[0]
            try:
                socket.send_fds(self._socket, [data], list(descriptors))
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:  # too many descriptors under way; they are being taken
                    return False
                self._outgoing.clear()  # it is gone, which its pidfd or the end of file tells
                return True
            self._outgoing.popleft()
        return True

    def messages(self) -> Iterator[KeeperMessage]:
        """What the keeper has to say. Raises EOFError when it is gone."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, _MAX_MESSAGE, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                raise EOFError from None
            if not data:
                raise EOFError
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            what, worker_id, detail = marshal.loads(data)
            yield what, worker_id, detail, descriptors[0] if descriptors else None

    def stop(self) -> None:
        """End the keeper and everything below it, and wait until it is gone."""
        self._socket.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its workers die with it
            self._process.wait()

    def kill_orphans(self) -> int:
        """After the keeper itself was lost: kill what its dead workers left behind, found by its environment.

        Returns how many. The keeper does this better while it lives: as a subreaper, it misses none.
        """
        mark = f"{_MARK}={self._mark}".encode()
        killed = 0
        for _ in range(_SWEEPS):
            found = [pid for pid in _all_pids() if mark in _environment(pid).split(b"\0")]
            if not found:
                break
            for pid in found:
                killed += _kill_marked(pid, mark)
        return killed

    def kill(self) -> None:
        """SIGKILL it: it does not do its work. Its workers die with it."""
        self._process.kill()

    @property
    def exit_code(self) -> int | None:
        """How the keeper ended, negative for a signal; None: it lives, or `stop` was not called."""
        return self._process.returncode

    def abandon(self) -> None:
        """In a forked copy of the parent: let go of the socket; the keeper is not ours."""
        self._socket.close()
        self._process.returncode = 0  # or Popen would complain that it was not waited for


def environment(added: Mapping[str, str] | None, allowed: Sequence[str] | None) -> dict[str, str]:
    """This process's environment as it is now, without what is not allowed, and with what is added."""
    inherited = dict(os.environ)  # at once: another thread may change it at any time
    if allowed is not None:
        inherited = {
            name: value for name, value in inherited.items() if any(fnmatchcase(name, pattern) for pattern in allowed)
        }
    return {**inherited, **(added or {})}


def _all_pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:  # no procfs
        return []


def _environment(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:  # gone, or not ours
        return b""


def _kill_marked(pid: int, mark: bytes) -> int:
    """SIGKILL a process by a descriptor taken before its mark was seen: no other one can be hit."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return 0
    try:
        if mark not in _environment(pid).split(b"\0"):
            return 0
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        return 0
    finally:
        os.close(pidfd)
    return 1


def has_ended(pidfd: int) -> bool:
    """Has the process of this pidfd ended, waited for or not?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def send(pidfd: int | None, pid: int, number: int) -> None:
    """Signal exactly this process, if it still lives."""
    try:
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, number)
        else:  # no pidfd on this platform; the keeper has not reported its death, so the pid is still its own
            os.kill(pid, number)
    except ProcessLookupError:
        return
