"""The hook of Claude Code: may it start a sub-agent now? Denied while a pool's breaker is open or the budget is spent.

    python -IS .../hook.py [--on-failure allow|deny] [--budget-directory DIR]     (also installed as `agentpool-hook`)

Claude Code starts it before each sub-agent, writes the call as JSON to its standard input, and reads the decision from
its standard output; nothing printed means that this hook has no objection. It starts no pool and waits for none: it
asks the control sockets of this user's pools, all at once, and reads what pools publish at the host's budget. A pool
that does not answer in time counts as a failure, which `--on-failure` decides.

The standard library only, and as little of it as possible: the answer is to be there 40 ms after the start of the
process, of which the interpreter takes 7 to 20 and the pools may take 15. So it runs without `site`, shares no code
with the package, whose import alone takes longer, and where the interpreter has them it uses the cores of `json` and
`socket`, which are written in C, without the modules around them: those load `re`, `enum` and `selectors`, 8 ms.
"""

from __future__ import annotations

import os
import sys
import time

if False:  # for type checkers: `typing` takes 4 ms
    from typing import Any

__all__ = ["main"]

#: Seconds within which all pools must have answered, from when they are asked.
PATIENCE = 0.015
#: A pool has to answer with one line of this length at most.
_LONGEST = 1 << 20
_TOOLS = ("Task", "Agent")
_OPEN = ("open", "forced_open")


class Failure(Exception):
    """Something could not be asked."""


def main() -> int:
    """Reads a hook's input and answers. The exit code is 0, or 2 for a wrong command line, which denies as well."""
    arguments = _arguments(sys.argv[1:])
    if arguments is None:
        sys.stderr.write("usage: agentpool-hook [--on-failure allow|deny] [--budget-directory DIR]\n")
        return 2
    denies = arguments["--on-failure"] == "deny"
    try:
        reason = _judge(sys.stdin.buffer.read(), arguments["--budget-directory"])
    except Failure as failure:
        reason = f"agentpool cannot tell whether there is room: {failure}" if denies else ""
    except Exception as error:  # a defect of ours; whatever it is, the user chose what it is to mean
        words = f"{type(error).__name__}: {error}"
        reason = f"agentpool's hook failed: {words}" if denies else ""
        sys.stderr.write(f"agentpool-hook: {words}\n")
    if reason:
        decision = {"hookEventName": "PreToolUse", "permissionDecision": "deny", "permissionDecisionReason": reason}
        sys.stdout.write(f'{{"hookSpecificOutput": {{{", ".join(map(_quoted, decision.items()))}}}}}\n')
        sys.stdout.flush()
    return 0


# -- JSON ------------------------------------------------------------------------------------------------------------


class _Scanning:
    """How the scanner of `json` is to read: as `json.loads` does."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}  # noqa: RUF012  of the scanner's own


def _loads(given: bytes) -> object:
    """Raises ValueError for what is no JSON."""
    text = given.decode().strip(" \t\r\n")
    try:
        from _json import make_scanner

        scan: Any = make_scanner  # takes any object with these attributes, whatever its types say
        value, end = scan(_Scanning)(text, 0)
        if end == len(text):
            found: object = value
            return found
    except (ImportError, StopIteration, SystemError):  # another interpreter; or no JSON, which it cannot say by itself
        pass
    import json

    return json.loads(text)


def _quoted(item: tuple[str, str]) -> str:
    try:
        from _json import encode_basestring_ascii as quote
    except ImportError:  # another interpreter
        from json import dumps as quote
    return f"{quote(item[0])}: {quote(item[1])}"


# -- judging ---------------------------------------------------------------------------------------------------------


def _arguments(words: list[str]) -> dict[str, str] | None:
    """None: they are wrong. What the user wanted on failure is then not known."""
    found = {"--on-failure": "allow", "--budget-directory": f"/tmp/agentpool-{os.geteuid()}/budget"}
    if len(words) % 2 or not found.keys() >= set(words[::2]):
        return None
    found.update(zip(words[::2], words[1::2], strict=True))
    return found if found["--on-failure"] in ("allow", "deny") else None


def _judge(given: bytes, budget_directory: str) -> str:
    """Why a sub-agent is not to start now; "": nothing is against it. Raises Failure."""
    try:
        call = _loads(given)
    except ValueError as error:
        raise Failure(f"its input is not JSON: {error}") from None
    if not isinstance(call, dict) or call.get("tool_name") not in _TOOLS:
        return ""
    problems: list[str] = []
    reason = _spent(budget_directory) or _breaker(problems)
    if not reason and problems:
        raise Failure("; ".join(problems))
    return reason


# -- the budget ------------------------------------------------------------------------------------------------------


def _spent(directory: str) -> str:
    """Is the host's budget spent? As the pools that take part in it say, which are alive: see io/shared_budget.py."""
    try:
        names = [name for name in os.listdir(directory) if name.endswith(".json")]
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Failure(f"{directory}: {error.strerror}") from None
    records = [record for name in names if (record := _record(os.path.join(directory, name))) is not None]
    agents = max((_number(record, "agents") for record in records), default=0)
    running = sum(_number(record, "slots") for record in records)
    if running and running >= agents:
        return (f"the host-wide budget is spent: {running} of {agents} agents run now. Do not start this sub-agent: do "
                "the work yourself, or try again when one has ended.")
    memory = max((_number(record, "memory_bytes") for record in records), default=0)
    used = sum(_number(record, "committed_bytes") for record in records)
    if memory and running and used >= memory:
        return (f"the host-wide budget is spent: agents use {used >> 20} of {memory >> 20} MB. Do not start this "
                "sub-agent: do the work yourself, or try again when one has ended.")
    return ""


