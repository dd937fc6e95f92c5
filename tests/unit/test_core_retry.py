from __future__ import annotations

import math
import random
from random import Random

import pytest
import tenacity

from agentpool.core.retry import RetryPolicy, backoff_seconds, compile_policy, is_lost_worker
from agentpool.errors import MemoryLimitError, QuarantinedError, SettingsError, TaskTimeoutError, WorkerCrashedError

LOST = WorkerCrashedError("the worker died")


def decide(policy: RetryPolicy, error: BaseException | None = LOST, *, attempt: int = 1, value: object = None,
           elapsed: float = 0.0, idle: float = 0.0) -> float | None:
    return policy.decide(attempt=attempt, error=error, value=value, started_at=100.0, now=100.0 + elapsed,
                         idle_seconds=idle)


class TestDefaults:
    def test_three_attempts_for_a_lost_worker_and_for_nothing_else(self) -> None:
        policy = RetryPolicy()
        assert [decide(policy, attempt=attempt) is not None for attempt in (1, 2, 3, 4)] == [True, True, False, False]
        for error in (ValueError(), QuarantinedError("x"), TaskTimeoutError("x"), MemoryLimitError("x")):
            assert decide(policy, error) is None
        assert decide(policy, None, value="fine") is None
        assert not policy.sees_results

    def test_the_wait_doubles_from_50_ms_with_jitter(self) -> None:
        policy = RetryPolicy(stop=tenacity.stop_after_attempt(100))
        for attempt, least in ((1, 0.05), (2, 0.1), (4, 0.4), (60, 10.0)):
            wait = decide(policy, attempt=attempt)
            assert wait is not None
            assert least <= wait <= least + 0.05

    def test_lost_means_lost_and_not_quarantined(self) -> None:
        assert is_lost_worker(LOST)
        assert not is_lost_worker(QuarantinedError("x"))
        assert not is_lost_worker(OSError())


class TestTenacitysStrategies:
    def test_stop_after_attempt_and_wait_fixed(self) -> None:
        policy = RetryPolicy(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_fixed(1.5))
        assert decide(policy) == 1.5
        assert decide(policy, attempt=2) is None

    def test_stop_after_delay_counts_from_the_first_attempt_on_the_cores_clock(self) -> None:
        policy = RetryPolicy(stop=tenacity.stop_after_delay(10), wait=tenacity.wait_none())
        assert decide(policy, attempt=50, elapsed=9.9) == 0.0
        assert decide(policy, attempt=2, elapsed=10.0) is None

    def test_stop_before_delay_sees_the_wait_that_would_come(self) -> None:
        policy = RetryPolicy(stop=tenacity.stop_before_delay(10), wait=tenacity.wait_fixed(4))
        assert decide(policy, elapsed=5.9) == 4.0
        assert decide(policy, elapsed=6.1) is None

    def test_wait_exponential_jitter(self) -> None:
        random.seed(1)
        policy = RetryPolicy(stop=tenacity.stop_after_attempt(9),
                             wait=tenacity.wait_exponential_jitter(max=6, jitter=0.5))
        waits = [decide(policy, attempt=attempt) for attempt in (1, 2, 3, 8)]
        for wait, least, most in zip(waits, (1, 2, 4, 6), (1.5, 2.5, 4.5, 6), strict=True):
            assert wait is not None
            assert least <= wait <= most

    def test_retry_if_exception_type(self) -> None:
        policy = RetryPolicy(retry=tenacity.retry_if_exception_type((OSError, MemoryLimitError)),
                             wait=tenacity.wait_none())
        assert decide(policy, ConnectionError()) == 0.0
        assert decide(policy, MemoryLimitError("x")) == 0.0
        assert decide(policy, ValueError()) is None
        assert decide(policy) is None
        assert not policy.sees_results

    def test_retry_if_result_sees_values(self) -> None:
        policy = RetryPolicy(retry=tenacity.retry_if_result(lambda value: value is None), wait=tenacity.wait_none())
        assert policy.sees_results
        assert decide(policy, None, value=None) == 0.0
        assert decide(policy, None, value=1) is None
        assert decide(policy, OSError()) is None

    def test_combined_with_or_and_and(self) -> None:
        either = tenacity.retry_if_exception_type(OSError) | tenacity.retry_if_result(lambda value: value == "busy")
        policy = RetryPolicy(retry=either, wait=tenacity.wait_fixed(1) + tenacity.wait_fixed(2),
                             stop=tenacity.stop_after_attempt(5) | tenacity.stop_after_delay(60))
        assert policy.sees_results
        assert decide(policy, OSError()) == 3.0
        assert decide(policy, None, value="busy") == 3.0
        assert decide(policy, None, value="done") is None
        assert decide(policy, OSError(), elapsed=61) is None
        both = tenacity.retry_if_exception_type(OSError) & tenacity.retry_if_exception_message("busy")
        policy = RetryPolicy(retry=both, wait=tenacity.wait_none(),
                             stop=tenacity.stop_after_attempt(2) & tenacity.stop_after_delay(5))
        assert decide(policy, OSError("busy"), attempt=9, elapsed=1) == 0.0
        assert decide(policy, OSError("busy"), attempt=9, elapsed=9) is None
        assert decide(policy, OSError("other")) is None

    def test_try_again_is_retried_whatever_retry_says(self) -> None:
        policy = RetryPolicy(retry=tenacity.retry_never, wait=tenacity.wait_none())
        assert decide(policy, tenacity.TryAgain()) == 0.0
        assert decide(policy, tenacity.TryAgain(), attempt=3) is None

    def test_a_callable_of_the_users_own_gets_a_state_as_in_tenacity(self) -> None:
        seen = []

        def retry(state: tenacity.RetryCallState) -> bool:
            assert state.outcome is not None
            seen.append((state.attempt_number, state.outcome.exception(), state.seconds_since_start, state.idle_for))
            return True

        policy = RetryPolicy(retry=retry, wait=lambda state: 2.0, stop=lambda state: state.upcoming_sleep > 5)
        assert policy.sees_results
        assert decide(policy, attempt=4, elapsed=7.5, idle=3.0) == 2.0
        assert seen == [(4, LOST, 7.5, 3.0)]

    @pytest.mark.parametrize(
        ("retry", "sees"),
        [
            (tenacity.retry_always, True),
            (tenacity.retry_never, False),
            (tenacity.retry_if_exception(lambda error: True), False),
            (tenacity.retry_if_not_exception_type(OSError), False),
            (tenacity.retry_if_exception_message("x"), False),
            (tenacity.retry_unless_exception_type(OSError), True),
            (tenacity.retry_if_not_result(bool), True),
            (tenacity.retry_if_exception_type(OSError) | tenacity.retry_if_exception_message("x"), False),
            (tenacity.retry_if_exception_type(OSError) & tenacity.retry_if_result(bool), False),
            (tenacity.retry_if_not_result(bool) & tenacity.retry_if_result(bool), True),
        ],
    )
    def test_results_are_rebuilt_only_for_strategies_that_may_look_at_them(self, retry, sees: bool) -> None:
        assert RetryPolicy(retry=retry).sees_results is sees

    @pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
    def test_a_wait_that_is_no_wait_is_an_error(self, seconds: float) -> None:
        with pytest.raises(ValueError, match="must be 0 or more, and finite"):
            decide(RetryPolicy(wait=lambda state: seconds))


