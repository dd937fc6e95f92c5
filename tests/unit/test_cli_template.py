"""Placeholders of `agentpool run`; the expected values were taken from GNU parallel 20221122."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpool.cli.template import MissingField, Template
from agentpool.cli.terminal import UsageProblem


def filled(*words: str, values: tuple[str, ...] = ("a",), number: int = 1) -> list[str]:
    return Template(words, sources=len(values)).arguments(number, values)


@pytest.mark.parametrize(
    ("value", "no_extension", "last", "directory", "bare"),
    [
        ("/a/b/c.tar.gz", "/a/b/c.tar", "c.tar.gz", "/a/b", "c.tar"),
        ("/a/b/", "/a/b/", "", "/a", ""),
        (".bashrc", "", ".bashrc", ".", ""),
        ("a/.b", "a/", ".b", "a", ""),
        ("x", "x", "x", ".", "x"),
        ("/", "/", "", "/", ""),
        ("dir.d/file", "dir.d/file", "file", "dir.d", "file"),
        ("sp ace/f.x", "sp ace/f", "f.x", "sp ace", "f"),
        ("", "", "", ".", ""),
        ("line\nbreak.x\n", "line\nbreak", "line\nbreak.x\n", ".", "line\nbreak"),
    ],
)
def test_endings_change_the_value(value: str, no_extension: str, last: str, directory: str, bare: str) -> None:
    words = filled("{}", "{.}", "{/}", "{//}", "{/.}", values=(value,))
    assert words == [value, no_extension, last, directory, bare]


def test_without_a_placeholder_the_argument_is_appended() -> None:
    assert filled("echo", "-n") == ["echo", "-n", "a"]
    assert filled("echo", values=("a", "b")) == ["echo", "a", "b"]


def test_any_placeholder_means_that_nothing_is_appended() -> None:
    assert filled("echo", "{#}", number=7) == ["echo", "7"]
    assert filled("--in={}", "x") == ["--in=a", "x"]


def test_several_sources() -> None:
    assert filled("{}", "{1}", "{2}", "x{}y", "{-1}", "{2/}", values=("a", "c/d")) == [
        "a", "c/d", "a", "c/d", "xa c/dy", "c/d", "d",
    ]  # fmt: skip


def test_braces_that_mean_nothing_stay() -> None:
    words = ["awk", "{print $1}", "{name}", "{0}", "{ }"]
    assert filled(*words, "{}") == [*words, "a"]


def test_a_source_that_is_not_there_is_a_usage_problem() -> None:
    with pytest.raises(UsageProblem, match=r"\{3\} names input source 3, but there are only 2"):
        Template(["echo", "{3}"], sources=2)
    with pytest.raises(UsageProblem, match="only one"):
        Template(["echo", "{-2}"])


@pytest.mark.parametrize("words", [[], [""], ["", ""]])
def test_no_command_is_a_usage_problem(words: list[str]) -> None:
    with pytest.raises(UsageProblem, match="no command"):
        Template(words)


def test_fields_of_a_json_line() -> None:
    words = ["{url}", "{at.line}", "{path/.}", "n={n}", "{flag}", "{none}", "{list}", "{}", "{#}"]
    template = Template(words, fields=True)
    record = {"url": "a b", "at": {"line": 3}, "path": "d/f.py", "n": 1.5, "flag": True, "none": None, "list": [1, "ä"]}
    assert template.arguments(4, ("whole",), record) == [
        "a b", "3", "f", "n=1.5", "true", "null", '[1,"ä"]', "whole", "4",
    ]  # fmt: skip


@pytest.mark.parametrize("record", [{}, [], 3, None, {"a": 1}])
def test_a_missing_field_is_named(record: object) -> None:
    with pytest.raises(MissingField, match=r"no field 'a\.b'"):
        Template(["echo", "{a.b}"], fields=True).arguments(1, ("",), record)


def test_a_shell_line_quotes_values_and_nothing_else() -> None:
    template = Template(["echo", "{}", "|", "wc -c;", "echo {.}"], shell=True)
    assert template.shell_line(1, ("it's $(x).y",)) == """echo 'it'"'"'s $(x).y' | wc -c; echo 'it'"'"'s $(x)'"""
    assert Template(["ls"], shell=True).shell_line(1, ("a b",)) == "ls 'a b'"
    assert Template(["ls"], shell=True, sources=2).shell_line(1, ("a", "b c")) == "ls a 'b c'"


@given(st.text(st.characters(exclude_characters="{}"), min_size=1), st.text())
def test_a_value_is_one_argument_whatever_is_in_it(word: str, value: str) -> None:
    assert filled(word, "{}", values=(value,)) == [word, value]
    assert filled(word, "x{}", values=(value,)) == [word, f"x{value}"]


@given(st.text(st.characters(exclude_characters="\0")))
def test_a_quoted_value_is_one_word_of_the_shell_line(value: str) -> None:
    assert shlex.split(Template(["echo x{}"], shell=True).shell_line(1, (value,))) == ["echo", f"x{value}"]
