"""plan=true against measured runs, PyTorch's own FLOP counter and numbers worked out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import tiny_llama
from test_configs import config
from torch.utils.flop_counter import FlopCounterMode

from iopo.config import TrainConfig
from iopo.data.example import Example
from iopo.data.layout import build_plain, build_shared
from iopo.logprobs import LogProbs
from iopo.model.load import tiny_causal_lm
from iopo.model.parallel import TrainModel, prepare
from iopo.objectives import GROUP, PAIR, QUAD, SINGLE, THREE
from iopo.training.plan.cost import Sizes, communication, gpu_memory, sizes_of, states
from iopo.training.plan.description import PlannedRun, describe
from iopo.training.plan.lengths import example_of
from iopo.training.plan.report import advice, plan_report
from iopo.training.plan.trace import Trace, attended_pairs, meta_policy, trace
from iopo.training.policy import adapt, block_options

HERE = Path(__file__).parents[1]
SMALL = (  # 35 M parameters
    "+experiment=tiny_random", "model.tiny.hidden_size=512", "model.tiny.intermediate_size=1536",
    "model.tiny.num_hidden_layers=6", "model.tiny.num_attention_heads=8",
    "model.tiny.num_key_value_heads=4", "model.tiny.vocab_size=16384",
    "model.tiny.tie_word_embeddings=false", "data.train=null", "data.heldout=null",
    "optim.tokens_per_microbatch=null", "optim.micro_batch_quads=2", "optim.global_batch_quads=4",
    "plan_for.gpus=1", "plan_for.prompt_tokens=60", "plan_for.response_tokens=40",
    "data.max_prompt_tokens=60", "data.max_response_tokens=40",
)  # fmt: skip


# a quad of 2 * 240 + 4 * 80 tokens, above its budget
ONE_LONG = [
    "optim.micro_batch_quads=null", "optim.tokens_per_microbatch=500",
    "plan_for.prompt_tokens=240", "plan_for.response_tokens=80",
    "data.max_prompt_tokens=240", "data.max_response_tokens=80",
]  # fmt: skip
VARIANTS = [
    [],
    ["parallel.checkpointing=full"],
    ["parallel.checkpointing=selective"],
    ["model.lora.rank=8"],
    ["model.lora.rank=8", "parallel.checkpointing=selective"],
    ["parallel.split_quads=true", *ONE_LONG],
    ["model.lora.rank=8", "parallel.split_quads=true", *ONE_LONG],
]


def test_predicted_memory_is_what_runs_take():
    runs = [[*SMALL, *variant] for variant in VARIANTS]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE.parent}:{HERE}",
    }
    command = [sys.executable, str(HERE / "helpers_plan.py"), json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for variant, run, measured in zip(VARIANTS, runs, json.loads(done.stdout), strict=True):
        planned = plan_report(config(*run)).peak
        print(f"{variant}: planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
        assert planned == pytest.approx(measured, rel=0.15), variant


def small_config(*overrides: str) -> TrainConfig:
    return config(*SMALL, *overrides)


def policy_of(cfg: TrainConfig, dtype: torch.dtype) -> TrainModel:
    return meta_policy(cfg.model, cfg.parallel, dtype)


FULL, SELECTIVE = "parallel.checkpointing=full", "parallel.checkpointing=selective"


@pytest.mark.parametrize("overrides", [[], [FULL], [SELECTIVE], ["model.lora.rank=4"]])
def test_flops_are_those_that_pytorch_counts(overrides):
    """Plain model, plain attention, one sequence: every product is one that FlopCounterMode sees.

    Eager attention computes all n^2 pairs and not the n (n+1) / 2 that are needed.
    """
    sizes = ("num_hidden_layers=3", "num_attention_heads=4", "num_key_value_heads=2")
    cfg = config("+experiment=tiny_random", *overrides, *(f"model.tiny.{s}" for s in sizes))
    assert cfg.model.tiny
    rows = [example_of(SINGLE, 23, 41)]
    planned = trace(policy_of(cfg, torch.float32), rows, "cpu")

    eager = LogProbs(tiny_causal_lm(cfg.model.tiny, seed=0, dtype=torch.float32, attention="eager"))
    adapt(eager, cfg.model.lora, cfg.seed)
    cpu = torch.device("cpu")
    how = block_options(cfg.parallel)
    run = prepare(eager, device=cpu, dtype=torch.float32, mesh=None, block_options=how)
    batch = build_plain(rows)
    with FlopCounterMode(display=False) as counter:
        run.model(batch).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = sum(n for op, n in counts.items() if not op.endswith("bmm"))
    n = 64
    # a forward has 2 products, a backward 4; flash attention's a fifth, the scores again
    products = 2 + 4 + (2 if overrides in ([FULL], [SELECTIVE]) else 0)
    product = counts["aten.bmm"] / products * (n + 1) / (2 * n)
    # kept by `selective` with segments, where it is one operator
    planned_products = 2 + 5 + (2 if overrides == [FULL] else 0)
    assert planned.forward["trunk"] + planned.backward["trunk"] == pytest.approx(linear, rel=0.02)
    attention = planned.forward["attention"] + planned.backward["attention"]
    assert attention == pytest.approx(planned_products * product, rel=0.02)
    V, D, R = 512, 32, 41
    head = 2 * R * V * D * (2 if overrides == ["model.lora.rank=4"] else 3)
    assert planned.forward["head"] + planned.backward["head"] == head


@pytest.mark.parametrize("rank", [0, 8])
def test_selective_computes_no_dear_product_again(rank):
    """Only the thin products of adapters, and none without adapters, for a third less memory."""

    def of(kind):
        cfg = small_config(f"parallel.checkpointing={kind}", f"model.lora.rank={rank}")
        traced = plan_report(cfg).trace
        return sum(traced.backward.values()), traced.saved_bytes

    (none, kept), (selective, kept_selective), (full, kept_full) = map(
        of, ("none", "selective", "full")
    )
    assert none <= selective <= (1.02 if rank else 1.0) * none < 0.9 * full
    assert kept_full < kept_selective < 0.67 * kept


def test_pairs_are_those_of_the_mask():
    tokens = [np.zeros(n, np.int32) for n in (5, 3, 7, 2, 4, 6)]
    example = Example("a", (tokens[0], tokens[3]), ((tokens[1], tokens[2]), (tokens[4], tokens[5])))
    batch = build_shared([example, example])
    assert batch.attention is not None
    n = batch.input_ids.numel()
    mask = torch.zeros(n, n, dtype=torch.bool)
    for start, stop, prefix_start, prefix_stop in batch.attention.ranges_N4.tolist():
        mask[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        mask[start:stop, prefix_start:prefix_stop] = True
    assert attended_pairs(batch.attention) == int(mask.sum())


@pytest.mark.parametrize(("prompt", "response", "tera"), [(200, 300, 75.0), (1000, 500, 187.8)])
def test_a_7b_quad_costs_what_the_shapes_say(prompt, response, tera):
    """Full checkpointing, LoRA, cached reference of three epochs, head recomputed.

    tera: (2P + 4R) tokens x 3 1/3 forwards of 2 x 6.525e9 each, plus attention and head.
    """
    overrides = ["+experiment=qwen2_7b_iopo", "parallel.checkpointing=full"]
    lengths = [f"plan_for.prompt_tokens={prompt}", f"plan_for.response_tokens={response}"]
    limits = [f"data.max_prompt_tokens={prompt}", f"data.max_response_tokens={response}"]
    cfg = config(*overrides, *lengths, *limits, "optim.global_batch_quads=8")
    plan = plan_report(cfg)
    forward = sum(plan.trace.forward.values()) / len(plan.work.heaviest)
    quad = sum(plan.flops.values()) / 8 + forward / 3
    assert quad == pytest.approx(tera * 1e12, rel=0.02)


NOTHING = Trace(0, 0, {}, {}, 1, 1, 1)


def seven_b(*overrides: str) -> tuple[PlannedRun, Sizes]:
    cfg = config("+experiment=qwen2_7b_iopo", "plan_for.gpus=8", *overrides)
    return describe(cfg), sizes_of(policy_of(cfg, torch.bfloat16), torch.bfloat16)


def test_full_fine_tuning_is_divided_by_the_ranks():
    run, sizes = seven_b("model.lora.rank=0")
    assert sizes.total == sizes.trained == 7_615_616_512
    assert sizes.block == 233_057_792
    assert (run.sharded, run.shard, run.replicas) == (True, 8, 1)
    assert sum(states(run, sizes).values()) == 16 * sizes.total / 8
    # no row is as large as the whole fp32 gradient, which each micro-batch divides
    assert max(gpu_memory(run, sizes, NOTHING, False).values()) < 4 * sizes.total
    gathers, scatter = communication(run, sizes, 3)
    assert gathers.bytes == 3 * 7 / 8 * 2 * (2 * 28 * sizes.block + sizes.root)
    assert scatter.bytes == 3 * 7 / 8 * 4 * sizes.total
    assert (gathers.path, scatter.path) == ("machine", "machine")


def test_hybrid_sharding_sends_only_gradients_between_machines():
    shards = ("model.lora.rank=0", "parallel.shard_processes=8", "optim.global_batch_quads=192")
    run, sizes = seven_b(*shards, "plan_for.gpus=64")
    transfers = communication(run, sizes, 1)
    assert [t.path for t in transfers] == ["machine", "machine", "network"]
    assert transfers[2].bytes == 2 * 7 / 8 * 4 * sizes.total / 8
    with pytest.raises(ValueError, match="does not divide the 12 processes"):
        seven_b(*shards, "plan_for.gpus=12")


def test_adapters_are_replicated_and_send_little():
    run, sizes = seven_b()
    assert sizes.trained == 20_185_088 and not run.sharded
    rows = gpu_memory(run, sizes, NOTHING, False)
    assert sum(rows.values()) == 2 * sizes.frozen + (16 + 4) * sizes.trained
    (reduce,) = communication(run, sizes, 3)
    assert reduce.bytes == 2 * 7 / 8 * 4 * sizes.trained


@pytest.mark.parametrize("lora", [0, 8])
def test_a_live_reference_is_divided_and_gathered_as_the_policy_is(lora):
    shards = (f"model.lora.rank={lora}", "parallel.shard_processes=8")
    run, sizes = seven_b(*shards)
    live, _ = seven_b(*shards, "reference.source=live")
    start = sizes.frozen if lora else sizes.total
    assert states(live, sizes)["live reference"] == 2 * start / 8
    # its root stays gathered: no backward comes
    held = [gpu_memory(each, sizes, NOTHING, False)["gathered weights"] for each in (run, live)]
    assert held[1] - held[0] == 2 * sizes.root
    sent = [communication(each, sizes, 3)[0].bytes for each in (run, live)]
    assert sent[1] - sent[0] == 3 * 7 / 8 * 2 * (start - sizes.root)


def test_the_forward_with_adapters_off_gathers_too():
    shards = ("parallel.shard_processes=8",)
    run, sizes = seven_b(*shards)
    off, _ = seven_b(*shards, "reference.source=adapter_off")
    sent = [communication(each, sizes, 3)[0].bytes for each in (run, off)]
    assert sent[1] - sent[0] == 3 * 7 / 8 * 2 * (sizes.total - sizes.root)


def test_what_does_not_fit_gets_advice_that_does():
    plan = plan_report(small_config("plan_for.gpu_gb=0.67"))
    assert not plan.fits
    assert FULL in advice(plan)[0]
    assert "does NOT fit" in str(plan)
    again = plan_report(small_config("plan_for.gpu_gb=0.67", FULL))
    assert again.fits and "fits: " in str(again)
    assert SELECTIVE in advice(plan_report(small_config("plan_for.gpu_gb=0.74")))[0]


@pytest.mark.parametrize(
    ("gpu_gb", "kind", "refused", "fits"),
    [(0.89, "none", 0, True), (0.82, "selective", 1, True), (0.74, "full", 2, True),
     (0.5, "full", 2, False)],
)  # fmt: skip
def test_auto_takes_the_least_recomputation_that_fits(gpu_gb, kind, refused, fits):
    """none takes 0.787 GB, selective 0.726, full 0.650; auto fills nine tenths."""
    plan = plan_report(small_config("parallel.checkpointing=auto", f"plan_for.gpu_gb={gpu_gb}"))
    assert plan.cfg.parallel.checkpointing.value == kind
    assert (len(plan.refused), plan.fits) == (refused, fits)
    assert f"checkpointing {kind}" in str(plan)
    assert ("too large: none 0.8 GB" in str(plan)) == (refused > 0)


@pytest.mark.parametrize("rank", [0, 8])
def test_a_split_quad_needs_less_memory_and_if_it_goes_twice_a_forward_more(rank):
    lora = f"model.lora.rank={rank}"
    whole = plan_report(small_config(*ONE_LONG, lora))
    split = plan_report(small_config(*ONE_LONG, lora, "parallel.split_quads=true"))
    assert (whole.trace.tokens, split.trace.tokens) == (800, 400)
    assert split.memory["activations"] < 0.52 * whole.memory["activations"]
    more = sum(split.flops.values()) / sum(whole.flops.values())
    assert more == pytest.approx(1.0 if rank else 4 / 3, rel=0.02)
    assert ("gradients of a split quad" in split.memory) == (rank > 0)
    assert "split by prompt: quads with 100% of the tokens" in str(split)


def test_splitting_is_advised_where_the_longest_quad_is_what_does_not_fit():
    sizes = ["data.max_prompt_tokens=2000", "data.max_response_tokens=600"]
    tight = plan_report(small_config(*ONE_LONG, *sizes, "plan_for.gpu_gb=1.15"))
    assert not tight.fits
    expected = f"{FULL} parallel.split_quads=true optim.tokens_per_microbatch=3200"
    assert any(line.startswith(expected) for line in advice(tight))


def test_lengths_come_from_the_data_if_it_is_here():
    plan = plan_report(config("+experiment=tiny_random", "plan_for.gpus=2"))
    assert "examples" in plan.work.source and plan.work.steps == 30
    assert plan.trace.tokens <= max(plan.cfg.optim.tokens_per_microbatch or 0, plan.work.longest)


def test_what_is_not_modelled_is_refused():
    with pytest.raises(ValueError, match="data.layout=plain"):
        plan_report(small_config("data.layout=plain"))
    with pytest.raises(ValueError, match="3 ranks do not divide"):
        plan_report(small_config("plan_for.gpus=3"))
    with pytest.raises(ValueError, match="no config.json for /nowhere"):
        plan_report(config("model.path=/nowhere"))


@pytest.mark.parametrize("rows", [QUAD, THREE, PAIR, SINGLE, GROUP])
def test_example_of_every_kind(rows):
    assert build_shared([example_of(rows, 3, 2)]).members == sum(rows.responses)


def test_groups_are_planned_with_the_responses_assumed_of_them():
    asked = ("objective=grpo", "data.train=groups.jsonl", "plan_for.group_responses=3")
    plan = plan_report(small_config(*asked))
    of_plan = plan.cfg.plan_for
    assert plan.work.tokens == of_plan.prompt_tokens + 3 * of_plan.response_tokens


def test_planned_models_have_the_parameters_of_real_ones():
    cfg = small_config("model.tiny.vocab_size=300", "model.tiny.hidden_size=32")
    policy = policy_of(cfg, torch.float32)
    real = tiny_llama(
        hidden_size=32, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    assert sizes_of(policy, torch.float32).total == sum(p.numel() for p in real.parameters())
