"""The docs, held to the code: what they show is run, what they name exists, what they list is complete.

Every `python` block is a whole program that is run in a process of its own, and every `console` block is run by bash,
command by command (`$ `, continued by `> `). Where a `text` block follows a `python` block, and below each command of a
`console` block, stands what it prints, standard error included; `...` stands for anything, as in doctest. `sh` blocks
are not run (they install, or take long); the commands in them must exist all the same.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import agentpool
from agentpool import errors
from agentpool.cli.app import app
from agentpool.config import BreakerSettings, PoolSettings, TaskOptions
from agentpool.core import transitions

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RECORDS = sorted((DOCS / "decisions").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *RECORDS]
#: Pages without an example would mean that none was found.
SHOWING = {"README.md", "guide.md", "migration.md", "operations.md"}
#: Seconds for one example.
LIMIT = 60

OUTPUT_RULES = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page. `output` is the text block that follows it with nothing but blank lines between."""

    page: Path
    line: int
    language: str
    text: str
    output: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, body = match.groups()
        between = text[end : match.start()]
        if language == "text" and found and found[-1].language == "python" and not between.strip():
            found[-1] = dataclasses.replace(found[-1], output=body)
        else:
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, language, body))
        end = match.end()
    return found


def run_blocks(language: str) -> list[Any]:
    return [pytest.param(block, id=block.name) for page in PAGES for block in blocks(page)
            if block.language == language]


def prose_and_code(page: Path) -> Iterator[str]:
    """Every inline code span and every line of code: where commands and paths are named."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        yield from (line.removeprefix("$ ") for line in block.text.splitlines())
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks))


def environment() -> dict[str, str]:
    """`python` and `agentpool` are this environment's; nothing of the outer run's settings gets in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_", "PYTHONWARN"))}
    programs = os.path.dirname(sys.executable)
    return kept | {"PATH": f"{programs}{os.pathsep}{kept.get('PATH', os.defpath)}", "COLUMNS": "100", "TERM": "dumb"}


