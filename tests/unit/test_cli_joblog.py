"""The job log: GNU parallel's format, appended whole, and what a resume reads from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentpool.cli.joblog import HEADER, JobLog, LogLine, completion_key, read_succeeded
from agentpool.cli.jobs import make_jobs
from agentpool.cli.template import Template


def line(number: int, *, exit_value: int = 0, signal: int = 0, command: str = "echo a") -> LogLine:
    return LogLine(number, 1795415470.6801, 0.0061, 2, exit_value, signal, command)


def write(path: Path, *lines: LogLine, append: bool = True) -> None:
    log = JobLog(str(path), append=append)
    for each in lines:
        log.write(each)
    log.close()


def test_the_format_is_gnu_parallels(tmp_path: Path) -> None:
    write(tmp_path / "log", line(1, exit_value=-1, signal=15, command="sleep '5\tx'\n"))
    # As GNU parallel 20221122 wrote it, a newline in the command as NUL.
    assert (tmp_path / "log").read_text() == (
        "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n"
        "1\t:\t1795415470.680\t     0.006\t0\t2\t-1\t15\tsleep '5\tx'\0\n"
    )


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = JobLog(str(tmp_path / "log"), append=False)
    assert (tmp_path / "log").read_text() == HEADER
    log.write(line(1))
    assert (tmp_path / "log").read_text() == HEADER + str(line(1))
    log.close()


def test_a_log_starts_anew_unless_it_is_appended_to(tmp_path: Path) -> None:
    write(tmp_path / "log", line(1))
    write(tmp_path / "log", line(2), append=True)
    assert (tmp_path / "log").read_text() == HEADER + str(line(1)) + str(line(2))
    write(tmp_path / "log", line(3), append=False)
    assert (tmp_path / "log").read_text() == HEADER + str(line(3))


def test_a_torn_last_line_is_closed_before_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(HEADER + str(line(1)) + "2\t:\t17954")
    write(tmp_path / "log", line(2))
    assert read_succeeded(str(tmp_path / "log")) == {completion_key(1, "echo a"), completion_key(2, "echo a")}


@pytest.mark.parametrize(
    ("failed", "command"),
    [({"exit_value": 1}, "x"), ({"signal": 9}, "x"), ({"exit_value": -1, "signal": 15}, "x"), ({}, "another")],
)
def test_only_what_ended_well_has_succeeded(tmp_path: Path, failed: dict[str, int], command: str) -> None:
    write(tmp_path / "log", line(1, command="x"), line(2, command=command, **failed))
    done = read_succeeded(str(tmp_path / "log"))
    assert completion_key(1, "x") in done
    assert completion_key(2, "x") not in done


def test_the_last_time_counts(tmp_path: Path) -> None:
    write(tmp_path / "log", line(1), line(1, exit_value=1), line(2, exit_value=1), line(2))
    assert read_succeeded(str(tmp_path / "log")) == {completion_key(2, "echo a")}


def test_what_is_no_whole_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("no log\n\n1\t:\n" + str(line(3))[:-1])
    assert read_succeeded(str(tmp_path / "log")) == set()
    assert read_succeeded(str(tmp_path / "missing")) == set()


@pytest.mark.parametrize("command", ["a\nb", "tab\there", "\udcff", "carriage\rreturn", "ä\u2028b"])
def test_any_command_is_found_again(tmp_path: Path, command: str) -> None:
    write(tmp_path / "log", line(1, command=command))
    assert read_succeeded(str(tmp_path / "log")) == {completion_key(1, command)}


def test_jobs_that_succeeded_are_skipped_and_keep_their_number() -> None:
    template = Template(["echo", "{#}", "{}"])
    done = {completion_key(2, "echo 2 b")}
    jobs = list(make_jobs([("a",), ("b",), ("c",)], template, done=done))
    assert [(job.number, job.position, job.argv) for job in jobs] == [
        (1, 0, ("echo", "1", "a")),
        (3, 1, ("echo", "3", "c")),
    ]


def test_a_line_that_cannot_become_a_job_is_one_with_a_problem() -> None:
    template = Template(["echo", "{name}"], fields=True)
    lines = ['{"name": "a"}', "", "{broken", '{"other": 1}', "[" * 100_000, "3"]
    jobs = list(make_jobs([(text,) for text in lines], template, json_lines=True))
    assert [job.number for job in jobs] == [1, 2, 3, 4, 5]  # an empty line is none
    assert jobs[0].argv == ("echo", "a")
    assert jobs[0].problem is None
    assert all(job.argv is None and job.problem for job in jobs[1:])
    assert "not JSON" in str(jobs[1].problem)
    assert "no field 'name'" in str(jobs[2].problem)
