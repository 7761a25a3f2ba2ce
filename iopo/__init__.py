"""Input-Output Preference Optimization (IOPO) in plain PyTorch."""

import os

__version__ = "0.1.0"

# OpenMP's threads that wait for each other sleep after a tenth of a millisecond, not after twenty:
# beside a busy program they would else take each other's cores (docs/performance.md). libgomp reads
# this when torch loads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
