"""What one job of `agentpool run` is, and how the jobs are made one after the other from the input. Pure but for input.

Used by the reading thread.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from agentpool.cli.joblog import completion_key
from agentpool.cli.template import MissingField, Template

__all__ = ["Job", "make_jobs"]


@dataclass(frozen=True, slots=True)
class Job:
    """One command to run.

    number: from 1, by input. position: from 0, among those that run (what a resume skipped does not count).
    argv: what to start, or None: `line` goes to a shell. problem: why it cannot be run, in words.
    """

    number: int
    position: int
    arguments: tuple[str, ...]
    argv: tuple[str, ...] | None
    line: str
    problem: str | None = None


def make_jobs(
    inputs: Iterable[tuple[str, ...]],
    template: Template,
    *,
    shell: bool = False,
    json_lines: bool = False,
    done: AbstractSet[int] = frozenset(),
) -> Iterator[Job]:
    """The jobs, in order of input, made as they are asked for. `done` are the keys of those to skip.

    A line that is no JSON, or lacks a field, becomes a job with a `problem`: the others run all the same.
    """
    number = position = 0
    for arguments in inputs:
        if json_lines and not arguments[0].strip():
            continue
        number += 1
        job = _make(number, position, arguments, template, shell, json_lines)
        if done and completion_key(number, job.line) in done:
            continue
        position += 1
        yield job


def _make(
    number: int, position: int, arguments: tuple[str, ...], template: Template, shell: bool, json_lines: bool
) -> Job:
    record: object = None
    try:
        if json_lines:
            record = json.loads(arguments[0])
        if shell:
            return Job(number, position, arguments, None, template.shell_line(number, arguments, record))
        argv = template.arguments(number, arguments, record)
    except (ValueError, RecursionError) as error:
        return Job(number, position, arguments, None, template.text, f"input is not JSON: {error}")
    except MissingField as error:
        return Job(number, position, arguments, None, template.text, f"input has {error.args[0]}")
    return Job(number, position, arguments, tuple(argv), shlex.join(argv))
