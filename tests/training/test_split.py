"""Quads split by prompt: the gradient of whole quads, with less alive at a time."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_models import norms_in_own_dtype
from test_configs import config
from test_invariance import WORDS, Capture, reference

from iopo.data.batching import token_counts
from iopo.training import loop, policy
from iopo.training.inputs import load_inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.policy import make_policy
from iopo.training.setup import make_job

CPU = torch.device("cpu")
SPLIT = "parallel.split_quads=true"
LORA, SHARDED_LORA = ("model.lora.rank=4",), ("model.lora.rank=4", "parallel.shard_processes=2")


def quads(path: Path, counts: list[int]) -> str:
    """An override that reads quads of so many words; 26 and more are above the budget of 450."""
    with open(path, "w") as file:
        for i, count in enumerate(counts):
            y = " ".join((WORDS * 9)[i : i + count])
            x = f"Write about {WORDS[i]}."
            row = {"x1": x + " Lower case.", "x2": x + " Upper, please.", "y1": y, "y2": y.upper()}
            file.write(json.dumps(row) + "\n")
    return f"data.train={path}"


def one_step(ranks: RankInfo, *overrides: str):
    """Of the first step: gradients, means, (has gradient, members) of every forward; and how many
    examples are above the budget."""
    cfg = config(
        "+experiment=tiny_random", "model.dtype=fp64", "optim.clip_norm=inf", "data.heldout=null",
        "optim.global_batch_quads=4", "optim.tokens_per_microbatch=450", *overrides,
    )  # fmt: skip
    inputs = load_inputs(cfg)
    job = make_job(cfg, inputs, ranks)
    train_model = make_policy(cfg, inputs, ranks)
    norms_in_own_dtype(train_model.model)
    for name, parameter in train_model.parameters.items():
        if name.endswith("lora_B"):  # at zero it would leave no gradient for A
            torch.nn.init.constant_(parameter, 0.01)
    forwards: list[tuple[bool, int]] = []

    def see(module, args):
        forwards.append((torch.is_grad_enabled(), args[0].members))

    train_model.model.register_forward_pre_hook(see)
    optimizer = Capture(list(train_model.parameters.values()), lr=1.0)
    three = cfg.objective.name == "iopo_three"
    source = by_length if three else reference(job)
    result = next(loop.train_steps(job, train_model, optimizer, source, first_step=1))
    above = (token_counts(job.examples, "shared") > 450).sum()
    return optimizer.seen, result.reduce(), forwards, int(above)


by_length = loop.Reference(
    lambda rows, batch: -4.0 * batch.scored_M.view(batch.examples, -1).float(), "test", 1.0
)


def assert_equal(whole, split, metrics: float = 1e-10):
    """metrics: relative difference allowed there; over ranks they are summed in float32."""
    largest = max(g.abs().max() for g in whole[0])
    assert largest > 1e-3
    for a, b in zip(whole[0], split[0], strict=True):
        assert (a - b).abs().max() <= 1e-10 * largest
    for name in ("loss", "margin", "grad_norm", "logp/x1y1"):
        assert split[1][name] == pytest.approx(whole[1][name], rel=metrics)


@pytest.mark.parametrize(
    "overrides",
    [("objective.name=iopo",), ("objective.name=iopo", "objective.link=ipo"),
     ("objective.name=iopo", "objective.sft_weight=0.3"), ("objective=input_preference",),
     ("objective=output_preference",), ("objective=iopo_three",)],
    ids=lambda overrides: "-".join(overrides),
)  # fmt: skip
@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_split_quads_have_the_gradient_of_whole_ones(tmp_path, overrides, lora):
    alone, data = RankInfo(0, 1, 0, 1, CPU), quads(tmp_path / "quads.jsonl", [28, 3, 5, 26])
    whole = one_step(alone, data, *lora, *overrides)
    split = one_step(alone, data, *lora, *overrides, SPLIT)
    assert_equal(whole, split)
    members = 3 if "objective=iopo_three" in overrides else 4
    assert split[3] == 2 and {m for _, m in whole[2]} == {members}
    # the two quads above the budget: each prompt with its responses; the others as they were
    parts = [grad for grad, m in split[2] if m < members]
    once = lora and ("iopo" in overrides[0] or members == 3) and "sft" not in overrides[-1]
    assert parts == ([True] * 4 if once else [False, False, True, True] * 2)
    assert len(split[2]) - len(parts) == len(whole[2]) - 2


HOW = {
    "full": (),
    "lora": LORA,
    "sharded lora": SHARDED_LORA,
    "hsdp": ("parallel.shard_processes=1",),
}
STEPS = {"both": [28, 3, 5, 26], "first only": [28, 3, 5, 4], "second idle": [28]}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    if rank > 0:
        policy.load_model = None  # the weights are rank 0's
    for how, overrides in HOW.items():
        for step in STEPS:
            data = f"data.train={folder}/{step}.jsonl"
            ranks = RankInfo(rank, 2, rank, 2, CPU)
            results[how, step] = one_step(ranks, data, *overrides, SPLIT)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_that_split_have_the_gradient_of_one_that_does_not(tmp_path):
    for step, counts in STEPS.items():
        quads(tmp_path / f"{step}.jsonl", counts)
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for step in STEPS:
        data = f"data.train={tmp_path}/{step}.jsonl"
        for how in HOW:
            whole = one_step(RankInfo(0, 1, 0, 1, CPU), data, *(LORA if "lora" in how else ()))
            for rank in ranks:
                assert_equal(whole, rank[how, step], metrics=1e-6)
            first, second = (rank[how, step][2] for rank in ranks)
            if how == "lora":  # nothing is exchanged before the last micro-batch
                assert first.count((True, 2)) == 2
                assert second.count((True, 2)) == (2 if step == "both" else 0)
            else:  # sharded: as many forwards of both kinds on both ranks
                assert first == second


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["objective=dpo"], "objective.name: found 'dpo'"),
     (["model.lora.rank=4", "model.lora.dropout=0.1"], r"model\.lora\.dropout: found 0\.1"),
     (["optim.tokens_per_microbatch=null", "optim.micro_batch_quads=1"],
      r"optim\.tokens_per_microbatch: found None, expected a number with parallel\.split_quads")],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        config("+experiment=tiny_random", SPLIT, *overrides)
