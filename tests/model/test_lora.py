"""LoRA: starts as the base, equals its definition, and trades files with PEFT."""

import dataclasses
import json

import peft
import pytest
import torch
from helpers_models import tiny_llama, tiny_qwen2
from torch import nn

from iopo.model import lora

IDS = torch.arange(40).view(2, 20) * 7 % 300


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def adapted(model=None, *, fill=True, rank=4, alpha=8.0, dropout=0.0, targets="all-linear"):
    model = model or tiny_qwen2()
    generator = torch.Generator().manual_seed(3)
    lora.add_lora(
        model, rank=rank, alpha=alpha, dropout=dropout, targets=targets, generator=generator
    )
    if fill:
        for layer in lora.adapters(model).values():
            layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_base_bit_for_bit(dtype):
    model = tiny_qwen2(dtype=dtype)
    before = logits(model)
    adapted(model, fill=False)
    assert torch.equal(logits(model), before)


def test_one_layer_equals_its_definition():
    layer = lora.LoRALinear(nn.Linear(5, 3), rank=2, alpha=6.0, dropout=0.0)
    layer.lora_A.data.normal_()
    layer.lora_B.data.normal_()
    x = torch.randn(2, 4, 5)
    expected = x @ layer.weight.T + layer.bias + 3.0 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected)


def test_only_adapters_train_and_bf16_bases_stay_bf16():
    model = adapted(tiny_llama(dtype=torch.bfloat16))
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert all(".lora_" in name for name in trained) and len(trained) == 2 * 7 * 2
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_adapter_off_is_the_base_and_comes_back():
    base = logits(tiny_qwen2())
    model = adapted()
    changed = logits(model)
    assert not torch.allclose(base, changed)
    with pytest.raises(RuntimeError, match="inside"), lora.adapter_off(model):
        assert torch.equal(logits(model), base)
        raise RuntimeError("inside")
    assert torch.equal(logits(model), changed)
    with pytest.raises(AssertionError, match="change nothing"), lora.adapter_off(tiny_llama()):
        pass


def test_merged_model_gives_the_same_logits():
    model = adapted(tiny_qwen2(tied=True))
    expected = logits(model)
    names = set(tiny_qwen2(tied=True).state_dict())
    lora.merge_lora(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) == names and not lora.adapters(model)


def test_targets():
    assert set(n.rsplit(".", 1)[-1] for n in lora.adapters(adapted(targets="q_proj,up_proj"))) == {
        "q_proj",
        "up_proj",
    }
    one = adapted(targets="layers.1.self_attn.v_proj")
    assert list(lora.adapters(one)) == ["model.layers.1.self_attn.v_proj"]
    assert not any("lm_head" in n for n in lora.adapters(adapted()))
    with pytest.raises(ValueError, match=r"query fits no linear layer.*q_proj"):
        adapted(targets="query")


def test_start_depends_on_the_generator_only():
    first, second = (list(lora.adapters(adapted(fill=False)).values()) for _ in range(2))
    assert all(torch.equal(a.lora_A, b.lora_A) for a, b in zip(first, second, strict=True))
    # kaiming-uniform with a = sqrt 5: uniform within 1 / sqrt(in)
    weight = first[0].lora_A
    assert 0.9 / 32**0.5 < weight.abs().max() <= 1 / 32**0.5


def test_dropout_acts_in_training_only():
    model = adapted(dropout=0.5)
    assert torch.equal(logits(model.eval()), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def save_adapter(model, folder):
    tensors = {
        f"{name}.{which}": getattr(layer, which)
        for name, layer in lora.adapters(model).items()
        for which in ("lora_A", "lora_B")
    }
    lora.write_adapter(folder, lora.adapter_config(model, "here"), tensors)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "layers.1.mlp.up_proj"])
def test_peft_reads_what_we_write(tmp_path, targets):
    model = adapted(targets=targets)
    save_adapter(model, tmp_path)
    read = peft.PeftModel.from_pretrained(tiny_qwen2(), str(tmp_path))
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_we_read_what_peft_writes(tmp_path, targets):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_qwen2(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    theirs.save_pretrained(str(tmp_path))
    model = tiny_qwen2()
    lora.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-5, atol=1e-6)
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())


def test_round_trip(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    other = tiny_qwen2()
    lora.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="layers.1.* do not fit this model"):
        lora.load_adapter(tiny_qwen2(num_hidden_layers=1), tmp_path)
    with pytest.raises(ValueError, match="has shape"):
        lora.load_adapter(tiny_qwen2(hidden_size=16), tmp_path)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_adapters_that_we_would_compute_wrongly_are_refused(tmp_path, change):
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        lora.load_adapter(tiny_qwen2(), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        lora.load_adapter(tiny_qwen2(), tmp_path)


# For each field of peft's LoraConfig, values that are not its default.
VALUES = {
    "task_type": ["FEATURE_EXTRACTION"], "peft_type": ["IA3"], "peft_version": ["0.1"],
    "auto_mapping": [{"base_model_class": "x"}], "base_model_name_or_path": ["x"],
    "revision": ["x"], "inference_mode": [True], "r": [2], "lora_alpha": [3],
    "lora_dropout": [0.5], "target_modules": [["down_proj"], "all-linear", ["embed_tokens"]],
    "exclude_modules": [["v_proj"]], "layers_to_transform": [[0]], "layers_pattern": ["layers"],
    "bias": ["all", "lora_only"], "modules_to_save": [["lm_head"]],
    "init_lora_weights": [
        False, "gaussian", "orthogonal", "eva", "pissa", "pissa_niter_4", "olora", "loftq", "corda",
        "lora_ga", "mica",
    ],
    "rank_pattern": [{"q_proj": 2}], "alpha_pattern": [{"q_proj": 2}],
    "megatron_config": [{"x": 1}], "megatron_core": ["x"], "trainable_token_indices": [[1]],
    "loftq_config": [{"loftq_bits": 4}], "eva_config": [{"rho": 1.5}], "qalora_group_size": [8],
    "layer_replication": [[[0, 2], [0, 2]]], "runtime_config": [{"ephemeral_gpu_offload": True}],
    "alora_invocation_tokens": [[3, 4]], "target_parameters": [["q_proj.weight"]],
}  # fmt: skip
CASES = [
    (field.name, value)
    for field in dataclasses.fields(peft.LoraConfig)
    for value in VALUES.get(field.name, [True])  # also a field that a later peft adds
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("field", "value"), CASES)
def test_every_setting_of_peft_gives_its_logits_or_is_refused(tmp_path, field, value):
    plain = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    if field == "layers_pattern":  # which peft takes with these only
        plain["layers_to_transform"] = [0]
    torch.manual_seed(3)
    try:
        theirs = peft.get_peft_model(tiny_qwen2(), peft.LoraConfig(**plain | {field: value}))
    except Exception:  # needs more than a value: a folder that merely says so
        theirs = peft.get_peft_model(tiny_qwen2(), peft.LoraConfig(**plain))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    if field not in ("target_modules", "r"):  # the files that were written stand for these
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    model = tiny_qwen2()
    try:
        lora.load_adapter(model, tmp_path)
    except ValueError as refusal:
        assert field in str(refusal) or value == ["embed_tokens"], refusal
        return
    expected = logits(peft.PeftModel.from_pretrained(tiny_qwen2(), str(tmp_path)).eval())
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-5)


def test_a_start_that_changes_the_base_is_refused_with_the_way_out(tmp_path):
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="'pissa'.*path_initial_model_for_weight_conversion"):
        lora.load_adapter(tiny_qwen2(), tmp_path)
