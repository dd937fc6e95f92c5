"""Records that processes publish: whole, with a lock, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentpool.io.records import RECORD_BYTES, Record, read_record


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "one.json")


def test_it_is_read_while_its_writer_lives(path: str) -> None:
    assert read_record(path) is None
    record = Record(path, {"slots": 1})
    assert read_record(path) == {"slots": 1}
    record.write({"name": "\U0001f300" * 300})
    assert read_record(path) == {"name": "\U0001f300" * 300}
    record.write({})
    assert read_record(path) == {}, "the shorter one has an end"
    record.close()  # as the kernel does for a process that ends
    assert os.path.exists(path)
    assert read_record(path) is None


def test_what_is_too_long_is_refused_and_changes_nothing(path: str) -> None:
    with pytest.raises(ValueError, match=f"longer than {RECORD_BYTES}"):
        Record(path, {"name": "x" * RECORD_BYTES})
    assert os.listdir(os.path.dirname(path)) == []
    record = Record(path, {"name": "x"})
    with pytest.raises(ValueError, match=f"longer than {RECORD_BYTES}"):
        record.write({"name": "x" * RECORD_BYTES})
    assert read_record(path) == {"name": "x"}
    record.close()


def test_a_removed_one_knows_it(path: str) -> None:
    record = Record(path, {})
    assert not record.is_removed
    os.unlink(path)
    assert record.is_removed
    record.unlink()
    record.close()


def test_what_no_process_of_ours_wrote_makes_no_sense(path: str) -> None:
    record = Record(path, {"slots": 1})
    for text in (b"", b"\x00\xff", b'00000000 {"slots": 1}', b"c4e2d4c0 [1]"):
        Path(path).write_bytes(text)
        assert read_record(path) == {}
    record.close()


def test_a_link_is_not_followed(path: str, tmp_path: Path) -> None:
    record = Record(str(tmp_path / "other.json"), {"slots": 1})
    os.symlink(tmp_path / "other.json", path)
    with pytest.raises(OSError, match=r"one\.json"):
        read_record(path)
    record.close()
