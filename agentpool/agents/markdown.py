"""Sub-agent files as Claude Code has them: a Markdown file whose front matter describes an agent, and whose body is
its system prompt.

Reads the files that it is told to, and nothing else. Needs PyYAML (`pip install 'agentpool-runtime[agents]'`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agentpool.agents.registry import AgentKind
from agentpool.errors import SettingsError

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["AgentFileError", "parse_agent", "read_agent", "read_directory"]

_FENCE: Final = "---"
#: Longer is no agent file but an accident.
_LARGEST: Final = 1024 * 1024
#: What Claude Code knows; everything else is kept in `AgentKind.extra` as well.
_LISTS: Final = ("tools", "disallowedTools", "skills")
_NAME: Final = re.compile(r"[^\s/\\]+")


class AgentFileError(SettingsError):
    """A sub-agent file cannot be understood. The message begins with file and line."""


def read_directory(
    directory: str | PathLike[str],
    *,
    program: str = "claude",
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[AgentKind]:
    """The kinds of all `*.md` files in a directory and below it, by file name; none where it does not exist.

    Two files of one name are an error. Everything else as in `read_agent`.
    """
    kinds: dict[str, AgentKind] = {}
    for path in sorted(Path(directory).rglob("*.md")):
        if not path.is_file():
            continue
        kind = read_agent(path, program=program, config=config, **settings)
        if kind.name in kinds:
            raise AgentFileError(f"{path}:1: the agent {kind.name!r} is in {kinds[kind.name].source} already")
        kinds[kind.name] = kind
    return list(kinds.values())


def read_agent(
    path: str | PathLike[str], *, program: str = "claude", config: Mapping[str, Any] | None = None, **settings: Any
) -> AgentKind:
    """The kind that one file describes, run by a stock agent program.

    config: keywords for the program, over those of the file. settings: fields of `AgentKind`.
    Raises AgentFileError, OSError, and ModuleNotFoundError where PyYAML is missing.
    """
    where = os.fspath(path)
    if os.path.getsize(where) > _LARGEST:
        raise AgentFileError(f"{where}:1: larger than {_LARGEST // 2**20} MB: no agent file")
    try:
        text = Path(where).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AgentFileError(f"{where}:1: not UTF-8 text: {error}") from None
    return parse_agent(text, where, program=program, config=config, **settings)


def parse_agent(
    text: str, source: str, *, program: str = "claude", config: Mapping[str, Any] | None = None, **settings: Any
) -> AgentKind:
    """As `read_agent`, from text; `source` is what errors call it."""
    matter, body, lines = _split(text, source)
    name = _required(matter, "name", source, lines)
    if not _NAME.fullmatch(name):
        raise AgentFileError(f"{source}:{lines.get('name', 1)}: the name {name!r} has blanks or slashes in it")
    description = _required(matter, "description", source, lines)
    for key in _LISTS:
        if key in matter:
            matter[key] = _words(matter[key], key, source, lines)
    return AgentKind(
        **{
            "name": name,
            "agent": program,
            "config": {**_config(name, matter, body, program), **(config or {})},
            "description": description,
            "source": source,
            "extra": {key: value for key, value in matter.items() if key not in ("name", "description")},
            **settings,
        }
    )


def _split(text: str, source: str) -> tuple[dict[str, Any], str, dict[str, int]]:
    """Front matter, body, and the line of each key."""
    rows = text.splitlines()
    if not rows or rows[0].rstrip() != _FENCE:
        raise AgentFileError(f"{source}:1: no front matter: the first line must be {_FENCE}")
    end = next((number for number, row in enumerate(rows[1:], 1) if row.rstrip() == _FENCE), None)
    if end is None:
        raise AgentFileError(f"{source}:{len(rows)}: the front matter has no end: a line {_FENCE} is missing")
    yaml = _yaml()
    head = "\n".join(rows[1:end])
    try:
        node = yaml.compose(head, Loader=yaml.SafeLoader)
        matter = yaml.safe_load(head)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 2 if mark is not None else 1
        problem = getattr(error, "problem", None) or str(error)
        hint = "; quote a text that has a colon in it" if "mapping values" in str(problem) else ""
        raise AgentFileError(f"{source}:{line}: the front matter is no YAML: {problem}{hint}") from None
    if not isinstance(matter, dict):
        raise AgentFileError(f"{source}:2: the front matter must be keys with values, such as name: and description:")
    lines = {str(key.value): key.start_mark.line + 2 for key, _ in node.value}
    return {str(key): value for key, value in matter.items()}, "\n".join(rows[end + 1 :]).strip(), lines


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "agent files need PyYAML, which is not installed: pip install 'agentpool-runtime[agents]'", name=error.name
        ) from error
    return yaml


def _required(matter: Mapping[str, Any], key: str, source: str, lines: Mapping[str, int]) -> str:
    value = matter.get(key)
    if value is None or value == "":
        raise AgentFileError(f"{source}:{lines.get(key, 1)}: the front matter has no {key}")
    if not isinstance(value, str):
        raise AgentFileError(f"{source}:{lines[key]}: {key} must be a text, got {value!r}; put it in quotes")
    return value.strip()


def _words(value: Any, key: str, source: str, lines: Mapping[str, int]) -> list[str]:
    """A list, or a text with commas in it; commas in parentheses belong to a tool: `Agent(one, two)`."""
    if isinstance(value, str):
        value = [word.strip() for word in re.split(r",(?![^(]*\))", value)]
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise AgentFileError(f"{source}:{lines[key]}: {key} must be names with commas between them, or a list of names")
    return [word for word in value if word]


def _config(name: str, matter: Mapping[str, Any], body: str, program: str) -> dict[str, Any]:
    """The keywords for the program. claude gets the whole definition, and reads it as it reads its own files."""
    if program == "claude":
        definition = {key: value for key, value in matter.items() if key != "name"}
        return {"agents": json.dumps({name: {**definition, "prompt": body}}, default=str), "agent": name}
    model = matter.get("model")
    # The short names are claude's own models.
    known = {} if model in (None, "inherit", "sonnet", "opus", "haiku") else {"model": model}
    return {"system_prompt": body or None, **known}
