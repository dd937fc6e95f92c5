"""`agentpool run`: any command line, once per argument, in pooled workers. The options, and how the parts are joined.

Main thread only. What the options mean to the pool is decided here; the loop is in `runner`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from agentpool.cli.config import BUDGET_OPTION, budget_to_join
from agentpool.cli.inputs import StreamSource, combine, open_sources, split_command_line
from agentpool.cli.joblog import JobLog, read_succeeded
from agentpool.cli.jobs import Job, make_jobs
from agentpool.cli.results import Printer
from agentpool.cli.runner import OUTSTANDING, Halt, Runner
from agentpool.cli.scratch import scratch_directory
from agentpool.cli.template import Template
from agentpool.cli.terminal import Interrupts, StatusLine, UsageProblem, message

if TYPE_CHECKING:
    import tenacity

    from agentpool.pool import AgentPool

__all__ = ["SETTINGS", "USAGE", "run"]

#: The words of COMMAND are not ours to read, wherever they stand.
SETTINGS: Final = {"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": False}
USAGE: Final = "[OPTIONS] [--] COMMAND [WORD]... [::: ARGUMENT...]..."


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The command line of `agentpool run`, as it was given."""

    words: Sequence[str]
    jobs: int
    timeout: float | None
    memory_limit: float | None
    retries: int
    job_log: str | None
    resume: bool
    keep_order: bool
    shell: bool
    json_lines: bool
    as_json: bool
    bar: bool
    halt: str
    files: Sequence[str]
    null: bool
    budget: bool | None


_Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Stop a job that runs longer; its exit value is -1.")
]
_MemoryLimit = Annotated[
    float | None,
    typer.Option(
        metavar="MB",
        help="Stop a job whose whole process tree uses more memory. The worker itself, about 15 MB, counts.",
    ),
]
_Retries = Annotated[
    int, typer.Option(min=0, metavar="N", help="Run a job that failed, for whatever reason, up to N times more.")
]
_JobLog = Annotated[
    str | None,
    typer.Option(
        "--joblog", metavar="FILE",
        help="Write a line for each ended job, in GNU parallel's format. The file starts anew, unless --resume is "
        "given or its name here begins with +.",
    ),
]
_Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Skip the jobs that succeeded by the job log. Failed, stopped and unfinished ones run again. A job is "
        "told by its number and its command.",
    ),
]
_KeepOrder = Annotated[
    bool, typer.Option("--keep-order", "-k", help="Show output in order of input, not as jobs end.")
]
_Shell = Annotated[
    bool, typer.Option("--shell", help="COMMAND is a line for /bin/sh, arguments quoted. Else there is no shell.")
]
_JsonLines = Annotated[
    bool, typer.Option("--jsonl", help="Each line of input is a JSON object; {name} in COMMAND is its field.")
]
_Bar = Annotated[
    bool, typer.Option("--bar", "--progress", help="Show progress, where standard error is a terminal.")
]
_Halt = Annotated[
    str, typer.Option(metavar="WHEN", help="End early: now|soon,fail|success|done=N, for example now,fail=1.")
]
_Files = Annotated[
    list[str] | None,
    typer.Option("--arg-file", "-a", metavar="FILE", help="Read arguments from lines of FILE; may be repeated."),
]


def run(
    context: typer.Context,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, metavar="N", help="Jobs that run at once.")] = 2,
    timeout: _Timeout = None,
    memory_limit: _MemoryLimit = None,
    retries: _Retries = 0,
    job_log: _JobLog = None,
    resume: _Resume = False,
    resume_failed: Annotated[bool, typer.Option("--resume-failed", help="GNU parallel's name for --resume.")] = False,
    keep_order: _KeepOrder = False,
    shell: _Shell = False,
    json_lines: _JsonLines = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each ended job.")] = False,
    bar: _Bar = False,
    halt: _Halt = "never",
    files: _Files = None,
    null: Annotated[bool, typer.Option("--null", "-0", help="Arguments end with a NUL, not with a newline.")] = False,
    budget: Annotated[bool | None, BUDGET_OPTION] = None,
) -> None:
    """Run a command line once per argument, in pooled workers."""
    options = RunOptions(
        words=context.args, jobs=jobs, timeout=timeout, memory_limit=memory_limit, retries=retries, job_log=job_log,
        resume=resume or resume_failed, keep_order=keep_order, shell=shell, json_lines=json_lines, as_json=as_json,
        bar=bar, halt=halt, files=files or [], null=null, budget=budget,
    )
    raise typer.Exit(run_jobs(options))


