"""Shell lines made from accepted templates, run by a real shell: a value never becomes a command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agentpool.cli.template import Template
from agentpool.cli.terminal import UsageProblem

FRAGMENTS = [
    "echo ", "{}", "{}", "{}", "'", '"', "$(true ", ")", "`", "\\", " # ", "#", "\n", "; ", " ", "a b", "$", "<<EOF",
    "<", "(", " && ", "{", "}", "${x:-", "$((1", "))", "|cat", "case x in x) echo ", ";; esac",
]  # fmt: skip
VALUES = [
    "$(touch canary)",
    "`touch canary`", "; touch canary;", "\ntouch canary\n", "'; touch canary; '", '"; touch canary; "',
    "\\'; touch canary; #", ") ; touch canary; (", "EOF\ntouch canary\n", "x\n$(touch canary)\nEOF\n", "| touch canary",
    "&& touch canary", "\\", "'", '"', "}; touch canary; {", ";; x) touch canary;; ",
]  # fmt: skip


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), min_size=2, max_size=8), value=st.sampled_from(VALUES))
def test_no_accepted_template_lets_a_value_run(fragments: list[str], value: str, tmp_path: Path) -> None:
    assume("{}" in fragments and fragments[0] != "{}")
    try:
        template = Template(["echo " + "".join(fragments)], shell=True)
    except UsageProblem:
        assume(False)
    line = template.shell_line(1, (value,))
    subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    canary = tmp_path / "canary"
    has_run = canary.exists()
    canary.unlink(missing_ok=True)  # or the next example would be blamed
    assert not has_run, line
