"""Retry decisions: tenacity's own strategy objects, evaluated on the core's clock. Nothing in here ever sleeps.

tenacity is imported when a policy is first made or asked (its import costs 58 ms and 15 MB, and a pool whose tasks
succeed needs none). Called by the scheduler, and by `agentpool.pool` to compile what a user passed as `retry=`.
"""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING, Final, TypeAlias

from agentpool.config import MB
from agentpool.errors import MemoryLimitError, QuarantinedError, SettingsError, WorkerCrashedError

if TYPE_CHECKING:
    import tenacity
    from tenacity.retry import RetryBaseT
    from tenacity.stop import StopBaseT
    from tenacity.wait import WaitBaseT

    RetryLike: TypeAlias = "int | RetryPolicy | tenacity.BaseRetrying | None"

__all__ = ["Escalate", "RetryPolicy", "backoff_seconds", "compile_policy"]

#: Back-off after a lost worker, a failed dispatch or a failed start: 50 ms, doubling to 10 s, with jitter.
_BACKOFF_INITIAL: Final = 0.05
_BACKOFF_MAX: Final = 10.0


def is_lost_worker(error: BaseException) -> bool:
    """Did the worker die under the task, without the task being quarantined for it?"""
    return isinstance(error, WorkerCrashedError) and not isinstance(error, QuarantinedError)


class RetryPolicy:
    """When a task that began runs again: tenacity's `stop`, `wait` and `retry` strategies.

    retry: sees the cause, an exception of `agentpool.errors` or the task's own (default: lost workers only).
    stop: default three attempts. wait: default exponential with jitter, 50 ms to 10 s.
    Each is called with a `tenacity.RetryCallState` that has `attempt_number`, `outcome`, `seconds_since_start` and
    `idle_for`; `fn`, `args` and `kwargs` are empty. They are called with the pool's lock held: they must not block,
    and must not call the pool. A task that raises `tenacity.TryAgain` is retried whatever `retry` says.
    """

    def __init__(
        self,
        *,
        stop: StopBaseT | None = None,
        wait: WaitBaseT | None = None,
        retry: RetryBaseT | None = None,
    ) -> None:
        import tenacity

        self._retrying = tenacity.Retrying(
            stop=stop if stop is not None else tenacity.stop_after_attempt(3),
            wait=wait if wait is not None else _default_wait(),
            retry=retry if retry is not None else tenacity.retry_if_exception(is_lost_worker),
        )
        #: Whether the strategies want to see values, so that a result must be rebuilt before they are asked.
        self.sees_results: Final = _sees_results(self._retrying.retry)

    def decide(
        self,
        *,
        attempt: int,
        error: BaseException | None,
        value: object,
        started_at: float,
        now: float,
        idle_seconds: float = 0.0,
    ) -> float | None:
        """Seconds to wait before the next attempt, or None: this outcome is final.

        `attempt` counts from 1; `error` None means that `value` was returned; `started_at` is when the first attempt
        began, `idle_seconds` what was waited between attempts. Raises what a strategy raises.
        """
        import tenacity

        retrying = self._retrying
        state = tenacity.RetryCallState(retrying, None, (), {})
        state.attempt_number = attempt
        state.start_time = started_at
        state.idle_for = idle_seconds
        state.outcome = outcome = tenacity.Future(attempt)
        state.outcome_timestamp = now
        if error is None:
            outcome.set_result(value)
        else:
            outcome.set_exception(error)
        # In tenacity's own order: a stop strategy may look at the wait that would come.
        if not isinstance(error, tenacity.TryAgain) and not retrying.retry(state):
            return None
        seconds = float(retrying.wait(state))
        if not 0 <= seconds < math.inf:
            raise ValueError(f"the wait strategy {retrying.wait!r} said {seconds} s; it must be 0 or more, and finite")
        state.upcoming_sleep = seconds
        return None if retrying.stop(state) else seconds

    def after_memory_limit(self, limit_bytes: int | None) -> tuple[int | None, bool]:
        """For a task that is run again after it passed a memory limit: its next limit, and whether it runs alone."""
        return limit_bytes, False


