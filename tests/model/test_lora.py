"""LoRA: starts as the base, equals its definition, and trades files with PEFT."""

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
