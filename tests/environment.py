"""Set before anything heavy is imported: conftest.py imports this first."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two workers share the cores; it moves no number
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# processes that a test starts import this checkout, whichever is installed
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
