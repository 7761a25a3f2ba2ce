"""Timings and memory: `python -m benchmarks.<name>` prints a table and writes JSON."""

import iopo  # noqa: F401  before torch, as in train.py: it sets how OpenMP's threads wait
