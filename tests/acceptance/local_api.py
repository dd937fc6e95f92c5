"""A local stand-in for the APIs of models, so that real agent programs complete real turns without a key or a network.

Loopback only, standard library only. It speaks Anthropic's Messages (JSON and server-sent events), OpenAI's Responses
(codex) and chat completions (llm and most others), and Gemini's generateContent. It counts the requests that are being
answered, and the most at once. What it answers is scripted by words in the newest message of the user:

  ERR status [n]      an API error; with n only for the first n requests with this very text
  HANG                never answers
  SLOW s              answers after s seconds
  BASH command        one call of the tool Bash, then a text
  CALL tool json      one call of the tool that is named, then a text
  SPAWN n words       n calls at once of the tool that starts a sub-agent, whose prompt is these words; then a text
  BIG kB              so much text
  (anything else)     "Hello from the local server."
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HELLO = "Hello from the local server."
#: Calls of tools, each its name and input.
Calls = list[tuple[str, dict[str, Any]]]
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 529: "overloaded_error"}


class LocalApi:
    """The server, in a thread of its own. `requests`: what was asked, `bodies`: in full, `peak`: how many at once."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.active = 0
        self.peak = 0
        self.errors: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.ids = itertools.count(1)
        api = self

        class Handler(_Handler):
            served = api

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def reset(self) -> None:
        with self.lock:
            self.requests.clear()
            self.bodies.clear()
            self.errors.clear()
            self.peak = self.active


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: LocalApi

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._reply(200, {})

    def do_GET(self) -> None:
        models = [{"id": "local", "object": "model", "type": "model", "display_name": "local"}]
        self._reply(200, {"object": "list", "data": models, "has_more": False})

    def do_POST(self) -> None:
        body = self._body()
        if "/count_tokens" in self.path:
            return self._reply(200, {"input_tokens": 10})
        dialect = next((answer for part, answer in (
            ("/v1/messages", self._messages), ("/responses", self._responses),
            ("/chat/completions", self._completions), ("enerateContent", self._gemini),
        ) if part in self.path), None)
        if dialect is None:
            return self._reply(200, {})
        api = self.served
        with api.lock:
            api.active += 1
            api.peak = max(api.peak, api.active)
        try:
            self._answer(body, dialect)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the agent gave up
        finally:
            with api.lock:
                api.active -= 1
        return None

    def _answer(self, body: dict[str, Any], dialect: Any) -> None:
        api = self.served
        said, is_tool_result = newest(body)
        with api.lock:
            api.requests.append(said)
            api.bodies.append(body)
        text = "All done." if is_tool_result else HELLO
        if found := re.search(r"\bSPAWN (\d+) (.+)", said):  # first: other words are meant for the sub-agents
            return dialect(body, text, _spawned(body, int(found[1]), found[2].strip()))
        if (found := re.search(r"\bERR (\d{3})(?: (\d+))?", said)) and self._may_fail(said, found):
            status = int(found[1])
            error = {"type": ERROR_TYPES.get(status, "api_error"), "message": f"scripted {status}"}
            headers = [("retry-after", "1")] if status in (429, 529) else []
            return self._reply(status, {"type": "error", "error": error}, headers)
        if re.search(r"\bHANG\b", said):
            api.closing.wait(600)
            self.close_connection = True
            return None
        if found := re.search(r"\bSLOW (\d+(?:\.\d+)?)", said):
            api.closing.wait(float(found[1]))
        calls: Calls = []
        if found := re.search(r"\bBASH (.+)", said):
            calls = [("Bash", {"command": found[1].strip(), "description": "a command"})]
        if found := re.search(r"\bCALL (\S+) (\{.*\})", said):
            calls = [(found[1], json.loads(found[2]))]
        if found := re.search(r"\bBIG (\d+)", said):
            text = "x" * (int(found[1]) * 1024)
        return dialect(body, text, calls)

    def _may_fail(self, said: str, found: re.Match[str]) -> bool:
        api = self.served
        with api.lock:
            api.errors[said] += 1
            return found[2] is None or api.errors[said] <= int(found[2])

    # -- dialects ------------------------------------------------------------------------------------------------

    def _messages(self, body: dict[str, Any], text: str, calls: Calls) -> None:
        number = next(self.served.ids)
        blocks: list[dict[str, Any]] = [
            {"type": "tool_use", "id": f"toolu_{number:08d}_{index}", "name": name, "input": given}
            for index, (name, given) in enumerate(calls)
        ] or [{"type": "text", "text": text}]
        stop = "tool_use" if calls else "end_turn"
        usage = {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        message = {"id": f"msg_{number:08d}", "type": "message", "role": "assistant", "model": body.get("model"),
                   "content": blocks, "stop_reason": stop, "stop_sequence": None, "usage": usage}
        if not body.get("stream"):
            return self._reply(200, message)
        return self._stream([
            ("message_start", {"message": {**message, "content": [], "stop_reason": None}}),
            *(event for index, block in enumerate(blocks) for event in _block_events(index, block)),
            ("message_delta", {"delta": {"stop_reason": stop, "stop_sequence": None}, "usage": usage}),
            ("message_stop", {}),
        ])

    def _responses(self, body: dict[str, Any], text: str, calls: Calls) -> None:
        number = next(self.served.ids)
        content = [{"type": "output_text", "text": text, "annotations": []}]
        item = {"id": f"msg_{number}", "type": "message", "role": "assistant", "status": "completed",
                "content": content}
        response = {"id": f"resp_{number}", "object": "response", "created_at": int(time.time()),
                    "model": body.get("model"), "status": "in_progress", "output": []}
        usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15,
                 "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        done = {**response, "status": "completed", "output": [item], "usage": usage}
        if not body.get("stream"):
            return self._reply(200, done)
        return self._stream([
            ("response.created", {"response": response}),
            ("response.output_item.added", {"output_index": 0, "item": {**item, "content": []}}),
            ("response.output_text.delta", {"item_id": item["id"], "output_index": 0, "content_index": 0,
                                            "delta": text}),
            ("response.output_item.done", {"output_index": 0, "item": item}),
            ("response.completed", {"response": done}),
        ])

    def _completions(self, body: dict[str, Any], text: str, calls: Calls) -> None:
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        base = {"id": f"chatcmpl-{next(self.served.ids)}", "created": int(time.time()), "model": body.get("model")}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return self._reply(200, {**base, "object": "chat.completion", "usage": usage, "choices": [choice]})
        chunk = {**base, "object": "chat.completion.chunk"}
        return self._stream([
            (None, {**chunk, "choices": [{"index": 0, "delta": {"role": "assistant", "content": text}}]}),
            (None, {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
            (None, {**chunk, "choices": [], "usage": usage}),
            (None, "[DONE]"),
        ])

    def _gemini(self, body: dict[str, Any], text: str, calls: Calls) -> None:
        content = {"role": "model", "parts": [{"text": text}]}
        answer = {"candidates": [{"content": content, "finishReason": "STOP", "index": 0}],
                  "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}}
        if "stream" not in self.path:
            return self._reply(200, answer)
        return self._stream([(None, answer)])

    # -- HTTP ----------------------------------------------------------------------------------------------------

    def _body(self) -> dict[str, Any]:
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            raw = b"".join(self._chunks())
        else:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            body = json.loads(raw or b"{}")
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _reply(self, status: int, answer: dict[str, Any], headers: list[tuple[str, str]] | None = None) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in [("content-type", "application/json"), ("content-length", str(len(data))),
                            *(headers or [])]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _stream(self, events: list[tuple[str | None, Any]]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for name, data in events:
            if name is not None:
                data = {"type": name, **data}
            text = data if isinstance(data, str) else json.dumps(data)
            self.wfile.write((f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode())
            self.wfile.flush()


def _spawned(body: dict[str, Any], number: int, prompt: str) -> Calls:
    """Calls of the tool that starts a sub-agent: it is called Agent today, and was called Task."""
    offered = {tool.get("name") for tool in body.get("tools") or []}
    name = "Agent" if "Agent" in offered else "Task"
    return [(name, {"description": f"job {index}", "prompt": prompt, "subagent_type": "general-purpose"})
            for index in range(number)]


def _block_events(index: int, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One block of a message of Anthropic's, as a stream has it."""
    if block["type"] == "tool_use":
        start, deltas = {**block, "input": {}}, [
            {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
    else:
        text = block["text"]
        start = {**block, "text": ""}
        deltas = [{"type": "text_delta", "text": text[at : at + 4096]} for at in range(0, len(text), 4096)]
    yield "content_block_start", {"index": index, "content_block": start}
    for delta in deltas:
        yield "content_block_delta", {"index": index, "delta": delta}
    yield "content_block_stop", {"index": index}


def newest(body: dict[str, Any]) -> tuple[str, bool]:
    """The newest text of the user, and whether it is the result of a tool instead."""
    messages = body.get("messages") or body.get("input") or body.get("contents") or []
    if isinstance(messages, str):
        return messages, False
    users = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    if not users:
        return "", False
    content = users[-1].get("content", users[-1].get("parts"))
    if isinstance(content, str):
        return content, False
    parts = [part for part in content or [] if isinstance(part, dict)]
    if any(part.get("type") == "tool_result" for part in parts):
        return "", True
    # Programs put reminders of their own before the prompt.
    texts = [part.get("text", "") for part in parts if not part.get("text", "").lstrip().startswith("<")]
    return (texts[-1] if texts else ""), False
