"""Kinds of agents, from classes and from files, and the programs that can be agents.

Loaded on first use, as the package above does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentpool.agents.installed import Installed, installed_agents
    from agentpool.agents.leftovers import Leftover, end_leftovers, find_leftovers
    from agentpool.agents.markdown import AgentFileError, read_agent
    from agentpool.agents.registry import AgentKind, AgentRegistry, agent, default_registry
    from agentpool.agents.retry import agent_retry
    from agentpool_worker.agents.failures import (
        AgentAnswerError,
        AgentError,
        AgentNotInstalledError,
        AgentProgramError,
        AgentRejectedError,
        AgentStalledError,
        AgentTimeoutError,
        AgentUnavailableError,
    )

_FAILURES = "agentpool_worker.agents.failures"
_LAZY = {
    "AgentAnswerError": _FAILURES,
    "AgentError": _FAILURES,
    "AgentFileError": "agentpool.agents.markdown",
    "AgentKind": "agentpool.agents.registry",
    "AgentNotInstalledError": _FAILURES,
    "AgentProgramError": _FAILURES,
    "AgentRegistry": "agentpool.agents.registry",
    "AgentRejectedError": _FAILURES,
    "AgentStalledError": _FAILURES,
    "AgentTimeoutError": _FAILURES,
    "AgentUnavailableError": _FAILURES,
    "Installed": "agentpool.agents.installed",
    "Leftover": "agentpool.agents.leftovers",
    "agent": "agentpool.agents.registry",
    "agent_retry": "agentpool.agents.retry",
    "default_registry": "agentpool.agents.registry",
    "end_leftovers": "agentpool.agents.leftovers",
    "find_leftovers": "agentpool.agents.leftovers",
    "installed_agents": "agentpool.agents.installed",
    "read_agent": "agentpool.agents.markdown",
}

__all__ = [
    "AgentAnswerError",
    "AgentError",
    "AgentFileError",
    "AgentKind",
    "AgentNotInstalledError",
    "AgentProgramError",
    "AgentRegistry",
    "AgentRejectedError",
    "AgentStalledError",
    "AgentTimeoutError",
    "AgentUnavailableError",
    "Installed",
    "Leftover",
    "agent",
    "agent_retry",
    "default_registry",
    "end_leftovers",
    "find_leftovers",
    "installed_agents",
    "read_agent",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'agentpool.agents' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module), name)
    return value
