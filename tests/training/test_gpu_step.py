"""One step of qwen2_7b_iopo on a GPU that is not here: devices, dtypes, and waits for the device.

The widths are the 7B's, the tensors have no values. PyTorch's CPU build cannot differentiate on
"cuda", so the meta device takes its place and says that it is CUDA; what would mix devices there is
found by looking at every operator's tensors.
"""

import sys
import traceback
from collections import Counter

import numpy as np
import pytest
import torch
from test_configs import config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.throughput_data import quads_of_lengths
from iopo.data.batching import token_counts
from iopo.logprobs import LogProbs
from iopo.model import load
from iopo.model.attention import SHARED
from iopo.model.parallel import prepare
from iopo.training import loop, optim
from iopo.training.inputs import batching
from iopo.training.policy import adapt, block_options

LAYERS, META = 3, torch.device("meta")
WAYS = {
    "lora": (),
    "lora, none": ("parallel.checkpointing=none",),
    "lora, selective": ("parallel.checkpointing=selective",),
    "full": ("model.lora.rank=0",),
}
COPIES = ("aten._to_copy.default", "aten.copy_.default")
PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")


class Watch(TorchDispatchMode):
    """Notes the dtypes of wide products and of our operators, and every wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.dtypes: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name == "aten._local_scalar_dense.default" and tensors[0].is_cuda:
            self.waits[where()] += 1
            return 1.0
        out = func(*args, **kwargs)
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        devices = {x.is_cuda for x in (*tensors, *outs) if x.dim() or x.is_cuda}
        if len(devices) > 1:
            assert name in COPIES, f"{name} mixes devices in {where()}"
            self.waits[where()] += 1
        wide = name in PRODUCTS and args[-2].shape[-1] >= 512 and args[-1].shape[-1] >= 512
        if wide or name.startswith(("iopo.", "torch_attn.")):
            floats = [str(x.dtype)[6:] for x in tensors if x.is_floating_point()]
            made = [str(x.dtype)[6:] for x in outs if x.is_floating_point()]
            key = "product" if wide else name.split(".")[1]
            self.dtypes.setdefault(key, set()).add(" ".join(floats + ["->"] + made))
        return out


def where() -> str:
    """The function of the loop, or of what it calls, that runs; a Job's `build` moves a batch."""
    own = [f.name for f in traceback.extract_stack() if f.filename == loop.__file__]
    return own[-1] if own else "?"


def one_step(overrides: tuple[str, ...]) -> dict:
    """What one optimizer step did: see Watch; and the dtypes and devices that it left."""
    cfg = config("+experiment=qwen2_7b_iopo", "optim.global_batch_quads=4", *overrides)
    architecture = load.architecture(str(cfg.model.path))
    architecture.num_hidden_layers, architecture.layer_types = LAYERS, ["full_attention"] * LAYERS
    dtype = load.compute_dtype(cfg.model.dtype, "cuda")
    loaded = dtype if cfg.model.lora.rank else torch.promote_types(dtype, torch.float32)
    policy = LogProbs(load.meta_causal_lm(architecture, loaded, SHARED))
    adapt(policy, cfg.model.lora, seed=0)
    text = np.arange(30_000, dtype=np.int32)
    quads = quads_of_lengths(text, [(600, 500, 300, 200), (2000, 1800, 900, 800)] * 2)
    batches = batching(cfg.optim, cfg.data.layout, 0, 1)
    model = prepare(
        policy, device=META, dtype=dtype, mesh=None, block_options=block_options(cfg.parallel)
    )
    optimizer = optim.make_optimizer(model.parameters, cfg.optim)
    job = loop.Job(
        objective="iopo", options=cfg.objective, batching=batches, examples=quads, heldout=(),
        tokens_N=token_counts(quads, batches.layout), steps=1, lr_at=lambda step: 1e-6,
        clip_norm=1.0, rank=0, device=META,
    )  # fmt: skip
    reference = loop.Reference(lambda rows, batch: torch.zeros(len(rows), 4), "here", 1.0)
    grads, computing = {}, model.parameters | model.copies
    for name, parameter in computing.items():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: grads.update({name: parameter.grad})
        )
    with Watch() as watch:
        result = next(loop.train_steps(job, model, optimizer, reference, first_step=1))
    states = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    kinds = {
        "masters": model.parameters.values(), "copies": model.copies.values(),
        "frozen": [p for p in policy.parameters() if not p.requires_grad],
        "gradients": grads.values(), "moments": states, "sums": [result.sums],
    }  # fmt: skip
    return {
        "waits": watch.waits,
        "dtypes": {key: sorted(found) for key, found in watch.dtypes.items()},
        "left": {
            kind: sorted({f"{str(t.dtype)[6:]} {'gpu' if t.is_cuda else 'cpu'}" for t in tensors})
            for kind, tensors in kinds.items()
        },
        "without_gradient": sorted(set(computing) - set(grads)),
    }


@pytest.fixture
def as_cuda(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    monkeypatch.setattr(
        sys.modules["torch.optim.optimizer"],
        "_get_fused_kernels_supported_devices",
        lambda: ["meta"],
    )


@pytest.mark.parametrize("way", WAYS)
def test_one_step_on_a_gpu_waits_only_where_it_says_and_computes_in_the_dtypes_it_says(
    way, as_cuda
):
    """Waits: the step's gradient norm; a micro-batch's tensors and references come from the host
    (with the numbers of constraints, which `torch.tensor` copies unseen)."""
    found = one_step(WAYS[way])
    assert found["waits"].keys() == {"train_steps", "build", "reference_log_probs"}
    assert found["waits"]["train_steps"] == 1
    assert found["waits"]["reference_log_probs"] == 2  # micro-batches
    dtypes = found["dtypes"]
    assert {dtype for kinds in dtypes["product"] for dtype in kinds.split()} == {"bfloat16", "->"}
    assert dtypes["_varlen_attn"] == ["bfloat16 " * 3 + "-> bfloat16 float32"]
    # logp, shift, scale, d logp / d hidden, nothing kept
    assert dtypes["linear_logprob"] == [
        "bfloat16 " * 2 + "-> float32 float32 float32 bfloat16 float32"
    ]
    assert ("linear_logprob_backward" in dtypes) == (way == "full")
    full = {"copies": ["bfloat16 gpu"], "frozen": []}
    lora = {"copies": [], "frozen": ["bfloat16 gpu"]}
    wide = dict.fromkeys(("masters", "gradients", "moments", "sums"), ["float32 gpu"])
    assert found["left"] == wide | (full if way == "full" else lora)
    assert not found["without_gradient"]


def test_a_step_that_asks_the_device_is_seen(as_cuda):
    with Watch() as watch:
        torch.ones(3, device=META).sum().item()
        with pytest.raises((AssertionError, RuntimeError), match="device"):
            torch.ones(3, device=META) + torch.ones(3)
    assert sum(watch.waits.values()) == 1
