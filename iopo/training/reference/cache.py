"""Reference log-probs: named by a manifest, computed once, kept on disk, never from live weights.

Computed once per (weights, data) and shared by every run that starts there: four float32 numbers a
quad. The manifest (sources.py) says which weights, tokenizer, truncation, dtype and code made them;
its hash names the folder, so that anything that could change a number is another cache.

Letters: E examples, M members per example.
"""

import fcntl
import hashlib
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from iopo.data.batching import Batching, pass_micro_batches, token_counts
from iopo.data.example import Example, content_key
from iopo.files import replacing, sha256_text, write_text
from iopo.model.identity import differing
from iopo.progress import progress, tracked
from iopo.training.launch.placement import from_rank_0
from iopo.training.launch.signals import heartbeat

STORE_EVERY_ROUNDS = 64  # of fill: what a kill loses
FILL_POLL_S = 1.0  # while another run fills

log = logging.getLogger(__name__)


def manifest_hash(manifest: dict[str, str]) -> str:
    """First 32 hex digits of the sha256 of the canonical JSON."""
    return sha256_text(json.dumps(manifest, sort_keys=True))[:32]


class Cache:
    """Log-probs by example content, in one folder: manifest.json, logps-{members}.npz.

    Safe for several runs at once: one at a time fills it and replaces the file in one step.
    """

    def __init__(self, root: Path, manifest: dict[str, str]):
        self.folder = root / manifest_hash(manifest)
        self.manifest = manifest

    def nearest(self) -> list[str]:
        """What a new cache does not share with the one that shares most; [] if it is not new."""
        if self.folder.exists():
            return []
        files = self.folder.parent.glob("*/manifest.json")
        others = [differing(json.loads(file.read_text()), self.manifest) for file in files]
        return min(others, key=len, default=[])

    def path(self, members: int) -> Path:
        return self.folder / f"logps-{members}.npz"

    def read(self, members: int) -> dict[str, np.ndarray]:
        """All rows, key -> float32 [members]; {} if there is no file yet.

        Raises ValueError if the file is damaged: a cache that cannot be trusted is never used.
        """
        path = self.path(members)
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as file:
                keys, logps, checksum = file["keys"], file["logps"], file["checksum"]
            if checksum.tobytes() != _checksum(keys, logps):
                raise ValueError("its checksum does not match")
            return {bytes(key).hex(): row for key, row in zip(keys, logps, strict=True)}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: this reference cache is damaged ({type(error).__name__}: {error}); "
                "delete it to recompute"
            ) from error

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Be the one run that computes missing rows; every rank enters together, rank 0 locks.

        While another run fills, all ranks wait, for hours if need be; a killed run holds no lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "filling", "w") as handle:

            def lock() -> bool:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            waiting = False
            while not from_rank_0(lock):
                if not waiting:
                    log.info("reference: another run is filling this cache; waiting for it")
                waiting = True
                heartbeat()
                time.sleep(FILL_POLL_S)
            yield

    def add(self, members: int, rows: dict[str, np.ndarray]) -> None:
        """Merge rows into the file, in one step; only inside `filling`, on rank 0.

        A row that is there already stays as it is: the runs that read it go on with its bits.
        """
        merged = rows | self.read(members)
        keys = np.array([np.frombuffer(bytes.fromhex(key), dtype=np.uint8) for key in merged])
        logps = np.array(list(merged.values()), dtype=np.float32)
        if not np.isfinite(logps).all():
            raise ValueError("reference log-probs: non-finite values; nothing was written")
        checksum = np.frombuffer(_checksum(keys, logps), dtype=np.uint8)
        write_text(self.folder / "manifest.json", json.dumps(self.manifest, indent=2))
        with replacing(self.path(members)) as new:
            np.savez(new, keys=keys, logps=logps, checksum=checksum)


def _checksum(keys: np.ndarray, logps: np.ndarray) -> bytes:
    return hashlib.sha256(keys.tobytes() + logps.tobytes()).digest()


