"""Makes `broken_schedulers` and `stress` importable: with import-mode=importlib a test's folder is on no path."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
