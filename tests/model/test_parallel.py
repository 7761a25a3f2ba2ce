"""Gradients do not depend on how the work is spread: processes, micro-batches, sharding, dtypes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_models import tiny_llama, tiny_qwen2
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from iopo.config import ExportConfig, ParallelConfig
from iopo.data.chat import Chat
from iopo.logprobs import LogProbs
from iopo.model import lora, parallel
from iopo.model.load import byte_tokenizer
from iopo.model.parallel import BlockOptions
from iopo.training.export import Origin, write_exports
from iopo.training.launch.placement import RankInfo
from iopo.training.policy import check_sharding

CPU = torch.device("cpu")
# each process's micro-batches of a step, as indices into the eight sequences; () is an empty turn
TURNS = {1: [[(0, 1, 2, 3, 4, 5, 6, 7)]], 2: [[(0, 1, 2), (3,)], [(4, 5, 6, 7), ()]]}
SPREADS = ["shard", "hsdp", "replicate"]


class Root(nn.Module):
    """The simplest root: log-likelihood of each sequence. Its loss is a sum, so it can be split."""

    def __init__(self, causal_lm):
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, ids_SL):
        hidden = self.causal_lm.get_decoder()(input_ids=ids_SL, use_cache=False).last_hidden_state
        weight = self.causal_lm.get_output_embeddings().weight
        logp = F.linear(hidden[:, :-1], weight).float().log_softmax(-1)
        return logp.gather(-1, ids_SL[:, 1:, None]).sum((1, 2))


def sequences():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 300, (1, 5 + i), generator=generator) for i in range(8)]


def make(kind, dtype=torch.float32):
    model = tiny_qwen2(tied=True, dtype=dtype) if kind == "lora" else tiny_llama(tied=True)
    if kind == "lora":
        generator = torch.Generator().manual_seed(3)
        options = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}
        lora.add_lora(model, **options, generator=generator)
        for layer in lora.adapters(model).values():
            layer.lora_B.data.normal_(std=0.1, generator=generator)
    return Root(model)


def micro_batches(turns):
    """Turns as lists of equal forwards on all ranks: FSDP needs as many everywhere."""
    forwards = [[j for turn in rank for j in turn] for rank in turns]
    most = max(len(f) for f in forwards)
    return [f + [None] * (most - len(f)) for f in forwards]


def gradients(root, train_model, forwards, max_norm=float("inf")):
    rows = sequences()
    for i, j in enumerate(forwards):
        train_model.set_sync(i == len(forwards) - 1)
        if j is None:
            train_model.empty_backward(rows[0])
        else:
            ((root(rows[j]) + 30.0) ** 2 / 8).sum().backward()
    norm = train_model.reduce_and_clip(max_norm)
    return {n: whole(p.grad) for n, p in train_model.parameters.items()}, norm


def whole(tensor):
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def plain_gradients(kind):
    """The slow twin: one process, plain autograd, one sum over all sequences."""
    root = make(kind)
    sum(((root(ids) + 30.0) ** 2 / 8).sum() for ids in sequences()).backward()
    return {n: p.grad for n, p in root.named_parameters() if p.requires_grad}


def assert_same(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def spread(kind, how, dtype=torch.float32, *, offload=False, **options):
    """Of several processes only the first has values."""
    root = make(kind)
    if dist.is_initialized() and dist.get_rank() > 0:
        root.to("meta").causal_lm.tie_weights()
    mesh = {
        "shard": lambda: parallel.make_mesh("cpu"),
        "hsdp": lambda: parallel.make_mesh("cpu", shard_processes=1),
        "replicate": lambda: None,
    }[how]()
    train_model = parallel.prepare(
        root,
        device=CPU,
        dtype=dtype,
        mesh=mesh,
        offload=offload,
        block_options=BlockOptions(**options),
    )
    return root, train_model


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    forwards = micro_batches(TURNS[2])[rank]
    for kind in ("full", "lora"):
        for how in SPREADS:
            root, train_model = spread(kind, how, checkpoint_every=2)
            grads, norm = gradients(root, train_model, forwards)
            optimizer = torch.optim.SGD(train_model.parameters.values(), lr=1e-3)
            optimizer.step()
            train_model.zero_grad()
            # a second step: nothing of the first may be left
            again, _ = gradients(root, train_model, forwards)
            weights = {n: whole(p) for n, p in train_model.parameters.items()}
            results[kind, how] = {"grads": grads, "norm": norm, "again": again, "weights": weights}
    for how in ("shard", "hsdp"):
        root, train_model = spread("full", how)
        train_model.set_sync(False)
        root(sequences()[0]).sum().backward()
        early = [p.grad for p in train_model.parameters.values() if p.grad is not None]
        results["early", how] = sum(grad.to_local().numel() for grad in early)
    for how in SPREADS:
        root, train_model = spread("full", how)
        with torch.no_grad():
            root(sequences()[0])  # gathers the root's group, and no backward lets go of it
            for parameter in train_model.parameters.values():
                parameter.mul_(1.1)  # as a checkpoint does that is loaded
            train_model.refresh()
            results["loaded", how] = root(sequences()[0])
        bf16 = spread("full", how, dtype=torch.bfloat16)
        results["bf16", how] = gradients(*bf16, forwards)[0]
    exported = parallel.prepare(
        LogProbs(tiny_llama(tied=True)),
        device=CPU,
        dtype=torch.bfloat16,
        mesh=parallel.make_mesh("cpu"),
    )
    ranks = RankInfo(rank, 2, rank, 2, CPU)
    write_exports(exported, Path(folder), ExportConfig(), Chat(byte_tokenizer()), Origin(), ranks)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_with_unequal_work_give_the_gradients_of_one(two_ranks, kind, how):
    expected = plain_gradients(kind)
    for rank in two_ranks:
        assert_same(rank[kind, how]["grads"], expected, 1e-5)
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        torch.testing.assert_close(rank[kind, how]["norm"], norm)


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_second_step_starts_clean(two_ranks, kind, how):
    root = make(kind)
    train_model = parallel.prepare(root, device=CPU, dtype=torch.float32, mesh=None)
    gradients(root, train_model, TURNS[1][0][0])
    torch.optim.SGD(train_model.parameters.values(), lr=1e-3).step()
    train_model.zero_grad()
    expected, _ = gradients(root, train_model, TURNS[1][0][0])
    assert_same(two_ranks[0][kind, how]["again"], expected, 2e-5)


@pytest.mark.parametrize("how", SPREADS)
def test_a_forward_after_loading_weights_computes_with_them(two_ranks, how):
    root = make("full")
    with torch.no_grad():
        for parameter in root.parameters():
            parameter.mul_(1.1)
        expected = root(sequences()[0])
    for rank in two_ranks:
        torch.testing.assert_close(rank["loaded", how], expected, rtol=1e-5, atol=1e-4)


def test_gradients_are_divided_at_once_and_copies_of_the_model_meet_at_the_last_micro_batch(
    two_ranks,
):
    parameters = sum(p.numel() for p in make("full").parameters())
    assert sum(rank["early", "shard"] for rank in two_ranks) == parameters
    assert [rank["early", "hsdp"] for rank in two_ranks] == [0, 0]


def test_all_processes_hold_the_same_bits(two_ranks):
    first, second = (rank["lora", "replicate"]["grads"] for rank in two_ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("how", SPREADS)
def test_bf16_gradients_are_summed_in_fp32_however_they_are_spread(two_ranks, how):
    """Every micro-batch has the same bf16 arithmetic, so only sums in bf16 could tell them apart.

    The tied weight is among them: its gradients as head and as embedding meet in fp32.
    """
    expected = gradients(*spread("full", "replicate", dtype=torch.bfloat16), range(8))[0]
    assert_same(two_ranks[0]["bf16", how], expected, 1e-5)


def test_sharded_model_is_exported_whole(two_ranks, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "ranks0" / "export"
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert stock.dtype == torch.bfloat16
    for name, parameter in tiny_llama(tied=True).named_parameters():
        assert torch.equal(stock.get_parameter(name), parameter.bfloat16()), name


def test_buckets_keep_order_and_size(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET_BYTES", 40)
    grads = [torch.zeros(n) for n in (4, 6, 1, 20, 2)]
    assert [[g.numel() for g in b] for b in parallel._buckets(grads)] == [[4, 6], [1], [20], [2]]


HOW = {"full": {"checkpoint_every": 1}, "every 2nd": {"checkpoint_every": 2}}
HOW["selective"] = {"checkpoint_every": 1, "selective": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("how", HOW)
def test_checkpointing_changes_no_bit(kind, how, dtype):
    def grads(**options):
        root = make(kind).train()
        if dtype is torch.float64:
            root.to(dtype)
        train_model = parallel.prepare(
            root, device=CPU, dtype=dtype, mesh=None, block_options=BlockOptions(**options)
        )
        return gradients(root, train_model, range(8))[0]

    plain, recomputed = grads(), grads(**HOW[how])
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_checkpointing_recomputes_every_kth_block():
    root, _ = spread("full", "replicate", checkpoint_every=2)
    calls = []
    for block in parallel.blocks(root):
        block.input_layernorm.register_forward_hook(lambda module, *_: calls.append(module))
    root(sequences()[0]).sum().backward()
    first, second = (calls.count(block.input_layernorm) for block in parallel.blocks(root))
    assert (first, second) == (2, 1)


def bf16_step(root, rows):
    train_model = parallel.prepare(root, device=CPU, dtype=torch.bfloat16, mesh=None)
    for ids in rows:
        (root(ids) / len(rows)).sum().backward()
    train_model.reduce_and_clip(float("inf"))
    return train_model


def test_bf16_computes_on_copies_of_fp32_parameters():
    root = make("full")
    before = {n: p.detach().clone() for n, p in root.named_parameters()}
    train_model = bf16_step(root, sequences())
    assert {p.dtype for p in train_model.parameters.values()} == {torch.float32}
    assert {p.grad.dtype for p in train_model.parameters.values()} == {torch.float32}
    assert {p.dtype for p in root.parameters()} == {torch.bfloat16}
    for name, parameter in train_model.parameters.items():
        assert torch.equal(parameter, before[name])
    # updates far below bf16's resolution must add up
    for _ in range(64):
        for parameter in train_model.parameters.values():
            parameter.data.add_(parameter.data.abs(), alpha=1e-4)
        train_model.zero_grad()
    for name, parameter in root.named_parameters():
        parameter = parameter.detach()
        torch.testing.assert_close(
            parameter.float(), train_model.parameters[name].data, rtol=8e-3, atol=0
        )
        moved = (parameter.float() - before[name]).abs().sum() / before[name].abs().sum()
        if parameter.dim() == 2:  # norms are all 1: they move by whole steps of bf16
            assert moved == pytest.approx(64e-4, rel=0.2)
    assert all(p.grad is None for p in root.parameters())


def test_many_small_bf16_gradients_are_not_lost():
    """300 equal micro-batches: a sum in bf16 stops growing at about 2^8 times the first."""
    root = make("full")
    ids = sequences()[0]
    train_model = parallel.prepare(root, device=CPU, dtype=torch.bfloat16, mesh=None)
    root(ids).sum().backward()
    once = {n: p.grad.clone() for n, p in train_model.copies.items()}
    for _ in range(299):
        root(ids).sum().backward()
    for name, parameter in train_model.copies.items():
        torch.testing.assert_close(parameter.grad, once[name] * 300, rtol=1e-4, atol=1e-6)


def test_tied_weight_gets_both_gradients_in_fp32():
    """Against fp32 arithmetic on the same bf16 values, head and embedding apart."""
    root = make("full")
    ids = torch.full((1, 400), 7)  # one token, many times: a bf16 sum of its rows would stall
    ids[0, ::7] = 11
    train_model = bf16_step(root, [ids])
    got = train_model.parameters["causal_lm.model.embed_tokens.weight"].grad
    slow = make("full")
    for parameter in slow.parameters():
        parameter.data = parameter.data.bfloat16().float()
    slow(ids).sum().backward()
    expected = slow.causal_lm.model.embed_tokens.weight.grad
    # rounding of activations stays: compare direction and size, tightly enough to see a lost half
    assert F.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.9995
    assert got.norm() / expected.norm() == pytest.approx(1, abs=5e-3)


def test_embedding_rows_are_summed_in_fp32():
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    ids = torch.ones(1, 5000, dtype=torch.long)
    parallel._Embedding.apply(ids, weight, -1).float().sum().backward()
    assert weight.grad.tolist() == [[0, 0], [5000, 5000], [0, 0]]
    weight.grad = None
    parallel._Embedding.apply(ids, weight, 1).float().sum().backward()
    assert weight.grad.abs().sum() == 0  # as nn.Embedding's padding_idx


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    root, train_model = spread("full", "replicate")
    free, norm = gradients(root, train_model, range(8))
    train_model.zero_grad()
    clipped, same = gradients(root, train_model, range(8), max_norm=0.5)
    torch.testing.assert_close(same, norm)
    total = torch.stack([g.norm() for g in clipped.values()]).norm()
    assert total.item() == pytest.approx(0.5, rel=1e-4)
    assert_same({n: g * (0.5 / norm) for n, g in free.items()}, clipped, 1e-5)


def test_not_finite_gradients_show_in_the_norm():
    root, train_model = spread("full", "replicate")
    (root(sequences()[0]) * float("nan")).sum().backward()
    assert not torch.isfinite(train_model.reduce_and_clip(1.0))


def test_groups_that_do_not_divide_the_processes_are_refused():
    with pytest.raises(ValueError, match="does not divide the 6 processes"):
        check_sharding(ParallelConfig(shard_processes=4), 6)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients():
    expected = gradients(*spread("full", "replicate"), range(8))[0]
    compiled = spread("full", "replicate", compile=True, checkpoint_every=1)
    assert_same(gradients(*compiled, range(8))[0], expected, 1e-5)
