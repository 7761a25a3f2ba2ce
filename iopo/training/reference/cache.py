"""Reference log-probs: named by a manifest, computed once, kept on disk, never from live weights.

    python -m iopo.training.reference [+experiment=NAME] [key=value ...]      fills it alone

A reference is the policy's starting point. Its log-probs never change, so they are computed once
per (weights, data) and shared by every run that starts there: four float32 numbers a quad. The
manifest says which weights, tokenizer, truncation, dtype and code made them; its hash names the
folder, so that anything that could change a number is another cache.

Letters: E examples, M members per example.
"""

import dataclasses
import fcntl
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import iopo
from iopo.data.layout import Batch
from iopo.data.tokenize import Example, content_key
from iopo.files import replacing, sha256_text

STORE_EVERY_ROUNDS = 64  # of fill: what a kill loses
STORE_EVERY_S = 60.0  # of FillingReference
FILL_POLL_S = 1.0  # while another run fills


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that determines a reference log-prob of a given example. All fields are hashed."""

    weights: str  # sha256 of the safetensors, adapter included
    tokenizer: str  # sha256 of tokenizer and chat template
    data: str  # sha256 of the training and held-out files
    truncation: str  # "prompt=1024,response=1024,overlong=drop"
    dtype: str
    layout: str  # shared | plain
    attention: str
    kernel: str  # which linear_logprob path
    torch: str = torch.__version__
    transformers: str = transformers.__version__
    iopo: str = iopo.__version__

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    def hash(self) -> str:
        """First 32 hex digits of the sha256 of the canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return sha256_text(text)[:32]


