"""Timings and memory: `python -m benchmarks.<name>` prints a table and writes JSON."""
