"""The test kit: the real core and the real manager on an imaginary machine, driven from a seed.

    from agentpool.testing import simulate
    report = simulate(2000, specs=[TaskSpec(policy=my_policy)])

Nothing in agentpool imports this package. `docs/reliability.md` says what it covers.
"""

from __future__ import annotations

from agentpool.testing.channel import FakeChannel
from agentpool.testing.clock import VirtualClock
from agentpool.testing.keeper import FakeKeeper
from agentpool.testing.machine import Machine
from agentpool.testing.oracle import Violation
from agentpool.testing.palette import Palette, Profile
from agentpool.testing.process import FakeProcess, How
from agentpool.testing.reactor import FakeReactor
from agentpool.testing.sampler import FakeHostSampler, FakeTreeSampler
from agentpool.testing.shrinking import shrunken
from agentpool.testing.simulator import Failure, Report, Schedule, Simulator, simulate
from agentpool.testing.stage import Stage
from agentpool.testing.watch import Coverage, watched
from agentpool.testing.world import World

__all__ = [
    "Coverage",
    "Failure",
    "FakeChannel",
    "FakeHostSampler",
    "FakeKeeper",
    "FakeProcess",
    "FakeReactor",
    "FakeTreeSampler",
    "How",
    "Machine",
    "Palette",
    "Profile",
    "Report",
    "Schedule",
    "Simulator",
    "Stage",
    "Violation",
    "VirtualClock",
    "World",
    "shrunken",
    "simulate",
    "watched",
]
