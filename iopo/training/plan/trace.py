"""What one micro-batch costs, from its shapes: the training code run on the meta device.

Nothing is allocated and nothing computed, so a 7B model takes seconds on a laptop. The operators
that autograd and activation checkpointing really call are watched: which tensors are alive, and
how many FLOPs each would take. PyTorch's own counter knows matrix products; attention by segments
and the log-prob head are added here.

What a GPU does differently is left out: blocks of the allocator (a few percent), torch.compile
(which keeps less), and the copies of a prompt's keys for its second response (below 1 %).

Letters: T packed tokens, R response rows, D width, V vocabulary, H heads, E head dimension.
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from iopo.config import ModelConfig, ParallelConfig
from iopo.data.example import Example
from iopo.data.layout import SharedSegments, build_shared
from iopo.kernels import tiled
from iopo.logprobs import LogProbs
from iopo.model import load
from iopo.model.attention import SHARED
from iopo.model.parallel import TrainModel, prepare
from iopo.training.policy import adapt, block_options

META = torch.device("meta")
CHUNK_BYTES_PER_WORD = 8192  # of the GPU head's backward; triton_gemm.py, absent without Triton
OPS = torch.ops.iopo


@dataclass(frozen=True)
class Trace:
    """Costs of one micro-batch on one rank.

    peak_bytes: most that forward and backward held beside weights and gradients that were there
        before, a gradient being added to included.
    saved_bytes: what the forward leaves for the backward.
    forward, backward: FLOPs by part (trunk, attention, head); a recomputed forward is in backward.
    tokens, rows, pairs: what the micro-batch holds; pairs of query and key, per head.
    """

    peak_bytes: int
    saved_bytes: int
    forward: dict[str, float]
    backward: dict[str, float]
    tokens: int
    rows: int
    pairs: int


def meta_policy(cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TrainModel:
    """The policy as policy.make_policy makes it on one rank, without values and not sharded."""
    config = load.config_of_tiny(cfg.tiny) if cfg.tiny else load.architecture(str(cfg.path))
    loaded = dtype if cfg.lora.rank > 0 else torch.promote_types(dtype, torch.float32)
    policy = LogProbs(load.meta_causal_lm(config, loaded, SHARED))
    adapt(policy, cfg.lora, seed=0)
    options = replace(block_options(parallel), compile=False)
    return prepare(policy, device=META, dtype=dtype, mesh=None, block_options=options)


def trace(policy: TrainModel, examples: Sequence[Example], device_type: str) -> Trace:
    """Forward and backward of one micro-batch, as the second or later of a step: there are
    gradients already. device_type: cuda or cpu, whose head's workspace is counted."""
    batch = build_shared(examples).to(META)
    assert batch.attention is not None
    pairs = attended_pairs(batch.attention)
    own: list[Tensor] = [*policy.model.parameters(), *policy.model.buffers()]
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            own.append(parameter.grad)
    # The head computes the logits, in its backward again, and there the gradients of the rows and
    # of a weight that trains; with a frozen weight that of the rows comes with the forward. What a
    # CPU keeps for a weight that trains it does not compute again.
    formulas = {
        OPS.segment_attention: lambda q, *_: 4 * pairs * q.shape[1] * q.shape[2],
        OPS.segment_attention_backward: lambda g, *_: 10 * pairs * g.shape[1] * g.shape[2],
        OPS.linear_logprob: lambda h, w, *rest: (4 if rest[-1] else 2) * h.shape[0] * w.numel(),
        OPS.linear_logprob_backward: lambda _, h, w, *rest: (
            (4 if not rest[-2] or kept_bytes(h, w, device_type) else 6) * h.shape[0] * w.numel()
        ),
    }
    watch = Watch(own, formulas, device_type)
    with watch:
        logp_EM = policy.model(batch)
        saved, forward = watch.live, _parts(watch.flops)
        logp_EM.sum().backward()
    total = _parts(watch.flops)
    backward = {part: total[part] - forward[part] for part in total}
    tokens, rows = batch.input_ids.numel(), len(batch.rows_R)
    return Trace(watch.peak, saved, forward, backward, tokens, rows, pairs)


def attended_pairs(segments: SharedSegments) -> int:
    """Pairs of a query and a key that it attends to, in one head."""
    start, stop, prefix_start, prefix_stop = segments.ranges_N4.unbind(1)
    own = stop - start
    return int((own * (own + 1) // 2 + own * (prefix_stop - prefix_start)).sum())


class Watch(TorchDispatchMode):
    """Counts the bytes of live storages and the FLOPs of operators.

    own: tensors that are there anyway. live, peak: bytes of all others, now and at most.
    flops: by operator.
    """

    def __init__(self, own: Sequence[Tensor], formulas: dict[Any, Any], device_type: str) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in own}
        self.formulas, self.device_type = formulas, device_type
        self.live = self.peak = 0
        self.flops: Counter[Any] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]
        for storage in storages:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, size)
        op = func.overloadpacket
        if op in self.formulas:
            self.flops[op] += self.formulas[op](*args)
        elif op in flop_registry:
            self.flops[op] += flop_registry[op](*args, **(kwargs or {}), out_val=out)
        if op is OPS.linear_logprob_backward or (op is OPS.linear_logprob and args[-1]):
            workspace = head_workspace(op, args, self.device_type)
            self.peak = max(self.peak, self.live + workspace)
        return out

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def head_workspace(op: Any, args: tuple[Any, ...], device_type: str) -> int:
    """Bytes that a head operator which computes a gradient takes inside and returns.

    A chunk of d loss / d logits on CUDA (triton_gemm.py); copies of the rows in the accum dtype and
    some tiles elsewhere (tiled.py).
    """
    hidden_RD, weight_VD = (args[1], args[2]) if op is OPS.linear_logprob_backward else args[:2]
    (rows, width), words = hidden_RD.shape, weight_VD.shape[0]
    if device_type == "cuda":
        return min(rows * hidden_RD.element_size(), CHUNK_BYTES_PER_WORD) * words
    accum_bytes = max(4, hidden_RD.element_size())
    copies = 2 if accum_bytes > hidden_RD.element_size() else 1  # of [R, D]
    tiles = tiled.tile_words(hidden_RD.dtype) * (tiled.ROWS + 2 * width)
    if not (op is OPS.linear_logprob_backward and args[9]):
        return accum_bytes * (rows * width * copies + tiles)
    kept = kept_bytes(hidden_RD, weight_VD, device_type)
    return accum_bytes * (rows * width * (copies + 1) + tiles) + kept


def kept_bytes(hidden_RD: Tensor, weight_VD: Tensor, device_type: str) -> int:
    """Of the errors that a trained head keeps; only a real CPU does, which meta stands for here."""
    if device_type != "cpu":
        return 0
    return tiled.kept_bytes(len(hidden_RD), len(weight_VD), hidden_RD.dtype)


def _parts(flops: Counter[Any]) -> dict[str, float]:
    parts = {"trunk": 0.0, "attention": 0.0, "head": 0.0}
    for op, count in flops.items():
        name = str(op)
        part = "attention" if "attention" in name else "head" if "logprob" in name else "trunk"
        parts[part] += count
    return parts
