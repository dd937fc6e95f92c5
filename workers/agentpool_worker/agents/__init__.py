"""Agents that come with agentpool, and the base class for a user's own.

Both sides import this: it loads the standard library only. What an agent needs (bandit, ruff, hypothesis) is loaded in
its `setup()` or `run()`, in the worker.
"""

from agentpool_worker.agents.base import STOCK, Agent

__all__ = ["STOCK", "Agent"]
