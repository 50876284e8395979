"""Makes the helpers beside these tests importable: `strategies`, `naive`, `outcome` and the others that are no tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
