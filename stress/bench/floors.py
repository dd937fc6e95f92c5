"""Bare mechanisms: what a parent in Python can reach on this machine with nothing of a pool around it.

No crash is noticed, nothing is limited or watched. They are no pools to use, but bounds to compare with.
"""

from __future__ import annotations

import collections
import os
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from stress.bench import tasks
from stress.bench.contenders import Contender

if TYPE_CHECKING:
    import socket
    import threading
    from concurrent.futures import Future

#: One read at most, and the largest message that is written in one piece.
READ_BYTES = 1 << 16


class Frames:
    """Messages with their length before them, on the ends of two pipes."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd
        self._rest = b""

    def send(self, messages: Sequence[bytes]) -> None:
        """All in one write where they are short."""
        data = b"".join([len(message).to_bytes(8, "little") + message for message in messages])
        view = memoryview(data)
        while view:
            view = view[os.write(self.write_fd, view) :]

    def receive(self) -> list[bytes]:
        """Wait for one message; return it and those that came with it."""
        while True:
            more = os.read(self.read_fd, READ_BYTES)
            if not more:
                raise EOFError
            data = self._rest + more
            messages, at = [], 0
            while len(data) - at >= 8:
                end = at + 8 + int.from_bytes(data[at : at + 8], "little")
                if end > len(data):
                    break
                messages.append(data[at + 8 : end])
                at = end
            self._rest = data[at:]
            if messages:
                return messages

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


class BareFutures(Contender):
    """bare: futures, a reader thread, forked children on pipes, one call with each worker"""

    name = "bare-1"
    cases = ("noop", "latency", "busy-parent", "pending", "cold-first", "cold-16", "ticker")
    floor = True
    #: Calls with each worker; the others wait in the parent.
    window: ClassVar[int] = 1

    _lock: threading.Lock
    _thread: threading.Thread

    def start(self, workers: int, **_: Any) -> None:
        import threading
        from concurrent.futures import Future

        self._future = Future
        self._workers: list[tuple[collections.deque[Future[Any]], Frames]] = []
        self._children: list[int] = []
        for _number in range(workers):
            down, up = os.pipe(), os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    for fd in (down[1], up[0], *(fd for _, end in self._workers for fd in (end.read_fd, end.write_fd))):
                        os.close(fd)
                    serve(Frames(down[0], up[1]))
                finally:
                    os._exit(0)
            os.close(down[0])
            os.close(up[1])
            self._workers.append((collections.deque(), Frames(up[0], down[1])))
            self._children.append(pid)
        self._lock = threading.Lock()
        self._backlog: collections.deque[tuple[Future[Any], bytes]] = collections.deque()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.submit = self._submit

    def _submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = self._future()
        data = pickle.dumps((function, args, {}), 5)
        with self._lock:
            owed, worker = min(self._workers, key=lambda pair: len(pair[0]))
            if len(owed) < self.window:
                owed.append(future)
                worker.send([data])
            else:
                self._backlog.append((future, data))
        return future

    def _read(self) -> None:
        """Take results, refill the worker that sent them, then settle the futures."""
        import select

        poll = select.poll()
        by_fd = {worker.read_fd: (owed, worker) for owed, worker in self._workers}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while by_fd:
            for fd, _ in poll.poll():
                owed, worker = by_fd[fd]
                try:
                    messages = worker.receive()
                except EOFError:
                    poll.unregister(fd)
                    del by_fd[fd]
                    continue
                done, batch = [], []
                with self._lock:
                    for message in messages:
                        done.append((owed.popleft(), message))
                        if self._backlog:
                            future, data = self._backlog.popleft()
                            owed.append(future)
                            batch.append(data)
                    if batch:
                        worker.send(batch)
                for future, message in done:
                    future.set_result(pickle.loads(message))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], chunksize: int) -> list[Any]:
        chunks = [items[at : at + chunksize] for at in range(0, len(items), chunksize)]
        parts = self.gather([self.submit(tasks.run_chunk, function, chunk) for chunk in chunks])
        return [value for part in parts for value in part]

    def best_chunk(self, items: int, workers: int) -> int:
        return 1000  # a window of larger messages could fill both pipes, and deadlock

    def shutdown(self) -> None:
        for _, worker in self._workers:
            os.close(worker.write_fd)
        self._thread.join(5)
        for pid in self._children:
            os.waitpid(pid, 0)


def serve(end: Frames) -> None:
    """A worker's loop: answers travel together as the calls did."""
    while True:
        try:
            messages = end.receive()
        except EOFError:
            return
        replies = []
        for message in messages:
            function, args, kwargs = pickle.loads(message)
            replies.append(pickle.dumps(function(*args, **kwargs), 5))
        end.send(replies)


class BareBatches(BareFutures):
    """bare: the same, 16 calls with each worker"""

    name = "bare-16"
    window = 16


class BareOutOfBand(Contender):
    """bare: buffers beside the pickle over a socket pair, one thread, no futures"""

    name = "bare-oob"
    cases = ("payload",)
    floor = True

    def start(self, workers: int, **_: Any) -> None:
        import socket

        self._workers: list[socket.socket] = []
        self._children: list[int] = []
        self._turn = 0
        for _number in range(workers):
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if not pid:
                try:
                    for other in [*self._workers, ours]:
                        other.close()
                    echo_out_of_band(theirs)
                finally:
                    os._exit(0)
            theirs.close()
            self._workers.append(ours)
            self._children.append(pid)
        self.submit = self._submit

    def _submit(self, function: Callable[..., Any], *args: Any) -> socket.socket:
        self._turn = (self._turn + 1) % len(self._workers)
        send_out_of_band(self._workers[self._turn], (function, args, {}))
        return self._workers[self._turn]

    def result(self, handle: socket.socket, timeout: float | None = None) -> Any:
        return receive_out_of_band(handle)

    def pids(self, workers: int, *_: Any, **__: Any) -> set[int]:
        return set(self._children)

    def shutdown(self) -> None:
        for worker in self._workers:
            worker.close()
        for pid in self._children:
            os.waitpid(pid, 0)


def send_out_of_band(end: socket.socket, value: Any) -> None:
    """Sizes, then the pickle and its buffers, each written from where it is."""
    buffers: list[pickle.PickleBuffer] = []
    parts: list[bytes | memoryview] = [pickle.dumps(value, 5, buffer_callback=buffers.append)]
    parts += [buffer.raw() for buffer in buffers]
    sizes = b"".join(len(part).to_bytes(8, "little") for part in parts)
    end.sendall(len(parts).to_bytes(8, "little") + sizes)
    for part in parts:
        end.sendall(part)


def receive_out_of_band(end: socket.socket) -> Any:
    """The next value."""
    from socket import MSG_WAITALL

    head = end.recv(8, MSG_WAITALL)
    if not head:
        raise EOFError
    table = end.recv(8 * int.from_bytes(head, "little"), MSG_WAITALL)
    sizes = [int.from_bytes(table[at : at + 8], "little") for at in range(0, len(table), 8)]
    body = end.recv(sizes[0], MSG_WAITALL)
    buffers = []
    for size in sizes[1:]:
        buffers.append(bytearray(size))
        end.recv_into(buffers[-1], size, MSG_WAITALL)
    return pickle.loads(body, buffers=buffers)


def echo_out_of_band(end: socket.socket) -> None:
    """A worker's loop."""
    while True:
        try:
            function, args, kwargs = receive_out_of_band(end)
        except (EOFError, OSError):
            return
        send_out_of_band(end, function(*args, **kwargs))


FLOORS: list[type[Contender]] = [BareFutures, BareBatches, BareOutOfBand]