class Cache:
    """Log-probs by example content, in one folder: manifest.json, logps-{members}.npz.

    Safe for several runs at once: writers hold a lock and replace the file atomically, so a reader
    sees an old whole file or a new whole file.
    """

    def __init__(self, root: Path, manifest: Manifest):
        self.folder = Path(root) / manifest.hash()
        self.manifest = manifest

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
            intact = checksum.tobytes() == _checksum(keys, logps) and len(keys) == len(logps)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        if not intact:
            raise _damaged(path, "its checksum does not match")
        return {bytes(key).hex(): row for key, row in zip(keys, logps, strict=True)}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's lock, for as long as it takes to replace a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def filling(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Be the one run that computes missing rows; every rank enters together, rank 0 locks.

        While another run fills, all ranks call `waiting` every FILL_POLL_S: it may take hours, and
        is no hang. A killed run's lock goes with it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "filling", "w") as handle:
            while not _told_by_rank_0(lambda: _try_lock(handle)):
                waiting()
                time.sleep(FILL_POLL_S)
            yield

    def add(self, members: int, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Merge rows into the file, atomically, and return all. Call with the lock held.

        A row that is there already stays as it is: the runs that read it go on with its bits.
        """
        merged = rows | self.read(members)
        keys = np.array([np.frombuffer(bytes.fromhex(key), dtype=np.uint8) for key in merged])
        logps = np.array(list(merged.values()), dtype=np.float32)
        if not np.isfinite(logps).all():
            raise ValueError("reference log-probs: non-finite values; nothing was written")
        checksum = np.frombuffer(_checksum(keys, logps), dtype=np.uint8)
        (self.folder / "manifest.json").write_text(json.dumps(self.manifest.to_dict(), indent=2))
        with replacing(self.path(members)) as new:
            np.savez(new, keys=keys, logps=logps, checksum=checksum)
        return merged


def _try_lock(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told_by_rank_0(ask: Callable[[], bool]) -> bool:
    """What `ask` returns on rank 0, on every rank."""
    if not dist.is_initialized():
        return ask()
    told = [ask() if dist.get_rank() == 0 else False]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _checksum(keys: np.ndarray, logps: np.ndarray) -> bytes:
    return hashlib.sha256(keys.tobytes() + logps.tobytes()).digest()


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: this reference cache is damaged ({why}); delete it to recompute")


class CachedReference:
    """Looks log-probs up by content. `rows` may be shared by all examples of a run."""

    def __init__(self, rows: dict[str, np.ndarray], where: str):
        self.rows, self.where = rows, where

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """float32 [E, M] on CPU. Raises ValueError listing ids that are not in the cache."""
        found = [self.rows.get(content_key(example)) for example in examples]
        missing = [e.id for e, row in zip(examples, found, strict=True) if row is None]
        if missing:
            raise ValueError(
                f"{self.where}: no reference log-probs for {len(missing)} examples, first "
                f"{missing[:5]}; the data changed after the cache was filled"
            )
        return torch.from_numpy(np.stack([row for row in found if row is not None]))


class FillingReference:
    """Looks log-probs up; computes those that are missing when they are met, and stores them.

    For a frozen base under adapters: with the adapters off, the model is the reference at any time,
    so the first epoch can fill the cache on its way. Ranks and runs may fill one cache together:
    each stores its rows and takes over what the others have stored. What a killed run had not
    stored is computed again when it is met again.

    rows: those known at the start, for lookups of any members. members: of the rows to be added.
    score: batch -> float32 [E, M] of the reference, without gradient. expected: what this rank
    meets in the first epoch; when it has met all, the rows are stored at once, before any other
    rank asks for them in the second.
    """

    def __init__(
        self,
        cache: Cache,
        members: int,
        rows: dict[str, np.ndarray],
        score: Callable[[Batch], Tensor],
        expected: Iterable[Example],
    ):
        self.cache, self.members, self.rows, self.score = cache, members, rows, score
        self.expected = {content_key(example) for example in expected} - rows.keys()
        self.fresh: dict[str, np.ndarray] = {}
        self.seen, self.stored_at = self._version(), time.monotonic()

    def __call__(self, examples: Sequence[Example], batch: Batch) -> Tensor:
        """float32 [E, M] on the CPU; batch: of the examples, in the run's layout."""
        keys = [content_key(example) for example in examples]
        self.expected -= set(keys)
        if not self.rows.keys() >= set(keys) and self._version() != self.seen:
            self.seen = self._version()
            self.rows |= self.cache.read(self.members)
        if not self.rows.keys() >= set(keys):
            logps_EM = self.score(batch).float().cpu().numpy()
            for key, row in zip(keys, logps_EM, strict=True):
                if key not in self.rows:
                    self.rows[key] = self.fresh[key] = row
        if not self.expected or time.monotonic() - self.stored_at > STORE_EVERY_S:
            self.store()
        return torch.from_numpy(np.stack([self.rows[key] for key in keys]))

    def store(self) -> None:
        """Write what was computed since the last time; does nothing if that is nothing."""
        if self.fresh:
            with self.cache.lock():
                self.rows |= self.cache.add(self.members, self.fresh)
                self.seen = self._version()
            self.fresh, self.stored_at = {}, time.monotonic()

    def _version(self) -> tuple[int, int] | None:
        """Changes with every replacement of the file."""
        try:
            status = self.cache.path(self.members).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino


def missing_examples(rows: dict[str, np.ndarray], examples: Sequence[Example]) -> list[Example]:
    """The examples whose content is not among `rows`, each content once."""
    wanted = {content_key(example): example for example in examples}
    return [example for key, example in wanted.items() if key not in rows]


def fill(
    cache: Cache,
    examples: Sequence[Example],
    members: int,
    score: Callable[[Sequence[Example]], Tensor],
    batches: Callable[[Sequence[Example]], list[list[int]]],
    progress: Callable[[int, int], None],
    waiting: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Make sure every example has a row and return all rows. Called by every rank together.

    score: examples -> float32 [E, M] with the reference weights, no gradient. batches: examples ->
    index lists that fit in memory; equal lists on every rank. Another run that wants the same rows
    meanwhile waits, calling `waiting`, and then finds them. Rows are stored every
    STORE_EVERY_ROUNDS batches a rank, so that a killed fill goes on from there.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if _told_by_rank_0(lambda: not missing_examples(cache.read(members), examples)):
        return cache.read(members)
    with cache.filling(waiting):
        return _fill_share(cache, examples, members, score, batches, progress, rank, world)


def _fill_share(cache, examples, members, score, batches, progress, rank, world):
    rows = cache.read(members)
    todo = missing_examples(rows, examples)
    if not todo:
        return rows
    groups = batches(todo)
    mine: dict[str, np.ndarray] = {}
    # Sharded weights are gathered by every rank in step, so each rank runs as many forwards as the
    # busiest one; the last round of a rank without work repeats a group and drops the result.
    rounds = -(-len(groups) // world)
    for i in range(rounds):
        index = i * world + rank
        group = [todo[j] for j in groups[index if index < len(groups) else 0]]
        logps_EM = score(group).float().cpu().numpy()
        if index < len(groups):
            mine |= {content_key(e): row for e, row in zip(group, logps_EM, strict=True)}
        progress(i + 1, rounds)
        if (i + 1) % STORE_EVERY_ROUNDS == 0 or i + 1 == rounds:
            rows |= _exchange(cache, members, mine, rank, world)
            mine = {}
    return rows


def _exchange(cache, members, mine, rank, world) -> dict[str, np.ndarray]:
    """What all ranks have computed, stored by rank 0."""
    if world > 1:
        shares: list = [None] * world
        dist.all_gather_object(shares, mine)
        mine = {key: row for share in shares for key, row in share.items()}
    if rank == 0:
        with cache.lock():
            cache.add(members, mine)
    if world > 1:
        dist.barrier()
    return mine


def recheck(
    reference: CachedReference,
    examples: Sequence[Example],
    score: Callable[[Sequence[Example]], Tensor],
    tolerance: float,
) -> float:
    """Score a few examples again and compare with the cache; the largest difference in nats.

    Raises ValueError above `tolerance` (nats per response): the cache is of other weights, or the
    numbers are not reproducible on this machine.
    """
    difference = (score(examples).float().cpu() - reference(examples)).abs().max().item()
    if not difference <= tolerance:
        raise ValueError(
            f"{reference.where}: cached log-probs differ from recomputed ones by {difference:.3g} "
            f"nats (tolerance {tolerance:.3g}); delete the cache, or use reference.source=live"
        )
    return difference
