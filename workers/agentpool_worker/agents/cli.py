"""Agents that are command-line programs: claude, codex, gemini, copilot, opencode, aider, llm, and any other.

Runs in a worker, on the thread that runs the task. A program is started for each prompt, or, where it speaks
stream-json, kept for the next one. Standard library only. What the programs want and say is in `presets`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final, TypedDict

from agentpool_worker.agents.base import Agent
from agentpool_worker.agents.failures import (
    AgentAnswerError,
    AgentError,
    AgentNotInstalledError,
    AgentProgramError,
    AgentStalledError,
    AgentTimeoutError,
    classify,
    retry_after_seconds,
)
from agentpool_worker.agents.presets import PRESETS, Preset, find, version_of
from agentpool_worker.agents.program import Program
from agentpool_worker.agents.reading import OutputReader, Reading
from agentpool_worker.agents.session import Session
from agentpool_worker.agents.starting import why_not_started
from agentpool_worker.agents.telling import Teller

__all__ = ["Aider", "Claude", "CliAgent", "CliAnswer", "Codex", "Copilot", "Gemini", "Llm", "OpenCode"]


class CliAnswer(TypedDict):
    """What an agent program answered.

    answer: its words. usage: tokens, as the program reports them. cost_usd: as the program reckons it, of this prompt;
    None: it does not say. turns, stop_reason, model, session_id: likewise. is_warm: a kept session answered.
    """

    answer: str
    program: str
    version: str
    model: str | None
    cost_usd: float | None
    usage: dict[str, Any]
    turns: int | None
    stop_reason: str | None
    session_id: str | None
    seconds: float
    is_warm: bool


#: The configuration that every program has, with its defaults; the options of its preset come on top.
_CONFIG: Final[dict[str, Any]] = {
    "command": None, "argv": None, "args": (), "form": None, "rules": None, "env": None, "cwd": None, "timeout": None,
    "stall_timeout": None, "interrupt_seconds": 2.0, "stop_grace": 1.0, "system_prompt": None, "session": False,
}  # fmt: skip


#: The same where the worker itself is to stop: all must be done within the pool's `kill_grace`.
_INTERRUPT_SECONDS: Final = 0.3


class CliAgent(Agent):
    """An agent command line. Not idempotent: it may have had effects before its worker was lost.

    command: the program, as a name or path; default: the preset's, on the worker's PATH.
    argv: the words after it, instead of the preset's; `{prompt}` stands for the prompt. Where no word has it, the
        prompt is written to standard input. args: further words.
    form, rules: how its output is read, see `agentpool_worker.agents.reading`; default: as the preset says.
    env, cwd: as in `CommandAgent`; `run(cwd=...)` and `run(path=...)` win.
    timeout: seconds for an answer: AgentTimeoutError. stall_timeout: seconds without a sign of life:
        AgentStalledError. None: no limit but the pool's. interrupt_seconds: how long a kept session may take to break
        its turn off before it is ended. stop_grace: seconds before what does not end is killed.
    system_prompt: what it is told beforehand; it stands before the prompt where the program has no option for it.
    session: keep the program for the next prompt (claude).
    Everything else is an option of the preset, such as `model`.
    """

    idempotent: ClassVar[bool] = False
    retries_transient_errors: ClassVar[bool] = True
    interrupts_itself: ClassVar[bool] = True
    preset: ClassVar[Preset | None] = None

    def __init_subclass__(cls, preset: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if preset is not None:
            cls.name, cls.preset = preset, PRESETS[preset]

    def __init__(self, **config: Any) -> None:
        options = self.preset.options if self.preset is not None else {}
        if unknown := sorted(set(config) - set(_CONFIG) - set(options)):
            known = ", ".join(sorted({*_CONFIG, *options}))
            raise TypeError(f"{self._label()} has no option {', '.join(unknown)}; known are {known}")
        self._config = {**_CONFIG, **config}
        if self.preset is None and not (self._config["command"] and self._config["argv"] is not None):
            raise TypeError("an agent program without a preset needs command= and argv=, e.g. command='my-agent', "
                            "argv=['--json', '{prompt}']")
        if self._config["session"] and type(self) is not Claude:
            raise TypeError(f"session=True needs a program that speaks stream-json: claude, not {self._label()}")
        self._reader()  # a wrong rule is an error now, not after the first answer
        self._program = ""
        self._version = ""
        self._session: Session | None = None

    def _label(self) -> str:
        return self.preset.name if self.preset is not None else type(self).__name__

    # -- the agent -----------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Find the program and see to its version; start it, where it is to be kept."""
        env = self._environment()
        preset = self.preset
        if preset is None:
            import shutil

            found = shutil.which(self._config["command"], path=env.get("PATH", os.defpath))
            if found is None:
                raise AgentNotInstalledError(f"the program {self._config['command']!r} is not installed")
            self._program = found
        else:
            self._program = find(preset, self._config["command"], env.get("PATH", os.defpath))
            self._version = version_of(preset, self._program, env)
        if self._config["session"]:
            self._session = self._open(self._config["cwd"])

    def run(
        self,
        prompt: str,
        *,
        path: str | None = None,
        out: str | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
        stall_timeout: float | None = None,
    ) -> CliAnswer:
        """Ask the program.

        path: what it is to look at: it runs in that directory, or that of the file, and is told. out: a directory for
        what it writes; it is told. cwd: where it runs. timeout, stall_timeout: instead of the configuration's.

        Raises the classes of `agentpool_worker.agents.failures`.
        """
        began = time.monotonic()
        text = _told(prompt, path, out)
        folder = cwd or (None if path is None else path if os.path.isdir(path) else os.path.dirname(path))
        timeout = self._config["timeout"] if timeout is None else timeout
        stall = self._config["stall_timeout"] if stall_timeout is None else stall_timeout
        ask = self._ask_session if self._config["session"] else self._ask_program
        try:
            reading, is_warm = ask(text, folder or self._config["cwd"], timeout, stall)
        except AgentError as error:
            error.program = error.program or self._label()
            raise
        return CliAnswer(
            answer=reading.answer,
            program=self._label(),
            version=self._version,
            model=reading.model,
            cost_usd=reading.cost_usd,
            usage=reading.usage,
            turns=reading.turns,
            stop_reason=reading.stop_reason,
            session_id=reading.session_id,
            seconds=time.monotonic() - began,
            is_warm=is_warm,
        )

    def close(self) -> None:
        """End a kept program, by the end of its input first."""
        session, self._session = self._session, None
        if session is not None:
            session.program.end(self._config["stop_grace"])

    # -- a process per prompt ------------------------------------------------------------------------------------

    def _ask_program(
        self, prompt: str, cwd: str | None, timeout: float | None, stall: float | None
    ) -> tuple[Reading, bool]:
        words, feed = self._words(prompt)
        reader, teller = self._reader(), Teller()
        program = self._start([self._program, *words, *self._option_words(stall)], cwd)
        try:
            program.send(feed)
            program.close_input()
            self._read_to_end(program, reader, teller, timeout, stall)
        finally:
            program.end(self._config["stop_grace"])
        teller.tell(reader.finish())
        self._check(reader, program.exit_code, program.stderr_tail)
        return reader.reading, False

    def _read_to_end(
        self, program: Program, reader: OutputReader, teller: Teller, timeout: float | None, stall: float | None
    ) -> None:
        began = time.monotonic()
        while True:
            now = time.monotonic()
            waits = [began + timeout - now] if timeout is not None else []
            if stall is not None:
                waits.append(program.heard_at + stall - now)
            line = program.read_line(max(0.0, min(waits, default=3600.0)))
            if line is not None:
                teller.tell(reader.feed(line))
                continue
            if program.exit_code is not None:
                return
            now = time.monotonic()
            details = {"stderr_tail": program.stderr_tail, **_known(reader.reading)}
            if timeout is not None and now - began >= timeout:
                raise AgentTimeoutError(f"{self._label()} took longer than its timeout of {timeout:g} s and was ended",
                                        **details)
            if stall is not None and now - program.heard_at >= stall:
                raise AgentStalledError(f"{self._label()} wrote nothing for {stall:g} s (stall_timeout) and was ended",
                                        **details)

    def _words(self, prompt: str) -> tuple[list[str], bytes]:
        """The words after the program, and what goes to its standard input."""
        argv, system = self._config["argv"], self._config["system_prompt"]
        if system and (self.preset is None or "system_prompt" not in self.preset.options):
            prompt = f"{system}\n\n{prompt}"  # it has no option for one
        if argv is None:
            assert self.preset is not None
            argv = self.preset.argv
        if any("{prompt}" in word for word in argv):
            return [word.replace("{prompt}", prompt) for word in argv], b""
        return list(argv), prompt.encode("utf-8", "surrogateescape")

    def _option_words(self, stall: float | None) -> list[str]:
        words: list[str] = []
        for name, template in (self.preset.options if self.preset is not None else {}).items():
            value = self._config.get(name)
            if value is not None and value is not False:
                words += [word.replace("{}", str(value)) for word in template]
        return [*words, *self._config["args"]]

    def _start(self, argv: list[str], cwd: str | None) -> Program:
        try:
            return Program(argv, self._environment(), cwd)
        except (OSError, ValueError) as error:
            raise AgentProgramError(why_not_started(argv, cwd, error)) from error

    def _environment(self) -> dict[str, str]:
        defaults = self.preset.env if self.preset is not None else {}
        given: Mapping[str, str] = self._config["env"] or {}
        return {**defaults, **os.environ, **given}

    # -- reading -------------------------------------------------------------------------------------------------

    def _reader(self) -> OutputReader:
        form, rules, preset = self._config["form"], self._config["rules"], self.preset
        if form is None and preset is not None:
            return OutputReader(preset.form, rules or preset.rules, preset.events)
        return OutputReader(form or "text", rules or {})

    def _check(self, reader: OutputReader, exit_code: int | None, stderr: str) -> None:
        """Raise what the program's end amounts to, unless it is an answer."""
        reading = reader.reading
        if not exit_code and not reading.failed and (reading.answer or reading.failed is False):
            if not (self.preset is not None and self.preset.says_error(reading.answer)):
                return
            reading.failed, reading.error = True, reading.answer
        said = reading.error or reading.answer or stderr
        words = f"{reading.error or reading.answer}\n{stderr}"
        kind = classify(reading.status, words) or (AgentAnswerError if reading.failed else AgentProgramError)
        failed = "answered with an error" if reading.failed else "gave no answer"
        how = f"ended with {exit_code}" if exit_code else failed
        stop = f" ({reading.stop_reason})" if reading.stop_reason not in (None, "success", "completed") else ""
        raise kind(
            f"{self._label()} {how}{stop}" + (f": {said.strip()[-1000:]}" if said.strip() else ""),
            status=reading.status,
            retry_after=retry_after_seconds(words),
            stderr_tail=stderr,
            **{**_known(reading), "answer": "" if reading.failed else reading.answer},
        )

    # -- a kept session ------------------------------------------------------------------------------------------

    def _open(self, cwd: str | None) -> Session:
        words, _ = self._words("")
        argv = [self._program, *words, "--input-format", "stream-json",
                *self._option_words(self._config["stall_timeout"])]
        session = Session(self._start(argv, cwd), cwd)
        try:
            session.start()
        except BaseException:
            session.program.end(self._config["stop_grace"])
            raise
        return session

    def _ask_session(
        self, prompt: str, cwd: str | None, timeout: float | None, stall: float | None
    ) -> tuple[Reading, bool]:
        is_warm = self._ready(cwd)
        session = self._session
        assert session is not None
        reader, teller = self._reader(), Teller()
        try:
            session.ask(prompt, lambda line: teller.tell(reader.feed(line)), timeout, stall)
        except AgentTimeoutError as error:
            error.__dict__.update(_known(reader.reading))
            if not session.interrupt(self._config["interrupt_seconds"]):
                self.close()
            raise
        except AgentError:
            self.close()
            raise
        except BaseException:  # asked to stop: the worker retires after this, and is killed if that takes long
            session.interrupt(_INTERRUPT_SECONDS)
            self.close()
            raise
        session.program.sweep()
        if reader.reading.cost_usd is not None:
            reader.reading.cost_usd = max(0.0, reader.reading.cost_usd - session.cost_usd)
        self._check(reader, session.program.exit_code, session.program.stderr_tail if reader.reading.failed else "")
        return reader.reading, is_warm

    def _ready(self, cwd: str | None) -> bool:
        """Have a session in that directory that remembers nothing. False: it was started just now."""
        session = self._session
        if session is not None and (session.cwd != cwd or not session.clear()):
            self.close()
            session = None
        if session is None:
            self._session = self._open(cwd)
            return False
        return True


