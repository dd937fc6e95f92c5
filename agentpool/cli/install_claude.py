"""`agentpool install-claude` and `uninstall-claude`: hook, MCP server and instructions in Claude Code's files.

Shows what changes, then writes: each file whole or not at all, with a copy of what was there before. Nothing is written
where one of the files cannot be understood. Main thread only.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import mkstemp
from typing import Annotated, Any, Final

import typer

from agentpool.cli import claude_files
from agentpool.cli.claude_files import HOOK, SERVER, Commands
from agentpool.cli.config import Configuration, read_configuration
from agentpool.cli.mcp import NEEDED, can_serve
from agentpool.cli.reach import Folder
from agentpool.cli.terminal import UsageProblem, message

__all__ = ["install_claude", "uninstall_claude"]

#: Beside each file that was changed: what it was before.
BACKUP: Final = ".before-agentpool"
_NOT_WRITTEN: Final = 1

_PROJECT = typer.Option("--project/--user", help="This project's files, or those of all your projects.")
_YES = typer.Option("--yes", "-y", help="Write without asking.")
_DRY = typer.Option("--dry-run", help="Show what would change, and write nothing.")
_NAMED = typer.Option("--orchestrator", metavar="FILE", help="The orchestrator's instructions that had ours added.")
_ORCHESTRATOR = typer.Option(
    "--orchestrator", metavar="FILE",
    help="Your own orchestrator's instructions, to which ours are added. Without it an agent of its own is made: "
    "agentpool-orchestrator.",
)


@dataclass(frozen=True, slots=True)
class Change:
    """A file, what is in it, and what shall be. None: there is no such file."""

    path: Path
    old: str | None
    new: str | None
    #: to be kept beside it
    backup: str | None = None


@dataclass(frozen=True, slots=True)
class _Target:
    path: Path
    add: Callable[..., str]
    take: Callable[[str], str]


def install_claude(
    project: Annotated[bool, _PROJECT] = True,
    orchestrator: Annotated[str | None, _ORCHESTRATOR] = None,
    on_failure: Annotated[
        str | None,
        typer.Option(
            metavar="allow|deny", help="What the hook answers where it cannot tell.  [default: as configured]"
        ),
    ] = None,
    place: Folder = None,
    yes: Annotated[bool, _YES] = False,
    dry_run: Annotated[bool, _DRY] = False,
) -> None:
    """Have Claude Code ask agentpool before it starts a sub-agent, and give it agentpool's tools."""
    if on_failure not in (None, "allow", "deny"):
        raise UsageProblem(f"--on-failure must be allow or deny, got {on_failure!r}")
    found = read_configuration()
    commands = _commands(found, on_failure or found.hook_policy, place)
    changes = [_installed(target, commands) for target in _targets(project, orchestrator)]
    code = _carry_out(changes, yes=yes, dry_run=dry_run, done="installed")
    if code == 0 and not can_serve():
        message(f"the hook works as it is; {NEEDED}")
    raise typer.Exit(code)


def uninstall_claude(
    project: Annotated[bool, _PROJECT] = True,
    orchestrator: Annotated[str | None, _NAMED] = None,
    yes: Annotated[bool, _YES] = False,
    dry_run: Annotated[bool, _DRY] = False,
) -> None:
    """Take all that out again: files are as they were, save for what others changed since."""
    changes = [_restored(target) for target in _targets(project, orchestrator)]
    raise typer.Exit(_carry_out(changes, yes=yes, dry_run=dry_run, done="removed"))


# --- what ------------------------------------------------------------------------------------------------------------


def _targets(is_project: bool, orchestrator: str | None) -> Sequence[_Target]:
    if is_project:
        settings = Path.cwd() / ".claude"
        servers = Path.cwd() / ".mcp.json"
    else:
        named = os.environ.get("CLAUDE_CONFIG_DIR", "")
        settings = Path(named) if named else Path.home() / ".claude"
        servers = Path(named) / ".claude.json" if named else Path.home() / ".claude.json"
    agent = Path(orchestrator).absolute() if orchestrator else settings / "agents" / "agentpool-orchestrator.md"
    if orchestrator and not agent.is_file():
        raise UsageProblem(f"--orchestrator {orchestrator}: there is no such file")
    return (
        _Target(settings / "settings.json", claude_files.with_hook, claude_files.without_hook),
        _Target(servers, claude_files.with_server, claude_files.without_server),
        _Target(agent, claude_files.with_instructions, claude_files.without_instructions),
    )


