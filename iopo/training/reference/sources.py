"""The reference of a run: looked up in a cache on disk, computed on the way, or a second model."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iopo import objectives
from iopo.config import ReferenceSource, TrainConfig
from iopo.data.batching import micro_batches, pass_micro_batches, plan_steps, token_counts
from iopo.data.layout import Batch
from iopo.data.tokenize import Example, content_key
from iopo.files import cache_root
from iopo.logprobs import LogProbs
from iopo.model import load, lora
from iopo.model.attention import SHARED
from iopo.model.parallel import TrainModel, make_mesh, prepare
from iopo.objectives import MEMBERS
from iopo.training import setup
from iopo.training.inputs import Inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.loop import Job, Reference
from iopo.training.reference.cache import (
    Cache,
    CachedReference,
    FillingReference,
    Manifest,
    fill,
    missing_examples,
    recheck,
)

FORWARD_TOKENS = 2  # times the tokens of a training micro-batch, where nothing is kept for backward


def manifest(cfg: TrainConfig, inputs: Inputs, device_type: str) -> Manifest:
    """What names the reference log-probs of this run; see iopo/reference.py."""
    if inputs.model_path is None:
        weights = "tiny " + repr(sorted((cfg.model.tiny or {}).items()))
    else:
        weights = load.weights_hash(inputs.model_path)
    if cfg.model.adapter is not None:
        weights += " adapter " + load.weights_hash(cfg.model.adapter)
    d = cfg.data
    return Manifest(
        weights=weights,
        tokenizer=inputs.tokenizer_hash,
        data=inputs.data_hash,
        truncation=f"{d.max_prompt_tokens} {d.max_response_tokens} {d.on_overlong.value}",
        dtype=str(setup.compute_dtype(cfg, device_type)),
        layout=d.layout.value,
        attention=SHARED if d.layout.value == "shared" else "sdpa",
        kernel=f"linear_logprob {device_type}",
    )


def cache_folder(cfg: TrainConfig) -> Path:
    """The folder that holds the caches of all manifests."""
    return Path(cfg.reference.cache_dir or cache_root() / "reference")


def make_reference(
    cfg: TrainConfig,
    inputs: Inputs,
    job: Job,
    ranks: RankInfo,
    train_model: TrainModel,
    say: Callable[[str], None],
    alive: Callable[[], None],
) -> Reference | None:
    """The reference, built while the policy holds its starting weights; None if not needed.

    Call it before a checkpoint is loaded: a reference is never taken from trained weights. Every
    rank calls it together.
    """
    if not objectives.OBJECTIVES[cfg.objective.name].reference:
        return None
    source = cfg.reference.source
    policy = setup.policy_of(train_model)
    if source is ReferenceSource.adapter_off:
        check_adapter_off(policy)
        score = base_score(policy)
        return Reference(
            lambda rows, batch: score(batch),
            "adapter_off",
            "the base under the adapters",
            1e-6,
            collective=train_model.sharded,
        )
    if source is ReferenceSource.live:
        frozen = _frozen_copy(cfg, inputs, ranks)

        def live(rows: Sequence[Example], batch: Batch) -> Tensor:
            with torch.no_grad():
                return frozen(batch)

        return Reference(
            live,
            "live",
            "a frozen copy of the starting weights",
            1e-6,
            collective=setup.shards(cfg, ranks.world_size),
        )
    cache = Cache(cache_folder(cfg), manifest(cfg, inputs, job.device.type))
    if source is ReferenceSource.auto and fills_on_the_way(cfg, train_model):
        return _filling(cfg, cache, job, train_model, say, alive)
    return _cached(cfg, cache, job, train_model, say, alive)


def fills_on_the_way(cfg: TrainConfig, train_model: TrainModel) -> bool:
    """Whether the first epoch computes the reference itself, with the adapters off.

    It costs what filling before the start costs, but no time passes before the first step and a run
    that stops early has computed no more than it used. With one epoch nothing is read again. A
    sharded base cannot: its forward needs all ranks, and each misses other rows.
    """
    adapted = lora.starts_at_zero(train_model.model)
    return adapted and not train_model.sharded and cfg.optim.epochs > 1


def base_score(policy: LogProbs) -> Callable[[Batch], Tensor]:
    """Log-probs of the base under the adapters, without gradient."""

    def score(batch: Batch) -> Tensor:
        with torch.no_grad(), lora.adapter_off(policy):
            return policy(batch)

    return score


def check_adapter_off(policy: LogProbs) -> None:
    """Refuse "adapter off" where the base is not the reference."""
    if not lora.adapters(policy):
        raise ValueError(
            "reference.source=adapter_off needs adapters; set model.lora.rank, or use cache or live"
        )
    if not lora.starts_at_zero(policy):
        raise ValueError(
            "reference.source=adapter_off: the adapters do not start at zero, so the model without "
            "them is not where training starts; use reference.source=cache or live"
        )


def _frozen_copy(cfg: TrainConfig, inputs: Inputs, ranks: RankInfo) -> LogProbs:
    dtype = setup.compute_dtype(cfg, ranks.device.type)
    frozen = setup.load_model(cfg, inputs, dtype).requires_grad_(False).eval()
    shard = setup.shards(cfg, ranks.world_size)
    mesh = make_mesh(ranks.device.type, cfg.parallel.shard_processes) if shard else None
    prepare(frozen, device=ranks.device, dtype=dtype, mesh=mesh, offload=cfg.parallel.offload)
    return frozen


def _filling(
    cfg: TrainConfig,
    cache: Cache,
    job: Job,
    train_model: TrainModel,
    say: Callable[[str], None],
    alive: Callable[[], None],
) -> Reference:
    """Held-out rows are needed at once and filled; training rows as the first epoch meets them."""
    members = objectives.OBJECTIVES[cfg.objective.name].members

    def progress(done: int, total: int) -> None:
        alive()

    waiting = _waiting(say, alive)
    filled = fill_rows(cache, job, job.heldout, len(MEMBERS), train_model, progress, waiting)
    rows = cache.read(members) | filled
    missing = missing_examples(rows, job.examples)
    if missing:
        say(
            f"reference: {len(missing)} of {len(job.examples)} examples are not in {cache.folder}; "
            "the first epoch computes them with the adapters off and stores them"
        )
    score = base_score(setup.policy_of(train_model))
    per_epoch = plan_steps(len(job.examples), job.batching, epochs=1)
    batches = [micro_batches(job.tokens_N, job.batching, s, job.rank) for s in range(per_epoch)]
    mine = [job.examples[i] for step in batches for indices in step for i in indices or ()]
    filling = FillingReference(cache, members, rows, score, mine)
    known = [example for example in job.examples if content_key(example) in rows]
    _recheck(cfg, job, CachedReference(rows, str(cache.folder)), known, train_model, say)
    return Reference(
        filling,
        "cache",
        str(cache.folder),
        _tolerance(cfg, job),
        _rounding(cfg, job, job.examples),
        filling.store,
    )


def _cached(
    cfg: TrainConfig,
    cache: Cache,
    job: Job,
    train_model: TrainModel,
    say: Callable[[str], None],
    alive: Callable[[], None],
) -> Reference:
    def progress(done: int, total: int) -> None:
        alive()
        if done == total or done % max(1, total // 10) == 0:
            say(f"reference: {done} of {total} batches")

    members, waiting = objectives.OBJECTIVES[cfg.objective.name].members, _waiting(say, alive)
    rows = fill_rows(cache, job, job.examples, members, train_model, progress, waiting)
    rows = rows | fill_rows(cache, job, job.heldout, len(MEMBERS), train_model, progress, waiting)
    reference = CachedReference(rows, str(cache.folder))
    _recheck(cfg, job, reference, job.examples, train_model, say)
    return Reference(
        lambda rows, batch: reference(rows),
        "cache",
        str(cache.folder),
        _tolerance(cfg, job),
        _rounding(cfg, job, job.examples),
    )


def fill_rows(
    cache: Cache,
    job: Job,
    examples: Sequence[Example],
    members: int,
    train_model: TrainModel,
    progress: Callable[[int, int], None],
    waiting: Callable[[], None],
) -> dict[str, np.ndarray]:
    """All rows of the cache after those of `examples` are in it; every rank calls it together."""
    if not examples:
        return {}
    alone = dataclasses.replace(job.batching, ranks=1)
    if alone.tokens_per_microbatch is not None:  # without gradients, a forward needs little memory
        more = FORWARD_TOKENS * alone.tokens_per_microbatch
        alone = dataclasses.replace(alone, tokens_per_microbatch=more)

    def batches(rows: Sequence[Example]) -> list[list[int]]:
        groups = pass_micro_batches(token_counts(rows, alone.layout), alone, 0)
        return [list(group) for group in groups if group]

    return fill(cache, examples, members, _score_now(job, train_model), batches, progress, waiting)


def _waiting(say: Callable[[str], None], alive: Callable[[], None]) -> Callable[[], None]:
    """What a run does while another one fills the cache: says so once, and shows that it lives."""
    said: list[bool] = []

    def waiting() -> None:
        if not said:
            said.append(True)
            say("reference: another run is filling this cache; waiting for it")
        alive()

    return waiting


def _score_now(job: Job, train_model: TrainModel) -> Callable[[Sequence[Example]], Tensor]:
    """Log-probs of the weights as they are, without gradient."""

    def score(rows: Sequence[Example]) -> Tensor:
        with torch.no_grad():
            return train_model.model(job.build(rows))

    return score


def _recheck(
    cfg: TrainConfig,
    job: Job,
    reference: CachedReference,
    known: Sequence[Example],
    train_model: TrainModel,
    say: Callable[[str], None],
) -> None:
    few = known[: cfg.reference.recheck_rows]
    if few:
        tolerance = _rounding(cfg, job, few) if _rounds(cfg, job) else 1e-2
        difference = recheck(reference, few, _score_now(job, train_model), tolerance)
        say(f"reference: {len(few)} cached rows scored again, differ by {difference:.2g} nats")


def _tolerance(cfg: TrainConfig, job: Job) -> float:
    """Largest difference of the loss at step 0 from its value at policy == reference."""
    return 0.1 if _rounds(cfg, job) else 1e-6


def _rounding(cfg: TrainConfig, job: Job, examples: Sequence[Example]) -> float:
    """Largest log-ratio, in nats, of equal weights in batches of different shapes."""
    if not _rounds(cfg, job):
        return 1e-4
    longest = max(len(r) for e in examples for responses in e.responses for r in responses)
    return 0.5 + 0.05 * math.sqrt(longest)  # some 0.03 nats a token, at random


def _rounds(cfg: TrainConfig, job: Job) -> bool:
    return setup.compute_dtype(cfg, job.device.type) is torch.bfloat16
