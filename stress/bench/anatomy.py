"""Where each microsecond of a short task goes: the steps of one no-op, each measured alone, in this process.

    python -m stress.bench.anatomy            # a table
    python -m stress.bench.anatomy --json     # the same for machines

The steps are the real functions of agentpool, called in loops as a full queue makes them: calls and results travel 64
at a time. What only the whole has (the garbage collector, other threads' turns, waking up) is in no step: the sum is
what is left when all else is perfect. `python -m stress.bench --cases noop` measures the whole.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from agentpool import submitting as facade
from agentpool.config import MB, PoolSettings
from agentpool.core import actions as act
from agentpool.core.records import HostState, TaskRecord, TaskSpec
from agentpool.core.scheduler import Scheduler
from agentpool.futures import AgentFuture
from agentpool.io.channel import Channel
from agentpool.runtime.outcomes import Encoded
from agentpool_worker import protocol
from agentpool_worker.main import Worker
from stress.bench.tasks import noop

#: Calls that travel together.
BATCH = 64
ROUNDS = 300
REPEATS = 5

PAYLOAD = protocol.call_by_name(protocol.reference(noop), (), {})
VALUE = pickle.dumps(None, 5)
SPEC = TaskSpec()


def per_call(step: Callable[[], object], calls: int = BATCH) -> float:
    """Microseconds for each of the `calls` that one `step` makes; the best of several runs, as noise only adds."""
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(ROUNDS):
            step()
        best = min(best, time.perf_counter() - began)
    return best / ROUNDS / calls * 1e6


def repeat(what: Callable[[], object]) -> Callable[[], None]:
    """`what` as often as a batch has calls."""

    def step() -> None:
        for _ in range(BATCH):
            what()

    return step


# -- the parent ------------------------------------------------------------------------------------------------------


def settling() -> Callable[[], None]:
    encoded = Encoded(VALUE, ())

    def step() -> None:
        for _ in range(BATCH):
            AgentFuture(None, PAYLOAD, ()).settle(True, encoded)

    return step


def reading() -> Callable[[], None]:
    def step() -> None:
        for _ in range(BATCH):
            future: AgentFuture[None] = AgentFuture(None, PAYLOAD, ())
            future.settle(True, Encoded(VALUE, ()))
            future.result()

    return step


def deciding() -> Callable[[], None]:
    """A core with one worker, which accepts, places and ends 64 tasks a step."""
    core = Scheduler(PoolSettings.make(1), seed=1)
    clock = [0.0]

    def perform() -> None:
        for action in core.take_actions(clock[0]):
            if isinstance(action, act.SampleHost):
                core.host_sampled(clock[0], HostState(64 * 1024 * MB, 32 * 1024 * MB))
            elif isinstance(action, act.Spawn):
                core.worker_ready(clock[0], action.worker, 1, 20 * MB)

    core.submit(0.0, TaskRecord(0, SPEC, None, "noop"))
    for _ in range(3):
        perform()
    (worker,) = core.workers.values()

    def step() -> None:
        for number in range(BATCH):
            core.submit(clock[0], TaskRecord(number, SPEC, None, "noop"), is_one_of_many=True)
        perform()
        while worker.running is not None:
            for _ in range(1 + len(worker.backlog)):
                clock[0] += 1e-6
                core.task_finished(clock[0], worker, worker.running, True, None, 1e-6, 0)
            perform()

    return step


def sending() -> Iterator[Callable[[], None]]:
    """64 calls into a real pipe, which is emptied."""
    channel = Channel()
    read_end = channel.worker_fds()[0]

    def step() -> None:
        for number in range(BATCH):
            channel.queue_call(number, PAYLOAD, ())
        channel.flush()
        os.read(read_end, 1 << 16)

    yield step
    channel.close()


def receiving() -> Callable[[], None]:
    reader = protocol.FrameReader()
    data = b"".join(bytes(part) for n in range(BATCH) for part in protocol.encode(protocol.VALUE, n, VALUE, x=3))

    def step() -> None:
        reader.feed(data)
        for _, _, _, _, _, _, payload, buffers in reader.frames():
            Encoded(payload, buffers)

    return step


# -- the worker ------------------------------------------------------------------------------------------------------


class Nowhere:
    """A link that has all calls and drops all results."""

    streams_from = None

    def read_calls(self, reader: protocol.FrameReader) -> int:
        return 0

    def write(self, parts: list[Any]) -> None:
        return

    def write_if_room(self, least: int, build: Callable[[int], bytes]) -> bool:
        return bool(build(least))

    def send_descriptors(self, descriptors: list[int]) -> None:
        return


def serving() -> Callable[[], None]:
    import resource

    worker = Worker(1, Nowhere(), bytearray(protocol.PAGE_SIZE))
    worker._getrusage = resource.getrusage
    frames = [protocol.Frame(protocol.CALL, 0, number + 1, number, 0, 0, PAYLOAD, ()) for number in range(BATCH)]

    def step() -> None:
        for frame in frames:
            worker._serve(frame)
        worker._flush()

    return step


def loading() -> Callable[[], None]:
    load = protocol.CallLoader().load
    return repeat(lambda: load(PAYLOAD, ()))


# -- the floor -------------------------------------------------------------------------------------------------------


def one_future() -> None:
    future: Future[None] = Future()
    future.set_result(None)
    future.result()


def piping() -> Iterator[Callable[[], None]]:
    read_end, write_end = os.pipe()
    data = bytes(64)

    def step() -> None:
        for _ in range(BATCH):
            os.write(write_end, data)
            os.read(read_end, 1 << 12)

    yield step
    os.close(read_end)
    os.close(write_end)


def polling() -> Iterator[Callable[[], None]]:
    read_end, write_end = os.pipe()
    epoll = select.epoll()
    epoll.register(read_end, select.EPOLLIN)
    os.write(write_end, b"x")
    yield repeat(lambda: epoll.poll(0))
    epoll.close()
    os.close(read_end)
    os.close(write_end)


def measure() -> list[tuple[str, str, float]]:
    """(where, step, microseconds)"""
    inbox: deque[object] = deque()
    lock = threading.Lock()
    call: tuple[Any, ...] = (noop, (), {})
    pickled = pickle.dumps(call, 5)

    def locking() -> None:
        with lock:
            pass

    gc.collect()
    gc.disable()
    try:
        settled = per_call(settling())
        made = per_call(repeat(lambda: AgentFuture(None, PAYLOAD, ())))
        recorded = per_call(repeat(lambda: TaskRecord(1, SPEC, None, "noop")))
        (sent,) = (per_call(step) for step in sending())
        (piped,) = (per_call(step) for step in piping())
        (polled,) = (per_call(step) for step in polling())
        parsed = per_call(receiving())
        return [
            ("caller", "the call as bytes, its function by name", per_call(repeat(lambda: facade._serialize(*call)))),
            ("caller", "the future", made),
            ("caller", "the task's record", recorded),
            ("caller", "into the inbox", per_call(repeat(lambda: inbox.append(None)))),
            ("caller", "result(): rebuilt", per_call(reading()) - settled),
            ("manager", "the core: accept, place, end", per_call(deciding()) - recorded),
            ("manager", "calls into the pipe", sent),
            ("manager", "results from bytes", parsed),
            ("manager", "futures settled", settled - made),
            ("worker", "a call, whole", per_call(serving())),
            ("worker", "of it: the function and its arguments", per_call(loading())),
            ("worker", "of it: the result as bytes", per_call(repeat(lambda: protocol.dumps(None)))),
            ("floor", "a Future of concurrent.futures: made, set, read", per_call(repeat(one_future))),
            ("floor", "pickle of the call", per_call(repeat(lambda: pickle.dumps(call, 5)))),
            ("floor", "unpickling it", per_call(repeat(lambda: pickle.loads(pickled)))),
            ("floor", "one write to a pipe and one read", piped),
            ("floor", "a lock taken and released", per_call(repeat(locking))),
            ("floor", "a look at epoll", polled),
        ]
    finally:
        gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stress.bench.anatomy", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    steps = measure()
    if options.json:
        print(json.dumps([{"where": where, "step": step, "us": round(us, 3)} for where, step, us in steps], indent=1))
        return
    print("| where | step | us |\n|---|---|---|")
    for where, step, us in steps:
        print(f"| {where} | {step} | {us:.2f} |")
    for where in ("caller", "manager"):
        print(f"| {where} | together | {sum(us for place, _, us in steps if place == where):.2f} |")


if __name__ == "__main__":
    main()