def _commands(found: Configuration, policy: str, place: str | None) -> Commands:
    import agentpool_worker.hook

    words = ["--on-failure", policy] if policy != "allow" else []
    directory = found.values["budget.directory"].value
    if directory:
        words += ["--budget-directory", str(directory)]
    control = ["--control-dir", os.path.abspath(place)] if place else []
    # By whole paths: Claude Code's PATH may be another one. The script agentpool-hook would take half as long again.
    program = [sys.executable, "-IS", str(agentpool_worker.hook.__file__)]
    command = Path(sys.executable).with_name("agentpool")
    server = [str(command)] if command.exists() else [sys.executable, "-m", "agentpool"]
    return Commands(claude_files.joined([*program, *words, *control]), (*server, "mcp", *control), policy == "deny")


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")  # with its line ends as they are
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageProblem(f"{path} cannot be read: {error}") from error


def _edited(text: str, edit: Callable[[str], str]) -> str:
    """By an `edit` that knows one kind of line ends: those of DOS stay what they are."""
    if 0 < text.count("\n") == text.count("\r\n"):
        return edit(text.replace("\r\n", "\n")).replace("\n", "\r\n")
    return edit(text)


def _change(path: Path, edit: Callable[[str], str]) -> Change:
    old = _read(path)
    try:
        return Change(path, old, _edited(old or "", edit))
    except (UsageProblem, ValueError, KeyError) as error:
        raise UsageProblem(f"{path}: {error}; nothing was written") from error


def _installed(target: _Target, commands: Commands) -> Change:
    change = _change(target.path, partial(target.add, commands=commands))
    if change.old is not None and target.take(change.old) == change.old:  # else it is not what was there before us
        return replace(change, backup=change.old)
    return change


def _restored(target: _Target) -> Change:
    """Without what is ours: as it was before, to the byte, where nobody else changed it since."""
    change = _change(target.path, target.take)
    if change.old is None or change.new == change.old:
        return replace(change, new=change.old)
    before = _read(_backup(target.path))
    if before is None:  # there was no such file
        return replace(change, new=None) if _is_empty(change.new or "") else change
    # To take out what was put in leaves out what was empty before, too: so it is done to the copy as well.
    add = partial(target.add, commands=Commands(HOOK, (SERVER,), is_closed=False))
    try:
        left = _edited(before, lambda text: target.take(add(text)))
    except (UsageProblem, ValueError, KeyError):  # somebody changed the copy
        return change
    return replace(change, new=before) if _means_the_same(left, change.new or "") else change


def _is_empty(text: str) -> bool:
    return text.strip() in ("", "{}")


def _means_the_same(one: str, other: str) -> bool:
    def meaning(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return bool(meaning(one) == meaning(other)) or (_is_empty(one) and _is_empty(other))


# --- showing and writing --------------------------------------------------------------------------------------------


def _carry_out(changes: Sequence[Change], *, yes: bool, dry_run: bool, done: str) -> int:
    changes = [change for change in changes if change.old != change.new]
    if not changes:
        print("Nothing to change.")
        return 0
    for change in changes:
        sys.stdout.write(_diff(change))
    sys.stdout.flush()
    if dry_run:
        return 0
    if not yes and sys.stdin.isatty() and not typer.confirm("Write this?"):
        message("nothing was written")
        return _NOT_WRITTEN
    for change in changes:
        if _read(change.path) != change.old:
            raise UsageProblem(f"{change.path} was changed meanwhile; nothing was written: try again")
    for number, change in enumerate(changes):
        try:
            _write(change, is_removal=done == "removed")
        except OSError as error:
            written = ", ".join(str(change.path) for change in changes[:number]) or "nothing"
            raise UsageProblem(f"{change.path} cannot be written: {error.strerror}; written was {written}") from error
    message(f"{done}; Claude Code reads its files when a session starts")
    return 0


def _diff(change: Change) -> str:
    old = "/dev/null" if change.old is None else str(change.path)
    new = "/dev/null" if change.new is None else str(change.path)
    lines = difflib.unified_diff((change.old or "").splitlines(True), (change.new or "").splitlines(True), old, new)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _backup(path: Path) -> Path:
    return path.with_name(path.name + BACKUP)


def _write(change: Change, *, is_removal: bool) -> None:
    path = Path(os.path.realpath(change.path))  # a link to a folder of settings stays one
    if change.new is None:
        path.unlink()
        _remove_empty(change.path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        if change.backup is not None:
            _replace(_backup(change.path), change.backup, path)
        _replace(path, change.new, path)
    if is_removal:
        with suppress(FileNotFoundError):
            _backup(change.path).unlink()


def _remove_empty(folder: Path) -> None:
    """What was made for a file of ours, where nothing else is in it."""
    with suppress(OSError):
        while folder.name in ("agents", ".claude"):
            folder.rmdir()
            folder = folder.parent


def _replace(path: Path, text: str, model: Path) -> None:
    """The file whole or as it was, with the permissions of `model`."""
    descriptor, name = mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, model.stat().st_mode & 0o777 if model.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
