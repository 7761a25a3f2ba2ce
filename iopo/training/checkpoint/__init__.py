"""Checkpoints: writing, finding, reading, and resuming from them."""
