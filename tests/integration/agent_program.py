#!/usr/bin/env python3
"""A scripted agent program for the tests: speaks text, JSON, and stream-json as claude does, and misbehaves on request.

What it does is scripted by words in the prompt:

  (anything else)        answers "You said: ..." and how many prompts it remembers
  ERR 529 [FILE]         an API error; with FILE only as long as that file does not exist, which is then made
  LIMIT                  ends the turn with an error of its own: the turn limit
  HANG, DEAF             falls silent; DEAF ignores interrupts, SIGINT and SIGTERM as well
  CHATTER                writes progress for ever
  GROW mb                keeps so much more memory
  TOOL FILE              runs a tool in a session of its own that writes its pid to FILE and sleeps; waits for it
  DETACH FILE            the same by a daemon without an environment, and answers
  BACKGROUND s           answers, lets a background task run for s seconds, and answers to that
  DIE code               exits in the middle
  ENV name               answers with that variable
  SLOW s                 waits so long before it answers
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time

TOOL = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()}\\n'); time.sleep(600)"
kept: list[bytearray] = []


class Agent:
    def __init__(self, form: str) -> None:
        self.form = form
        self.memory: list[str] = []
        self.cost = 0.0
        self.buffer = b""
        self.interrupted = False
        self.serves = False

    def say(self, **message: object) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    def result(self, text: str, **more: object) -> int:
        self.cost += 0.25
        message = {"type": "result", "subtype": "success", "is_error": False, "result": text, "num_turns": 1,
                   "session_id": f"session-{os.getpid()}", "total_cost_usd": self.cost,
                   "usage": {"input_tokens": 10, "output_tokens": len(text.split())}, "queued_turn_count": 0, **more}
        if self.form == "text":
            print(text)
        elif self.form == "json":
            print(json.dumps(message))
        else:
            self.say(type="assistant", message={"content": [{"type": "text", "text": text}]})
            self.say(**message)
        sys.stdout.flush()
        return int(bool(message["is_error"]))

    def turn(self, prompt: str) -> int:
        """Do what the prompt says; the exit code of a program that runs once."""
        words = prompt.split()
        word = words[0] if words else ""
        rest = words[1:]
        self.memory.append(prompt)
        if self.form == "stream-json":
            self.say(type="system", subtype="init", model="scripted-1", tools=[])
        if word == "ERR" and (len(rest) < 2 or not os.path.exists(rest[1])):
            if len(rest) > 1:
                open(rest[1], "w").close()
            self.say(type="system", subtype="api_retry", attempt=1, max_retries=1, retry_delay_ms=1,
                     error_status=int(rest[0]))
            return self.result(f"API Error: {rest[0]} scripted. Retry-After: 0.2", is_error=True,
                               api_error_status=int(rest[0]))
        if word == "LIMIT":
            return self.result("", subtype="error_max_turns", is_error=True, errors=["Reached the turn limit (3)"])
        if word in ("HANG", "DEAF", "CHATTER"):
            return self.hang(word)
        if word == "GROW":
            kept.append(bytearray(b"x") * (int(rest[0]) * 1024 * 1024))
        if word == "SLOW":
            self.pause(float(rest[0]))
        if word == "TOOL":
            self.say(type="assistant", message={"content": [{"type": "tool_use", "name": "Bash", "id": "t1",
                                                             "input": {"command": "sleep"}}]})
            subprocess.run([sys.executable, "-c", TOOL, rest[0]], start_new_session=True, check=False)
        if word == "DETACH":
            subprocess.run(["setsid", "-f", sys.executable, "-c", TOOL, rest[0]], check=True, env={},
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not os.path.exists(rest[0]):
                time.sleep(0.005)
        if word == "BACKGROUND":
            return self.background(float(rest[0]))
        if word == "DIE":
            print("scripted death", file=sys.stderr)
            sys.exit(int(rest[0]))
        if word == "ENV":
            return self.result(os.environ.get(rest[0], "(not set)"))
        return self.result(f"You said: {prompt.strip()} ({len(self.memory)})")

    def background(self, seconds: float) -> int:
        task = {"task_id": "b1", "description": "a background task"}
        self.say(type="system", subtype="background_tasks_changed", tasks=[task])
        self.say(type="system", subtype="task_started", **task)
        self.result("It runs in the background.")
        self.pause(seconds)
        self.say(type="system", subtype="task_notification", status="completed", **task)
        self.say(type="system", subtype="background_tasks_changed", tasks=[])
        return self.result("It is done.", origin={"kind": "task-notification"})

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.interrupted and (left := end - time.monotonic()) > 0:
            if not self.serves:
                time.sleep(left)
            else:
                self.look(left)

    def hang(self, word: str) -> int:
        if word == "DEAF":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while not self.interrupted or word == "DEAF":
            if word == "CHATTER":
                self.say(type="system", subtype="status", at=time.time())
            if self.serves and word != "DEAF":
                self.look(0.05)
            else:
                time.sleep(0.05)
        return self.result("", subtype="error_during_execution", is_error=True, terminal_reason="aborted_streaming")

    # -- stream-json ---------------------------------------------------------------------------------------------

    def look(self, seconds: float) -> None:
        """Control requests are answered also in the middle of a turn; prompts wait."""
        if not select.select([0], [], [], seconds)[0]:
            return
        chunk = os.read(0, 65536)
        if not chunk:
            sys.exit(0)
        self.buffer += chunk
        lines = self.buffer.split(b"\n")
        self.buffer = b"\n".join(line for line in lines if not self.control(line))

    def control(self, line: bytes) -> bool:
        if b'"control_request"' not in line:
            return False
        request = json.loads(line)
        self.say(type="control_response", response={"subtype": "success", "request_id": request["request_id"]})
        self.interrupted = request["request"]["subtype"] == "interrupt"
        return True

    def serve(self) -> None:
        self.serves = True
        while True:
            while b"\n" not in self.buffer:
                chunk = os.read(0, 65536)
                if not chunk:
                    return
                self.buffer += chunk
            line, _, self.buffer = self.buffer.partition(b"\n")
            if not line.strip() or self.control(line):
                continue
            prompt = json.loads(line)["message"]["content"]
            self.interrupted = False
            if prompt == "/clear":
                self.memory.clear()
                self.cost = 0.0
                self.say(type="conversation_reset", trigger="clear")
                self.say(type="result", subtype="success", is_error=False, result="", num_turns=0, total_cost_usd=0,
                         queued_turn_count=0)
            else:
                self.turn(prompt)


def main(argv: list[str]) -> int:
    if "--version" in argv:
        print(os.environ.get("AGENT_PROGRAM_VERSION", "2.1.0 (scripted agent)"))
        return 0
    form = argv[argv.index("--output-format") + 1] if "--output-format" in argv else "text"
    agent = Agent(form)
    if "--input-format" in argv:
        agent.serve()
        return 0
    prompt = next((word[9:] for word in argv if word.startswith("--prompt=")), None)
    return agent.turn(sys.stdin.read() if prompt is None else prompt)


if __name__ == "__main__":
    assert re.match(r"3\.", sys.version)
    sys.exit(main(sys.argv[1:]))
