"""The keeper: the process that forks workers, sees each of them die, and leaves nothing behind.

Started once per pool, as `python -m agentpool_worker.keeper SOCKET`. Single-threaded, so that forking it is safe; a
child subreaper, so that whatever a dead worker leaves behind becomes the keeper's child, and is killed. It ends, with
everything below it, when the parent does. It decides nothing: it forks when told to, and reports deaths.

Whoever makes a pool waits for its first worker, so this imports as little as it can: `signal`, `socket`, `typing` and
`traceback` would take 10 ms. What most workers need later is imported when the first ones are on their way.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import _socket as socket
import gc
import marshal
import os
import select
import sys
from time import monotonic

from agentpool_worker.authkey import set_authkey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

#: Descriptors of a worker, in the order in which they are sent: calls, results, control, standard error, page, and the
#: pool's arena where there is one.
WORKER_FDS: Final = 6
#: Messages stay below the kernel's limit for one datagram.
MAX_MESSAGE: Final = 128 * 1024
#: A worker's descriptors are moved out of the way of code that counts on low numbers.
_FD_BASE: Final = 200
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Without a message for so long, in milliseconds, the keeper imports what the first workers did not wait for.
_LATER: Final = 50
#: A process is kept ready for this long, in seconds, after a worker was replaced.
_SPARE_SECONDS: Final = 5.0


_libc: Any = None


def _prctl(option: int, value: int) -> None:
    """prctl(2) where there is one; elsewhere nothing, and the docs say what is missing then."""
    global _libc
    if sys.platform != "linux":
        return
    import ctypes

    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
    if _libc.prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl")


class ParentGone(Exception):
    """Nobody is left to keep workers for."""


class Keeper:
    """The keeper's state: its socket to the parent, and its workers."""

    def __init__(self, parent: socket.socket, parent_pid: int) -> None:
        self._parent = parent
        self._parent_pid = parent_pid
        self._pid = os.getpid()
        self._is_parent_gone = False
        self._setup: dict[str, Any] = {}
        self._preload_failure = ""
        self._is_lean = True
        self._workers: dict[int, int] = {}  # pid -> worker id
        #: forked ahead, as pid and socket: it becomes the next worker in half the time, and is kept while workers are
        #: being replaced
        self._spare: tuple[int, socket.socket] | None = None
        self._spare_until = 0.0
        self._has_buried = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> None:
        """Serve until the parent is gone or says stop; returns only in a forked child, as the worker's main."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        # The mask is that of the thread that started us; neither we nor the workers can do with a blocked SIGCHLD.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops us
        # Handlers raise nothing: the flag is looked at, and the wake-up descriptor ends the wait.
        signal.signal(signal.SIGTERM, self._parent_died)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            self._serve()
        except ParentGone:
            pass
        except BaseException:
            _print_error()  # a defect; all that there is below must be gone nevertheless
        self._end()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._parent, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while not self._is_parent_gone and os.getppid() == self._parent_pid:
            events = poll.poll(self._patience())
            if not events and not self._sees_to_spare() and self._is_lean:
                self._import_more()
                _freeze()
            for descriptor, _ in events:
                if descriptor == self._wake_read:
                    os.read(self._wake_read, 4096)
                    self._reap()
                else:
                    self._receive()

    def _patience(self) -> float | None:
        """Milliseconds until there is something to do without being told."""
        spare_seconds = self._spare_until - monotonic()
        if self._spare is None and spare_seconds > 0:
            return 0
        if self._is_lean and self._workers:
            return _LATER
        return None if self._spare is None else max(0.0, spare_seconds) * 1000 + 1

    def _parent_died(self, *_: object) -> None:
        self._is_parent_gone = True

    # -- messages ------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        space = socket.CMSG_SPACE(WORKER_FDS * 4)
        try:
            data, ancillary, _, _ = self._parent.recvmsg(MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:  # it died and had not read all that we told it
            raise ParentGone from None
        if not data:
            raise ParentGone
        descriptors = _descriptors(ancillary)
        message = marshal.loads(data)
        if message[0] == "spawn":
            self._spawn(message[1], descriptors)
        elif message[0] == "setup":
            self._set_up(message[1])
        else:
            raise ParentGone

    def _set_up(self, setup: dict[str, Any]) -> None:
        is_first = not self._setup
        self._setup = setup
        set_authkey(setup["authkey"])
        sys.path[:] = setup["path"]
        sys.argv[:] = setup["argv"]
        if setup["method"] == "spawn":
            self._is_lean = False
            return
        if not is_first:
            self._dismiss_spare()  # it knows what was set up before
            return
        # Here, so that workers share its pages; pickle, with re and enum, as nearly every module wants it.
        import faulthandler  # noqa: F401
        import fcntl  # noqa: F401
        import pickle  # noqa: F401
        import resource  # noqa: F401

        import agentpool_worker.main  # noqa: F401

        if setup["preload"]:
            self._import_more()
            self._preload()
            _freeze()
        else:
            gc.freeze()  # there is next to no garbage yet, and somebody waits

    def _import_more(self) -> None:
        """What workers need for calls that are sent by value, so that those to come share it."""
        import agentpool_worker.byvalue  # noqa: F401

        self._is_lean = False

    def _preload(self) -> None:
        """Import what the user named. What fails is tried again with the next start: it may have been mended."""
        self._preload_failure = ""
        try:
            for name in self._setup["preload"]:
                __import__(name)
        except BaseException:
            import importlib
            import traceback

            self._preload_failure = f"a module to preload cannot be imported:\n{traceback.format_exc()}"
            importlib.invalidate_caches()

    def _tell(self, message: tuple[str, int, int | str], descriptor: int | None = None) -> None:
        data = marshal.dumps(message)
        try:
            if descriptor is None:
                self._parent.send(data)
            else:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))
                self._parent.sendmsg([data], [rights])
        except ConnectionError:
            raise ParentGone from None

    # -- workers -------------------------------------------------------------------------------------------------

    def _spawn(self, worker_id: int, descriptors: list[int]) -> None:
        if self._preload_failure:
            self._preload()
            _freeze()
        if self._preload_failure:
            self._tell(("failed", worker_id, self._preload_failure))
        else:
            try:
                pid = self._send_spare(worker_id, descriptors) or os.fork()
            except OSError as error:
                self._tell(("failed", worker_id, f"fork failed: {error}"))
            else:
                if pid == 0:
                    self._become_worker(lambda: (worker_id, descriptors))
                self._workers[pid] = worker_id
                if self._has_buried and self._setup["method"] != "spawn":
                    self._spare_until = monotonic() + _SPARE_SECONDS
                # We have not waited for it, so that the pid is still its own.
                pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
                self._tell(("spawned", worker_id, pid), pidfd)
                if pidfd is not None:
                    os.close(pidfd)
        for descriptor in descriptors:
            os.close(descriptor)

    def _sees_to_spare(self) -> bool:
        """Nobody wants anything: have a spare where workers are being replaced, and none otherwise. True: it is new."""
        if monotonic() >= self._spare_until:
            self._dismiss_spare()
        elif self._spare is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                pid = os.fork()
            except OSError:
                self._spare_until = 0.0  # when a worker is wanted, the failure will be told
            else:
                if pid == 0:
                    ours.close()
                    self._become_worker(lambda: _take_over(theirs))
                self._spare = pid, ours
                return True
            finally:
                theirs.close()
        return False

    def _send_spare(self, worker_id: int, descriptors: list[int]) -> int:
        """Have the spare become this worker; returns its pid. 0: there is none."""
        if self._spare is None:
            return 0
        (pid, spare), self._spare = self._spare, None
        rights = b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in descriptors)
        try:
            spare.sendmsg([marshal.dumps(worker_id)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError:  # somebody killed it
            return 0
        finally:
            spare.close()
        return pid

    def _dismiss_spare(self) -> None:
        if self._spare is not None:
            (pid, spare), self._spare = self._spare, None
            spare.close()
            _kill_child(pid)

    def _become_worker(self, take_over: Callable[[], tuple[int, list[int]]]) -> None:
        """In the forked child. Never returns. `take_over`: waits for the worker's id and descriptors."""
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            if os.getppid() != self._pid:
                os._exit(1)  # the keeper died before its death could have been signalled
            os.setsid()
            import resource

            if not self._setup["core_dumps"]:
                resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            if self._setup["data_limit"] is not None:
                resource.setrlimit(resource.RLIMIT_DATA, (self._setup["data_limit"],) * 2)
            _reseed()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._let_go()
            worker_id, descriptors = take_over()
            calls, results, control, stderr, page, *arena = _out_of_the_way(descriptors)
            os.dup2(stderr, 2)
            os.close(stderr)
            os.environ["AGENTPOOL_WORKER"] = str(worker_id)
            if self._setup["method"] == "spawn":
                self._exec(worker_id, calls, results, control, page, *arena)
            from agentpool_worker import main

            main.serve(worker_id, calls, results, control, page, *arena)
            main.finish()
        except BaseException:
            _print_error()
        finally:
            os._exit(1)

    def _let_go(self) -> None:
        """In the forked child: keep nothing of the keeper's."""
        self._parent.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        if self._spare is not None:
            self._spare[1].close()

    def _exec(self, worker_id: int, *descriptors: int) -> None:
        """A fresh interpreter. What it must know beside its descriptors goes through the page, as argv has limits."""
        from agentpool_worker.protocol import REPORT

        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        os.pwrite(descriptors[3], marshal.dumps(self._setup), REPORT)
        options = sys.orig_argv[1 : sys.orig_argv.index("-c")]  # those that the parent's interpreter runs with
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        program = (
            f"import sys; path = sys.path[:]; sys.path.insert(0, {root!r}); import agentpool_worker; "
            "sys.path[:] = path; from agentpool_worker import main; main.main(sys.argv)"
        )
        words = [sys.executable, *options, "-c", program, str(worker_id), *map(str, descriptors)]
        os.execv(sys.executable, words)

    # -- deaths --------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Take note of every child that died; kill what dead workers left behind."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                break
            if self._spare is not None and pid == self._spare[0]:
                self._dismiss_spare()
            worker_id = self._workers.pop(pid, None)
            if worker_id is not None:
                self._has_buried = True
                self._tell(("exited", worker_id, os.waitstatus_to_exitcode(status)))
        spare_pid = 0 if self._spare is None else self._spare[0]
        for pid in _children():
            if pid not in self._workers and pid != spare_pid:
                _kill_child(pid)

    def _end(self) -> None:
        """Kill everything below, and end. Each killed process hands us its own children, until there are none."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pids = set(_children()) | set(self._workers)
        while True:
            killed = [_kill_child(pid) for pid in pids]
            if killed and not any(killed):
                os._exit(0)  # what is left is not ours to kill
            try:
                pid, _ = os.waitpid(-1, 0)
            except ChildProcessError:
                os._exit(0)
            self._workers.pop(pid, None)
            pids = set(_children()) | set(self._workers)


def _take_over(keeper: socket.socket) -> tuple[int, list[int]]:
    """In a spare: wait for the id and the descriptors of the worker that it is to be."""
    from agentpool_worker import main

    main.rehearse()
    data, ancillary, _, _ = keeper.recvmsg(64, socket.CMSG_SPACE(WORKER_FDS * 4), socket.MSG_CMSG_CLOEXEC)
    if not data:
        os._exit(0)  # it is not wanted
    keeper.close()
    return marshal.loads(data), _descriptors(ancillary)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Those that came with a message."""
    found: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found += [int.from_bytes(payload[i : i + 4], sys.byteorder) for i in range(0, len(payload), 4)]
    return found


