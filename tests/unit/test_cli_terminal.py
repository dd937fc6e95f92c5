"""Signals that wait for their moment, and when a run halts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from agentpool.cli.runner import Halt
from agentpool.cli.terminal import Interrupted, Interrupts
from agentpool.cli.terminal import UsageProblem as Problem


@pytest.fixture(autouse=True)
def _signals_as_in_the_foreground() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_waits_until_it_is_allowed() -> None:
    with Interrupts() as interrupts:
        send(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught, interrupts.allowed():
            pytest.fail("it was not raised at the door")
        assert caught.value.exit_code == 143
        with interrupts.allowed():
            pass  # it was raised once


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_raised_where_it_is_allowed(number: int, code: int) -> None:
    with Interrupts() as interrupts, pytest.raises(Interrupted) as caught, interrupts.allowed():
        send(number)
    assert caught.value.exit_code == code


def test_what_was_ignored_stays_ignored_and_handlers_come_back() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts, interrupts.allowed():
        send(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_halt_as_gnu_parallel_writes_it() -> None:
    assert Halt.parse("never") is None
    assert Halt.parse("now,fail=1") == Halt(True, "fail", 1)
    assert Halt.parse("soon,success=12") == Halt(False, "success", 12)
    assert Halt.parse("soon,done=3") == Halt(False, "done", 3)


@pytest.mark.parametrize("text", ["", "now", "later,fail=1", "now,fail=0", "now,fail=1%", "now,fail", "1", "no,fail=1"])
def test_halt_as_nobody_writes_it(text: str) -> None:
    with pytest.raises(Problem, match="--halt"):
        Halt.parse(text)
