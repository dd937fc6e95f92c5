"""Where the arguments come from: lists, files, descriptors; how they combine; and that a stream is read as needed."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpool.cli.inputs import ListSource, StreamSource, combine, open_sources, split_command_line
from agentpool.cli.terminal import UsageProblem


def test_the_command_ends_at_the_first_list() -> None:
    assert split_command_line(["echo", "-n", "{}"]) == (["echo", "-n", "{}"], [])
    assert split_command_line(["echo", ":::", "a", "--", "b", ":::", "c", "::::", "f"]) == (
        ["echo"],
        [(":::", ["a", "--", "b"]), (":::", ["c"]), ("::::", ["f"])],
    )


def test_linked_lists_are_refused_rather_than_taken_for_arguments() -> None:
    with pytest.raises(UsageProblem, match=r":::\+"):
        split_command_line(["echo", ":::", "a", ":::+", "b"])


def test_every_combination_with_the_last_source_fastest() -> None:
    sources = [ListSource(("a", "b")), ListSource(("1", "2"))]
    assert list(combine(sources)) == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert list(combine([ListSource(("a",)), ListSource(())])) == []


def read_all(data: bytes, separator: bytes = b"\n") -> list[str]:
    reading, writing = os.pipe()
    try:
        os.write(writing, data)  # less than a pipe holds
        os.close(writing)
        return list(StreamSource(reading, separator, "test"))
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    ("data", "records"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\n\nb", ["a", "", "b"]),
        (b" a \r\n", [" a \r"]),
        (b"\xff\n", ["\udcff"]),
    ],
)
def test_lines(data: bytes, records: list[str]) -> None:
    assert read_all(data) == records


def test_records_that_end_with_nul_may_have_newlines() -> None:
    assert read_all(b"a\nb\0c\0", b"\0") == ["a\nb", "c"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=50), max_size=40))
def test_lines_come_back_as_they_were(lines: list[str]) -> None:
    assert read_all("".join(f"{line}\n" for line in lines).encode()) == lines


def test_long_input_is_cut_right_at_the_edges_of_a_read(tmp_path: Path) -> None:
    lines = ["x" * (number * 7919 % 100_000) for number in range(60)]
    (tmp_path / "input").write_text("\n".join(lines))
    (source,) = open_sources([str(tmp_path / "input")], [], null=False)
    assert list(source) == lines
    assert isinstance(source, StreamSource)
    os.close(source.fd)


def test_the_first_source_is_read_as_needed() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as input_:
        input_.write(b"1\n2\n")
        pairs = combine([StreamSource(reading, b"\n", "test"), ListSource(("a", "b"))])
        # The stream has no end yet: reading on would block for ever.
        assert list(itertools.islice(pairs, 3)) == [("1", "a"), ("1", "b"), ("2", "a")]
        input_.write(b"3\n")
        assert list(itertools.islice(pairs, 2)) == [("2", "b"), ("3", "a")]
    os.close(reading)


def test_a_descriptor_that_does_not_block_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    pid = os.fork()
    if pid == 0:
        os.write(writing, b"late\n")
        os._exit(0)
    os.close(writing)
    assert list(StreamSource(reading, b"\n", "test")) == ["late"]
    os.waitpid(pid, 0)
    os.close(reading)


def test_a_line_without_end_is_refused_before_it_fills_the_memory() -> None:
    with open("/dev/zero", "rb") as zero, pytest.raises(UsageProblem, match="line longer than 64 MB"):
        list(StreamSource(zero.fileno(), b"\n", "zero"))


def test_sources_by_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("x\n")
    sources = open_sources([str(file)], [(":::", ["a"]), ("::::", [str(file), str(file)])], null=False)
    assert [list(source) for source in sources] == [["x"], ["a"], ["x"], ["x"]]
    for source in sources:
        if isinstance(source, StreamSource):
            os.close(source.fd)
    (only,) = open_sources([], [], null=True)
    assert only == StreamSource(0, b"\0", "standard input")


@pytest.mark.parametrize(
    ("files", "groups", "words"),
    [
        (["/nonexistent/file"], [], "cannot read /nonexistent/file: No such file"),
        ([], [("::::", [])], "needs the name of a file"),
        (["-", "-"], [], "only once"),
        (["-"], [("::::", ["-"])], "only once"),
    ],
)
def test_sources_that_cannot_be_had(files: list[str], groups: list[tuple[str, list[str]]], words: str) -> None:
    with pytest.raises(UsageProblem, match=words):
        open_sources(files, groups, null=False)
