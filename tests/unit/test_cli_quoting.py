"""Which places of a shell line are safe for a value. That none of the accepted ones lets a value run is tested with a
real shell in tests/integration/test_cli_quoting.py."""

from __future__ import annotations

import pytest

from agentpool.cli.quoting import unsafe_place

SLOT = object()


def place(line: str) -> str | None:
    parts: list[object] = []
    for piece in line.split("{}"):
        parts += [piece, SLOT]
    return unsafe_place(parts[:-1])


@pytest.mark.parametrize(
    "line",
    [
        "echo {}",
        "{}",
        "echo x{}y {} | sort > {}.out",
        "echo 'quoted' \"too\" {}",
        "echo 'it'\\''s' {}",
        'echo "a \\" b" {}',
        'echo "$(basename {})"',
        "(cd /; ls {})",
        "case x in a) echo {};; esac",
        "echo $((1 << 2)) {}",
        "echo a#b {}",
        "echo x # comment\necho {}",
        "echo `date` {}",
        "echo \\\\{}",
        'echo "$HOME" "$(echo "x" "y")" {}',
    ],
)
def test_safe(line: str) -> None:
    assert place(line) is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("echo '{}'", "inside single quotes"),
        ('echo "{}"', "inside double quotes"),
        ("sh -c 'echo {}'", "inside single quotes"),
        ('echo "$(echo "{}")"', "inside double quotes"),
        ("echo `echo {}`", "inside backticks"),
        ('echo "`echo {}`"', "inside backticks"),
        ("echo `echo $(echo {})`", "inside backticks"),
        ("echo \\{}", "after a backslash"),
        ("echo ${}", "after a dollar sign"),
        ("echo x # {}", "in a comment"),
        ("# {}", "in a comment"),
        ("(# {}\n)", "in a comment"),
        ("echo $((1 + {}))", "inside ((...))"),
        ("cat <<EOF\n{}\nEOF", "here-document"),
        ("cat <<EOF; echo {}\nEOF", "here-document"),
        ("echo {} \"{}\"", "inside double quotes"),
    ],
)
def test_unsafe(line: str, words: str) -> None:
    assert words in str(place(line))
