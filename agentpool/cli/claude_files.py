"""What `agentpool install-claude` puts into Claude Code's files, and how it finds it again.

Makes texts from texts: nothing here reads or writes a file. What is ours is known by the name of the hook's program, by
the name of the MCP server, and by the marks around the instructions.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any, Final

from agentpool.cli import json_edit
from agentpool.cli.terminal import UsageProblem

__all__ = ["HOOK", "SERVER", "Commands", "joined", "with_hook", "with_instructions", "with_server", "without_hook",
           "without_instructions", "without_server"]

#: The tool is called Agent today, and was called Task.
MATCHER: Final = "Task|Agent"
SERVER: Final = "agentpool"
HOOK: Final = "agentpool-hook"
#: A part of each command that is our hook.
_HOOK_NAMES: Final = (HOOK, "agentpool_worker/hook.py")
_BEGIN: Final = "<!-- agentpool: begin -->"
_END: Final = "<!-- agentpool: end -->"

_INSTRUCTIONS: Final = """\
## Delegating work

Agents share this machine's memory. A program called agentpool counts them, and may refuse a new one.

- Before you start several sub-agents, call the tool `pool_status` of the MCP server `agentpool`. Start no more at once
  than the budget has free.
- When a sub-agent is denied, the reason says why: the budget is spent, or a circuit breaker is open. Do not start it
  again at once, and do not work around it with other tools. Do the work yourself, or go on with something else and
  try again when another agent has ended.
- Reviews, performance checks and generated tests of Python code need no sub-agent: `run_agents` of the MCP server
  `agentpool` runs them in pooled processes, as many at once as the budget allows, and waits for its turn by itself.
- Give each agent a task of its own, with all it needs to know. Collect what they found before you start more.
"""

_AGENT_FILE: Final = """\
---
name: agentpool-orchestrator
description: Splits a large task into parts for several agents and runs no more of them at once than this machine's budget allows. Use it for work that needs more than two agents.
---

You split a task into parts, delegate them, and put the results together.

"""  # noqa: E501  a line of front matter cannot be broken


@dataclass(frozen=True, slots=True)
class Commands:
    """The programs that Claude Code is to start: the hook's command line, and the MCP server's words."""

    hook: str
    server: tuple[str, ...]
    is_closed: bool


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise UsageProblem(f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageProblem("it is not a JSON object")
    return found


def _hook_places(found: dict[str, Any]) -> list[tuple[int, int]]:
    """Group and position of each of our hooks. Raises UsageProblem where `hooks` has another form."""
    hooks = found.get("hooks", {})
    groups = hooks.get("PreToolUse", []) if isinstance(hooks, dict) else None
    if not isinstance(groups, list):
        raise UsageProblem("its hooks have a form that is not known")
    return [
        (number, position) for number, group in enumerate(groups) if isinstance(group, dict)
        for position, hook in enumerate(group.get("hooks") or []) if isinstance(hook, dict)
        if any(name in str(hook.get("command", "")) for name in _HOOK_NAMES)
    ]


def with_hook(text: str, commands: Commands) -> str:
    """Settings with the hook in them, once."""
    hook: dict[str, Any] = {"type": "command", "command": commands.hook, "timeout": 5}
    if commands.is_closed:
        hook["onFailure"] = "block"
    found = _parsed(text)
    places = _hook_places(found)
    if not places:
        end = len(found.get("hooks", {}).get("PreToolUse", []))
        group = {"matcher": MATCHER, "hooks": [hook]}
        return json_edit.set_value(text, ["hooks", "PreToolUse", end], group)
    (number, position), *others = places
    if found["hooks"]["PreToolUse"][number]["hooks"][position] != hook:
        text = json_edit.set_value(text, ["hooks", "PreToolUse", number, "hooks", position], hook)
    return without_hook(text, keep=(number, position)) if others else text


def without_hook(text: str, keep: tuple[int, int] | None = None) -> str:
    """Settings without the hook; what it was alone in goes with it."""
    for number, position in reversed(_hook_places(_parsed(text))):
        if (number, position) == keep:
            continue
        text = json_edit.remove(text, ["hooks", "PreToolUse", number, "hooks", position])
        paths: list[list[str | int]] = [["hooks", "PreToolUse", number], ["hooks", "PreToolUse"], ["hooks"]]
        for path in paths:
            inner: Any = _parsed(text)
            for part in [*path, "hooks"] if len(path) == 3 else path:
                inner = inner[part]
            if inner:
                break
            text = json_edit.remove(text, path)
    return text


def with_server(text: str, commands: Commands) -> str:
    """The list of MCP servers with ours in it."""
    program, *words = commands.server
    entry = {"type": "stdio", "command": program, "args": words}
    servers = _parsed(text).get("mcpServers", {})
    if not isinstance(servers, dict):
        raise UsageProblem("its mcpServers have a form that is not known")
    return text if servers.get(SERVER) == entry else json_edit.set_value(text, ["mcpServers", SERVER], entry)


def without_server(text: str) -> str:
    """The list of MCP servers without ours."""
    servers = _parsed(text).get("mcpServers")
    if not isinstance(servers, dict) or SERVER not in servers:
        return text
    return json_edit.remove(text, ["mcpServers", SERVER] if len(servers) > 1 else ["mcpServers"])


def with_instructions(text: str, commands: Commands) -> str:
    """An orchestrator's instructions with ours in them: in place of an older version, else at the end."""
    block = f"{_BEGIN}\n{_INSTRUCTIONS}{_END}\n"
    if not text.strip():
        return _AGENT_FILE + block
    if _BEGIN in text and _END in text:
        head, _, rest = text.partition(_BEGIN)
        return head + block + rest.partition(_END)[2].removeprefix("\n")
    return f"{text}{'' if text.endswith(chr(10)) else chr(10)}\n{block}"


def without_instructions(text: str) -> str:
    """Those without ours; "" where there was nothing else."""
    if _BEGIN not in text or _END not in text:
        return text
    head, _, rest = text.partition(_BEGIN)
    rest = rest.partition(_END)[2].removeprefix("\n")
    if head == _AGENT_FILE and not rest:
        return ""
    return head.removesuffix("\n") + rest if not rest else head + rest


def joined(words: list[str]) -> str:
    """A command line for the shell that Claude Code starts it with."""
    return shlex.join(words)
