"""The screen of `agentpool top`. Imports textual.

A thread follows the pool and hands each snapshot to the screen; orders go over a connection of their own, each in a
thread, so that a pool that does not answer holds up nothing here. What a pool says of memory may be a minute old for an
idle worker: trees are measured here, from this process, with each snapshot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Final

import psutil
from rich.text import Text
from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, DataTable, Footer, Label, Sparkline, Static

from agentpool.cli.budget_view import budget_line, budget_of, share_words
from agentpool.cli.tables import mb_words, seconds_words, state_style
from agentpool.config import MB
from agentpool.control.client import ControlClient
from agentpool.control.wire import ControlError
from agentpool.io.sampler import TreeSampler
from agentpool_worker.agents.rendering import printable

__all__ = ["PoolScreen"]

_BARS: Final = " ▁▂▃▄▅▆▇█"
_HISTORY: Final = 60
_TREND: Final = 16
_COLUMNS: Final = ("WORKER", "PID", "STATE", "MEMORY", "TREND", "CPU", "PROCS", "DONE", "FOR", "TASK")
_RIGHT: Final = frozenset({"WORKER", "PID", "MEMORY", "CPU", "PROCS", "DONE", "FOR"})


class Meter:
    """Memory and CPU of one worker's tree, as this process measures them. The following thread's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._sampler = TreeSampler(pid)
        self._previous: tuple[float, float] | None = None
        self.history: deque[float] = deque(maxlen=_HISTORY)

    def read(self, told_mb: float) -> tuple[float, float | None]:
        """MB, and percent of a processor since the last look. Where it cannot be measured: what the pool told."""
        try:
            reading = self._sampler.read()
        except psutil.AccessDenied:
            reading = None
        if reading is None:  # gone, or in another container
            self.history.append(told_mb)
            return told_mb, None
        now, memory_mb = time.monotonic(), reading.rss_bytes / MB
        self.history.append(memory_mb)
        previous, self._previous = self._previous, (now, reading.cpu_seconds)
        if previous is None or now <= previous[0]:
            return memory_mb, None
        return memory_mb, max(0.0, 100 * (reading.cpu_seconds - previous[1]) / (now - previous[0]))


def trend(values: deque[float]) -> str:
    """The last values as bars; the tallest is the largest of all that are remembered."""
    most = max(values, default=0.0)
    if most <= 0:
        return ""
    return "".join(_BARS[1 + round(value / most * (len(_BARS) - 2))] for value in list(values)[-_TREND:])


