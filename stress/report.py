"""What a run came to, as data, and as a page of Markdown."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stress.oracle import RULES, Verdict
from stress.recorder import percentile

if TYPE_CHECKING:
    from stress.harness import Run

Result = dict[str, Any]


def result(run: Run, verdict: Verdict, seconds: float) -> Result:
    """One scenario's, as plain data for JSON."""
    rows = run.recorder.rows()
    latencies = _latencies(run.ledger.record_path)
    outcomes = run.ledger.outcomes
    return {
        "scenario": run.scenario.name, "title": run.scenario.title, "executor": run.target.name,
        "label": run.target.label, "seed": run.seed, "machine": machine(), "python": platform.python_version(),
        "seconds": round(seconds, 2), "is_satisfied": verdict.is_satisfied, "why_skipped": "",
        "accepted": run.ledger.accepted, "returned": outcomes["returned"], "failed": outcomes["failed"],
        "cancelled": outcomes["cancelled"], "never_settled": max(run.stalled, len(run.ledger.open)),
        "refused": dict(run.ledger.refused), "errors": dict(run.ledger.errors), "kinds": dict(run.ledger.by_kind),
        "lost_to_faults": verdict.lost_to_faults, "innocent": verdict.innocent, "rebuilt": run.rebuilt,
        "per_second": round(run.ledger.settled / max(1e-6, rows[-1]["t"]), 1) if rows else 0.0,
        "latency": {f"p{share * 100:g}": percentile(latencies, share) for share in (0.5, 0.95, 0.99)},
        "peak_pool_mb": round(run.recorder.peak_pool_mb, 1), "peak_worker_mb": run.recorder.peak_worker_mb,
        "peak_workers": run.recorder.peak_workers, "least_available_mb": round(run.recorder.least_available_mb),
        "parent_mb": [rows[0]["parent_mb"], rows[-1]["parent_mb"]] if rows else [],
        "parent_growth_mb": verdict.memory_growth_mb, "parent_noise_mb": verdict.memory_noise_mb,
        "shutdown_seconds": round(run.shutdown_seconds, 3), "facts": run.facts,
        "skipped": run.skipped | run.chaos.skipped,
        "faults": dict(Counter(mark.kind for mark in run.chaos.marks)),
        "marks": [mark.as_json() | {"at": round(mark.at - run.recorder.began_at, 3)} for mark in run.chaos.marks],
        "rules": {rule: _rule(rule, verdict) for rule in RULES},
        "series": rows,
    }


def skipped(name: str, title: str, executor: str, label: str, why: str) -> Result:
    """Of a scenario that the executor cannot play."""
    return {"scenario": name, "title": title, "executor": executor, "label": label, "why_skipped": why,
            "is_satisfied": None}


def _rule(rule: str, verdict: Verdict) -> dict[str, Any]:
    if rule in verdict.broken:
        return {"state": "broken", "count": verdict.counts[rule], "examples": verdict.broken[rule]}
    if rule in verdict.not_judged:
        return {"state": "not judged", "why": verdict.not_judged[rule]}
    return {"state": "kept"}


def _latencies(record: Path) -> list[float]:
    found = []
    with open(record) as file:
        for line in file:
            if line.startswith("settled "):
                words = line.split()
                found.append(float(words[9]) - float(words[8]))
    return sorted(found)


