"""The three sources of a run's reference: a cache on disk, a second model, the base under adapters.

All are built while the policy holds its starting weights, before a checkpoint is loaded: a
reference is never taken from trained weights.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

import iopo
from iopo.config import DataConfig, ModelConfig, ReferenceConfig
from iopo.data.batching import member_counts
from iopo.data.layout import Batch
from iopo.data.tokenize import Example
from iopo.files import cache_root
from iopo.model import load, lora
from iopo.model.identity import identity
from iopo.model.parallel import TrainModel
from iopo.objectives import MEMBERS
from iopo.progress import progress
from iopo.training.inputs import Inputs, attention_of
from iopo.training.loop import Job, Reference
from iopo.training.reference.cache import Cache, fill, look_up, recheck

FORWARD_TOKENS = 2  # times the tokens of a training micro-batch, where nothing is kept for backward
EXACT = 1e-6  # of the loss at step 0, where policy and reference are computed alike
# Of equal bf16 weights in batches of different shapes: nats per square root of a response's tokens,
# root mean square; 0.050 and 0.048 on a CPU with AMX, over 48 quads, at most 0.074 over four.
BF16_ROUNDING = 0.05
# Of fp32 and fp64, chosen, not measured: the last bit of a sum of 2,048 nats in float32, as in the
# cache, is 2.4e-4 nats.
FP32_ROUNDING = 3e-4

log = logging.getLogger(__name__)


def manifest(
    model: ModelConfig, data: DataConfig, inputs: Inputs, device_type: str
) -> dict[str, str]:
    """Everything that determines a reference log-prob of a given example, by name."""
    # of model.tiny; a folder's weights take its place
    tiny = {"weights": "tiny " + repr(sorted((model.tiny or {}).items()))}
    return (
        tiny
        | identity(inputs.model_path, inputs.chat, model.adapter)
        | {
            "data": inputs.data_hash,
            "truncation": f"{data.max_prompt_tokens} {data.max_response_tokens} {data.on_overlong}",
            "dtype": str(load.compute_dtype(model.dtype, device_type)),
            "layout": data.layout.value,
            "attention": attention_of(data.layout),
            "kernel": f"linear_logprob {device_type}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "iopo": iopo.__version__,
        }
    )


def inputs_of_other(inputs: Inputs, path: str) -> Inputs:
    """The same rows and tokens for the model of reference.path.

    Raises ValueError for a folder without weights, and where the tokens mean something else there.
    """
    folder = load.resolve_model(path)
    if load.load_tokenizer(folder).get_vocab() != inputs.chat.tokenizer.get_vocab():
        raise ValueError(
            f"reference.path: {path} has another vocabulary than the policy, whose tokens it would "
            "score; give a model of the same family"
        )
    return dataclasses.replace(inputs, model_path=folder)


def cache_folder(cfg: ReferenceConfig) -> Path:
    """The folder that holds the caches of all manifests."""
    return Path(cfg.cache_dir or cache_root() / "reference")


def adapter_off(policy: TrainModel) -> Reference:
    """The policy with its adapters off, computed in every epoch."""

    @torch.no_grad()
    def call(rows: Sequence[Example], batch: Batch) -> Tensor:
        with lora.adapter_off(policy.model):
            return policy.model(batch)

    return Reference(call, "the base under the adapters", EXACT, collective=policy.sharded)


def live(frozen: TrainModel) -> Reference:
    """A second model with the starting weights."""

    @torch.no_grad()
    def call(rows: Sequence[Example], batch: Batch) -> Tensor:
        return frozen.model(batch)

    where = "a frozen copy of the starting weights"
    return Reference(call, where, EXACT, collective=frozen.sharded)


def cached(cache: Cache, job: Job, model: TrainModel, recheck_rows: int) -> Reference:
    """Rows of the cache, after those that miss are computed. Every rank calls it together.

    recheck_rows: examples scored again and compared with the cache.
    """
    budget = job.batching.tokens_per_microbatch
    more = None if budget is None else FORWARD_TOKENS * budget  # a forward needs little memory
    batching = dataclasses.replace(job.batching, ranks=1, tokens_per_microbatch=more)

    @torch.no_grad()
    def score(rows: Sequence[Example]) -> Tensor:
        return model.model(job.build(rows))

    if len(others := cache.nearest()) == 1:  # a cache that differs in more is of another run
        log.info(f"reference: a new cache; one that is there differs in its {others[0]} alone")
    members = len(job.examples[0].members())
    rows = fill(cache, job.examples, members, score, batching)
    rows = rows | fill(cache, job.heldout, len(MEMBERS), score, batching)
    rounds = model.dtype is torch.bfloat16
    rounding = BF16_ROUNDING if rounds else FP32_ROUNDING
    if few := job.examples[:recheck_rows]:
        tokens_EM = torch.from_numpy(member_counts(few)[1])
        with progress(None, "scoring some cached rows again"):
            again = score(few)
        difference = recheck(
            look_up(rows, few, cache.folder), again, tokens_EM,
            3 * rounding, cache.folder,
        )  # fmt: skip
        log.info(
            f"reference: {len(few)} cached rows scored again, differ by {difference:.2g} nats per "
            "square root of a token"
        )
    longest = int(member_counts(job.examples)[1].max())
    return Reference(
        lambda examples, batch: look_up(rows, examples, cache.folder),
        str(cache.folder),
        0.1 if rounds else EXACT,
        4 * rounding * math.sqrt(longest),
    )