class Told(Message):
    """Something that another thread has to show."""

    def __init__(self, show: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.show = show
        self.arguments = arguments


class Question(ModalScreen[bool]):
    """Something that cannot be undone: is it meant?"""

    DEFAULT_CSS = """
    Question { align: center middle; }
    Question > Vertical { width: 64; height: auto; border: thick $error; background: $surface; padding: 1 2; }
    Question Label { width: 100%; }
    Question Horizontal { height: auto; align: center middle; margin-top: 1; }
    Question Button { margin: 0 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"), Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Label(self._question, markup=False)
            with Horizontal():
                yield Button("Yes (y)", variant="error", id="yes")
                yield Button("No (n)", variant="primary", id="no")

    def on_mount(self) -> None:
        self.query_one("#no", Button).focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)


class PoolScreen(App[None]):
    """One pool, looked at again and again."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #summary { height: auto; padding: 0 1; }
    #memory { height: 2; margin: 0 1 1 1; }
    #workers { height: 1fr; }
    #ended { display: none; background: $error; color: $text; text-align: center; height: 1; }
    #ended.is-shown { display: block; }
    #said { height: 1; padding: 0 1; color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "recycle", "Recycle"),
        Binding("k", "kill", "Kill"),
        Binding("p", "pause", "Pause/resume"),
        Binding("d", "drain", "Drain"),
        Binding("b", "breaker", "Breaker"),
        Binding("x", "shutdown", "Stop pool"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, path: str, interval: float = 1.0) -> None:
        super().__init__()
        self._path = path
        self._interval = interval
        self._client: ControlClient | None = None
        self._meters: dict[int, Meter] = {}
        self._total_mb: deque[float] = deque(maxlen=_HISTORY)
        self._stats: dict[str, Any] = {}
        self.has_ended = False

    def compose(self) -> ComposeResult:
        yield Static(id="summary", markup=False)
        yield Sparkline([0.0], summary_function=max, id="memory")
        table: DataTable[Text] = DataTable(id="workers", cursor_type="row", zebra_stripes=True)
        yield table
        yield Static("The pool ended. What is shown is how it was; q leaves.", id="ended", markup=False)
        yield Static(id="said", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        table = self._table()
        for title in _COLUMNS:
            table.add_column(Text(title, justify="right" if title in _RIGHT else "left"), key=title,
                             width=_TREND if title == "TREND" else None)
        table.focus()
        self.run_worker(self._follow, thread=True, name="follow")

    def on_unmount(self) -> None:
        if self._client is not None:
            self._client.close()

    def _table(self) -> DataTable[Text]:
        return self.query_one("#workers", DataTable)

    # -- the following thread ------------------------------------------------------------------------------------

    def _follow(self) -> None:
        reason = "it was shut down"
        try:
            self._client = client = ControlClient(self._path)
            for snapshot in client.follow("watch", interval=self._interval, seconds=self._interval + 10):
                self._measure(snapshot)
                self._hand(self.show, client.hello["pool"], snapshot)
        except ControlError as error:
            reason = str(error)
        self._hand(self.end, reason)

    def _hand(self, show: Callable[..., None], *arguments: Any) -> None:
        """From any thread, without waiting: the screen may be ending, and waits for this thread then."""
        self.post_message(Told(show, arguments))

    @on(Told)
    def _told(self, message: Told) -> None:
        message.show(*message.arguments)

    def _measure(self, snapshot: dict[str, Any]) -> None:
        """Put this process's own readings in."""
        workers = snapshot["stats"]["workers"]
        present = {worker["id"]: worker for worker in workers if worker["pid"]}
        for gone in self._meters.keys() - present.keys():
            del self._meters[gone]
        for number, worker in present.items():
            if number not in self._meters:
                self._meters[number] = Meter(worker["pid"])
            worker["memory_mb"], worker["cpu_percent"] = self._meters[number].read(worker["memory_mb"])
            worker["trend"] = trend(self._meters[number].history)
        snapshot["stats"]["memory_mb"] = sum(worker["memory_mb"] for worker in workers)
        snapshot["budget"] = budget_of(snapshot["stats"])

    # -- showing -------------------------------------------------------------------------------------------------

    def show(self, pool: dict[str, Any], snapshot: dict[str, Any]) -> None:
        """A new snapshot has come."""
        stats = snapshot["stats"]
        self._stats = stats
        self._total_mb.append(stats["memory_mb"])
        self.query_one("#memory", Sparkline).data = list(self._total_mb)
        self.query_one("#summary", Static).update(_summary(pool, snapshot))
        table = self._table()
        rows = {str(worker["id"]): _row(worker) for worker in stats["workers"]}
        for key in [key.value for key in table.rows if key.value not in rows]:
            table.remove_row(str(key))
        for name, row in rows.items():
            if name in table.rows:
                for title, cell in zip(_COLUMNS, row, strict=True):
                    table.update_cell(name, title, cell)
            else:
                table.add_row(*row, key=name)

    def end(self, reason: str) -> None:
        """The pool is gone, or does not answer."""
        self.has_ended = True
        said = self.query_one("#ended", Static)
        said.update(f"The pool ended ({reason}). What is shown is how it was; q leaves.")
        said.add_class("is-shown")

    def _say(self, words: str) -> None:
        self.query_one("#said", Static).update(words)

    # -- orders --------------------------------------------------------------------------------------------------

    def _chosen(self) -> dict[str, Any] | None:
        """The worker under the cursor."""
        if self._is_over():
            return None
        table = self._table()
        if not table.row_count:
            self._say("There is no worker to choose.")
            return None
        key = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
        return next((worker for worker in self._stats["workers"] if str(worker["id"]) == key), None)

    def _is_over(self) -> bool:
        if self.has_ended:
            self._say("The pool ended: there is nobody to tell.")
        return self.has_ended

    def _order(self, verb: str, words: str, **arguments: Any) -> None:
        if not self._is_over():
            self.run_worker(lambda: self._send(verb, words, arguments), thread=True, group="orders")

    def _send(self, verb: str, words: str, arguments: dict[str, Any]) -> None:
        try:
            with ControlClient(self._path) as client:
                client.call(verb, **arguments)
        except ControlError as error:
            words = str(error)
        self._hand(self._say, words)

    def _ask(self, question: str, verb: str, words: str, **arguments: Any) -> None:
        if self._is_over():
            return

        def answered(is_meant: bool | None) -> None:
            if is_meant:
                self._order(verb, words, **arguments)
            else:
                self._say("Nothing was done.")

        self.push_screen(Question(question), answered)

    def action_recycle(self) -> None:
        """Replace the chosen worker when its task has ended."""
        if worker := self._chosen():
            self._order("recycle", f"Worker {worker['id']} is replaced when its task has ended.", worker=worker["id"])

    def action_kill(self) -> None:
        """Kill the chosen worker."""
        if worker := self._chosen():
            task = f" Its task fails: {printable(worker['task'])}." if worker["task"] else ""
            self._ask(f"Kill worker {worker['id']} (pid {worker['pid']}) and all below it?{task}", "kill",
                      f"Worker {worker['id']} was killed.", worker=worker["id"], reason="killed from agentpool top")

    def action_pause(self) -> None:
        """Pause, or resume after a pause or drain."""
        if self._stats.get("is_paused") or self._stats.get("is_draining"):
            self._order("resume", "Resumed.")
        else:
            self._order("pause", "Paused: nothing begins until p is pressed again.")

    def action_drain(self) -> None:
        """Refuse new tasks."""
        self._ask("Drain the pool? Whoever submits to it gets an error until it is resumed (p).", "drain",
                  "Draining: what was accepted is finished, nothing new is taken.")

    def action_breaker(self) -> None:
        """Force the breaker open, or reset it."""
        if self._stats.get("circuit_breaker", {}).get("state", "closed") == "closed":
            self._ask("Force the breaker open? No worker is started until it is reset (b).", "breaker",
                      "The breaker is forced open.", action="open", reason="forced open from agentpool top")
        else:
            self._order("breaker", "The breaker was reset.", action="reset")

    def action_shutdown(self) -> None:
        """The emergency stop."""
        self._ask("Stop the pool? Its workers are killed, what waits is cancelled.", "shutdown",
                  "The pool was stopped.", reason="stopped from agentpool top")


def _summary(pool: dict[str, Any], snapshot: dict[str, Any]) -> Text:
    stats, breaker, budget = snapshot["stats"], snapshot["breaker"], snapshot["budget"]
    counters = stats["counters"]
    left = "" if breaker["seconds_left"] is None else f" for {seconds_words(breaker['seconds_left'])}"
    text = Text.assemble(
        (printable(str(pool["name"])), "bold"), f"  {pool['id']}  up {seconds_words(stats['uptime_seconds'])}  ",
        (stats["status"], state_style(stats["status"])), "  breaker ",
        ("held closed" if breaker["is_held_closed"] else breaker["state"], state_style(breaker["state"])), left,
        f"\nworkers {stats['total_agents']}/{stats['max_pool_size']}  running {stats['running']}/"
        f"{stats['max_concurrent']}  queued {stats['queue_length']}  retrying {stats['waiting_to_retry']}  done "
        f"{counters['completed']}  failed {counters['failed']}  memory {mb_words(stats['memory_mb'])}",
    )
    if budget is not None:
        text.append(f"\n{share_words(stats['host_budget'])}\n{budget_line(budget)}")
    for reason in stats["reasons"]:
        text.append(f"\n! {printable(reason)}", "yellow")
    return text


def _row(worker: dict[str, Any]) -> list[Text]:
    cpu = worker.get("cpu_percent")
    cells = {
        "WORKER": worker["id"], "PID": worker["pid"] or "-", "STATE": worker["status"],
        "MEMORY": mb_words(worker["memory_mb"]), "TREND": worker.get("trend", ""),
        "CPU": "-" if cpu is None else f"{cpu:.0f} %", "PROCS": worker["processes"], "DONE": worker["tasks_done"],
        "FOR": seconds_words(worker["task_seconds"] or worker["idle_seconds"]),
        "TASK": worker["task"] or worker["leaves_because"] or "-",
    }
    return [Text(printable(str(cells[title])), style=state_style(str(cells[title])) if title == "STATE" else "",
                 justify="right" if title in _RIGHT else "left") for title in _COLUMNS]
