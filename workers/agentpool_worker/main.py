"""The worker's loop: read a call, run it, send what came of it.

The main thread reads calls and runs them. A second thread, asleep on the control pipe, passes on the wish to stop a
task, and ends the process at once when the parent is gone. It knows nothing of pools, limits or retries: it does what
frames say. `Worker` talks to a `Link`, so that tests drive it without a process.

It imports as little as it can, as the keeper does: the first worker is waited for.
"""

from __future__ import annotations

import _pickle as pickle
import _signal as signal  # type: ignore[import-not-found]
import _thread
import contextlib
import gc
import os
import sys
import threading
import time

from agentpool_worker import context, protocol
from agentpool_worker.arena import SharedBlocks
from agentpool_worker.protocol import (
    BEGAN,
    OUTBOX,
    OUTBOX_DATA,
    OUTBOX_HEADER,
    PAGE_SIZE,
    REVOKED,
    Frame,
    FrameReader,
    Stream,
    encode,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final, Protocol
else:
    Protocol = object

#: A result waits in the outbox for company at most this long, in seconds, and never past the end of what was read.
HOLD_SECONDS: Final = 0.0002
#: Memory is measured after a task no more often than this, in seconds: it costs as much as a short task.
MEASURE_EVERY: Final = 0.001
_PAGE_KIB: Final = os.sysconf("SC_PAGE_SIZE") // 1024


class Link(Protocol):
    """What a worker needs of the outside."""

    @property
    def streams_from(self) -> int | None:
        """The descriptor that large calls can be unpickled from while they arrive; None: there is none."""

    def read_calls(self, reader: FrameReader) -> int:
        """Block for bytes of calls; 0: no more will come."""

    def write(self, parts: list[bytes | memoryview]) -> None:
        """Write all of it to the parent, blocking."""

    def write_if_room(self, least: int, build: Callable[[int], bytes]) -> bool:
        """Write what `build(room)` makes, without waiting. False: it made nothing, or another thread is writing."""

    def send_descriptors(self, descriptors: list[int]) -> None:
        """Pass descriptors to the parent; they stay open here."""


class PipeLink:
    """The real link: two pipe ends. `write` may be called by both threads; frames never interleave."""

    def __init__(self, calls: int, results: int, page: Any, control: int = -1) -> None:
        self._calls = calls
        self._results = results
        self._control = control
        self._announced = protocol.announced(page)
        self._is_large = False
        self._lock = threading.Lock()

    def abandon(self, *others: int) -> None:
        """In a process that a task forked: the pipes are the worker's, and must end when the worker does."""
        for descriptor in (self._calls, self._results, *others):
            with contextlib.suppress(OSError):  # the task closed it before
                os.close(descriptor)

    @property
    def streams_from(self) -> int | None:
        return self._calls

    def read_calls(self, reader: FrameReader) -> int:
        return reader.read_from(self._calls)

    def write(self, parts: list[bytes | memoryview]) -> None:
        with self._lock:
            if len(parts) > 1 and not self._is_large:
                self._is_large = True
                protocol.enlarge_pipe(self._results)
            self._announced[0] += sum(memoryview(part).nbytes for part in parts)
            for part in parts:
                self._write(part)

    def _write(self, part: bytes | memoryview) -> None:
        view = memoryview(part)
        while view:
            view = view[os.write(self._results, view) :]

    def write_if_room(self, least: int, build: Callable[[int], bytes]) -> bool:
        from agentpool_worker import streaming

        if not self._lock.acquire(blocking=False):
            return False
        try:
            frame = build(streaming.room_in(self._results, least))
            self._announced[0] += len(frame)
            self._write(frame)
            return bool(frame)
        finally:
            self._lock.release()

    def send_descriptors(self, descriptors: list[int]) -> None:
        import _socket as socket

        numbers = b"".join([descriptor.to_bytes(4, sys.byteorder) for descriptor in descriptors])
        control = socket.socket(fileno=self._control)
        try:
            control.settimeout(None)  # whatever the task made the default
            control.sendmsg([b"d"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        finally:
            control.detach()


def _agents_set_up() -> int:
    """How many agents this worker has set up and keeps; their memory belongs to its baseline."""
    base = sys.modules.get("agentpool_worker.agents.base")
    return 0 if base is None else len(base._instances)


def _rss_kib() -> int:
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no procfs, or no descriptor: the parent measures from outside
        return 0
    try:
        return int(os.read(descriptor, 128).split()[1]) * _PAGE_KIB
    finally:
        os.close(descriptor)


class Worker:
    """One worker, from its first frame to its last."""

    def __init__(self, worker_id: int, link: Link, page: Any, arena: int = -1) -> None:
        self.worker_id = worker_id
        self._pid = os.getpid()
        self._main_thread = threading.get_ident()
        self._link = link
        self._page = page
        self.shared = SharedBlocks(worker_id, page, arena)
        self._reader = FrameReader(link.streams_from, self.shared)
        self._load_call = protocol.CallLoader().load
        self._generation = 0
        self._held = 0
        self._held_since = 0.0
        self._measured_at = 0.0
        self._max_kib = 0
        self._interruptible = 0  # id of the task whose code runs now; 0: none
        self._stop_wanted = 0  # id of the task that is to stop
        self._cancelled = threading.Event()
        self._has_initializer = False
        # An uncontended lock is a full memory barrier on every platform that CPython supports, see _began().
        self._barrier = threading.Lock()

    # -- the main thread -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the parent closes the pipe of calls."""
        import resource

        self._getrusage = resource.getrusage
        self._max_kib = self._getrusage(resource.RUSAGE_SELF).ru_maxrss
        context._connect(self)
        while True:
            for frame in self._reader.frames():
                if frame.kind == protocol.CALL:
                    self._serve(frame)
                elif frame.kind == protocol.INIT:
                    if not self._initialize(frame):
                        return
                    flags = int(self._has_initializer)
                    self._link.write(encode(protocol.READY, os.getpid(), flags=flags, x=_rss_kib()))
                elif frame.kind == protocol.COLLECT:
                    gc.collect()
                    self._link.write(encode(protocol.COLLECTED, x=max(0, _rss_kib() - self.shared.own_kib)))
            self._flush()
            if self.shared.is_used:
                self.shared.release()
            if not self._link.read_calls(self._reader):
                return

    def _initialize(self, frame: Frame) -> bool:
        """Run the initializer, if there is one. False: it raised, and the pool is told."""
        try:
            initializer, initargs = protocol.loads(frame.payload, buffers=frame.buffers)
            if initializer is not None:
                self._has_initializer = True
                initializer(*initargs)
        except BaseException as error:
            _flush_streams()
            payload, buffers = _describe(error, skip=1)
            self._link.write(encode(protocol.INIT_FAILED, 0, payload, buffers))
            return False
        return True

    def _began(self, slot: int) -> bool:
        """Note in the page that the call begins. False: the parent revoked it first.

        Dekker's protocol with the parent's `revoke`: each side writes its own byte, passes a barrier and reads the
        other's. At least one sees the other; where both do, the call counts as not begun, and the parent is told.
        """
        page = self._page
        page[BEGAN + slot] = 1
        self._barrier.acquire()
        self._barrier.release()
        if page[REVOKED + slot]:
            page[BEGAN + slot] = 0
            return False
        return True

    def _serve(self, frame: Frame) -> None:
        slot, task_id = frame.x, frame.task_id
        if not self._began(slot):
            if isinstance(frame.payload, Stream):
                frame.payload.drain()
            self.shared.release(frame)
            self._send(encode(protocol.SKIPPED, task_id, x=slot), time.monotonic())
            return
        if self._cancelled.is_set() and self._stop_wanted != task_id:
            self._cancelled.clear()  # it was meant for a task that had ended
        agents = _agents_set_up()
        started = time.monotonic()
        try:
            kind, payload, buffers = self._attempt(frame)
        except context.TaskCancelled as error:  # it came between the end of the task's own error and its handler
            kind, (payload, buffers) = protocol.ERROR, _describe(error)
        context._leave()
        shared = None
        if frame.flags & protocol.SHARED or type(payload) is tuple or buffers:
            shared = self.shared.put(kind, payload, buffers)
            if shared is not None:
                payload, buffers = b"", ()
            self.shared.release(frame)  # before the result goes: whoever waits for it finds the block free
        if _agents_set_up() != agents:
            self._send(encode(protocol.AGENT_SET_UP, task_id, x=_rss_kib()), started)
        ended = time.monotonic()
        rss = peak = 0
        if ended - self._measured_at > MEASURE_EVERY:
            self._measured_at = ended
            rss, peak = self._measure()
        micros = min(int((ended - started) * 1e6), 0xFFFFFFFF)
        if kind != protocol.VALUE or micros > 1000:
            _flush_streams()
        if shared is not None:
            place, sizes = shared
            self._send([protocol.encode_shared(kind, task_id, place, sizes, x=micros, y=rss, z=peak)], ended)
        else:
            self._send(encode(kind, task_id, payload, buffers, x=micros, y=rss, z=peak), ended)

    def _attempt(self, frame: Frame) -> tuple[int, protocol.Payload, Sequence[memoryview]]:
        """Unpickle, run and pickle: all of it is the user's code, and all of it can be interrupted."""
        stage = protocol.CALL_FAILED
        try:
            context._enter(context.TaskContext(frame.task_id, self.worker_id, self._cancelled))
            call = self._load_stream(frame.payload) if isinstance(frame.payload, Stream) else None
            self._interruptible = frame.task_id
            if self._stop_wanted == frame.task_id:
                raise context.TaskCancelled("asked to stop before it began")
            function, args, kwargs = call or self._load_call(frame.payload, frame.buffers)
            stage = protocol.ERROR
            value = protocol.finish(function(*args, **kwargs))
            self._end_if_copy()
            stage = protocol.RESULT_FAILED
            payload, buffers = protocol.dumps(value)
            self._interruptible = 0
            return protocol.VALUE, payload, buffers
        except BaseException as error:
            self._interruptible = 0
            self._end_if_copy(error)
            where = ""
            if isinstance(error, context.TaskCancelled):
                stage = protocol.ERROR
            elif stage == protocol.RESULT_FAILED:
                from agentpool_worker import unpicklable

                where = unpicklable.find(value, "result", protocol.dumps)
            payload, buffers = _describe(error, skip=1, where=where)
            return stage, payload, buffers

    def _load_stream(self, stream: Stream) -> tuple[Any, Any, Any]:
        """A large call, while it arrives. Not interruptible: what was read of the pipe must be known to the byte."""
        try:
            return self._load_call(stream, ())
        finally:
            stream.drain()

    def _end_if_copy(self, error: BaseException | None = None) -> None:
        """A task that forked comes back twice. Only the original goes on; the copy ends here, as after os.fork()."""
        if os.getpid() == self._pid:
            return
        if error is not None and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exception(error)
        _flush_streams()
        code = error.code if isinstance(error, SystemExit) else int(error is not None)
        os._exit(code if isinstance(code, int) else int(code is not None))

    def _measure(self) -> tuple[int, int]:
        """RSS now and, where this task raised it, the peak RSS, in KiB."""
        maximum = self._getrusage(0).ru_maxrss
        peak = 0
        if maximum > self._max_kib:
            peak = self._max_kib = maximum
        return max(0, _rss_kib() - self.shared.own_kib), peak

    # -- the outbox ----------------------------------------------------------------------------------------------

    def _send(self, parts: list[bytes | memoryview], now: float) -> None:
        """Send a frame, or hold it for company: never so long that anybody would notice, and never to be lost."""
        first = parts[0]
        if len(parts) > 1 or self._held + len(first) > PAGE_SIZE - OUTBOX_DATA:
            self._flush()
            self._link.write(parts)
            return
        start = OUTBOX_DATA + self._held
        self._page[start : start + len(first)] = first
        if not self._held:
            self._held_since = now
        self._held += len(first)
        OUTBOX_HEADER.pack_into(self._page, OUTBOX, self._generation, self._held)
        if now - self._held_since > HOLD_SECONDS:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._link.write([bytes(self._page[OUTBOX_DATA : OUTBOX_DATA + self._held])])
            self._emptied()

    def _emptied(self) -> None:
        self._generation = self._generation + 1 & 0xFFFFFFFF
        self._held = 0
        OUTBOX_HEADER.pack_into(self._page, OUTBOX, self._generation, 0)

    # -- events of the running task: see `streaming.Outlet` -------------------------------------------------------

    def hold_stop(self) -> int:
        """In the main thread: raise nothing in the task until `release_stop`. In others nothing is raised ever."""
        if threading.get_ident() != self._main_thread:
            return 0
        held, self._interruptible = self._interruptible, 0
        return held

    def release_stop(self, held: int) -> None:
        """The end of `hold_stop`. Raises TaskCancelled where that came meanwhile."""
        if held:
            self._interruptible = held
            if self._stop_wanted == held:
                self._interruptible = 0
                raise context.TaskCancelled("the pool asked this task to stop")

    def write_events(self, least: int, build: Callable[[int], bytes]) -> bool:
        """While a task runs, under its sender's lock: write events without waiting. False: there is no room.

        Results of calls before it go first, so that the parent knows by then which task runs.
        """
        if self._held:
            if not self._link.write_if_room(self._held, self._held_results):
                return False
            self._emptied()
        return self._link.write_if_room(least, build)

    def _held_results(self, room: int) -> bytes:
        return bytes(self._page[OUTBOX_DATA : OUTBOX_DATA + self._held]) if self._held <= room else b""

    def send_output(self, task_id: int, descriptors: list[int]) -> None:
        """In the main thread, as a task begins: have the parent read what it writes to these pipes."""
        self._flush()
        self._link.send_descriptors(descriptors)
        self._link.write(encode(protocol.OUTPUT, task_id))

    def write_last(self, frame: bytes) -> None:
        """In the main thread: write events of a task that has ended."""
        self._flush()
        self._link.write([frame])

    # -- stopping ------------------------------------------------------------------------------------------------

    def on_stop_signal(self, signum: int, stack_frame: object) -> None:
        """In the main thread: raise in the task that is to stop, once, and never outside of its code."""
        if self._interruptible and self._interruptible == self._stop_wanted:
            self._interruptible = 0
            raise context.TaskCancelled("the pool asked this task to stop")

    def request_stop(self, task_id: int) -> None:
        """In the control thread: note the wish, and tell the parent that this process can react."""
        self._stop_wanted = task_id
        self._cancelled.set()
        self._link.write(encode(protocol.STOPPING, task_id))


def _describe(error: BaseException, skip: int = 0, where: str = "") -> tuple[protocol.Payload, Sequence[memoryview]]:
    """An error as (pickled exception or None, class name, text, traceback, why not pickled, where in the result).

    The parent can always rebuild the texts. `skip` leaves out the worker's own frames.
    """
    import traceback

    trace = error.__traceback__
    for _ in range(skip):
        trace = trace.tb_next if trace is not None and trace.tb_next is not None else trace
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except BaseException as failure:  # a user's __str__ may raise, or exit
        text = f"{type(error).__qualname__} (its traceback cannot be formatted: {type(failure).__name__})\n"
    try:
        message = str(error)
    except BaseException as failure:
        message = f"(its message cannot be made: {type(failure).__name__})"
    pickled, why = _pickle_error(error)
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    return protocol.dumps((pickled, name, message, text, why, where))


def _pickle_error(error: BaseException) -> tuple[bytes | None, str]:
    """The exception's pickle, tried out: one whose constructor cannot be replayed would fail only in the parent."""
    trace, cause, about = error.__traceback__, error.__cause__, error.__context__
    try:
        if _is_plain(error):
            return pickle.dumps(error, 5), ""  # cloudpickle would do the same, and have to be imported first, for 10 ms
        import cloudpickle

        pickled = cloudpickle.dumps(error)
        protocol.loads(pickled)
        return pickled, ""
    except BaseException as failure:
        return None, f"{type(failure).__name__}: {failure}"
    finally:
        error.__traceback__, error.__cause__, error.__context__ = trace, cause, about


def _is_plain(error: BaseException) -> bool:
    """Is it of a class that the parent has as well, and what it holds of simple types?"""
    own = error.__class__.__module__ in ("builtins", "agentpool_worker.context")
    return own and protocol.is_simple(error.args) and not error.__dict__


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except Exception:  # the task closed it, or put something else there: its own affair, and no reason to die
            continue


def _control_loop(worker: Worker, control: int, report: int, main_thread: int) -> None:
    """The second thread: sleeps until the parent wants something. End of file means that the parent is gone."""
    import faulthandler

    reader = FrameReader()
    with contextlib.suppress(ConnectionResetError):  # the parent is gone, and had not read all that we sent
        while reader.read_from(control):
            for frame in reader.frames():
                if frame.kind == protocol.STOP:
                    if frame.flags:
                        faulthandler.dump_traceback(report, all_threads=True)
                    worker.request_stop(frame.task_id)
                    signal.pthread_kill(main_thread, signal.SIGINT)
                elif frame.kind == protocol.TRIM:
                    worker.shared.trim()
    os.kill(os.getpid(), signal.SIGKILL)


def serve(worker_id: int, calls: int, results: int, control: int, report: int, arena: int = -1) -> None:
    """Be a worker on these descriptors; returns when the parent closed the pipe of calls.

    `report` is the file behind the page, `arena` that of large calls and results, if there is one. Must be called by
    the main thread of a process of its own.
    """
    import faulthandler
    import mmap

    page = mmap.mmap(report, PAGE_SIZE)
    os.lseek(report, protocol.REPORT, os.SEEK_SET)
    faulthandler.enable(report, all_threads=True)
    faulthandler.register(signal.SIGUSR1, report, all_threads=True, chain=False)
    link = PipeLink(calls, results, page, control)

    def after_fork() -> None:
        link.abandon(control)
        context._connect(None)  # what a task forks has no word: its events would be written into a file of its own

    worker = Worker(worker_id, link, page, arena)
    os.register_at_fork(before=worker.shared.keep, after_in_child=after_fork)
    signal.signal(signal.SIGINT, worker.on_stop_signal)
    # Not a `threading.Thread`: that waits until it runs, and whoever asks for a task's threads need not see it.
    _thread.start_new_thread(_control_loop, (worker, control, report, threading.get_ident()))
    worker.run()


def rehearse() -> None:
    """Be a worker of nobody for one call: what a forked process writes to is its own then, before somebody waits."""
    import mmap

    calls, their_calls = os.pipe()
    their_results, results = os.pipe()
    init = encode(protocol.INIT, 0, pickle.dumps((None, ()), 5))
    call = encode(protocol.CALL, 1, pickle.dumps((abs, (-1,), {}), 5))
    os.write(their_calls, b"".join((*init, *call)))
    os.close(their_calls)
    page = mmap.mmap(-1, PAGE_SIZE)
    Worker(0, PipeLink(calls, results, page), page).run()
    for descriptor in (calls, results, their_results):
        os.close(descriptor)


def finish() -> None:
    """End the process as a worker should: agents closed, exit handlers run, nothing of the parent's flushed twice."""
    import atexit

    base = sys.modules.get("agentpool_worker.agents.base")
    if base is not None:
        base.close_all()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._exit_function()
    atexit._run_exitfuncs()
    _flush_streams()
    os._exit(0)


def main(argv: list[str]) -> None:
    """A worker in a fresh interpreter; the words are its id and its descriptors, as `serve` takes them."""
    import marshal

    from agentpool_worker.authkey import set_authkey

    worker_id, calls, results, control, report, *arena = (int(word) for word in argv[1:])
    for descriptor in (calls, results, control, report, *arena):
        os.set_inheritable(descriptor, False)  # they came through the exec; what a task starts must not have them
    setup = marshal.loads(os.pread(report, protocol.PAGE_SIZE, protocol.REPORT))
    os.ftruncate(report, protocol.REPORT)
    sys.path[:] = setup["path"]
    sys.argv[:] = setup["argv"]
    set_authkey(setup["authkey"])
    for name in setup["preload"]:
        __import__(name)
    serve(worker_id, calls, results, control, report, *arena)
    finish()
