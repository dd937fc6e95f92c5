"""The agent command lines that are known: how each is found, called and read.

Data and pure functions, but for `find` and `version_of`, which look on this machine. Standard library only; runs in a
worker, and in the parent where a person asks what is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from agentpool_worker.agents.failures import AgentNotInstalledError
from agentpool_worker.agents.reading import Event, claude_events

__all__ = ["PRESETS", "Preset", "find", "version_of"]

_VERSION_SECONDS: Final = 30.0


class Preset(NamedTuple):
    """How one program is used.

    argv: the words after the program; `{prompt}` stands for the prompt, and where no word has it, the prompt goes to
    standard input. In a word of its own a prompt that begins with a dash would be an option.
    options: the words that an option of the agent becomes, `{}` being its value; an option that is not here is not
    known to the program. oldest: the oldest version that is known to work so. checked: the versions that this was
    checked with. natives: where, beside an npm wrapper, the native program is.
    error_pattern: in an answer, what tells that it is an error, of a program that ends with 0 all the same.
    """

    name: str
    program: str
    argv: tuple[str, ...]
    form: str
    rules: Mapping[str, str | tuple[str, ...]]
    oldest: tuple[int, ...]
    checked: str
    install: str
    options: Mapping[str, tuple[str, ...]]
    events: Callable[[dict[str, Any]], Iterator[Event]] | None = None
    natives: tuple[str, ...] = ()
    env: Mapping[str, str] = {}
    error_pattern: str = ""

    def says_error(self, answer: str) -> bool:
        """Is this answer an error that the program passes off as one? For programs that end with 0 all the same."""
        return bool(self.error_pattern) and re.search(self.error_pattern, answer) is not None


def _npm(package: str, program: str) -> tuple[str, ...]:
    """Where npm puts the package of a native program: beside the wrapper's link, below it, or beside its package."""
    return (f"../{package}/{program}", f"../node_modules/{package}/{program}",
            f"../../{package.rpartition('/')[2]}/{program}")


_CLAUDE_RULES: Final[dict[str, str | tuple[str, ...]]] = {
    "answer": "result [type=result]",
    "failed": "is_error [type=result]",
    "error": ("result [type=result is_error=True]", "errors.0 [type=result]"),
    "status": "api_error_status [type=result]",
    "cost_usd": "total_cost_usd [type=result]",
    "usage": "+usage [type=result]",
    "session_id": "session_id [type=result]",
    "turns": "+num_turns [type=result]",
    "stop_reason": ("subtype [type=result]", "terminal_reason [type=result]"),
    "model": "model [type=system subtype=init]",
}

PRESETS: Final[dict[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset(
            name="claude",
            program="claude",
            argv=("-p", "--output-format", "stream-json", "--verbose"),
            form="jsonl",
            rules=_CLAUDE_RULES,
            events=claude_events,
            oldest=(2, 0),
            checked="2.1.330",
            install="npm install -g @anthropic-ai/claude-code, or pip install claude-agent-sdk, which brings it along",
            options={
                "model": ("--model", "{}"),
                "system_prompt": ("--system-prompt", "{}"),
                "agents": ("--agents", "{}"),
                "agent": ("--agent", "{}"),
                "permission_mode": ("--permission-mode", "{}"),
                "tools": ("--tools", "{}"),
                "allowed_tools": ("--allowedTools", "{}"),
                "disallowed_tools": ("--disallowedTools", "{}"),
                "effort": ("--effort", "{}"),
                "max_budget_usd": ("--max-budget-usd", "{}"),
                "resume": ("--resume", "{}"),
            },
            natives=(
                "../@anthropic-ai/claude-code-linux-{arch}/claude",
                "../../claude-code-linux-{arch}/claude",
                "../lib/python{python}/site-packages/claude_agent_sdk/_bundled/claude",
            ),
            # Its own retries and ours multiply: it tries twice, the pool decides about more.
            env={"CLAUDE_CODE_MAX_RETRIES": "1", "DISABLE_AUTOUPDATER": "1"},
        ),
        Preset(
            name="codex",
            program="codex",
            argv=("exec", "--json", "--skip-git-repo-check", "-"),
            form="jsonl",
            rules={
                "answer": "item.text [type=item.completed item.type=agent_message]",
                "failed": "error [type=turn.failed]",
                "error": ("error.message [type=turn.failed]", "message [type=error]"),
                "usage": "usage [type=turn.completed]",
                "session_id": "thread_id [type=thread.started]",
                "text": "item.text [type=item.completed item.type=agent_message]",
                "tool_use": "item [type=item.started]",
                "retry": "message [type=error]",
            },
            oldest=(0, 40),
            checked="0.169.0",
            install="npm install -g @openai/codex",
            options={"model": ("-m", "{}"), "sandbox": ("-s", "{}"), "profile": ("-p", "{}")},
            natives=_npm("@openai/codex-linux-{arch}", "vendor/{machine}-unknown-linux-musl/bin/codex"),
        ),
        Preset(
            name="gemini",
            program="gemini",
            argv=("-o", "json"),
            form="json",
            rules={
                "answer": "response",
                "failed": "error",
                "error": "error.message",
                "status": "error.code",
                "usage": "stats.models",
                "session_id": "session_id",
            },
            oldest=(0, 20),
            checked="0.61.0",
            install="npm install -g @google/gemini-cli",
            options={"model": ("-m", "{}"), "approval_mode": ("--approval-mode", "{}")},
        ),
        Preset(
            name="copilot",
            program="copilot",
            argv=("-s",),
            form="text",
            rules={},
            oldest=(1, 0),
            checked="1.0.102",
            install="npm install -g @github/copilot",
            options={"model": ("--model", "{}"), "allow_all_tools": ("--allow-all-tools",)},
            natives=_npm("@github/copilot-linux-{arch}", "copilot"),
        ),
        Preset(
            name="opencode",
            program="opencode",
            argv=("run", "--format", "json"),
            form="jsonl",
            rules={
                "answer": "+part.text [type=text]",
                "failed": "error [type=error]",
                "error": ("error.name [type=error]", "message [type=error]", "error.data.message [type=error]"),
                "status": "error.data.statusCode [type=error]",
                "cost_usd": "+part.cost [type=step_finish]",
                "usage": "+part.tokens [type=step_finish]",
                "session_id": "sessionID",
                "text": "part.text [type=text]",
                "tool_use": "part [type=tool_use]",
            },
            oldest=(1, 0),
            checked="1.18.33",
            install="npm install -g opencode-ai",
            options={"model": ("-m", "{}"), "agent": ("--agent", "{}")},
            natives=_npm("opencode-linux-{arch}", "bin/opencode"),
        ),
        Preset(
            name="aider",
            program="aider",
            argv=("--message={prompt}", "--yes-always", "--no-git", "--no-pretty", "--no-stream",
                  "--no-check-update", "--no-show-release-notes", "--no-analytics"),
            form="text",
            rules={},
            oldest=(0, 80),
            error_pattern=r"(?m)^litellm\.\w*(Error|Exception)\b",
            checked="0.86.2",
            install="pip install aider-chat",
            options={"model": ("--model", "{}")},
        ),
        Preset(
            name="llm",
            program="llm",
            argv=("prompt", "--no-stream"),
            form="text",
            rules={},
            oldest=(0, 20),
            checked="0.36",
            install="pip install llm",
            options={"model": ("-m", "{}"), "system_prompt": ("-s", "{}")},
        ),
    )
}


