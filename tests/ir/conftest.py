"""Makes the helpers beside these tests importable by their names: `strategies`, `naive`, `outcome` and others."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
