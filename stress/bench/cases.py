"""All cases, in the order of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stress.bench import costs, crews, faults, registry, speed

if TYPE_CHECKING:
    from stress.bench.registry import Case

#: A case stands in the module where it was entered; the modules in this order.
CASES: dict[str, Case] = {
    name: spec
    for module in (speed, costs, faults, crews)
    for name, spec in registry.CASES.items()
    if spec.run.__module__ == module.__name__
}
