"""What the user's files say, and `agentpool config`, which shows it with where each value came from.

Two files, both optional: `~/.config/agentpool/config.toml` (`$XDG_CONFIG_HOME/agentpool/config.toml`), and the
project's `agentpool.toml`, in the current directory or the next one above that has one. The project's values win. Read
by the command line only. Main thread only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from agentpool.cli.terminal import UsageProblem, message
from agentpool.config import HostBudget
from agentpool.errors import SettingsError

__all__ = ["BUDGET_OPTION", "Configuration", "HookPolicy", "Value", "budget_to_join", "config", "read_configuration"]

HookPolicy = Literal["allow", "deny"]

_DEFAULT: Final = "default"
_BUDGET: Final = HostBudget()
#: key -> its default; what a file may say, and nothing else
_DEFAULTS: Final[Mapping[str, Any]] = {
    "budget.agents": _BUDGET.agents,
    "budget.memory_mb": _BUDGET.memory_mb,
    "budget.directory": _BUDGET.directory,
    "hook.on_failure": "allow",
}
#: What the project must not say: it came with the code, and these are about the user's own directories.
_USERS_OWN: Final = frozenset({"budget.directory", "hook.on_failure"})


@dataclass(frozen=True, slots=True)
class Value:
    """A value, and where it came from: "default", or the path of a file."""

    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """All values by key, and the files that were read."""

    values: Mapping[str, Value]
    files: tuple[str, ...]

    @property
    def has_budget(self) -> bool:
        """Did a file say anything of the budget?"""
        return any(value.source != _DEFAULT for key, value in self.values.items() if key.startswith("budget."))

    @property
    def budget(self) -> HostBudget:
        """The budget that the files describe."""
        said = {key.removeprefix("budget."): value.value for key, value in self.values.items()
                if key.startswith("budget.")}
        said["memory_mb"] = said["memory_mb"] or None
        return HostBudget(**said)

    @property
    def hook_policy(self) -> HookPolicy:
        """What the hook of Claude Code answers where it can ask nobody."""
        return "deny" if self.values["hook.on_failure"].value == "deny" else "allow"

    def source_of_budget(self) -> str:
        """Where the number of agents came from, in words."""
        source = self.values["budget.agents"].source
        return "the default" if source == _DEFAULT else source


def read_configuration(*, environ: Mapping[str, str] | None = None, directory: str | None = None) -> Configuration:
    """The configuration of this user in this directory. Raises UsageProblem for a file that cannot be used."""
    environ = os.environ if environ is None else environ
    values = {key: Value(default, _DEFAULT) for key, default in _DEFAULTS.items()}
    files = []
    for path, is_project in _files(environ, Path(directory or os.getcwd())):
        found = _read(path)
        if found is None:
            continue
        files.append(str(path))
        for key, value in _flatten(found, path):
            if is_project and key in _USERS_OWN:
                raise UsageProblem(f"{path}: {key} is the user's own to say: put it into {_users_file(environ)}")
            values[key] = Value(value, str(path))
    configuration = Configuration(values, tuple(files))
    _check(configuration)
    return configuration


def _users_file(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_CONFIG_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path(environ.get("HOME") or os.path.expanduser("~"), ".config")
    return base / "agentpool" / "config.toml"


def _files(environ: Mapping[str, str], directory: Path) -> Iterator[tuple[Path, bool]]:
    yield _users_file(environ), False
    for folder in (directory, *directory.parents):
        if (folder / "agentpool.toml").is_file():
            yield folder / "agentpool.toml", True
            return


def _read(path: Path) -> dict[str, Any] | None:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageProblem(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise UsageProblem(f"{path} is not TOML: {error}") from error


def _flatten(found: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    for section, content in found.items():
        keys = {f"{section}.{name}": value for name, value in content.items()} if isinstance(content, dict) else {
            section: content
        }
        for key, value in keys.items():
            if key not in _DEFAULTS:
                raise UsageProblem(f"{path}: unknown key {key}; known are {', '.join(_DEFAULTS)}")
            yield key, value


def _check(configuration: Configuration) -> None:
    sources = ", ".join(configuration.files)
    policy = configuration.values["hook.on_failure"]
    if policy.value not in ("allow", "deny"):
        raise UsageProblem(f"{policy.source}: hook.on_failure must be \"allow\" or \"deny\", got {policy.value!r}")
    try:
        _ = configuration.budget
    except SettingsError as error:
        raise UsageProblem(f"{sources}: {error}") from error


#: `--budget` of the commands that run agents
BUDGET_OPTION: Final = typer.Option(
    "--budget/--no-budget",
    help="Share the host-wide budget with this user's other pools, or do not.  [default: where a file configures it]",
)


def budget_to_join(wanted: bool | None, at_once: int, option: str) -> HostBudget | None:
    """The budget that a command takes part in; None: none. Says so where the command asks for more than it has.

    wanted: what the command line says of it. at_once, option: how many agents are to run at once, and who said so.
    """
    found = read_configuration()
    if wanted is False or (wanted is None and not found.has_budget):
        return None
    budget = found.budget
    if at_once > budget.agents:
        message(f"{option} {at_once} is above the host-wide budget of {budget.agents} ({found.source_of_budget()}): no "
                f"more than {budget.agents} run at once, and each waits for its turn")
    return budget


def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the configuration, and where each value came from."""
    found = read_configuration()
    if as_json:
        values = {key: {"value": value.value, "source": value.source} for key, value in found.values.items()}
        print(json.dumps({"values": values, "files": list(found.files)}, indent=2))
        return
    rows = [("KEY", "VALUE", "FROM")]
    rows += [(key, _shown(value.value), value.source) for key, value in found.values.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, shown, source in rows:
        print(f"{key:<{widths[0]}}  {shown:<{widths[1]}}  {source}")
    if not found.has_budget:
        print("\nNo file says anything of the budget: `agentpool run` joins it with --budget only.")


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