def _number(record: dict[str, object], key: str) -> int:
    value = record.get(key)
    return value if isinstance(value, int) else 0


def _record(path: str) -> dict[str, object] | None:
    """What a pool says of itself; None: it has ended, and nobody has a lock on it any more."""
    import fcntl
    import struct

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        if struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question))[0] == fcntl.F_UNLCK:
            return None
        for _ in range(100):  # it may be written at this moment
            checksum, _, text = os.pread(descriptor, 1024, 0).rstrip(b"\n").partition(b" ")
            if checksum == b"%08x" % _crc32(text):
                found = _loads(text)
                return found if isinstance(found, dict) else None
        return None
    finally:
        os.close(descriptor)


def _crc32(data: bytes) -> int:
    import binascii

    return binascii.crc32(data)


# -- the breakers ----------------------------------------------------------------------------------------------------


def _breaker(problems: list[str]) -> str:
    """Is the breaker of one of this user's pools open? What could not be asked is added to `problems`."""
    addresses = {address: path for folder in _folders() for address, path in _sockets(folder)}
    if not addresses:
        return ""
    for pool, state, reason in _ask(addresses, problems):
        if state in _OPEN:
            return (f"the circuit breaker of pool {pool} is {state.replace('_', ' ')}: {reason}. Do not start this "
                    "sub-agent: do the work yourself, or try again later (`agentpool breaker show`).")
    return ""


def _folders() -> list[str]:
    """As in agentpool/control/folder.py."""
    user = os.geteuid()
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    found = [os.path.join(named, "agentpool")] if named.startswith("/") else []
    found += [f"/run/user/{user}/agentpool", f"/tmp/agentpool-{user}"]
    return list(dict.fromkeys(found))


def _sockets(folder: str) -> list[tuple[str, str]]:
    """Address and path of each: the address is short, as there is room for 107 bytes, however long the path is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # for the rest of this process
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return []  # not ours: nobody we know is in there
        names = [name for name in os.listdir(descriptor) if name.endswith(".sock") and not name.startswith(".")]
    except OSError:
        return []
    return [(f"/proc/self/fd/{descriptor}/{name}", f"{folder}/{name}") for name in names]


def _ask(addresses: dict[str, str], problems: list[str]) -> list[tuple[str, str, str]]:
    """Name, breaker state and reason of each pool that answers in time. The addresses come with their paths."""
    import select

    try:
        import _socket as socket
    except ImportError:  # another interpreter
        import socket  # type: ignore[no-redef]

    deadline = time.monotonic() + PATIENCE
    waiting: dict[int, tuple[socket.socket, str, bytearray]] = {}
    answers = []
    poll = select.poll()
    for address, path in addresses.items():
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(address)
            connection.sendall(b'{"id":1,"verb":"breaker","arguments":{}}\n')
        except (ConnectionRefusedError, FileNotFoundError):  # it has ended
            connection.close()
            continue
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            connection.close()
            continue
        waiting[connection.fileno()] = connection, path, bytearray()
        poll.register(connection.fileno(), select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(max(1, left * 1000)):
            connection, path, said = waiting[descriptor]
            try:
                data = connection.recv(65536)
            except OSError:
                data = b""
            said += data
            answer = _answer(said)
            if answer is None and data and len(said) < _LONGEST:
                continue
            poll.unregister(descriptor)
            del waiting[descriptor]
            connection.close()
            if answer is not None:
                answers.append(answer)
            elif said:
                problems.append(f"{path}: what answers is no pool")
    for connection, path, _ in waiting.values():
        problems.append(f"{path}: the pool does not answer")
        connection.close()
    return answers


def _answer(said: bytearray) -> tuple[str, str, str] | None:
    """Out of the pool's greeting and its answer; None: they are not complete, or are none."""
    lines = said.split(b"\n")
    if len(lines) < 3:
        return None
    try:
        hello: Any = _loads(bytes(lines[0]))
        answer: Any = _loads(bytes(lines[1]))
        breaker = answer["result"]
        return str(hello["pool"]["name"]), str(breaker["state"]), str(breaker["reason"])
    except (ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    sys.exit(main())
