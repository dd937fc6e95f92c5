"""The commands put together. Imports typer; what a command needs beyond that is imported when it runs.

Errors that a user can cure are one line and exit code 2; a defect shows its traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from agentpool import __version__
from agentpool.cli import orders
from agentpool.cli.config import config
from agentpool.cli.doctor import EXAMPLES as _DOCTOR_EXAMPLES
from agentpool.cli.doctor import doctor
from agentpool.cli.health import EXAMPLES as _HEALTH_EXAMPLES
from agentpool.cli.health import health
from agentpool.cli.install_claude import install_claude, uninstall_claude
from agentpool.cli.logs import EXAMPLES as _LOGS_EXAMPLES
from agentpool.cli.logs import logs
from agentpool.cli.mcp import mcp
from agentpool.cli.orchestrate import orchestrate
from agentpool.cli.ps import EXAMPLES as _PS_EXAMPLES
from agentpool.cli.ps import ps
from agentpool.cli.run import SETTINGS, USAGE, run
from agentpool.cli.status import EXAMPLES as _STATUS_EXAMPLES
from agentpool.cli.status import status
from agentpool.cli.sweep import sweep
from agentpool.cli.terminal import CommandFailed, UsageProblem, give_up_output, message
from agentpool.cli.top import EXAMPLES as _TOP_EXAMPLES
from agentpool.cli.top import top
from agentpool.errors import SettingsError

__all__ = ["run_app"]

_USAGE_ERROR: Final = 2

_EXAMPLES: Final = """\b
Examples:
  agentpool orchestrate "Review this code" --path src
  agentpool run -j 4 -- gzip -9 {} ::: *.log
  agentpool ps
  agentpool top
  agentpool health
"""

_RUN_EXAMPLES: Final = """\b
Arguments come from each ::: list (several give every combination), from the
files of -a and ::::, or else from the lines of standard input.

