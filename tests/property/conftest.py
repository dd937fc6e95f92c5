"""Makes `fake_crew` importable: with import-mode=importlib a test's folder is on no path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
