"""The report as one HTML file that needs nothing else, with a plot of everything over time."""

from __future__ import annotations

import html as escaping
import re
from collections.abc import Sequence
from typing import Any, Final

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --bad: #d33; --good: #1a9e55; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .8rem 0; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
svg { max-width: 100%; height: auto; } strong { color: var(--bad); } .good { color: var(--good); }
h2 { margin-top: 2.5rem; } .missing { color: #888; }
"""


def html(results: Sequence[dict[str, Any]]) -> str:
    """The page."""
    from stress import report

    played = [one for one in results if not one["why_skipped"]]
    head = f"{played[0]['machine']}, Python {played[0]['python']}" if played else ""
    body = ["<h1>Stress report</h1>", f"<p>{escaping.escape(head)}</p>", _from_markdown(report.table(results))]
    for one in results:
        title, _, rest = report.section(one).partition("\n")
        body += [_from_markdown(title), "" if one["why_skipped"] else _plot(one), _from_markdown(rest)]
    return (f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>Stress report</title>"
            f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>\n" + "\n".join(body)
            + "</html>\n")


def _plot(one: dict[str, Any]) -> str:
    if len(one["series"]) < 2:
        return "<p class='missing'>No plot: the run was over at once.</p>"
    try:
        from stress import plots
    except ImportError as error:
        return f"<p class='missing'>No plot: {escaping.escape(str(error))}. pip install -e '.[stress]'</p>"
    return plots.svg(one)


def _from_markdown(text: str) -> str:
    """Of what `stress.report` writes: headings, tables, lists, paragraphs, bold."""
    out: list[str] = []
    block = ""
    for line in [*text.splitlines(), ""]:
        kind = "table" if line.startswith("|") else "ul" if line.startswith("- ") else ""
        if kind != block:
            out += [f"</{block}></div>" if block == "table" else f"</{block}>"] if block else []
            out += ["<div class='wide'><table>" if kind == "table" else f"<{kind}>"] if kind else []
            block = kind
        if kind == "table":
            if not re.fullmatch(r"[|:\- ]+", line) or not line.strip("|- :"):
                cells = [] if re.fullmatch(r"\|[|:\-]+", line) else line.strip().strip("|").split("|")
                cells = [] if not any(cell.strip() for cell in cells) else cells
                out += ["<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in cells) + "</tr>"] if cells else []
        elif kind == "ul":
            out.append(f"<li>{_inline(line[2:])}</li>")
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            out.append(f"<h{level}>{_inline(line.lstrip('# '))}</h{level}>")
        elif line:
            out.append(f"<p>{_inline(line)}</p>")
    return "\n".join(out)


def _inline(text: str) -> str:
    safe = escaping.escape(text.strip())
    safe = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", safe)
    return f"<span class='good'>{safe}</span>" if safe in ("kept", "satisfied") else safe
