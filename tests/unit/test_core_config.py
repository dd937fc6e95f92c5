from __future__ import annotations

import math
from typing import Any

import pytest

from agentpool.config import MB, BreakerSettings, PoolSettings, TaskOptions
from agentpool.errors import SettingsError


class TestDefaults:
    def test_they_are_the_designs(self) -> None:
        settings = PoolSettings.make()
        assert (settings.max_workers, settings.concurrency, settings.min_workers) == (4, 2, 0)
        assert settings.max_pending is None
        assert (settings.memory_limit_mb, settings.idle_timeout, settings.cleanup_interval) == (100, 300, 60)
        assert (settings.alert_bytes, settings.critical_bytes) == (500 * MB, 800 * MB)
        assert settings.cpu_threshold_percent == 80
        for name in ("memory_growth_mb", "hard_memory_limit_mb", "max_tasks_per_child", "task_timeout", "queue_timeout",
                     "retry", "min_available_mb"):
            assert getattr(settings, name) is None
        breaker = settings.breaker
        assert (breaker.failure_threshold, breaker.window_seconds, breaker.open_seconds, breaker.max_open_seconds) == (
            5, 60, 30, 300)

    def test_plain_settings_say_the_same(self) -> None:
        assert PoolSettings() == PoolSettings.make()


class TestDefaultsGiveWay:
    @pytest.mark.parametrize(
        ("given", "workers", "concurrency"),
        [
            ({}, 4, 2),
            ({"max_workers": None}, 4, 2),
            ({"max_workers": None, "max_concurrent": None}, 4, 2),
            ({"max_workers": 3}, 3, 3),
            ({"max_workers": 1}, 1, 1),
            ({"max_workers": 3, "max_concurrent": None}, 3, 3),
            ({"max_workers": 3, "max_concurrent": 2}, 3, 2),
            ({"max_concurrent": 3}, 4, 3),
            ({"max_concurrent": 8}, 8, 8),
            ({"min_workers": 6}, 6, 2),
            ({"min_workers": 6, "max_concurrent": 8}, 8, 8),
        ],
    )
    def test_of_workers_and_throttle(self, given: dict[str, Any], workers: int, concurrency: int) -> None:
        settings = PoolSettings.make(**given)
        assert (settings.max_workers, settings.concurrency) == (workers, concurrency)

    def test_the_soft_limit_follows_a_lower_hard_one_that_alone_was_given(self) -> None:
        assert PoolSettings.make(hard_memory_limit_mb=50).memory_limit_mb == 50
        assert PoolSettings.make(hard_memory_limit_mb=500).memory_limit_mb == 100

    @pytest.mark.parametrize(
        ("given", "alert_mb", "critical_mb"),
        [
            ({"max_workers": 2}, 250, 400),
            ({"alert_memory_mb": 50}, 50, 800),
            ({"alert_memory_mb": 3000}, 3000, 3000),
            ({"critical_memory_mb": 300}, 300, 300),
            ({"critical_memory_mb": 3000}, 500, 3000),
            ({"memory_limit_mb": None, "critical_memory_mb": 300}, None, 300),
            ({"memory_limit_mb": None, "alert_memory_mb": 300}, 300, None),
            ({"memory_limit_mb": None}, None, None),
        ],
    )
    def test_a_derived_threshold_never_contradicts_a_given_one(
        self, given: dict[str, Any], alert_mb: int | None, critical_mb: int | None
    ) -> None:
        settings = PoolSettings.make(**given)
        assert settings.alert_bytes == (None if alert_mb is None else alert_mb * MB)
        assert settings.critical_bytes == (None if critical_mb is None else critical_mb * MB)

    def test_preload_may_be_any_sequence(self) -> None:
        assert PoolSettings.make(preload=["json", "re"]).preload == ("json", "re")
        assert PoolSettings.make(preload=("json",)).preload == ("json",)


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"max_workers": 0}, "max_workers must be greater than 0"),
            ({"max_workers": 2.0}, "max_workers must be a whole number, got 2.0"),
            ({"max_workers": True}, "must be a whole number"),
            ({"max_concurrent": "2"}, "max_concurrent must be a whole number"),
            ({"min_workers": -1}, "min_workers must be at least 0"),
            ({"max_pending": 0}, "max_pending must be greater than 0"),
            ({"max_tasks_per_child": 0}, "max_tasks_per_child must be greater than 0"),
            ({"memory_limit_mb": 0}, "memory_limit_mb must be greater than 0"),
            ({"memory_limit_mb": math.inf}, "memory_limit_mb must be finite.*got inf; for no limit, say None"),
            ({"task_timeout": math.nan}, "task_timeout must be greater than 0, got nan"),
            ({"task_timeout": "3"}, "task_timeout must be a number, greater than 0 .or None., got '3'"),
            ({"idle_timeout": False}, "idle_timeout must be a number.*got False"),
            ({"kill_grace": -1}, "kill_grace must be zero or more"),
            ({"min_available_mb": -1}, "min_available_mb must be zero or more"),
            ({"cpu_policy": "stop"}, "cpu_policy must be 'report' or 'throttle', got 'stop'"),
            ({"start_method": "forkserver"}, "start_method must be 'fork' or 'spawn'"),
            ({"preload": "json"}, "preload must be a sequence of module names, got 'json'"),
            ({"preload": 5}, "preload must be a sequence of module names, got 5"),
            ({"preload": [5]}, "preload must be a sequence of module names"),
            ({"max_wrokers": 5}, "unknown setting max_wrokers; known are alert_memory_mb,"),
        ],
    )
    def test_what_is_out_of_range(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            PoolSettings.make(**given)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"max_workers": 2, "max_concurrent": 3}, "a task needs a worker of its own"),
            ({"max_workers": 2, "min_workers": 3}, r"min_workers \(3\) is above max_workers \(2\)"),
            ({"memory_limit_mb": 100, "hard_memory_limit_mb": 50}, "raise the hard limit or lower memory_limit_mb"),
            ({"alert_memory_mb": 500, "critical_memory_mb": 300}, "an alert comes first: lower it, or raise the other"),
        ],
    )
    def test_what_contradicts_itself_with_the_cure(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            PoolSettings.make(**given)

    def test_a_breaker_that_would_open_for_shorter_and_shorter(self) -> None:
        with pytest.raises(SettingsError, match=r"max_open_seconds \(10\) must not be below open_seconds \(30"):
            BreakerSettings(max_open_seconds=10)
        with pytest.raises(SettingsError, match="failure_threshold must be greater than 0"):
            BreakerSettings(failure_threshold=0)


class TestTaskOptions:
    def test_a_view_replaces_some(self) -> None:
        options = TaskOptions(timeout=5.0).updated({"priority": 3})
        assert (options.timeout, options.priority, options.block) == (5.0, 3, True)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"timeuot": 5}, "unknown option timeuot; known are block,"),
            ({"timeout": 0}, "timeout must be greater than 0"),
            ({"priority": 1.5}, "priority must be a whole number, got 1.5"),
            ({"priority": True}, "priority must be a whole number"),
            ({"key": 7}, "key must be a string, got 7"),
            ({"memory_limit_mb": 100, "hard_memory_limit_mb": 50}, "raise the hard limit or lower memory_limit_mb"),
        ],
    )
    def test_what_is_wrong_is_refused(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            TaskOptions().updated(given)
