"""Installs the agent programs of the acceptance tests into a folder, from the package registries, and says what it has.

    python tests/acceptance/install.py FOLDER

What cannot be had is named with the reason, and its tests are skipped with it. A second call installs nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

#: Seconds for one package.
LIMIT = 600


def pip(folder: Path, package: str) -> str:
    """Into an environment of its own; what went wrong, or an empty text."""
    python = folder / "bin" / "python"
    if not python.exists():
        said = call([sys.executable, "-m", "venv", str(folder)])
        if said:
            return said
    return call([str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", package])


def npm(folder: Path, package: str) -> str:
    if shutil.which("npm") is None:
        return "npm is not on PATH"
    folder.mkdir(parents=True, exist_ok=True)
    return call(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), package])


def call(command: list[str]) -> str:
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return "" if ended.returncode == 0 else f"{' '.join(command)} failed: {ended.stderr.strip()[-600:]}"


def find(folder: Path, name: str) -> str:
    """The program below the folder: a native one before a script. Files only: links lead to the same."""
    found = sorted((path for path in folder.rglob(name) if path.is_file() and path.stat().st_mode & 0o111),
                   key=lambda path: -path.stat().st_size)
    return str(found[0]) if found else ""


#: name -> (how to install it, package, the program's file name)
PROGRAMS = {
    "claude": (pip, "claude-agent-sdk", "claude"),
    "codex": (npm, "@openai/codex", "codex"),
    "llm": (pip, "llm", "llm"),
    "gemini": (npm, "@google/gemini-cli", "gemini"),
    "opencode": (npm, "opencode-ai", "opencode"),
    "copilot": (npm, "@github/copilot", "copilot"),
}


def main(folder: Path) -> None:
    report = {}
    for name, (install, package, program) in PROGRAMS.items():
        place = folder / name
        path = find(place, program)
        problem = ""
        if not path:
            print(f"{name}: installing {package}", flush=True)
            problem = install(place, package)
            path = "" if problem else find(place, program)
        if not path:
            problem = problem or f"{package} was installed, and has no program {program!r}"
        print(f"{name}: {path or 'skipped: ' + problem}", flush=True)
        report[name] = {"path": path, "problem": problem}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "programs.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
