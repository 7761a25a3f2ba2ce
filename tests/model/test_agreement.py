"""The check against the model's own logits: what it lets pass, finds, and leaves as it was."""

from types import MethodType

import pytest
import torch
from helpers_models import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from iopo.agreement import check_family, check_weights, difference, random_quads
from iopo.config import DataConfig, TrainConfig
from iopo.logprobs import LogProbs, end_of
from iopo.model.attention import SHARED
from iopo.training.inputs import load_inputs

QUADS = random_quads(300)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma3_text", {"final_logit_softcapping": 30.0}),
        ("phi3", {"rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48, "original_max_position_embeddings": 4096}}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 7.0, "residual_multiplier": 0.5}),
        ("mixtral", {}),
        ("gpt2", {}),
    ],
)  # fmt: skip
def test_families_that_agree(family, changes):
    check_family(AutoConfig.for_model(family, **changes), where="here")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (
            "gpt_oss",
            "here: model type 'gpt_oss' .*Attention needs the attention keyword s_aux",
        ),
        ("deepseek_v3", "DeepseekV3Attention needs keys and values of different width"),
        ("gemma2", "Gemma2Attention needs soft-capped"),
        ("mamba", "AttentionInterface"),
    ],
)
def test_families_that_are_refused(family, reason):
    with pytest.raises(ValueError, match=reason):
        check_family(AutoConfig.for_model(family), where="here")


def test_before_weights_load():
    tiny = {"model_type": "gpt_oss", "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    cfg = TrainConfig(data=DataConfig(train="data/verified/train.jsonl", limit_rows=4))
    cfg.model.tiny = tiny
    with pytest.raises(ValueError, match=r"model\.tiny: model type 'gpt_oss' is not supported"):
        load_inputs(cfg)


def mixing(self, hidden_states, **kwargs):
    """A layer in which each token sees those before it in the row, whoever's they are."""
    return type(self).forward(self, hidden_states, **kwargs) + hidden_states.cumsum(1) * 0.01


def test_layers_that_mix_rows_are_found():
    model = tiny_llama(attention=SHARED)
    block = model.model.layers[1]
    block.forward = MethodType(mixing, block)
    with pytest.raises(ValueError, match="'llama' is not supported: .* first 2 of 2 layers differ"):
        check_weights(model, QUADS, where="here")


def test_another_position_code_is_found():
    """Positions of its own, not those that it is given."""
    model = tiny_llama(attention=SHARED, initializer_range=0.3)
    rotary = model.model.rotary_emb
    ordinary = rotary.forward
    rotary.forward = lambda x, position_ids: ordinary(x, torch.arange(x.shape[1])[None])
    assert difference(model, QUADS, SHARED) > 1e-2


class Shifted(type(tiny_llama())):
    """One token's logit is another one after the head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 0] += 1
        return output


def test_an_end_that_is_not_a_scale_is_refused():
    model = AutoModelForCausalLM.from_config(tiny_llama().config)
    model.__class__ = Shifted
    with pytest.raises(ValueError, match="Shifted: between .* more than a scale"):
        LogProbs(model)


@pytest.mark.parametrize(
    ("family", "changes", "end"),
    [
        ("llama", {}, (1.0, None)),
        ("cohere", {"logit_scale": 0.3}, (0.3, None)),
        ("granite", {"logits_scaling": 7.0}, (1 / 7, None)),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ("minicpm3", {"dim_model_base": 8}, (0.25, None)),
    ],
)
def test_the_end_of_a_model_is_measured_exactly(family, changes, end):
    config = AutoConfig.for_model(
        family, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        num_key_value_heads=2, intermediate_size=32, pad_token_id=0, **changes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    assert end_of(model) == end
    assert "forward" not in model.get_decoder().__dict__
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_leaves_the_model_as_it_was(dtype):
    model = tiny_llama(attention=SHARED, dtype=dtype, num_hidden_layers=5, tied=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    random_state = torch.random.get_rng_state()
    check_weights(model, QUADS, where="here")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.dtype == dtype and p.grad is None for p in model.parameters())
    assert model.training and model.config._attn_implementation == SHARED
    assert len(model.model.layers) == 5 and not model.config.use_cache
    assert torch.equal(torch.random.get_rng_state(), random_state)
