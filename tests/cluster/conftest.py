"""The small corpus and recipe stand beside the tests of the workers."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "workers"))