def run_jobs(options: RunOptions) -> int:
    """Runs the jobs; the exit code. Raises UsageProblem before anything has run."""
    command, groups = split_command_line(options.words)
    if options.resume and options.job_log is None:
        raise UsageProblem("--resume needs --joblog FILE: the log says what has succeeded")
    halt = Halt.parse(options.halt)
    # Checked before files are opened or standard input is touched.
    sources = len(options.files) + sum(len(values) if kind == "::::" else 1 for kind, values in groups) or 1
    if options.json_lines and sources > 1:
        raise UsageProblem("--jsonl takes one source of input")
    template = Template(command, sources=sources, fields=options.json_lines, shell=options.shell)
    jobs = _jobs(options, template, groups)
    with scratch_directory() as directory, _open_log(options) as log, Interrupts() as interrupts:
        status = StatusLine(sys.stderr, wanted=options.bar)
        with _make_pool(options) as pool:
            return Runner(
                pool,
                jobs,
                printer=Printer(status=status, keep_order=options.keep_order, as_json=options.as_json, log=log),
                interrupts=interrupts,
                directory=directory,
                halt=halt,
            ).run()


def _jobs(options: RunOptions, template: Template, groups: Sequence[tuple[str, list[str]]]) -> Iterator[Job]:
    sources = open_sources(options.files, groups, null=options.null)
    if any(isinstance(source, StreamSource) and source.fd == 0 for source in sources) and sys.stdin.isatty():
        message("reading arguments from the terminal, one a line; Ctrl-D ends them")
    done = _succeeded(options)
    return make_jobs(combine(sources), template, shell=options.shell, json_lines=options.json_lines, done=done)


def _log_path(options: RunOptions) -> str | None:
    return None if options.job_log is None else options.job_log.removeprefix("+")


def _succeeded(options: RunOptions) -> set[int]:
    path = _log_path(options)
    if path is None or not options.resume:
        return set()
    try:
        return read_succeeded(path)
    except OSError as error:
        raise UsageProblem(f"cannot read the job log {path}: {error.strerror}") from error


@contextmanager
def _open_log(options: RunOptions) -> Iterator[JobLog | None]:
    path = _log_path(options)
    if path is None or options.job_log is None:
        yield None
        return
    try:
        log = JobLog(path, append=options.resume or options.job_log.startswith("+"))
    except OSError as error:
        raise UsageProblem(f"cannot write the job log {path}: {error.strerror}") from error
    with closing(log):
        yield log


def _make_pool(options: RunOptions) -> AgentPool:
    from agentpool.pool import AgentPool

    # The limit for jobs is the limit for what a worker may keep, too: thresholds for the whole pool follow from it.
    # Without one there is nothing to derive them from: a command may be of any size, and the host's memory decides.
    budget = budget_to_join(options.budget, options.jobs, "-j")
    return AgentPool(
        max_workers=options.jobs,
        max_pending=OUTSTANDING,
        task_timeout=options.timeout,
        memory_limit_mb=options.memory_limit,
        hard_memory_limit_mb=options.memory_limit,
        retry=_retry_policy(options.retries),
        scope="pool" if budget is None else "host",
        budget=budget,
    )


def _retry_policy(retries: int) -> tenacity.Retrying | None:
    """Every failure counts: a failed start, a lost worker, a limit, and, as the agent then raises, an exit code."""
    if not retries:
        return None
    import tenacity

    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=tenacity.wait_exponential(multiplier=0.1, max=10.0) + tenacity.wait_random(0, 0.1),
        retry=tenacity.retry_if_exception(lambda error: not isinstance(error, CancelledError)),
    )
