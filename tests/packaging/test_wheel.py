"""The wheel, as a user gets it: built, installed into a fresh environment, used with the source folder out of reach.

Needs the package registry, for the build's and the wheel's own dependencies.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Seconds for one step of the installation.
LIMIT = 120

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5 * LIMIT)]

PROBE = """
import importlib.util, json, sys
import agentpool, agentpool_worker
print(json.dumps({
    "path": sys.path,
    "files": [agentpool.__file__, agentpool_worker.__file__],
    "version": agentpool.__version__,
    "missing": [name for name in agentpool.__all__ if not hasattr(agentpool, name)],
    "workers": importlib.util.find_spec("workers") is not None,
}))
"""

RUN = """
from agentpool import AgentPool
with AgentPool(max_workers=1) as pool:
    print(pool.submit(lambda number: number + 1, 41).result(timeout=60))
"""


def _environment(folder: Path) -> dict[str, str]:
    """Without what leads back to the source folder or to the outer run's settings."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "COV_", "PYTEST_", "VIRTUAL_ENV"))}
    return kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "TMPDIR": str(folder)}


def _run(folder: Path, *command: str | Path) -> str:
    """Standard output of a command that must succeed. It is run in `folder`, which holds no source."""
    ended = subprocess.run([str(part) for part in command], cwd=folder, env=_environment(folder), text=True,
                           stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Where the build back end is installed already, nothing is fetched for the build.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    _run(folder, sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder / "dist", ROOT)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The programs' folder of an environment with the wheel, and an empty folder to work in."""
    folder = tmp_path_factory.mktemp("installed")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    _run(elsewhere, programs / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cli]")
    return programs, elsewhere


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        tops = {name.partition("/")[0] for name in names}
        (metadata_folder,) = {top for top in tops if top.endswith(".dist-info")}
        metadata = archive.read(f"{metadata_folder}/METADATA").decode()
    assert tops == {"agentpool", "agentpool_worker", metadata_folder}
    assert {"agentpool/py.typed", "agentpool_worker/py.typed"} <= set(names)
    assert f"{metadata_folder}/licenses/LICENSE" in names
    assert "\nName: agentpool-runtime\n" in metadata
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    sources = {f"agentpool/{path.relative_to(ROOT / 'agentpool').as_posix()}" for path in
               (ROOT / "agentpool").rglob("*.py")}
    assert sources <= set(names)


def test_both_packages_are_imported_from_it(installed: tuple[Path, Path]) -> None:
    programs, elsewhere = installed
    found = json.loads(_run(elsewhere, programs / "python", "-c", PROBE))
    site = str(programs.parent)
    assert not [entry for entry in found["path"] if Path(entry).is_relative_to(ROOT)], "the source folder is in reach"
    assert all(file.startswith(site) for file in found["files"]), found["files"]
    assert not found["missing"], "names of __all__ that are not there"
    assert not found["workers"], "a top-level module called `workers` is importable"


def test_the_command_says_its_version(installed: tuple[Path, Path]) -> None:
    programs, elsewhere = installed
    version = json.loads(_run(elsewhere, programs / "python", "-c", PROBE))["version"]
    assert version in _run(elsewhere, programs / "agentpool", "--version").split()
    assert version in _run(elsewhere, programs / "python", "-m", "agentpool", "--version").split()


def test_a_pool_of_it_runs_a_task(installed: tuple[Path, Path]) -> None:
    programs, elsewhere = installed
    assert _run(elsewhere, programs / "python", "-c", RUN).strip() == "42"


def test_the_library_needs_no_extra(wheel: Path, installed: tuple[Path, Path]) -> None:
    """What `[cli]` brings is imported by the command only."""
    programs, elsewhere = installed
    probe = "import agentpool, agentpool.monitor, agentpool.pool, sys; print({'typer', 'rich'} & set(sys.modules))"
    assert _run(elsewhere, programs / "python", "-c", probe).strip() == "set()"
