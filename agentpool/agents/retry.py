"""When an agent's error is worth another try, and how long to wait for it.

The policy is evaluated in the parent, by the core, on tenacity's own strategies. Imports tenacity where a policy is
made, and never in a worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from agentpool.core.retry import RetryPolicy, is_lost_worker
from agentpool_worker.agents.failures import AgentError

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["agent_retry", "is_worth_retrying"]

#: Seconds before the second attempt, doubling; the API was just told that it is too much.
_INITIAL: Final = 1.0


def is_worth_retrying(error: BaseException) -> bool:
    """Is it an agent's error that passes by itself: 429, 5xx, 529, a time-out, silence, no connection?"""
    return isinstance(error, AgentError) and error.is_transient


def agent_retry(
    attempts: int = 3, *, initial: float = _INITIAL, longest: float = 60.0, lost_workers: bool = False
) -> RetryPolicy:
    """The policy that agent programs have by default: what is overloaded is asked again, what refused is not.

    attempts: how often a task may begin, the first time included. initial: seconds before the second one, doubling
    with jitter up to `longest`; at least as long as the API said (Retry-After), and never more than `longest`.
    lost_workers: whether a lost worker is a reason too; an agent that began may have had effects.
    """
    import tenacity

    backoff = tenacity.wait_exponential(multiplier=initial, max=longest) + tenacity.wait_random(0, initial / 2)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.retry_after if isinstance(error, AgentError) else None
        return min(max(float(backoff(state)), asked or 0.0), longest)

    def is_reason(error: BaseException) -> bool:
        return is_worth_retrying(error) or (lost_workers and is_lost_worker(error))

    return RetryPolicy(
        stop=tenacity.stop_after_attempt(attempts), wait=wait, retry=tenacity.retry_if_exception(is_reason)
    )
