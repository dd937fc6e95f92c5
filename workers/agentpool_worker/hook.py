"""The hook of Claude Code: may it start a sub-agent now? Denied while a pool's breaker is open or the budget is spent.

    python -IS .../hook.py [--on-failure allow|deny] [--budget-directory DIR] [--control-dir DIR]

(also installed as `agentpool-hook`)

Claude Code starts it before each sub-agent, writes the call as JSON to its standard input, and reads the decision from
its standard output; nothing printed means that this hook has no objection. It starts no pool and asks none: it reads
what pools publish, at the host's budget and beside their control sockets, in files that are locked as long as their
pool's process lives (`agentpool/io/records.py`). So a pool that is busy or stopped holds up nothing. Where something
cannot be read, `--on-failure` decides.

The standard library only, and as little of it as possible: the answer is to be there 40 ms after the start of the
process, of which the interpreter takes 7 to 20. So it runs without `site`, shares no code with the package, whose
import alone takes longer, and where the interpreter has it it uses the core of `json`, which is written in C, without
the modules around it: those load `re` and `enum`, 5 ms.
"""

from __future__ import annotations

import os
import sys

if False:  # for type checkers: `typing` takes 4 ms
    from typing import Any

__all__ = ["main"]

#: A record is no longer.
_PAGE = 4096
_TOOLS = ("Task", "Agent")


class Failure(Exception):
    """Something could not be read."""


def main() -> int:
    """Reads a hook's input and answers. The exit code is 0, or 2 for a wrong command line, which denies as well."""
    arguments = _arguments(sys.argv[1:])
    if arguments is None:
        sys.stderr.write("usage: agentpool-hook [--on-failure allow|deny] [--budget-directory D] [--control-dir D]\n")
        return 2
    denies = arguments["--on-failure"] == "deny"
    try:
        reason = _judge(sys.stdin.buffer.read(), arguments)
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
    found = {
        "--on-failure": "allow",
        "--budget-directory": f"/tmp/agentpool-{os.geteuid()}/budget",
        "--control-dir": os.environ.get("AGENTPOOL_CONTROL_DIR", ""),
    }
    if len(words) % 2 or not found.keys() >= set(words[::2]):
        return None
    found.update(zip(words[::2], words[1::2], strict=True))
    return found if found["--on-failure"] in ("allow", "deny") else None


def _judge(given: bytes, arguments: dict[str, str]) -> str:
    """Why a sub-agent is not to start now; "": nothing is against it. Raises Failure."""
    try:
        call = _loads(given)
    except ValueError as error:
        raise Failure(f"its input is not JSON: {error}") from None
    if not isinstance(call, dict) or call.get("tool_name") not in _TOOLS:
        return ""
    failures = []
    for look, where in ((_breaker, arguments["--control-dir"]), (_spent, arguments["--budget-directory"])):
        try:
            if reason := look(where):
                return reason
        except Failure as failure:  # what the other one knows still counts
            failures.append(failure)
    if failures:
        raise failures[0]
    return ""


def _breaker(directory: str) -> str:
    """Is the breaker of one of this user's pools open? As those say of which it is: see agentpool/control/notice.py."""
    for folder in [directory] if directory else _folders():
        for record in _records(folder, ".breaker"):
            state = str(record.get("state")).replace("_", " ")
            return (f"the circuit breaker of pool {record.get('pool')} is {state}: {record.get('reason')}. Do not "
                    "start this sub-agent: do the work yourself, or try again later (`agentpool breaker show`).")
    return ""


def _folders() -> list[str]:
    """As in agentpool/control/folder.py."""
    user = os.geteuid()
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    found = [f"{named}/agentpool"] if named.startswith("/") else []
    return [*found, f"/run/user/{user}/agentpool", f"/tmp/agentpool-{user}"]


def _spent(directory: str) -> str:
    """Is the host's budget spent? As the pools say that take part in it: see agentpool/io/shared_budget.py."""
    records = _records(directory, ".json")
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


# -- records ---------------------------------------------------------------------------------------------------------


def _records(folder: str, suffix: str) -> list[dict[str, object]]:
    """What the pools that live say of themselves in the files of that name."""
    try:
        found = os.lstat(folder)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return []  # not ours: nobody we know is in there
        names = [name for name in os.listdir(folder) if name.endswith(suffix) and not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Failure(f"{folder}: {error.strerror}") from None
    return [record for name in names if (record := _record(f"{folder}/{name}")) is not None]


def _record(path: str) -> dict[str, object] | None:
    """What a pool says of itself; None: it has ended, and nobody has a lock on it any more."""
    import fcntl
    import struct

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:  # it has ended just now
        return None
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    try:
        question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        if struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question))[0] == fcntl.F_UNLCK:
            return None
        for _ in range(100):  # it may be written at this moment
            checksum, _, text = os.pread(descriptor, _PAGE, 0).rstrip(b"\n").partition(b" ")
            if checksum == b"%08x" % _crc32(text):
                found = _loads(text)
                return found if isinstance(found, dict) else None
    finally:
        os.close(descriptor)
    raise Failure(f"{path}: it is no record of a pool")


def _crc32(data: bytes) -> int:
    import binascii

    return binascii.crc32(data)


if __name__ == "__main__":
    sys.exit(main())
