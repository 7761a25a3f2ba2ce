"""One `seed` drives named random streams, so that adding one stream never shifts another."""

import hashlib
import json
import random

import numpy as np
import torch


def stream_seed(seed: int, name: str, *where: int) -> int:
    """A 63-bit seed for the stream `name` at `where` (rank, step, ...), equal on every machine."""
    text = "/".join([str(seed), name, *map(str, where)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_process(seed: int, name: str, *where: int) -> None:
    """Seed Python, NumPy and torch (CPU and every GPU) of this process from one named stream."""
    value = stream_seed(seed, name, *where)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def rng_state() -> dict[str, torch.Tensor]:
    """The state of every generator of this process (torch, its GPU, NumPy, Python), as uint8."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    others = {"numpy": [kind, np.asarray(keys).tolist(), *rest], "python": random.getstate()}
    state = {
        "torch": torch.get_rng_state(),
        "others": torch.tensor(list(json.dumps(others).encode()), dtype=torch.uint8),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` returned, in this process or another of the same machine kind."""
    torch.set_rng_state(state["torch"])
    others = json.loads(bytes(state["others"].tolist()))
    np.random.set_state(tuple(others["numpy"]))
    version, keys, gauss = others["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
