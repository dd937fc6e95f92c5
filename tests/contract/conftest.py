"""For the contract tests, half of which have real processes: each must leave nothing behind."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _closed_by_a_leak_check(no_leaks: None) -> None:
    """First to be set up and so the last to be torn down: it sees what is left when all else is gone."""
