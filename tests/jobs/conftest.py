"""The small corpus and recipe stand beside the tests of the workers, what compares runs beside those of the cluster."""

import sys
from pathlib import Path

for room in ("workers", "cluster"):
    sys.path.append(str(Path(__file__).parents[1] / room))
