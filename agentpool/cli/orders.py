"""What orders a pool about: `recycle`, `kill`, `drain`, `pause`, `resume`, `resize`, `breaker`, `shutdown`.

Each asks the pool for one thing and says in a line what came of it. Waiting is done here, never in the pool.
"""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer

from agentpool.cli.reach import EXIT_CODES, Folder, Json, Pool, answer_no, print_json, reach
from agentpool.cli.tables import seconds_words
from agentpool.cli.terminal import UsageProblem, message
from agentpool.control.client import ControlClient
from agentpool.control.wire import ControlError
from agentpool_worker.agents.rendering import printable

__all__ = ["COMMANDS"]

_LOOK_SECONDS: Final = 0.2

Worker = Annotated[int, typer.Argument(metavar="WORKER", help="The worker's number, as `agentpool status` lists it.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it is done.")]
Timeout = Annotated[
    float | None, typer.Option(min=0, metavar="SECONDS", help="How long to wait at most; exit code 1 after that.")
]


class Action(enum.StrEnum):
    """What can be done about a breaker."""

    show = "show"
    open = "open"
    close = "close"
    reset = "reset"


@contextmanager
def _ordered(pool: str | None, place: str | None) -> Iterator[ControlClient]:
    """Connected to the pool that is meant. Whoever did not name one, and sees it, is told which one it is."""
    with reach(pool, place) as client:
        if pool is None and sys.stderr.isatty():
            who = client.hello["pool"]
            message(f"pool {printable(str(who['name']))} ({who['id']})")
        yield client


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _tell(as_json: bool, answer: dict[str, Any], words: str) -> None:
    if as_json:
        print_json(answer)
    else:
        print(words)


def recycle(
    worker: Annotated[
        int | None, typer.Argument(metavar="WORKER", help="Its number in `agentpool status`; none: every worker.")
    ] = None,
    pool: Pool = None, as_json: Json = False, place: Folder = None,
) -> None:
    """Replace a worker, or all, as soon as their tasks have ended. No work is lost."""
    with _ordered(pool, place) as client:
        answer = client.call("recycle", worker=worker)
    count = answer["recycled"]
    words = "1 worker goes as soon as its task has" if count == 1 else f"{count} workers go as soon as their tasks have"
    _tell(as_json, answer, f"{words} ended.")


def kill(
    worker: Worker,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="What its task's error says.")] = "killed by hand",
    pool: Pool = None, as_json: Json = False, place: Folder = None,
) -> None:
    """Kill a worker and all processes below it now. Its task fails, or runs again where it may; the pool goes on."""
    with _ordered(pool, place) as client:
        answer = client.call("kill", worker=worker, reason=reason)
    _tell(as_json, answer, f"Worker {worker} {'was killed' if answer['killed'] else 'is gone already'}.")
    answer_no(not answer["killed"])


def pause(pool: Pool = None, as_json: Json = False, place: Folder = None) -> None:
    """Begin no task until `agentpool resume`. Running tasks go on, new ones wait."""
    with _ordered(pool, place) as client:
        _tell(as_json, client.call("pause"), "Paused: nothing begins until `agentpool resume`.")


def resume(pool: Pool = None, as_json: Json = False, place: Folder = None) -> None:
    """End a pause or a drain."""
    with _ordered(pool, place) as client:
        _tell(as_json, client.call("resume"), "Resumed.")


def drain(
    timeout: Timeout = None,
    wait: Wait = True,
    pool: Pool = None, as_json: Json = False, place: Folder = None,
) -> None:
    """Have a pool refuse new tasks and finish what it accepted; wait for that. `agentpool resume` ends it."""
    with _ordered(pool, place) as client:
        left = client.call("drain")["unfinished"]
        if wait:
            left = _await(timeout, lambda: client.call("tasks", limit=1)["total"])
    words = "Drained: nothing is left." if not left else f"Draining: {_count(left, 'task')} not over yet."
    _tell(as_json, {"drained": not left, "unfinished": left}, words)
    answer_no(wait and left > 0)


