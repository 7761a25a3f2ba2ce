"""Exports read back, by stock transformers and by PEFT, as the model that was trained."""

import json

import peft
import pytest
import torch
from helpers_models import tiny_llama, tiny_qwen2
from helpers_tokenizer import THINKING, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from iopo.config import ExportConfig
from iopo.data.chat import Chat
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.load import byte_tokenizer
from iopo.model.parallel import prepare
from iopo.training import export
from iopo.training.launch.placement import RankInfo

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20) * 6 % 258


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def trained(model, dtype=torch.float32):
    train_model = prepare(LogProbs(model), device=CPU, dtype=dtype, mesh=None)
    generator = torch.Generator().manual_seed(1)
    for parameter in train_model.parameters.values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    train_model.zero_grad()
    return train_model


def write(train_model, run, *, base="org/base", merged=False):
    cfg, alone = ExportConfig(merged=merged), RankInfo(0, 1, 0, 1, CPU)
    export.write_exports(train_model, run, cfg, Chat(byte_tokenizer()), base, alone)


def adapted(model):
    generator = torch.Generator().manual_seed(3)
    lora.add_lora(model, rank=4, alpha=8.0, dropout=0.1, targets="all-linear", generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_full_model_gives_the_same_logits(tmp_path, dtype, tied):
    train_model = trained(tiny_llama(tied=tied), dtype)
    write(train_model, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert stock.dtype == dtype and stock.config.use_cache
    torch.testing.assert_close(logits(stock), logits(train_model.model.causal_lm))
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]


def test_adapter_and_merged_model_give_the_same_logits(tmp_path):
    train_model = trained(adapted(tiny_qwen2()))
    expected = logits(train_model.model.causal_lm)
    train_model.model.train()
    write(train_model, tmp_path, merged=True)
    with_peft = peft.PeftModel.from_pretrained(tiny_qwen2(), str(tmp_path / "export"))
    torch.testing.assert_close(logits(with_peft), expected, rtol=1e-4, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export-merged", dtype="auto")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    # the model in training is untouched
    assert lora.adapters(train_model.model.causal_lm) and train_model.model.causal_lm.training


def test_exports_carry_the_chat_of_training(tmp_path):
    """Stock transformers, as vLLM, renders the text of training and reads where to stop."""
    tokenizer = tiny_tokenizer("{{ strftime_now('%d %b %Y') }}" + THINKING)
    tokenizer.eos_token = "<|endoftext|>"  # the template ends turns with <|im_end|>
    chat = Chat(tokenizer, options={"enable_thinking": False})
    train_model = trained(adapted(tiny_qwen2(vocab=400, eos_token_id=5)))
    cfg, alone = ExportConfig(merged=True), RankInfo(0, 1, 0, 1, CPU)
    export.write_exports(train_model, tmp_path, cfg, chat, None, alone)
    for name in ("export", "export-merged", "export-base"):
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == [0, 2, 5]
        stock = AutoTokenizer.from_pretrained(tmp_path / name)
        asked = stock.apply_chat_template(
            chat.messages("ask"), tokenize=False, add_generation_prompt=True
        )
        assert asked == chat.prompt("ask") and asked.endswith("</think>\n\n")


def test_base_without_a_name_is_written_too(tmp_path):
    train_model = trained(adapted(tiny_qwen2()))
    write(train_model, tmp_path, base=None)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "export"))
    expected = logits(train_model.model.causal_lm)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_an_export_that_reads_back_differently_is_refused(tmp_path, monkeypatch):
    train_model = trained(tiny_llama())
    write(train_model, tmp_path)
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    tensors = export.gather(train_model, keep=True)

    def wrong(*_, **__):
        return tensors | {"lm_head.weight": tensors["lm_head.weight"] * 1.5}

    monkeypatch.setattr(export, "gather", wrong)
    with pytest.raises(export.ExportError, match="on average"):
        write(train_model, tmp_path)
    monkeypatch.setattr(export, "gather", lambda *_, **__: tensors | {"extra": torch.ones(2)})
    with pytest.raises(export.ExportError, match="extra"):
        write(train_model, tmp_path)
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
