"""The helpers beside these tests are importable by their own names."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

# torch.autograd judges the gradients; where there is no torch, the rest is tested.
collect_ignore = [] if find_spec("torch") else ["test_grad.py"]
sys.path.insert(0, str(Path(__file__).resolve().parent))