def execute(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    # Its pools are found by its commands, and no others are: this user may have some.
    own = {"XDG_RUNTIME_DIR": str(folder), "AGENTPOOL_CONTROL_DIR": str(folder / "agentpool")}
    ended = subprocess.run(command, cwd=folder, env=environment() | own, stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    return ended.returncode, ended.stdout


def assert_prints(expected: str, printed: str, name: str) -> None:
    if not doctest.OutputChecker().check_output(expected, printed, OUTPUT_RULES):
        pytest.fail(f"{name} prints\n\n{printed}\nand the page says\n\n{expected}", pytrace=False)


# -- what is shown is run --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("block", run_blocks("python"))
def test_a_program_of_the_docs_runs_and_prints_what_they_say(block: Block, tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(block.text, encoding="utf-8")
    code, printed = execute([sys.executable, str(program)], tmp_path)
    assert code == 0, f"{block.name} ended with {code}\n{printed}"
    assert_prints(block.output or "", printed, block.name)


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("block", run_blocks("console"))
def test_a_session_of_the_docs_runs_and_prints_what_they_say(block: Block, tmp_path: Path) -> None:
    sessions = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not sessions[0].strip(), f"{block.name} does not begin with a command"
    for session in sessions[1:]:
        first, *rest = session.splitlines(keepends=True)
        more = list(itertools.takewhile(lambda line: line.startswith("> "), rest))
        command = first + "".join(line.removeprefix("> ") for line in more)
        _, printed = execute(["bash", "-c", command], tmp_path)
        assert_prints("".join(rest[len(more) :]), printed, f"{block.name}: {command}")


def test_there_are_examples() -> None:
    """Of which the tests above would not miss any if none were found."""
    assert {page.name for page in PAGES for block in blocks(page) if block.language == "python"} >= SHOWING
    assert any(block.language == "console" for page in PAGES for block in blocks(page))
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {"python", "console", "text", "sh", "mermaid", "json", "toml"}, "a block in an unknown language"


def test_the_readmes_first_example_is_short() -> None:
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len(first.text.splitlines()) <= 12


# -- what is named exists --------------------------------------------------------------------------------------------


def make_targets() -> set[str]:
    (line,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return set(line.split())


def words_after(program: str, text: str) -> list[list[str]]:
    """The arguments of each call of `program` in a line of code: at its start, or behind a pipe or a `$(`."""
    return [_split(rest) for rest in re.findall(rf"(?:^|[|;&(] *|/){program} +([^|;&]*)", text)]


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # a quote that the next line closes
        return text.split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    named = {word for text in prose_and_code(page) for words in words_after("make", text)
             for word in words if re.fullmatch(r"[a-z0-9]+", word)}
    assert named <= make_targets()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for text in prose_and_code(page):
        for words in words_after("agentpool", text):
            if words[0] in ("--version", "--help", "-h", "--install-completion"):
                continue
            assert words[0] in commands, f"{page.name}: {text}"
            known = {"-h", "--help"} | {name for parameter in commands[words[0]].params
                                           for name in (*parameter.opts, *parameter.secondary_opts)}
            ours = words[1 : words.index("--")] if "--" in words else words[1:]
            options = {word.partition("=")[0] for word in ours if re.match(r"--?[a-z0]", word)}
            assert options <= known, f"{page.name}: {text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_files_that_are_named_exist(page: Path) -> None:
    text = "\n".join(prose_and_code(page))
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module
    named = re.findall(r"(?<![\w/.])((?:agentpool|workers|tests|docs|stress)/[\w./-]*\w)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    """`tests/unit/test_it.py::test_name`, or `::TestClass`: also a method, so that classes need not be named."""
    missing = [f"{path}::{name}" for path, name in named_tests(page)
               if not (ROOT / path).exists() or name not in definitions(ROOT / path)]
    assert not missing, f"{page.name} names {missing}"


def named_tests(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8"))


@functools.cache
def definitions(file: Path) -> frozenset[str]:
    """What a test file defines that pytest runs: test functions and methods, and classes."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return frozenset(node.name for node in nodes if isinstance(node, ast.ClassDef) or
                     (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")))


def test_each_row_of_the_table_of_faults_names_a_test() -> None:
    page = DOCS / "reliability.md"
    _, *sections = re.split(r"^\| fault \| promise \| test \|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(sections) >= 6
    for section in sections:
        rows = list(itertools.takewhile(lambda line: line.startswith("|"), section.strip().splitlines()))[1:]
        assert rows
        for row in rows:
            assert re.search(r"`tests/[\w/]+\.py::\w+`", row.strip("|").split("|")[2]), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    without_blocks = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_blocks, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# -- what is listed is complete --------------------------------------------------------------------------------------


def reference() -> str:
    return (DOCS / "reference.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of the reference."""
    _, found, rest = reference().partition(f"\n{heading}\n")
    assert found, f"no heading {heading!r}"
    rows = []
    for line in rest.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
        assert not line.startswith("#"), f"no table below {heading!r}"
    return rows[2:]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    ("heading", "cls"),
    [("## Settings", PoolSettings), ("## Breaker settings", BreakerSettings), ("## Task options", TaskOptions)],
)
def test_every_setting_is_listed_with_its_default(heading: str, cls: type[Any]) -> None:
    listed = {named(row[0])[0]: named(row[1])[0] for row in table(heading)}
    defaults = {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}
    assert list(listed) == list(defaults)
    for name, text in listed.items():
        value = BreakerSettings() if text == "BreakerSettings()" else ast.literal_eval(text)
        assert value == defaults[name], name


def test_every_error_is_listed_with_what_else_it_is() -> None:
    listed = {named(row[0])[0]: set(named(row[1])) for row in table("## Errors")}
    classes = {name: getattr(errors, name) for name in errors.__all__}
    assert set(listed) == set(classes)
    for name, cls in classes.items():
        assert listed[name] == {base.__name__ for base in cls.__bases__ if base is not Exception}, name


def test_every_public_name_is_listed() -> None:
    listed = {name for row in table("## Public names") for name in named(row[0])}
    errors_listed = {named(row[0])[0] for row in table("## Errors")}
    assert set(agentpool.__all__) <= listed | errors_listed
    assert all(hasattr(agentpool, name) for name in listed)


REPORTS = """
import json
from agentpool import AgentPool, get_resource_monitor
with AgentPool() as pool:
    pool.submit(abs, 1).result()
    stats, health = pool.get_pool_stats(), get_resource_monitor().get_health_report()
print(json.dumps([stats, health]))
"""


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a report as the reference writes them: `a.b`, `workers[].id`."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield f"{prefix}{name}"
            yield from keys(part, f"{prefix}{name}.")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            yield from keys(part, f"{prefix[:-1]}[].")


@pytest.mark.usefixtures("no_leaks")
def test_every_key_of_the_reports_is_listed(tmp_path: Path) -> None:
    program = tmp_path / "reports.py"
    program.write_text(REPORTS, encoding="utf-8")
    code, printed = execute([sys.executable, str(program)], tmp_path)
    assert code == 0, printed
    stats, health = json.loads(printed.splitlines()[-1])
    for heading, report in (("## Pool statistics", stats), ("## Health report", health)):
        listed = {name for row in table(heading) for name in named(row[0])}
        # `a.*` stands for everything below `a`: what is not always there, or has a table of its own.
        open_ended = tuple(name.removesuffix("*") for name in listed if name.endswith(".*"))
        listed = {name for name in listed if not name.endswith(".*")}
        real = set(keys(report))
        unlisted = {name for name in real - listed if not name.startswith(open_ended)}
        assert not unlisted, f"{heading}: there, and not listed"
        assert listed <= real, f"{heading}: listed, and not there"


BEGIN, END = "<!-- transitions: begin -->", "<!-- transitions: end -->"


def with_diagrams(page: str) -> str:
    """The page with the diagrams as `python -m agentpool.core.transitions` prints them."""
    ended = subprocess.run([sys.executable, "-m", "agentpool.core.transitions"], capture_output=True, text=True,
                           check=True, timeout=LIMIT)
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{ended.stdout.strip()}\n{END}{after}"


def test_the_diagrams_are_those_of_the_tables() -> None:
    assert reference() == with_diagrams(reference()), f"run: python {Path(__file__).relative_to(ROOT)}"
    assert reference().count("```mermaid") == 3
    for states in (transitions.TaskState, transitions.WorkerState, transitions.BreakerState):
        assert all(f"    {state.name} --> " in reference() for state in states)


def test_the_diagrams_can_be_drawn() -> None:
    """mermaid ends a label at a semicolon or colon, and takes what follows for something else."""
    labels = [label for block in blocks(DOCS / "reference.md") if block.language == "mermaid"
              for label in re.findall(r" --> \w+: (.*)$", block.text, re.MULTILINE)]
    assert labels
    assert not [label for label in labels if re.search("[;:]", label)]


# -- the decisions ---------------------------------------------------------------------------------------------------


def test_decisions_are_numbered_short_and_in_one_form() -> None:
    numbers = [record.name.partition("-")[0] for record in RECORDS]
    assert all(re.fullmatch(r"\d{4}", number) for number in numbers)
    assert len(set(numbers)) == len(numbers), "a number names one decision; there may be gaps"
    for record in RECORDS:
        text = record.read_text(encoding="utf-8")
        assert text.startswith(f"# {record.name[:4]}: "), record.name
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequence"], record.name
        assert len(text.splitlines()) < 30, record.name


def test_every_decision_is_in_the_index() -> None:
    assert list(re.findall(r"\(decisions/([^)]+)\)", reference())) == [record.name for record in RECORDS]


if __name__ == "__main__":
    (DOCS / "reference.md").write_text(with_diagrams(reference()), encoding="utf-8")
