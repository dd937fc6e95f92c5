"""Options of tasks that need more than a free worker: what the moves for those choose from."""

from __future__ import annotations

from functools import cache

from agentpool.config import MB
from agentpool.core.records import TaskSpec
from agentpool.core.retry import compile_policy
from agentpool.testing.machine import TOTAL_BYTES

__all__ = ["rationed_specs"]


@cache
def rationed_specs() -> tuple[TaskSpec, ...]:
    """Recorded schedules name them by their place: add at the end only.

    Half of the machine is available while it is well: one task of three tenths fits, two do not.
    """
    return (
        TaskSpec(group="g", group_limit=1),
        TaskSpec(group="g", group_limit=2, policy=compile_policy(3), priority=5),
        TaskSpec(group="h", group_limit=2, expected_bytes=TOTAL_BYTES // 10, queue_timeout=20.0),
        TaskSpec(expected_bytes=TOTAL_BYTES * 3 // 10),
        TaskSpec(expected_bytes=TOTAL_BYTES * 3 // 10, timeout=0.5, policy=compile_policy(3), kind="a"),
        TaskSpec(expected_bytes=TOTAL_BYTES * 2, group="h", group_limit=3),
        TaskSpec(growth_limit_bytes=30 * MB, kind="b"),
        TaskSpec(growth_limit_bytes=30 * MB, soft_limit_bytes=200 * MB),
    )
