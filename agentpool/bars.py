"""Progress bars that follow a task: of tqdm, or of rich. Both libraries are optional, and imported when used.

    with AgentPool() as pool:
        future = pool.submit(index, pages)
        tqdm_bar(future, desc="indexing", unit="page")
        future.result()

A bar follows the `Progress` events of its task. It is drawn by the thread of the pool that calls event callbacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentpool.events import Event, Progress

if TYPE_CHECKING:
    from concurrent.futures import Future

    import rich.progress

    from agentpool.futures import AgentFuture

__all__ = ["rich_bar", "tqdm_bar"]


def tqdm_bar(future: AgentFuture[Any], *, bar_class: Any = None, **options: Any) -> Any:
    """A `tqdm` that shows how far the task is, and is closed when it is over. Returns the bar.

    options: as `tqdm` takes them (`desc`, by default the task's name, `unit`, `position`, `leave`, ...). bar_class:
    another class than `tqdm.tqdm`, such as `tqdm.notebook.tqdm`. Raises ImportError where tqdm is not installed.
    """
    if bar_class is None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise _missing("tqdm", error) from error
        bar_class = tqdm
    options.setdefault("desc", _name(future))
    bar = bar_class(**options)

    def follow(event: Event) -> None:
        if isinstance(event, Progress):
            if event.total is not None:
                bar.total = event.total
            if event.message:
                bar.set_postfix_str(event.message, refresh=False)
            bar.update(event.done - bar.n)  # back to the start with a new attempt

    def close(_: Future[Any]) -> None:
        bar.close()

    future.add_event_callback(follow)
    future.add_done_callback(close)
    return bar


def rich_bar(
    future: AgentFuture[Any], progress: rich.progress.Progress | None = None, description: str | None = None
) -> rich.progress.Progress:
    """A bar in a `rich.progress.Progress` that shows how far the task is. Returns that.

    progress: one that you started, to which the bar is added; for several tasks give it to each. None: one is made and
    started for this task, and stopped when it is over. description: by default the task's name. A message of the task
    is shown behind it. Raises ImportError where rich is not installed.
    """
    try:
        from rich.markup import escape
        from rich.progress import Progress as RichProgress
    except ImportError as error:
        raise _missing("rich", error) from error
    name = escape(_name(future) if description is None else description)
    shown = RichProgress() if progress is None else progress
    bar = shown.add_task(name, total=None)
    if progress is None:
        shown.start()

    def follow(event: Event) -> None:
        if isinstance(event, Progress):
            words = f"{name}: {escape(event.message)}" if event.message else name
            shown.update(bar, completed=event.done, total=event.total, description=words)

    def end(_: Future[Any]) -> None:
        shown.stop_task(bar)
        if progress is None:
            shown.stop()

    future.add_event_callback(follow)
    future.add_done_callback(end)
    return shown


def _name(future: AgentFuture[Any]) -> str:
    return future.name or f"task {future.snapshot().task_id}"


def _missing(library: str, error: ImportError) -> ImportError:
    return ImportError(
        f"a progress bar of {library} needs {library}, which cannot be imported ({error}). Install it with the extra "
        f"`progress`: pip install 'agentpool-runtime[progress]'", name=library
    )
