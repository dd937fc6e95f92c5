"""What an agent of a plan is called with: its prompt with the results of its dependencies, and its keywords.

Pure but for a prompt that is a function of the user's: that is called here, in the caller's thread.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from agentpool_worker.agents.rendering import render_result, words_of

if TYPE_CHECKING:
    from agentpool.orchestrator.plans import Plan, PlannedAgent

__all__ = ["call_of", "named_results", "text_of"]

#: Characters of one result in a prompt: a command line of Linux holds 131,072 bytes in one argument.
RESULT_CHARACTERS: Final = 20_000

_PLACEHOLDER: Final = re.compile(r"\{results(?:\[([^\[\]{}]+)\])?\}")


def named_results(prompt: str) -> list[str]:
    """The NAMEs of `{results[NAME]}` in a prompt."""
    return [name for name in _PLACEHOLDER.findall(prompt) if name]


def call_of(
    plan: Plan, agent: PlannedAgent, run: object, results: Mapping[str, Any], missing: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """The prompt and the keywords for `run`. `missing`: dependencies without a result, each with the reason."""
    kwargs = dict(agent.kwargs)
    if agent.results_as is not None:
        kwargs[agent.results_as] = dict(results)
    if plan.path is not None:
        for name, value in (("path", plan.path), ("out", plan.out)):
            if name not in kwargs and _takes(run, name):
                kwargs[name] = value
    return _prompt_of(plan, agent, results, missing), kwargs


def _prompt_of(plan: Plan, agent: PlannedAgent, results: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    prompt = plan.prompt if agent.prompt is None else agent.prompt
    if not isinstance(prompt, str):
        made = prompt(dict(results))
        if not isinstance(made, str):
            raise TypeError(f"the prompt of agent {agent.name!r} is a function that returned no string but {made!r}")
        return made
    if not agent.after:
        return prompt
    texts = {name: text_of(results[name]) if name in results else f"({name} has no result: {missing[name]})"
             for name in agent.after}
    everything = "\n\n".join(f"{name}:\n{text}" for name, text in texts.items())
    # In one pass: what a result says is text, also where it looks like a placeholder. A name that is no dependency can
    # only come from the plan's own prompt, which is not this agent's alone.
    return _PLACEHOLDER.sub(lambda found: texts.get(found[1], found[0]) if found[1] else everything, prompt)


def text_of(result: Any) -> str:
    """A result for a prompt: words as they are, others as reports show them, cut where it is very long."""
    text = words_of(result)
    if text is None:
        text = "\n".join(render_result(result))
    left_out = len(text) - RESULT_CHARACTERS
    return text if left_out <= 0 else f"{text[:RESULT_CHARACTERS]}\n({left_out} more characters are left out here)"


def _takes(run: object, name: str) -> bool:
    """Has `run` a keyword of this name, or any? What cannot be told is taken for a yes: the call will say."""
    try:
        parameters = inspect.signature(run).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return True
    return any(
        parameter.kind is parameter.VAR_KEYWORD
        or (parameter.name == name and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD))
        for parameter in parameters.values()
    )
