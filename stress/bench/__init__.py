"""The project's own benchmark: `python -m stress.bench`, or `make bench`, which also writes docs/benchmarks.md.

    registry    what a case and a column are
    speed, costs, faults, crews    the cases; `cases` has them all, in the order of the tables
    contenders, floors    the pools that are measured; bare mechanisms that bound what a pool can reach
    tasks       what runs in workers: imports next to nothing
    meters      what /proc and the clocks say
    cell        one measurement, in its own process
    runner      cells in turns, within limits, leaving nothing behind
    goals, report, plots    what the figures are held against, and how they are shown

A *cell* is one contender, one case, one round. What a cell imports is kept small, as starts and memory are measured.
`eight_agents.py` and `idle_workers.py` are programs of their own.
"""
