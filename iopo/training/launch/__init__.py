"""Processes of a run: placement, launch, signals, failures, the run folder."""
