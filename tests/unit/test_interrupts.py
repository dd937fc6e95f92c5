"""Ctrl-C around a change of the core: it waits, it is never lost, and other handlers are left alone."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

from agentpool.runtime import interrupts


@pytest.fixture(autouse=True)
def standard_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_waits_for_the_end_of_the_block() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        steps.append("went on")
    assert steps == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_inner_block_does_not_end_the_waiting() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
        steps.append("went on")
    assert steps == ["went on"]


def test_without_ctrl_c_nothing_is_raised_now_or_later() -> None:
    for _ in range(2):
        with interrupts.held():
            pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_one_ctrl_c_is_raised_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        signal.raise_signal(signal.SIGINT)
    with interrupts.held():
        pass


def test_an_error_of_the_block_gives_way_to_ctrl_c_and_is_its_context() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("inside")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_programs_own_handler_is_left_alone() -> None:
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append("own"))
    with interrupts.held():
        signal.raise_signal(signal.SIGINT)
        assert seen == ["own"]


def test_another_thread_holds_nothing() -> None:
    held = []
    thread = threading.Thread(target=lambda: held.append(interrupts.hold()))
    thread.start()
    thread.join()
    assert held == [False]


def test_a_hold_that_was_never_released_ends_with_its_caller() -> None:
    """The handler of another signal may raise between `hold` and the `try` that would release it."""

    def holds_and_is_torn_away() -> None:
        assert interrupts.hold()
        signal.raise_signal(signal.SIGINT)  # it waits, as long as this runs

    holds_and_is_torn_away()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_block_inside_other_context_managers_holds_as_long_as_it_runs() -> None:
    @contextlib.contextmanager
    def section() -> Iterator[None]:
        with interrupts.held():
            yield

    steps = []
    with pytest.raises(KeyboardInterrupt), section():
        signal.raise_signal(signal.SIGINT)
        steps.append("went on")
    assert steps == ["went on"]
