"""Log-probs of members: three layouts against one sequence at a time through the stock model."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers_models import norms_in_own_dtype
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.throughput_variants import build_packed
from iopo import objectives
from iopo.data.batching import Batching, micro_batches, token_counts, tokens
from iopo.data.example import Example
from iopo.data.layout import build_plain, build_shared
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED

V = 61
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": dict(model_type="llama", tie_word_embeddings=False),
    "smollm2": dict(model_type="llama", tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=False),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "gemma3": dict(model_type="gemma3_text", head_dim=16, sliding_window=64, layer_types=
                   ["sliding_attention", "full_attention"], final_logit_softcapping=5.0),
    "granite": dict(model_type="granite", logits_scaling=0.3, attention_multiplier=0.2,
                    residual_multiplier=0.7, embedding_multiplier=3.0),
}  # fmt: skip


def tiny(family: str, attention: str = SHARED, dtype: torch.dtype = torch.float64):
    """A random model whose weights do not depend on `attention` and are large enough to matter."""
    keys = SIZES | FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(keys.pop("model_type"), initializer_range=0.3, **keys)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if dtype == torch.float64:
        norms_in_own_dtype(model)
    return model.to(dtype)


def quad(name: str, lengths: tuple[int, int, int, int], seed: int = 0) -> Example:
    """x1, x2, y1, y2 of these lengths with random tokens."""
    draw = np.random.default_rng([seed, *lengths])
    x1, x2, y1, y2 = (draw.integers(3, V, n).astype(np.int32) for n in lengths)
    return Example(name, (x1, x2), ((y1, y2), (y2, y1)))


QUADS = [quad("a", (7, 5, 4, 6)), quad("b", (1, 30, 1, 2)), quad("c", (3, 3, 11, 1))]
EMPTY_TAILS = [quad("d", (4, 6, 3, 0)), quad("e", (2, 2, 0, 0))]


def naive(model, examples: list[Example]) -> torch.Tensor:
    """[examples, members]: one sequence at a time, stock logits, log_softmax."""
    logps = []
    for example in examples:
        for prompt, responses in zip(example.prompts, example.responses, strict=True):
            for response in responses:
                path = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
                logp_LV = model(path, use_cache=False).logits[0].log_softmax(-1)
                rows = torch.arange(len(prompt) - 1, path.shape[1] - 1)
                logps.append(logp_LV[rows, path[0, len(prompt) :]].sum())
    return torch.stack(logps).view(len(examples), -1)


def gradients(model, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a sum with a different weight per member, by parameter name."""
    model.zero_grad()
    (logp * torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype).view(logp.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        scale = expected[name].abs().max().clamp_min(1)
        error = (actual[name] - expected[name]).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [build_shared, build_packed, build_plain])
def test_equals_one_sequence_at_a_time_in_float64(family, build):
    examples = QUADS + EMPTY_TAILS
    model, stock = tiny(family), tiny(family, "sdpa")
    logp = LogProbs(model)(build(examples))
    expected = naive(stock, examples)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-10)
    assert_same(gradients(model, logp), gradients(stock, expected), 1e-10)
    assert logp[3, 1] == 0  # an empty response


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_equals_plain_in_float32(family):
    model = tiny(family, dtype=torch.float32)
    shared, plain = (LogProbs(model)(build(QUADS)) for build in (build_shared, build_plain))
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model, shared), gradients(model, plain), 1e-5)


def loss_and_gradients(model, examples, build, cut: Batching):
    """IOPO's loss per example, and the gradient of their mean, summed over micro-batches."""
    model.zero_grad()
    losses = {}
    for indices in micro_batches(token_counts(examples, cut.layout), cut, 0)[0]:
        batch = build([examples[i] for i in indices])
        logp_E4 = LogProbs(model)(batch)
        tokens_E4 = batch.scored_M.view(batch.examples, 4)
        reference_E4 = -3.5 * tokens_E4 - torch.tensor([0.0, 3.0, -5.0, 1.0], dtype=logp_E4.dtype)
        loss_E = objectives.compute(
            "iopo", logp_E4, reference_E4, tokens_E4, torch.zeros(batch.examples),
            objectives.Options(),
        )  # fmt: skip
        (loss_E.sum() / len(examples)).backward()
        losses |= dict(zip((examples[i].id for i in indices), loss_E.detach(), strict=True))
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return torch.stack([losses[e.id] for e in examples]), grads


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_loss_and_its_gradient_do_not_depend_on_layout_and_packing(dtype, tolerance):
    """One plain quad at a time, against all packed, and a budget that quad b exceeds alone."""
    examples = QUADS + EMPTY_TAILS
    model = tiny("llama", dtype=dtype)
    one = Batching(5, 1, seed=0, layout="plain", micro_batch_quads=1)
    loss_E, grads = loss_and_gradients(model, examples, build_plain, one)
    assert (loss_E - np.log(2)).abs().min() > 1e-3  # every quad has a weight of its own
    for budget in (1000, 35):
        cut = Batching(5, 1, seed=0, tokens_per_microbatch=budget)
        above = [e.id for e in examples if tokens(e, "shared") > budget]
        assert above == ([] if budget == 1000 else ["b"])
        packed_E, packed = loss_and_gradients(model, examples, build_shared, cut)
        torch.testing.assert_close(packed_E, loss_E, rtol=tolerance, atol=tolerance)
        assert_same(packed, grads, tolerance)