def _out_of_the_way(descriptors: list[int]) -> list[int]:
    """Have the worker's descriptors at high numbers."""
    import fcntl
    import resource

    moved = []
    base = min(_FD_BASE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    for descriptor in descriptors:
        moved.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, base))
        os.close(descriptor)
    return moved


def _freeze() -> None:
    """A collection in a forked child would write to, and so copy, every page that it shares."""
    gc.collect()
    gc.freeze()


def _print_error() -> None:
    import traceback

    traceback.print_exc()
    sys.stderr.flush()


def _kill_child(pid: int) -> bool:
    """SIGKILL a child. It has not been waited for, so that the pid cannot be anybody else's. False: we may not."""
    try:
        os.kill(pid, signal.SIGKILL)
    except (PermissionError, ProcessLookupError):  # it became another user's; without procfs: it is gone
        return False
    return True


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # no procfs: only the workers themselves are known
        return []


def _reseed() -> None:
    """Forked workers would all draw the same numbers. (`random` sees to itself.)"""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def main(argv: list[str]) -> None:
    """`python -m agentpool_worker.keeper SOCKET PARENT_PID`"""
    os.set_inheritable(int(argv[1]), False)
    parent = socket.socket(fileno=int(argv[1]))
    Keeper(parent, int(argv[2])).run()


if __name__ == "__main__":
    main(sys.argv)
