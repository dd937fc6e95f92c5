"""A kept session: one agent program that answers prompt after prompt over stream-json, as claude speaks it.

`Turn` is pure: it knows when a prompt is answered to the end. `Session` talks, on the thread that runs the task.
Standard library only; knows nothing of pools.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

from agentpool_worker.agents.failures import AgentProgramError, AgentStalledError, AgentTimeoutError
from agentpool_worker.agents.program import Program

__all__ = ["Session", "Turn"]

#: From start to the first sign that the program speaks the protocol, in seconds.
START_SECONDS: Final = 60.0
#: For the acknowledgement that the conversation was forgotten.
CLEAR_SECONDS: Final = 10.0
#: Silence after which a follow-up that should come, as a background task ended, is not waited for any more.
SETTLE_SECONDS: Final = 5.0
#: The same where it is unknown whether one will come.
DOUBT_SECONDS: Final = 0.25


class Turn:
    """One prompt, until it and all background tasks that it started are done.

    The first result of a turn may come while sub-agents or shells go on in the background. As each ends it is
    notified, and the program then says something more, with a result of its own.
    """

    def __init__(self) -> None:
        self.is_answered = False
        self.results = 0
        self._running: set[str] = set()
        self._owed = 0
        self._queued = 0
        self._in_doubt = False

    def feed(self, said: dict[str, Any]) -> None:
        """Take note of one message of the program."""
        kind, subtype = said.get("type"), said.get("subtype")
        if kind == "system" and subtype == "task_started":
            self._running.add(str(said.get("task_id")))
        elif kind == "system" and subtype == "task_notification":
            self._running.discard(str(said.get("task_id")))
            if self.is_answered:
                self._owed += 1
            else:
                self._in_doubt = True
        elif kind == "system" and subtype == "background_tasks_changed":
            tasks = said.get("tasks")
            self._running = {str(task.get("task_id")) for task in tasks if isinstance(task, dict)} \
                if isinstance(tasks, list) else set()
        elif kind == "result":
            self._take_result(said)

    def _take_result(self, said: dict[str, Any]) -> None:
        self.results += 1
        origin = said.get("origin")
        if isinstance(origin, dict) and origin.get("kind") == "task-notification":
            self._owed = max(0, self._owed - 1)
        else:
            self.is_answered = True
            if "queued_turn_count" not in said:  # older versions answer all notifications at once
                self._owed = 0
        self._queued = int(said.get("queued_turn_count") or 0)

    @property
    def has_background_tasks(self) -> bool:
        return bool(self._running)

    @property
    def is_done(self) -> bool:
        return self.is_answered and not (self._running or self._owed or self._queued or self._in_doubt)

    @property
    def patience(self) -> float | None:
        """Silence, in seconds, after which the turn counts as done although something may follow; None: never."""
        if not self.is_answered or self._running:
            return None
        return SETTLE_SECONDS if self._owed or self._queued else DOUBT_SECONDS


class Session:
    """The program, ready for prompts. `ask`, then `clear`, then `ask` again; `end` at last."""

    def __init__(self, program: Program, cwd: str | None) -> None:
        self.program = program
        self.cwd = cwd
        self.is_used = False
        #: what the conversation had cost by the last result
        self.cost_usd = 0.0
        self._requests = 0

    def start(self) -> None:
        """Wait until it speaks the protocol. Raises AgentProgramError."""
        if self._request({"subtype": "initialize", "hooks": None}, START_SECONDS) is None:
            raise AgentProgramError(
                f"{self.program.argv[0]} did not answer the initialize request of the stream-json protocol within "
                f"{START_SECONDS:g} s{self._ended()}",
                stderr_tail=self.program.stderr_tail,
            )

    @property
    def is_alive(self) -> bool:
        return self.program.exit_code is None

    def ask(
        self, prompt: str, take: Callable[[bytes], None], timeout: float | None, stall_timeout: float | None
    ) -> None:
        """One turn; each line of output is given to `take`.

        Raises AgentTimeoutError, AgentStalledError, and AgentProgramError where the program ends.
        """
        self.is_used = True
        began = time.monotonic()
        turn = Turn()
        self._send({"type": "user", "message": {"role": "user", "content": prompt}})
        while not turn.is_done:
            now = time.monotonic()
            waits = [began + timeout - now] if timeout is not None else []
            if stall_timeout is not None:
                waits.append(self.program.heard_at + stall_timeout - now)
            if turn.patience is not None:
                waits.append(turn.patience)
            line = self.program.read_line(max(0.0, min(waits, default=3600.0)))
            if line is not None:
                take(line)
                if said := _parsed(line):
                    self._answer_request(said)
                    turn.feed(said)
                    self._note_cost(said)
            elif not self.is_alive:
                raise AgentProgramError(f"{self.program.argv[0]} ended in the middle of a turn{self._ended()}",
                                        stderr_tail=self.program.stderr_tail)
            else:
                now = time.monotonic()
                if timeout is not None and now - began >= timeout:
                    raise AgentTimeoutError(f"the agent took longer than its timeout of {timeout:g} s")
                if stall_timeout is not None and now - self.program.heard_at >= stall_timeout:
                    raise AgentStalledError(f"the agent wrote nothing for {stall_timeout:g} s (stall_timeout)")
                if turn.patience is not None and now - self.program.heard_at >= turn.patience:
                    return

    def clear(self) -> bool:
        """Forget the conversation. False: it did not say that it has, and must not be used again."""
        if not self.is_used:
            return self.is_alive
        self._send({"type": "user", "message": {"role": "user", "content": "/clear"}})
        said = self._await(lambda said: said.get("type") == "result" and said.get("num_turns") == 0
                           and not isinstance(said.get("origin"), dict), CLEAR_SECONDS)
        if said is None or said.get("is_error"):
            return False
        self.cost_usd = _number(said.get("total_cost_usd"))
        self.is_used = False
        return True

    def interrupt(self, seconds: float) -> bool:
        """Break the turn off. True: it is over within so many seconds, and the session can be used again."""
        if not self.is_alive:
            return False
        turn = Turn()
        self._requests += 1
        self._send({"type": "control_request", "request_id": f"agentpool-{self._requests}",
                    "request": {"subtype": "interrupt"}})

        def is_over(said: dict[str, Any]) -> bool:
            turn.feed(said)
            return turn.is_answered

        said = self._await(is_over, seconds)
        return said is not None and not turn.has_background_tasks

    # -- the protocol --------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any]) -> None:
        self.program.send(json.dumps(message).encode() + b"\n")

    def _request(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        self._requests += 1
        name = f"agentpool-{self._requests}"
        self._send({"type": "control_request", "request_id": name, "request": request})
        return self._await(lambda said: said.get("type") == "control_response"
                           and (said.get("response") or {}).get("request_id") == name, seconds)

    def _await(self, is_it: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            line = self.program.read_line(remaining)
            if line is None:
                if not self.is_alive:
                    return None
                continue
            said = _parsed(line)
            if said is None:
                continue
            self._answer_request(said)
            self._note_cost(said)
            if is_it(said):
                return said
        return None

    def _answer_request(self, said: dict[str, Any]) -> None:
        """The program may ask something of its host. Nobody is here to be asked; unanswered it would wait for ever."""
        if said.get("type") != "control_request":
            return
        self._send({"type": "control_response", "response": {
            "subtype": "error", "request_id": said.get("request_id"), "error": "agentpool answers no such requests"}})

    def _note_cost(self, said: dict[str, Any]) -> None:
        if said.get("type") == "result" and not self.is_used:
            self.cost_usd = _number(said.get("total_cost_usd"))

    def _ended(self) -> str:
        if self.is_alive:
            return ""
        tail = self.program.stderr_tail
        return f"; it ended with {self.program.exit_code}" + (f": {tail[-500:]}" if tail else "")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(line)
    except ValueError:  # not of the protocol: a warning of the runtime
        return None
    return said if isinstance(said, dict) else None