@pytest.mark.parametrize("build", [build_shared, build_plain])
def test_changing_one_example_leaves_the_others_untouched(build):
    """Bitwise, at the same lengths; the changed one stands between the others."""
    log_probs = LogProbs(tiny("llama", dtype=torch.float32))
    before = log_probs(build(QUADS))
    after = log_probs(build([QUADS[0], quad("b", (1, 30, 1, 2), seed=1), QUADS[2]]))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] != after[1]).all()


def test_the_padded_tail_changes_nothing():
    model = tiny("llama")
    logp = LogProbs(model)(build_shared(QUADS))
    padded = LogProbs(model)(build_shared(QUADS, multiple=128))
    torch.testing.assert_close(padded, logp, rtol=0, atol=1e-12)
    assert_same(gradients(model, padded), gradients(model, logp), 1e-12)


def test_pairs_single_responses_and_three_members():
    model, stock = tiny("qwen2"), tiny("qwen2", "sdpa")
    x1, x2, y1, y2 = (QUADS[0].prompts[0], QUADS[0].prompts[1], *QUADS[0].responses[0])
    kinds = {
        "pair": (((x1,), ((y1, y2),)), ((x2,), ((y2, y1),))),
        "sft": (((x1,), ((y1,),)), ((x2,), ((y2,),))),
        "iopo_three": (((x1, x2), ((y1, y2), (y1,))), ((x2, x1), ((y2, y1), (y2,)))),
        "four responses": (((x1,), ((y1, y2, x1, x2),)), ((x2,), ((x2, y2, y1, y1),))),
    }
    for kind, forests in kinds.items():
        examples = [Example(f"{kind} {i}", *forest) for i, forest in enumerate(forests)]
        logp = LogProbs(model)(build_shared(examples))
        expected = naive(stock, examples)
        torch.testing.assert_close(logp, expected, rtol=0, atol=1e-10)
        assert_same(gradients(model, logp), gradients(stock, expected), 1e-10)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_head_with_bias(family):
    model, stock = tiny(family), tiny(family, "sdpa")
    for each in (model, stock):
        each.lm_head = torch.nn.Linear(32, V, dtype=torch.float64)
        torch.nn.init.normal_(each.lm_head.weight, generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(each.lm_head.bias, generator=torch.Generator().manual_seed(2))
    logp, expected = LogProbs(model)(build_shared(QUADS)), naive(stock, QUADS)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-10)
    assert_same(gradients(model, logp), gradients(stock, expected), 1e-10)


@pytest.mark.parametrize("family", ["llama", "smollm2", "gemma3"])
def test_a_frozen_head_gives_the_rest_the_same_gradients(family):
    """And the values of a pass without gradient, bit for bit: a policy starts at its reference."""
    model = tiny(family)
    log_probs, batch = LogProbs(model), build_shared(QUADS)
    expected = log_probs(batch)
    wanted = gradients(model, expected)
    model.get_output_embeddings().requires_grad_(False)
    logp = log_probs(batch)
    assert torch.equal(logp, expected)
    with torch.no_grad():
        assert torch.equal(log_probs(batch), logp)
    model.zero_grad()
    weights_EM = torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype).view(logp.shape)
    (logp * weights_EM).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_same(found, {name: wanted[name] for name in found}, 1e-10)


def test_checkpointed_blocks_give_the_same_gradients():
    model = tiny("llama")
    expected = gradients(model, LogProbs(model)(build_shared(QUADS)))
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert_same(gradients(model, LogProbs(model)(build_shared(QUADS))), expected, 0)


def test_a_model_with_the_shared_attention_still_generates():
    prompt = torch.arange(3, 9).repeat(2, 1)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0  # left padding, as batched generation has it
    texts = [
        tiny("llama", attention).generate(
            prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=True
        )
        for attention in (SHARED, "sdpa")
    ]
    assert torch.equal(*texts)


@pytest.mark.slow
def test_compiled_blocks_are_whole_graphs_and_new_layouts_need_no_new_ones():
    torch._dynamo.reset()
    log_probs = LogProbs(tiny("llama", dtype=torch.float32))
    batches = [build_shared(quads) for quads in (QUADS, QUADS[:2], QUADS[1:], QUADS * 2)]
    graphs_after = []
    expected = [log_probs(batch) for batch in batches]
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    for block in log_probs.causal_lm.model.layers:
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True, backend=counting)
    for batch, wanted in zip(batches, expected, strict=True):
        logp = log_probs(batch)
        logp.sum().backward()
        torch.testing.assert_close(logp, wanted)
        graphs_after.append(len(graphs))
    assert graphs_after == [graphs_after[0]] * 4


def test_refusals():
    model = tiny("llama")
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="has Identity as output layer"):
        LogProbs(model)
    model = tiny("gemma3")
    long = build_shared([quad("long", (60, 2, 5, 5))])
    with pytest.raises(ValueError, match="Gemma3TextConfig: the model's sliding window of 64"):
        LogProbs(model)(long)


def test_an_output_weight_that_is_sharded_inside_forward_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny("llama", dtype=torch.float32)
        logprobs = LogProbs(model)
        fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="shard LogProbs itself as the FSDP root"):
            logprobs(build_shared(QUADS))
    finally:
        torch.distributed.destroy_process_group()