\b
In COMMAND, {} is the argument, {.} without its extension, {/} its last path
component, {//} its directory, {/.} its last component without extension, {#}
the job's number, {1} {2} {1/} the argument of one source, and with --jsonl
{name} a field. Without any of these the argument is appended.

\b
Exit code: the number of failed jobs, 101 for more than 100; 2: a wrong
command line; 130: interrupted. Output is kept apart per job. With
--keep-order at most 1000 jobs wait for one that is slow.

\b
Examples:
  agentpool run -j 4 -- gzip -9 {} ::: *.log
  find . -name '*.png' -print0 | agentpool run -0 -- optipng {}
  agentpool run --timeout 60 --retries 2 -k -- curl -sS {} < urls.txt
  agentpool run --joblog log --resume -- ./train {1} {2} ::: 0.1 0.01 ::: 1 2 3
  agentpool run --jsonl -- git clone {url} {name} < repositories.jsonl
  agentpool run --shell -- 'sort {} | uniq -c > {.}.count' ::: *.txt
"""

_ORCHESTRATE_EXAMPLES: Final = """\b
Exit code: 0 when every required agent succeeded, 1 when one failed or was
skipped, 124 when the time of --budget-seconds was spent first, 2: a wrong
command line or plan, 130: interrupted (143 by SIGTERM). What was found until
then is printed all the same.

\b
Examples:
  agentpool orchestrate "Review this code" --path src
  agentpool orchestrate "Write tests" --path src --out tests/generated
  agentpool orchestrate "Review" --path . --agent security-analyst --json
  agentpool orchestrate --plan release.toml --dry-run
  agentpool orchestrate --plan release.toml --budget-seconds 600 --budget-mb 2000

\b
A plan:
  prompt = "Get this ready for a release"
  path = "src"                     # relative to this file
  [agents.security]
  kind = "security-analyst"
  [agents.lint]
  kind = "command"
  prompt = "ruff check ."
  policy = "optional"              # its failure fails nothing
  [agents.report]
  kind = "mytools:Reporter"        # a class in mytools.py beside this file
  after = ["security", "lint"]
  prompt = "Sum up: {results}"
"""

_SWEEP_EXAMPLES: Final = """\b
A pool ends its own processes, also when its program is killed. What this finds
is left after worse: a machine without subreapers, a keeper killed as well.
Exit code: 0; 1 where a process could not be ended.

\b
Examples:
  agentpool sweep --dry-run
  agentpool sweep --json
"""

_CONFIG_EXAMPLES: Final = """\b
Files: ~/.config/agentpool/config.toml, then agentpool.toml of the project,
which is looked for in this directory and those above, and wins:

\b
  [budget]
  agents = 2         # that run at once, whichever process runs them
  memory_mb = 800    # of all their workers; 0: not limited

\b
The user's file only:

\b
  [budget]
  directory = "/run/agents"   # where the pools of this budget meet
  [hook]
  on_failure = "allow"        # or "deny": where Claude Code's hook can ask nobody

\b
Examples:
  agentpool config
  agentpool config --json
"""

_INSTALL_EXAMPLES: Final = """\b
Files of a project: .claude/settings.json, .mcp.json and .claude/agents/. Each
is kept beside it as NAME.before-agentpool. What else is in them stays as it is.

\b
Exit code: 0; 1: you said no; 2: a file that cannot be understood.

\b
Examples:
  agentpool install-claude --dry-run
  agentpool install-claude --user --on-failure deny --yes
  agentpool install-claude --orchestrator .claude/agents/lead.md
"""

_UNINSTALL_EXAMPLES: Final = """\b
Examples:
  agentpool uninstall-claude
  agentpool uninstall-claude --user --yes
"""

_MCP_EXAMPLES: Final = """\b
Speaks MCP over standard input and output, and ends with them. Tools:
run_agent, run_agents, pool_status, breaker. Workers start with the first
agent, and end half a minute after the last one.

\b
Examples:
  agentpool mcp
  agentpool mcp --agent security-analyst --agent claude
"""

app = typer.Typer(
    name="agentpool",
    help="Run agents, each in its own pooled process, and keep the machine alive while they misbehave.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=True,
    # Plain text: brackets in help texts are not markup, and what is printed can be searched and piped.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"agentpool {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


app.command("orchestrate", epilog=_ORCHESTRATE_EXAMPLES)(orchestrate)
app.command("run", epilog=_RUN_EXAMPLES, options_metavar=USAGE, context_settings=SETTINGS)(run)
app.command("ps", epilog=_PS_EXAMPLES)(ps)
app.command("status", epilog=_STATUS_EXAMPLES)(status)
app.command("health", epilog=_HEALTH_EXAMPLES)(health)
app.command("top", epilog=_TOP_EXAMPLES)(top)
app.command("logs", epilog=_LOGS_EXAMPLES)(logs)
for _name, (_order, _epilog) in orders.COMMANDS.items():
    app.command(_name, epilog=_epilog)(_order)
app.command("doctor", epilog=_DOCTOR_EXAMPLES)(doctor)
app.command("sweep", epilog=_SWEEP_EXAMPLES)(sweep)
app.command("config", epilog=_CONFIG_EXAMPLES)(config)
app.command("install-claude", epilog=_INSTALL_EXAMPLES)(install_claude)
app.command("uninstall-claude", epilog=_UNINSTALL_EXAMPLES)(uninstall_claude)
app.command("mcp", epilog=_MCP_EXAMPLES)(mcp)


def run_app(args: list[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        app(args=args, prog_name="agentpool")
    except SystemExit as end:  # typer ends every command with it
        return _flushed(end.code if isinstance(end.code, int) else int(end.code is not None))
    except (UsageProblem, SettingsError) as error:
        message(str(error))
        return _USAGE_ERROR
    except CommandFailed as error:
        message(str(error))
        return error.exit_code
    except BrokenPipeError:
        return give_up_output()
    raise AssertionError("typer returned without an exit code")


def _flushed(code: int) -> int:
    """Empties the output's buffer here, where a reader that went away can still be answered quietly."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return give_up_output()
    return code
