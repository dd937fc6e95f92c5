"""Long lives of one scheduler, from a seed: what Hypothesis' short ones do not reach (deep queues, many generations).

A failure prints its seed; `run(seed, steps)` replays it exactly.
"""

from __future__ import annotations

import random
from random import Random

import pytest
import tenacity
from fake_crew import TOTAL, Process, World

from agentpool.config import MB, BreakerSettings, PoolSettings
from agentpool.core.records import TaskSpec
from agentpool.core.retry import RetryPolicy


def _settings(rng: Random) -> PoolSettings:
    workers = rng.randint(1, 6)
    return PoolSettings(
        max_workers=workers,
        max_concurrent=rng.randint(1, workers),
        min_workers=rng.choice([0, 0, workers]),
        max_pending=rng.choice([None, None, 20]),
        max_tasks_per_child=rng.choice([None, None, 5, 100]),
        hard_memory_limit_mb=rng.choice([None, 300]),
        critical_memory_mb=rng.choice([None, None, 400]),
        idle_timeout=rng.choice([None, 20]),
        start_timeout=5,
        kill_grace=rng.choice([0, 1]),
        breaker=BreakerSettings(failure_threshold=4, open_seconds=5, max_open_seconds=20),
    )


def _spec(rng: Random) -> TaskSpec:
    retry = RetryPolicy(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_fixed(0.1),
                        retry=tenacity.retry_if_exception_type(Exception))
    return TaskSpec(
        timeout=rng.choice([None, 0.5]),
        queue_timeout=rng.choice([None, None, 30.0]),
        policy=rng.choice([None, None, retry, RetryPolicy()]),
        priority=rng.choice([0, 0, 0, 3, rng.randint(-99, 99)]),
        key=rng.choice([None, None, None, "k"]),
        kind=rng.choice([None, None, None, "a", "b"]),
        soft_limit_bytes=rng.choice([None, None, 50 * MB]),
        expected_bytes=rng.choice([None, None, None, TOTAL // 10, TOTAL * 3 // 10]),
        group=rng.choice([None, None, "g"]),
        group_limit=rng.choice([1, 2]),
    )


class Driver:
    """Chooses what happens next: mostly good, with faults in between."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.world = World(_settings(self.rng), seed)
        self.specs = [TaskSpec(), TaskSpec(), *(_spec(self.rng) for _ in range(6))]
        self.fault_rate = self.rng.choice([0.0, 0.02, 0.2])

    def process(self, **wanted: bool) -> Process | None:
        found = [process for process in self.world.living
                 if all(bool(getattr(process, name)) is value for name, value in wanted.items())]
        return self.rng.choice(found) if found else None

    def step(self) -> None:
        rng, world = self.rng, self.world
        if rng.random() < self.fault_rate:
            self.fault()
            return
        match rng.randrange(6):
            case 0:
                spec = rng.choice(self.specs)
                for _ in range(rng.choice([1, 1, 3, 40])):
                    world.submit(spec, rng.choice("fg"))
            case 1 | 2:
                if process := self.process(is_ready=True, is_killed=False):
                    self.work(process, rng.randint(1, 20))
            case 3:
                world.advance(rng.choice([0.0, 0.0001, 0.002, 0.02, 0.3, 3.0]))
            case 4:
                world.jump()
            case _:
                world.be_kind()

    def work(self, process: Process, steps: int) -> None:
        rng, world = self.rng, self.world
        for _ in range(steps):
            world.step(process, is_value=rng.random() < 0.9, payload=OSError())
            if process.outbox and rng.random() < 0.8:
                world.deliver(process, seconds=rng.choice([0.00001, 0.00001, 0.001, 0.2]),
                              rss_bytes=rng.choice([0, 0, 30 * MB, 150 * MB]))

    def fault(self) -> None:
        rng, world = self.rng, self.world
        core = world.core
        match rng.randrange(11):
            case 0 | 1:
                if process := self.process():
                    world.die(process, rng.choice([-9, -11, 1]))
            case 2:
                if process := self.process(current=True):
                    world.die(process)
            case 3:
                if world.unresolved:
                    world.kill_task(rng.choice(world.unresolved))
            case 4:
                if world.unresolved:
                    world.cancel(rng.choice(world.unresolved))
            case 5:
                if process := self.process(frames=True):
                    world.revoke(process.worker)
                    world.settle_down()
            case 6:
                if process := self.process():
                    world.sample_wanted.insert(0, process.worker)
                    world.answer_sample(rng.choice([90, 180, 360, 500]) * MB)
            case 7:
                world.answer_host(rng.choice([TOTAL // 2, TOTAL // 200]), rng.choice([10.0, 99.0]),
                                  rng.choice([None, 80.0]))
            case 8:
                world.operate(rng.choice([core.pause, core.resume, core.drain, core.resume]))
            case 9:
                world.operate(core.resize, rng.randint(1, 6), rng.choice([None, 1]))
                if core.workers:
                    which = rng.choice(list(core.workers))
                    if rng.random() < 0.5:
                        world.operate(core.kill_worker, which, "by hand")
                    else:
                        world.operate(core.recycle, which)
            case _:
                rng.choice([world.force_open, world.reset_breaker, world.reset_breaker])()


def run(seed: int, steps: int) -> World:
    random.seed(seed)  # tenacity's wait strategies draw from the global generator
    driver = Driver(seed)
    for _ in range(steps):
        driver.step()
    driver.world.run_to_the_end()
    return driver.world


@pytest.mark.parametrize("seed", range(8))
def test_a_long_life_loses_nothing(seed: int) -> None:
    world = run(seed, 150)
    assert len(world.outcomes) == len(world.tasks) > 20


def test_a_seed_replays_exactly() -> None:
    first, second = run(5, 100), run(5, 100)
    assert first.core.counters == second.core.counters
    assert first.core.story() == second.core.story()
    assert first.now == second.now