def look_up(rows: dict[str, np.ndarray], examples: Sequence[Example], where: Path) -> Tensor:
    """float32 [E, M] on CPU. Raises ValueError listing ids that are not in the cache `where`."""
    keys = [content_key(example) for example in examples]
    missing = [e.id for e, key in zip(examples, keys, strict=True) if key not in rows]
    if missing:
        raise ValueError(
            f"{where}: no reference log-probs for {len(missing)} examples, first {missing[:5]}; "
            "the data changed after the cache was filled: start the run again to compute them"
        )
    return torch.from_numpy(np.stack([rows[key] for key in keys]))


def missing_examples(rows: dict[str, np.ndarray], examples: Sequence[Example]) -> list[int]:
    """Which examples' content is not among `rows`, each content once."""
    wanted = {content_key(example): i for i, example in enumerate(examples)}
    return [i for key, i in wanted.items() if key not in rows]


def fill(
    cache: Cache,
    examples: Sequence[Example],
    members: int,
    score: Callable[[Sequence[Example]], Tensor],
    batching: Batching,
) -> dict[str, np.ndarray]:
    """Compute and store the rows that are missing; returns all rows. Every rank calls it together.

    score: examples -> float32 [E, M] with the reference weights, no gradient. batching: of one
    rank; says which examples fit in memory together. Rows are stored every STORE_EVERY_ROUNDS
    batches of a rank: a killed fill goes on from there.
    """
    if not examples:
        return {}
    with progress(None, "looking for the data's reference log-probs"):
        if from_rank_0(lambda: not missing_examples(cache.read(members), examples)):
            return cache.read(members)
    with cache.filling():
        rows = cache.read(members)
        todo = np.array(missing_examples(rows, examples), dtype=np.int64)
        tokens_N = token_counts(examples, batching.layout)[todo]
        groups = pass_micro_batches(tokens_N, batching, 0)
        batches = [todo[list(group)].tolist() for group in groups if group]
        return rows | _compute(cache, members, examples, batches, score)


def _compute(
    cache: Cache,
    members: int,
    examples: Sequence[Example],
    batches: list[list[int]],
    score: Callable[[Sequence[Example]], Tensor],
) -> dict[str, np.ndarray]:
    """Compute and store the rows of all batches, which the ranks share; returns them."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Sharded weights are gathered by every rank in step, so each rank runs as many forwards as the
    # busiest one; in the last round a rank without work repeats a batch and drops the result.
    rounds = -(-len(batches) // world)
    mine: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    for done in tracked(range(1, rounds + 1), "batches of the reference"):
        index = (done - 1) * world + rank
        batch = [examples[i] for i in batches[index if index < len(batches) else 0]]
        logps_EM = score(batch).float().cpu().numpy()
        if index < len(batches):
            mine |= {content_key(e): row for e, row in zip(batch, logps_EM, strict=True)}
        heartbeat()
        if done == rounds or done % STORE_EVERY_ROUNDS == 0:
            shares: list[dict[str, np.ndarray]] = [mine] * world
            if dist.is_initialized():
                dist.all_gather_object(shares, mine)
            fresh = {key: row for share in shares for key, row in share.items()}
            rows, mine = rows | fresh, {}
            if rank == 0:
                cache.add(members, fresh)
    return rows


def recheck(
    cached_EM: Tensor, again_EM: Tensor, tokens_EM: Tensor, tolerance: float, where: Path
) -> float:
    """How far cached log-probs are from those scored again: nats per square root of a response's
    tokens, root mean square over all members.

    Rounding adds up at random over the tokens, and the largest of some members says little of it.
    Raises ValueError above `tolerance`: the cache was made with this model and these versions, so
    the machine computes otherwise than the one that made it.
    """
    scaled_EM = (again_EM.float().cpu() - cached_EM) / tokens_EM.sqrt()
    difference = scaled_EM.square().mean().sqrt().item()
    if not difference <= tolerance:
        raise ValueError(
            f"{where}: cached log-probs differ from recomputed ones by {difference:.3g} nats per "
            f"square root of a token (tolerance {tolerance:.3g}). Its manifest is this run's "
            "(weights, config, tokenizer, data, versions), so the machine that filled it computes "
            "otherwise. Set reference.cache_dir to a folder of this run's own, or "
            "reference.source=live; leave this cache to the runs that share it"
        )
    return difference