def find(preset: Preset, command: str | None, path: str) -> str:
    """The program of a preset: `command` (a name or path) where it is given, else as `path` has it.

    Of an npm wrapper the native program beside it is taken: a wrapper that is killed leaves the agent running.
    Raises AgentNotInstalledError, which says how to install it.
    """
    import shutil

    wanted = command or preset.program
    found = shutil.which(wanted, path=path)
    if found is None:
        where = "" if command else " on PATH"
        raise AgentNotInstalledError(
            f"the agent {preset.name!r} needs the program {wanted!r}, which is not installed{where}: {preset.install}; "
            "or name it: command='/path/to/it'",
            program=preset.name,
        )
    return _native(preset, found) if command is None else found


def _native(preset: Preset, found: str) -> str:
    """The native program that belongs to what was found, if there is one."""
    import platform
    import sys

    machine = platform.machine()
    names = {
        "arch": {"x86_64": "x64", "aarch64": "arm64"}.get(machine, machine),
        "machine": machine,
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }
    real = os.path.realpath(found)
    try:
        with open(real, "rb") as file:
            if file.read(4) == b"\x7fELF":
                return real
    except OSError:  # it may be started and not read
        return found
    for folder in dict.fromkeys((os.path.dirname(found), os.path.dirname(real))):
        for native in preset.natives:
            candidate = os.path.normpath(os.path.join(folder, native.format_map(names)))
            if os.access(candidate, os.X_OK):
                return candidate
    return found


def version_of(preset: Preset, program: str, env: Mapping[str, str]) -> str:
    """The version that the program says of itself.

    Raises AgentNotInstalledError where it says none, or one that is too old for how it is called here.
    """
    try:
        ended = subprocess.run([program, "--version"], env=dict(env), stdin=subprocess.DEVNULL, capture_output=True,
                               timeout=_VERSION_SECONDS, start_new_session=True, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AgentNotInstalledError(f"{program} --version failed: {error}", program=preset.name) from error
    said = (ended.stdout + b"\n" + ended.stderr).decode("utf-8", "replace")
    number = re.search(r"\d+(?:\.\d+)+", said)
    if ended.returncode or number is None:
        raise AgentNotInstalledError(
            f"{program} --version ended with {ended.returncode} and names no version: {said.strip()[:300]!r}; is it "
            f"{preset.name}? {preset.install}",
            program=preset.name,
        )
    parts = tuple(int(part) for part in number[0].split("."))
    if parts < preset.oldest:
        raise AgentNotInstalledError(
            f"{program} is {preset.name} {number[0]}; agentpool needs {'.'.join(map(str, preset.oldest))} or later and "
            f"was checked with {preset.checked}: {preset.install}",
            program=preset.name,
        )
    return number[0]
