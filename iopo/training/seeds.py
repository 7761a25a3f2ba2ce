"""One `seed` drives named random streams, so that adding one stream never shifts another."""

import hashlib
import random

import numpy as np
import torch


def stream_seed(seed: int, name: str, *where: int) -> int:
    """A 63-bit seed for the stream `name` at the position `where` (rank, step, ...).

    A pure function of its arguments, equal on every machine and Python version.
    """
    text = "/".join([str(seed), name, *map(str, where)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_process(seed: int, name: str, *where: int) -> None:
    """Seed Python, NumPy and torch (CPU and every GPU) of this process from one named stream."""
    value = stream_seed(seed, name, *where)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
