"""What is remembered of workers that have ended, and what `logs` tells of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from agentpool.control.following import Logs
from agentpool.io.channel import kept_since
from agentpool.runtime.lastwords import Ended, LastWords


class Living:
    """A channel."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def stderr_since(self, position: int) -> tuple[bytes, int]:
        return kept_since(self.text, len(self.text), position), len(self.text)


class FakeWorkers:
    """Those that live, and those that ended, who are remembered as a pool does."""

    def __init__(self, **living: bytes) -> None:
        self.living = {int(name.removeprefix("w")): Living(text) for name, text in living.items()}
        self.ended = Ended()

    def channels(self) -> Mapping[int, Living]:
        return self.living

    def ended_workers(self, asked: Collection[int]) -> Mapping[int, LastWords]:
        return self.ended.find(asked)

    def end(self, worker: int, how: str = "exited with code 0") -> None:
        self.ended.add(worker, how, *self.living.pop(worker).stderr_since(0))


def test_those_that_said_nothing_push_out_none_that_did() -> None:
    ended = Ended()
    ended.add(1, "was killed by SIGSEGV", b"last words", 10)
    for worker in range(2, 2000):
        ended.add(worker, "exited with code 0 (idle)", b"", 0)
    assert list(ended.find([])) == [1]
    assert list(ended.find([1000, 1744, 1999])) == [1, 1744, 1999], "of the last 256 silent ones the end is known"


def test_of_sixteen_the_words_are_kept_and_of_those_before_the_end() -> None:
    ended = Ended()
    for worker in range(1, 101):
        ended.add(worker, f"exited with code {worker}", b"x" * 10, 99)
    assert list(ended.find([])) == list(range(85, 101))
    assert ended.find([84])[84].how == "exited with code 84"
    assert ended.find([84])[84].stderr_since(0) == (b"", 99)
    assert ended.find([])[85].stderr_since(92) == (b"x" * 7, 99)


def told(logs: Logs) -> list[dict[str, Any]]:
    events, _ = logs.take(1e9)
    for event in events:
        event.pop("seconds_ago", None)
    return events


@pytest.mark.parametrize("worker", [1, None])
def test_a_follower_hears_each_end_once_and_all_that_came_before_it(worker: int | None) -> None:
    workers = FakeWorkers(w1=b"one\n")
    logs = Logs(workers, worker, is_followed=True)
    assert told(logs) == [{"worker": 1, "text": "one\n"}]
    workers.living[1].text += b"two\n"
    assert told(logs) == [{"worker": 1, "text": "two\n"}]
    workers.end(1, "was killed by SIGKILL (by hand)")
    events, end = logs.take(1e9)
    assert [event.pop("seconds_ago") > 0 for event in events] == [True]
    assert events == [{"worker": 1, "ended": True, "how": "was killed by SIGKILL (by hand)"}]
    assert end == (None if worker is None else "worker 1 ended")
    if worker is None:
        assert told(logs) == []


def test_a_follower_of_all_hears_of_one_that_began_and_ended_between_two_looks() -> None:
    workers = FakeWorkers(w1=b"")
    logs = Logs(workers, None, is_followed=True)
    assert told(logs) == []
    workers.living[2] = Living(b"short\n")
    workers.end(2, "exited with code 3")
    workers.end(1)
    assert told(logs) == [{"worker": 1, "ended": True, "how": "exited with code 0"},
                          {"worker": 2, "text": "short\n"},
                          {"worker": 2, "ended": True, "how": "exited with code 3"}]


def test_who_asks_of_one_that_ended_in_silence_hears_that_alone() -> None:
    workers = FakeWorkers(w1=b"", w2=b"here\n")
    workers.end(1, "exited with code 0 (idle)")
    events, end = Logs(workers, 1, is_followed=False).take(1e9)
    assert [event["how"] for event in events] == ["exited with code 0 (idle)"]
    assert end == "that is all that is kept"
    assert told(Logs(workers, None, is_followed=False)) == [{"worker": 2, "text": "here\n"}]