class TestCompile:
    @pytest.mark.parametrize("retry", [None, 0, 1])
    def test_none_0_and_1_mean_that_a_begun_task_is_not_run_again(self, retry: int | None) -> None:
        assert compile_policy(retry) is None

    def test_a_number_is_the_attempts_for_a_lost_worker(self) -> None:
        policy = compile_policy(2)
        assert policy is not None
        assert decide(policy) is not None
        assert decide(policy, attempt=2) is None
        assert decide(policy, ValueError()) is None

    def test_a_policy_is_used_as_it_is(self) -> None:
        policy = RetryPolicy()
        assert compile_policy(policy) is policy

    def test_of_a_tenacity_retrying_its_three_strategies_are_used(self) -> None:
        policy = compile_policy(tenacity.Retrying(stop=tenacity.stop_after_attempt(4), wait=tenacity.wait_fixed(2),
                                                  retry=tenacity.retry_if_exception_type(OSError), reraise=True))
        assert policy is not None
        assert decide(policy, OSError(), attempt=3) == 2.0
        assert decide(policy, OSError(), attempt=4) is None

    @pytest.mark.parametrize(
        ("retry", "message"),
        [
            (-1, "number of attempts, 0 or more, got -1"),
            (True, "got True"),
            ("3", "a RetryPolicy or a tenacity.Retrying"),
            (tenacity.stop_after_attempt(3), "a RetryPolicy or a tenacity.Retrying"),
            (tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(3)), "not an AsyncRetrying"),
            (tenacity.Retrying(), "has no stop: name one"),
            (tenacity.Retrying(stop=tenacity.stop_after_attempt(3), before_sleep=print, after=print),
             "retry has after, before_sleep"),
            (tenacity.Retrying(stop=tenacity.stop_after_attempt(3), before=print, retry_error_callback=print),
             "retry has before, retry_error_callback"),
        ],
    )
    def test_what_cannot_be_honoured_is_refused_with_the_cure(self, retry, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            compile_policy(retry)


def test_the_cores_own_backoff_is_the_same_curve_and_replays_from_its_seed() -> None:
    first, second = ([backoff_seconds(n, Random(3)) for n in range(1, 50)] for _ in range(2))
    assert first == second
    for failures, least in ((1, 0.05), (2, 0.1), (8, 6.4), (9, 10.0), (10_000, 10.0)):
        assert least <= backoff_seconds(failures, Random(0)) <= least + 0.05
