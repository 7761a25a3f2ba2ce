"""Whether training is right on this device, at small size: one line a check, none stops another.

    python -m benchmarks.gpu.smoke --device cuda [--json FILE]

bf16 on CUDA, fp32 on a CPU. Exit code 1 if a check fails.
"""

import argparse
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import write_json
from benchmarks.throughput_data import quads_of_lengths
from benchmarks.throughput_variants import build_packed
from iopo import objectives
from iopo.config import CheckpointConfig
from iopo.data.layout import Batch, build_plain, build_shared
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.attention import SHARED
from iopo.model.load import tiny_causal_lm
from iopo.model.parallel import BlockOptions, TrainModel, make_mesh, prepare
from iopo.training.checkpoint.folders import latest_intact
from iopo.training.checkpoint.tensors import gather_state, load_state
from iopo.training.checkpoint.writer import Checkpoints

CONFIG = {
    "model_type": "qwen2", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = [(40, 33, 21, 17), (9, 64, 30, 2), (120, 100, 7, 40)]
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}  # of norms; of a member's nats: 4 times


class Smoke:
    """A small Qwen2 and three quads on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.tolerance = device, dtype, TOLERANCE[dtype]
        text = np.random.default_rng(0).integers(0, 1000, 4000).astype(np.int32)
        self.quads = quads_of_lengths(text, LENGTHS)

    def model(self, *, full: bool, attention: str = SHARED) -> PreTrainedModel:
        dtype = torch.float32 if full else self.dtype
        model = tiny_causal_lm(CONFIG, seed=0, dtype=dtype, attention=attention)
        if not full:
            generator = torch.Generator().manual_seed(0)
            lora.add_lora(
                model, rank=8, alpha=16.0, dropout=0.0, targets="all-linear", generator=generator
            )
            for layer in lora.adapters(model).values():
                layer.lora_B.data.normal_(std=0.02, generator=generator)
        return model

    def policy(self, *, full: bool = False, attention: str = SHARED, mesh=None, **options):
        policy = LogProbs(self.model(full=full, attention=attention))
        how = BlockOptions(**options)
        return prepare(policy, device=self.device, dtype=self.dtype, mesh=mesh, block_options=how)

    def step(self, policy: TrainModel, build: Callable = build_shared) -> tuple[Tensor, Tensor]:
        """Log-probs [Q, 4] and the gradient of IOPO's loss, [parameters], which stays in place."""
        batch: Batch = build(self.quads).to(self.device)
        policy.set_sync(True)
        logp_Q4 = policy.model(batch)
        reference_Q4 = logp_Q4.detach() - torch.linspace(-1, 1, 4, device=self.device)
        tokens_Q4 = batch.scored_M.view(batch.examples, 4)
        differing_Q = torch.zeros(batch.examples, device=self.device)
        loss_Q = objectives.compute(
            "iopo", logp_Q4, reference_Q4, tokens_Q4, differing_Q, objectives.Options()
        )
        loss_Q.mean().backward()
        policy.reduce_and_clip(math.inf)
        grads = [p.grad for p in policy.parameters.values()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        return logp_Q4.detach(), torch.cat([g.flatten().float() for g in whole])

    def agree(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> str:
        """What differs, in words. Raises AssertionError if it is more than rounding."""
        nats = (one[0] - other[0]).abs().max().item()
        share = ((one[1] - other[1]).norm() / other[1].norm()).item()
        text = f"log-probs within {nats:.1e} nats, gradients within {share:.1e}"
        assert nats <= 4 * self.tolerance and share <= self.tolerance, text
        return text

    def layouts(self) -> str:
        plain = self.step(self.policy(attention="sdpa"), build_plain)
        shared = self.agree(self.step(self.policy()), plain)
        packed = self.agree(self.step(self.policy(), build_packed), plain)
        return f"shared against plain: {shared}; packed: {packed}"

    def all_weights(self) -> str:
        plain = self.step(self.policy(full=True, attention="sdpa"), build_plain)
        return self.agree(self.step(self.policy(full=True)), plain)

    def same_bits_twice(self) -> str:
        runs = [self.step(self.policy(full=True)) for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
        return "three steps with all weights have equal bits"

    def recomputation(self) -> str:
        kept, texts = self.step(self.policy()), []
        for name, options in {
            "every 2nd": {"checkpoint_every": 2},
            "selective": {"checkpoint_every": 1, "selective": True},
        }.items():
            found = self.step(self.policy(**options))
            bits = all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
            texts.append(f"{name}: {'equal bits' if bits else self.agree(found, kept)}")
        return "; ".join(texts)

    def sharded(self) -> str:
        """FSDP2, over one rank: its code, not its communication."""
        whole = self.step(self.policy(full=True))
        found = self.step(self.policy(full=True, mesh=make_mesh(self.device.type)))
        return self.agree(found, whole)

    def checkpoints(self) -> str:
        """Saved while training goes on, then at once; both read back into fresh models."""
        for mesh in (None, make_mesh(self.device.type)):
            for asynchronous in (True, False):
                with tempfile.TemporaryDirectory() as folder:
                    self._saved_and_read(Path(folder), mesh, asynchronous)
        return "adapters and shards, both ways, twice each: equal bits"

    def _saved_and_read(self, folder: Path, mesh, asynchronous: bool) -> None:
        def make() -> tuple[TrainModel, torch.optim.Optimizer]:
            policy = self.policy(full=mesh is not None, mesh=mesh)
            return policy, torch.optim.AdamW(policy.parameters.values(), lr=1e-3, fused=True)

        policy, optimizer = make()
        about = {"config": {}, "identity": {}, "metrics": {}}
        with Checkpoints(folder, CheckpointConfig(asynchronous=asynchronous)) as checkpoints:
            for step in (1, 2):
                self.step(policy)
                optimizer.step()
                policy.zero_grad()
                checkpoints.save(step, gather_state(policy.parameters, optimizer, 0), about)
        again, fresh = make()
        found, _ = latest_intact(folder)
        assert found is not None and found.name.endswith("2"), found
        load_state(found, again.parameters, fresh)
        pairs = zip(
            gather_state(policy.parameters, optimizer, 0).items(),
            gather_state(again.parameters, fresh, 0).items(), strict=True,
        )  # fmt: skip
        for (name, one), (_, other) in pairs:
            one, other = (x.to_local() if hasattr(x, "to_local") else x for x in (one, other))
            assert torch.equal(one, other), name

    def compiled(self) -> str:
        eager = self.step(self.policy())
        if self.device.type == "cuda":
            return self.agree(self.step(self.policy(compile=True)), eager)
        # a CPU rehearses the tracing: its compiler would take a minute
        with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
            return self.agree(self.step(self.policy(compile=True)), eager)


CHECKS = ("layouts", "all_weights", "same_bits_twice", "recomputation", "sharded", "checkpoints",
          "compiled")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as meet:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(f"{meet}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        smoke, report = Smoke(device, dtype), {}
        for name in CHECKS:
            started = time.monotonic()
            try:
                ok, text = True, getattr(smoke, name)()
            except Exception as error:  # a check's failure is its result
                traceback.print_exc()
                ok, text = False, f"{type(error).__name__}: {error}"[:300]
            seconds = round(time.monotonic() - started, 1)
            report[name] = {"ok": ok, "text": text, "seconds": seconds}
            print(f"{name}: {'ok' if ok else 'FAILED'} in {seconds} s: {text}", flush=True)
            write_json(args.json, report)
        dist.destroy_process_group()
    failed = [name for name, found in report.items() if not found["ok"]]
    print(f"{len(report) - len(failed)} of {len(report)} checks passed{': not ' * bool(failed)}"
          + ", ".join(failed))  # fmt: skip
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