class Escalate(RetryPolicy):
    """Runs a task that passed its hard memory limit again: with more memory, or alone, or both.

    factor: the limit of the next attempt is this times the last one, up to `cap_mb` (None: no cap), where the task had
    a limit of its own; a task that was stopped for the pool's sake (`critical_memory_mb`) keeps what it had.
    alone: the next attempt starts when no other task runs, and none starts beside it.
    attempts: how often the task may begin, the first time included. wait: as in `RetryPolicy`.
    A lost worker is a reason to try again as well, as it is with `retry=attempts`. Raises SettingsError.
    """

    def __init__(
        self,
        *,
        factor: float = 1.5,
        cap_mb: float | None = None,
        alone: bool = False,
        attempts: int = 3,
        wait: WaitBaseT | None = None,
    ) -> None:
        import tenacity

        if factor < 1 or (factor == 1 and not alone):
            raise SettingsError(f"factor must be greater than 1, or 1 with alone=True, got {factor!r}")
        if attempts < 2:
            raise SettingsError(f"attempts must be at least 2, got {attempts!r}: the first one counts")
        retry = tenacity.retry_if_exception(lambda error: is_lost_worker(error) or isinstance(error, MemoryLimitError))
        super().__init__(stop=tenacity.stop_after_attempt(attempts), wait=wait, retry=retry)
        self._factor = factor
        self._cap_bytes = None if cap_mb is None else int(cap_mb * MB)
        self._is_alone = alone

    def after_memory_limit(self, limit_bytes: int | None) -> tuple[int | None, bool]:
        """The next attempt's limit, and whether it runs alone."""
        if limit_bytes is None:
            return None, self._is_alone
        raised = int(limit_bytes * self._factor)
        if self._cap_bytes is not None:
            raised = max(limit_bytes, min(raised, self._cap_bytes))
        return raised, self._is_alone


def _sees_results(retry: object) -> bool:
    """Does this retry strategy look at values, or might it?"""
    import tenacity

    if isinstance(retry, tenacity.retry_any):
        return any(_sees_results(part) for part in retry.retries)
    if isinstance(retry, tenacity.retry_all):
        return all(_sees_results(part) for part in retry.retries)
    # Some subclasses of retry_if_exception do look at values: retry_unless_exception_type retries every value.
    errors = tenacity.retry_if_exception
    return retry is not tenacity.retry_never and not (
        isinstance(retry, errors) and type(retry).__call__ is errors.__call__
    )


def _default_wait() -> WaitBaseT:
    import tenacity

    growing = tenacity.wait_exponential(multiplier=_BACKOFF_INITIAL, max=_BACKOFF_MAX)
    return growing + tenacity.wait_random(0, _BACKOFF_INITIAL)


def backoff_seconds(failures: int, rng: Random) -> float:
    """How long to wait after this many failures in a row (1 or more) that no task is charged for.

    The same curve as the default wait of a `RetryPolicy`, but drawn from the core's own generator, so that a seed
    replays exactly, and without importing tenacity.
    """
    growing = _BACKOFF_INITIAL * 2.0 ** min(failures - 1, 16)
    return min(growing, _BACKOFF_MAX) + rng.uniform(0, _BACKOFF_INITIAL)


def compile_policy(retry: RetryLike) -> RetryPolicy | None:
    """What a user passed as `retry=`, as a policy. None, 0 and 1 mean: a task that began is not run again.

    A whole number is the attempts for a lost worker; a `RetryPolicy` is used as it is; of a `tenacity.Retrying` its
    `stop`, `wait` and `retry` are. Raises SettingsError for anything else: for a tenacity object that would never stop,
    or that has callbacks, which could only run with the pool's lock held.
    """
    if retry is None or isinstance(retry, RetryPolicy):
        return retry
    import tenacity

    if isinstance(retry, int) and not isinstance(retry, bool):
        if retry < 0:
            raise SettingsError(f"retry must be the number of attempts, 0 or more, got {retry}")
        return RetryPolicy(stop=tenacity.stop_after_attempt(retry)) if retry > 1 else None
    if not isinstance(retry, tenacity.BaseRetrying):
        raise SettingsError(
            f"retry must be a number of attempts, a RetryPolicy or a tenacity.Retrying(...), got {retry!r}"
        )
    if isinstance(retry, tenacity.AsyncRetrying):
        raise SettingsError("retry must be a tenacity.Retrying, not an AsyncRetrying: nothing is awaited here")
    if retry.stop is tenacity.stop_never:
        raise SettingsError("retry has no stop: name one, e.g. tenacity.Retrying(stop=stop_after_attempt(3), ...)")
    callbacks = {
        "before": retry.before is not tenacity.before_nothing,
        "after": retry.after is not tenacity.after_nothing,
        "before_sleep": retry.before_sleep is not None,
        "retry_error_callback": retry.retry_error_callback is not None,
    }
    if given := [name for name, is_given in callbacks.items() if is_given]:
        raise SettingsError(
            f"retry has {', '.join(given)}: a pool uses stop, wait and retry of a tenacity.Retrying, and calls nothing "
            "else of it; leave that out, and look at future.attempts or the pool's counters instead"
        )
    return RetryPolicy(stop=retry.stop, wait=retry.wait, retry=retry.retry)