def _known(reading: Reading) -> dict[str, Any]:
    """What an error tells of an answer that is none."""
    return {name: getattr(reading, name) for name in ("answer", "session_id", "usage", "cost_usd")}


def _told(prompt: str, path: str | None, out: str | None) -> str:
    """The prompt, with what the orchestrator gives every agent."""
    if path is not None:
        prompt += f"\n\nLook at: {path}"
    if out is not None:
        prompt += f"\n\nWrite what you produce into the directory {out}"
    return prompt


class Claude(CliAgent, preset="claude"):
    """Claude Code. With `session=True` one program answers prompt after prompt, cleared in between."""

    def _option_words(self, stall: float | None) -> list[str]:
        words = super()._option_words(stall)
        # A long answer is a sign of life only where its pieces are shown.
        return words if stall is None else [*words, "--include-partial-messages"]


class Codex(CliAgent, preset="codex"):
    """OpenAI's codex."""


class Gemini(CliAgent, preset="gemini"):
    """Google's Gemini CLI."""


class Copilot(CliAgent, preset="copilot"):
    """GitHub's Copilot CLI."""


class OpenCode(CliAgent, preset="opencode"):
    """opencode."""


class Aider(CliAgent, preset="aider"):
    """aider."""


class Llm(CliAgent, preset="llm"):
    """Simon Willison's llm."""