def machine() -> str:
    """In a few words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release().split('-')[0]}"


# -- Markdown --------------------------------------------------------------------------------------------------------


def milliseconds(seconds: float | None) -> str:
    """For people."""
    return "-" if seconds is None else f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def word(one: Mapping[str, Any]) -> str:
    """The verdict."""
    return "skipped" if one["why_skipped"] else "satisfied" if one["is_satisfied"] else "**broken**"


def table(results: Sequence[Result]) -> str:
    """A row for each run."""
    lines = ["| scenario | executor | tasks | returned | failed | cancelled | never settled | failed though innocent "
             "| tasks/s | p99 | memory peak, pool | oracle |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"]
    for one in results:
        if one["why_skipped"]:
            lines.append(f"| {one['scenario']} | {one['label']} {'|' * 10} skipped: it lacks {one['why_skipped']} |")
            continue
        lines.append(
            f"| {one['scenario']} | {one['label']} | {one['accepted']:,} | {one['returned']:,} | {one['failed']:,} "
            f"| {one['cancelled']:,} | {one['never_settled']:,} | {one['innocent']:,} | {one['per_second']:,.0f} "
            f"| {milliseconds(one['latency']['p99'])} | {one['peak_pool_mb']:,.0f} MB | {word(one)} |")
    return "\n".join(lines)


def section(one: Result) -> str:
    """One run in full."""
    if one["why_skipped"]:
        return f"## {one['scenario']} ({one['label']})\n\nSkipped: {one['label']} lacks {one['why_skipped']}.\n"
    latency = ", ".join(f"{name} {milliseconds(value)}" for name, value in one["latency"].items())
    facts = {
        "verdict": word(one), "seed": one["seed"], "took": f"{one['seconds']:.1f} s",
        "tasks accepted": f"{one['accepted']:,}: {one['returned']:,} returned, {one['failed']:,} failed, "
                          f"{one['cancelled']:,} cancelled, {one['never_settled']:,} never settled",
        "submissions refused": _counts(one["refused"]), "errors": _counts(one["errors"]),
        "kinds of tasks": _counts(one["kinds"]), "faults injected": _counts(one["faults"]),
        "tasks lost to faults": one["lost_to_faults"], "failed though innocent": one["innocent"],
        "executors made anew": one["rebuilt"], "throughput": f"{one['per_second']:,.0f} a second",
        "latency, accepted to settled": latency,
        "memory peaks": f"pool {one['peak_pool_mb']:,.0f} MB in {one['peak_workers']} workers, "
                        f"one worker {one['peak_worker_mb']:,.0f} MB",
        "parent": _parent(one), "shutdown": f"{one['shutdown_seconds']:.2f} s",
        **{name: _counts(value) if isinstance(value, dict) else value for name, value in one["facts"].items()},
    }
    lines = [f"## {one['scenario']} ({one['label']})", "", one["title"] + ".", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value not in ("", 0)]
    lines += ["", "| rule | | |", "|---|---|---|"]
    for rule, found in one["rules"].items():
        note = found.get("why", "") or (f"{found['count']} times" if found["state"] == "broken" else "")
        lines.append(f"| {rule} | {RULES[rule]} | {_state(found['state'])}{': ' if note else ''}{note} |")
    for rule, found in one["rules"].items():
        lines += [f"\n**{rule}** is broken:\n", *(f"- {text}" for text in found.get("examples", ()))] if (
            found["state"] == "broken") else []
    lines += [f"\nLeft out: {name}: {why}" for name, why in one["skipped"].items()]
    return "\n".join(lines) + "\n"


def _state(state: str) -> str:
    return f"**{state}**" if state == "broken" else state


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count)


def _parent(one: Result) -> str:
    if not one["parent_mb"]:
        return ""
    text = f"{one['parent_mb'][0]:.0f} MB at first, {one['parent_mb'][1]:.0f} MB at last"
    if one["parent_growth_mb"] is not None:
        text += f"; over the last half {one['parent_growth_mb']:+.1f} MB, noise {one['parent_noise_mb']:.1f} MB"
    return text


def markdown(results: Sequence[Result]) -> str:
    """The whole page."""
    played = [one for one in results if not one["why_skipped"]]
    head = f"{played[0]['machine']}, Python {played[0]['python']}." if played else ""
    return "\n".join(["# Stress report", "", head, "", table(results), "", *map(section, results)])


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """`REPORT.md`, `report.json` and `report.html`; the paths."""
    from stress import page

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "REPORT.md", folder / "report.html", folder / "report.json"]
    texts = (markdown(results), page.html(results), json.dumps(list(results)))
    for path, text in zip(paths, texts, strict=True):
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        part.replace(path)
    return paths