def _await(timeout: float | None, count_left: Callable[[], int]) -> int:
    """Look until nothing is left, or the time is over; returns what is left."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while left := count_left():
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            break
        time.sleep(_LOOK_SECONDS if deadline is None else min(_LOOK_SECONDS, deadline - now))
    return left


def resize(
    workers: Annotated[int | None, typer.Argument(metavar="N", min=1, help="Worker processes at most.")] = None,
    concurrent: Annotated[int | None, typer.Option("--concurrent", "-c", min=1, metavar="N",
                                                   help="Tasks at once; follows N where it was never set.")] = None,
    pool: Pool = None, as_json: Json = False, place: Folder = None,
) -> None:
    """Change how many workers there may be, and how many tasks run at once. No task is stopped for it."""
    if workers is None and concurrent is None:
        raise UsageProblem("resize needs the number of workers, --concurrent N, or both")
    with _ordered(pool, place) as client:
        answer = client.call("resize", workers=workers, concurrent=concurrent)
    workers_words, tasks_words = _count(answer["max_workers"], "worker"), _count(answer["max_concurrent"], "task")
    _tell(as_json, answer, f"At most {workers_words}, {tasks_words} at once.")


def breaker(
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.show,
    ttl: Annotated[float | None, typer.Option(min=0.1, metavar="SECONDS",
                                              help="For how long; open: until reset. close needs it.")] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Shown as the reason, with open.")] = "opened by hand",
    pool: Pool = None, as_json: Json = False, place: Folder = None,
) -> None:
    """Show a pool's breaker, which forbids or allows to start workers, or force it.

    open: start no worker. close: start workers for --ttl seconds whatever fails, however little memory there is. reset:
    closed, and it judges by itself again.
    """
    if action is Action.close and ttl is None:
        raise UsageProblem("breaker close needs --ttl SECONDS, as it overrides the memory floor; to have the "
                           "breaker judge by itself again, say: agentpool breaker reset")
    if action in (Action.show, Action.reset) and ttl is not None:
        raise UsageProblem(f"breaker {action} knows no --ttl: that is for open and close")
    with _ordered(pool, place) as client:
        answer = client.call("breaker", action=action.value, ttl=ttl,
                             reason=reason if action is Action.open else None)
    left = answer["seconds_left"]
    words = "held closed" if answer["is_held_closed"] else answer["state"].replace("_", " ")
    words += "" if left is None else f" for {seconds_words(left)}"
    words += f": {answer['reason']}" if answer["reason"] else ""
    failures = f" ({answer['failure_count']} failed starts lately)" if answer["failure_count"] else ""
    _tell(as_json, answer, f"The breaker is {words}{failures}.")


def shutdown(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="What the tasks' errors and the log say.")] = "by hand",
    graceful: Annotated[bool, typer.Option("--graceful", help="Finish what was accepted first.")] = False,
    timeout: Timeout = None,
    wait: Wait = True,
    pool: Pool = None, as_json: Json = False, place: Folder = None,
) -> None:
    """Stop a pool at once: kill its workers, cancel what waits. --graceful: finish what was accepted first."""
    with _ordered(pool, place) as client:
        answer = client.call("shutdown", reason=None if graceful else reason, graceful=graceful)
        is_over = not wait or _await_end(client, timeout)
    if graceful:
        words = f"Shutting down: {_count(answer['unfinished'], 'task')} to finish first." if not wait else "Shut down."
    else:
        words = (f"Stopped: {_count(answer['workers_stopped'], 'worker')} killed, "
                 f"{_count(answer['tasks_stopped'], 'task')} stopped, {answer['tasks_cancelled']} cancelled.")
    _tell(as_json, answer | {"is_over": is_over and wait}, words if is_over else "It goes on shutting down.")
    answer_no(not is_over)


def _await_end(client: ControlClient, timeout: float | None) -> bool:
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        for _ in client.follow("watch", interval=_LOOK_SECONDS, seconds=10):
            if deadline is not None and time.monotonic() >= deadline:
                return False
    except ControlError as error:
        if error.code not in ("gone", "closed"):
            raise
    return True


def _examples(*lines: str) -> str:
    return f"{EXIT_CODES}\n\b\nExamples:\n" + "".join(f"  agentpool {line}\n" for line in lines)


#: name -> what it does, and the end of its help
COMMANDS: Final[dict[str, tuple[Callable[..., None], str]]] = {
    "recycle": (recycle, _examples("recycle 3", "recycle --pool reviews")),
    "kill": (kill, _examples("kill 3", "kill 3 --reason 'it fills the disk' --pool 4711")),
    "drain": (drain, _examples("drain", "drain --timeout 60 || agentpool shutdown --reason 'took too long'")),
    "pause": (pause, _examples("pause", "pause --pool reviews")),
    "resume": (resume, _examples("resume", "resume --pool reviews")),
    "resize": (resize, _examples("resize 8", "resize 8 --concurrent 2", "resize -c 1")),
    "breaker": (breaker, _examples("breaker", "breaker open --ttl 600 --reason 'the API is down'",
                                   "breaker close --ttl 60", "breaker reset")),
    "shutdown": (shutdown, _examples("shutdown --reason 'out of memory'", "shutdown --graceful --timeout 60")),
}
