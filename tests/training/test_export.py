"""Exports read back, by stock transformers and by PEFT, as the model that was trained."""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers_fork import finish, run_train, start_ranks
from helpers_models import tiny_llama, tiny_qwen2
from helpers_tokenizer import THINKING, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from iopo.config import ExportConfig
from iopo.data.chat import Chat
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.load import byte_tokenizer, tiny_causal_lm
from iopo.model.parallel import prepare
from iopo.training import export
from iopo.training.checkpoint.folders import latest
from iopo.training.launch.placement import RankInfo
from iopo.training.launch.signals import Control

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
    export.write_exports(train_model, run, cfg, Chat(byte_tokenizer()), export.Origin(base), alone)


def slow_export(folder: Path) -> None:
    replacing = export.replacing

    @contextmanager
    def slow(target):
        with replacing(target) as new:
            time.sleep(4)
            yield new

    export.replacing, train_model = slow, trained(adapted(tiny_llama()))
    control = Control(folder / "stacks.txt", timeout_s=3)
    write(train_model, folder)
    control.close()


def test_an_export_that_takes_long_is_no_hang(tmp_path):
    assert finish(start_ranks(1, slow_export, tmp_path)) == [0]
    assert (tmp_path / "export" / "adapter_config.json").exists()


def test_files_get_the_mode_of_the_umask_and_the_dtype_of_the_base(tmp_path):
    before = os.umask(0o027)
    try:
        write(trained(adapted(tiny_qwen2())), tmp_path, base=None, merged=True)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len([file for file in files if file.suffix == ".safetensors"]) == 3
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}
    train_model = trained(tiny_llama())  # computes in fp32, on a base in bf16
    cfg, alone = ExportConfig(), RankInfo(0, 1, 0, 1, CPU)
    chat, origin = Chat(byte_tokenizer()), export.Origin(dtype=torch.bfloat16)
    export.write_exports(train_model, tmp_path / "bf16", cfg, chat, origin, alone)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16" / "export", dtype="auto")
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(
        stock.lm_head.weight, train_model.model.causal_lm.lm_head.weight.bfloat16()
    )


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


@pytest.mark.parametrize("rank", [0, 4])
def test_a_routers_biases_are_part_of_the_weights(tmp_path, rank):
    """A buffer that training does not change, and that decides which experts run."""
    config = {
        "model_type": "glm4_moe", "num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 300, "max_position_embeddings": 512, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    }  # fmt: skip
    model = tiny_causal_lm(config, seed=0, dtype=torch.bfloat16, attention="sdpa")
    (name,) = (name for name, _ in model.named_buffers() if name.endswith("correction_bias"))
    biases = model.get_buffer(name).copy_(torch.linspace(-1, 1, 4))
    train_model = trained(adapted(model) if rank else model, torch.bfloat16)
    write(train_model, tmp_path, base=None, merged=rank > 0)
    for folder in ("export-base", "export-merged") if rank else ("export",):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        assert torch.equal(stock.get_buffer(name), biases)


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
    export.write_exports(train_model, tmp_path, cfg, chat, export.Origin(), alone)
    for name in ("export", "export-merged", "export-base"):
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == [0, 2, 5]
        stock = AutoTokenizer.from_pretrained(tmp_path / name)
        asked = stock.apply_chat_template(
            chat.messages("ask"), tokenize=False, add_generation_prompt=True
        )
        assert asked == chat.prompt("ask") and asked.endswith("</think>\n\n")


def test_an_adapter_alone_is_written_without_a_copy_of_its_base(tmp_path, monkeypatch):
    gathered, gather = {}, export.gather
    monkeypatch.setattr(
        export, "gather", lambda *a, **k: gathered.update(gather(*a, **k)) or gathered
    )
    write(trained(adapted(tiny_qwen2())), tmp_path)
    assert gathered and all(".lora_" in name for name in gathered)
    assert (tmp_path / "export" / "adapter_model.safetensors").exists()


def test_base_without_a_name_is_written_too(tmp_path):
    train_model = trained(adapted(tiny_qwen2()))
    write(train_model, tmp_path, base=None)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "export"))
    expected = logits(train_model.model.causal_lm)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_what_bf16_rounds_in_training_does_not_refuse_an_export(tmp_path, monkeypatch):
    scores, score = [], export._score
    monkeypatch.setattr(export, "_score", lambda *a: scores.append(score(*a)) or scores[-1])
    model = tiny_llama()
    model.lm_head.weight.data *= 3000  # logits as large as those of a run that went astray
    train_model = trained(model, torch.bfloat16)
    cfg, alone = ExportConfig(), RankInfo(0, 1, 0, 1, CPU)
    origin = export.Origin(dtype=torch.float32)
    export.write_exports(train_model, tmp_path, cfg, Chat(byte_tokenizer()), origin, alone)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert stock.dtype == torch.float32
    assert abs(scores[0] - scores[1]) < 0.1
    ids = Chat(byte_tokenizer()).tokenizer.encode(export.PROBE, add_special_tokens=False)
    logp = stock(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1]
    said = logp.gather(1, torch.tensor(ids)[1:, None])[len(ids) // 2 - 1 :]
    assert abs(scores[0] - said.mean().item()) > 0.1  # in fp32


def test_an_export_that_reads_back_differently_is_refused(tmp_path, monkeypatch):
    train_model = trained(tiny_llama())
    write(train_model, tmp_path)
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    tensors = export.gather(train_model, torch.float32, keep=True)

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


FAILURES = {
    "check": lambda: (_ for _ in ()).throw(export.ExportError("does not read back")),
    "disk": lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def run_with_failing_export(arguments: list[str], folder: Path, how: str) -> None:
    """Be train.py, whose export fails once it is written, where it is read back."""
    replacing = export.replacing
    if how == "no checkpoint":
        dcp.save = lambda *_, **__: FAILURES["disk"]()
        return run_train(arguments, folder / "cache", folder / "output.txt")

    @contextmanager
    def failing(target):
        with replacing(target) as new:
            yield new
            FAILURES[how]()

    export.replacing = failing
    run_train(arguments, folder / "cache", folder / "output.txt")


def train(world: int, folder: Path, *overrides: str, how: str | None = None) -> int | None:
    arguments = ["+experiment=tiny_random", f"run={folder}/run", "optim.epochs=2",
                 "optim.global_batch_quads=2", "data.heldout=null", *overrides]  # fmt: skip
    folder.mkdir(exist_ok=True)
    if how is None:
        ranks = start_ranks(world, run_train, arguments, folder / "cache", folder / "output.txt")
    else:
        ranks = start_ranks(world, run_with_failing_export, arguments, folder, how)
    return finish(ranks)[0]


def exported(folder: Path) -> dict[str, bytes]:
    """All files, but for an adapter's config, which names its run's base."""
    names = sorted({file.name for file in folder.iterdir()} - {"adapter_config.json"})
    assert any(name.endswith(".safetensors") for name in names)
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("how", "world", "options"),
    [
        ("check", 1, ()),
        pytest.param(
            "disk", 1, ("model.lora.rank=2", "export.merged=true"), marks=pytest.mark.slow
        ),
        pytest.param("kill", 1, ("checkpoint.asynchronous=false",), marks=pytest.mark.slow),
        pytest.param("check", 2, (), marks=pytest.mark.slow),
    ],
)
def test_weights_outlive_an_export_that_fails(tmp_path, how, world, options):
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert train(world, good, *options) == 0, (good / "output.txt").read_text()[-2000:]
    assert not (good / "run" / "checkpoints").exists()  # none was asked for
    assert train(world, bad, *options, how=how) == (-signal.SIGKILL if how == "kill" else 1)
    run, newest = bad / "run", latest(bad / "run")[0]
    assert newest is not None and not (run / "export").exists()
    steps = (run / "metrics.jsonl").read_text()
    if how != "kill":
        message = (run / "FAILED").read_text()
        assert str(newest) in message and "the same command" in message
        (step,) = {int(word.split("=")[1]) for word in message.split() if "export_step=" in word}
        assert train(world, bad, f"export_step={step}") == 0
        assert exported(run / "exported" / newest.name / "export") == exported(
            good / "run" / "export"
        )
    assert train(world, bad, *options) == 0, (bad / "output.txt").read_text()[-2000:]
    assert (run / "metrics.jsonl").read_text() == steps  # no step was made again
    for name in ("export", *(["export-merged"] if "export.merged=true" in options else [])):
        assert exported(run / name) == exported(good / "run" / name)
    assert (run / "COMPLETE").exists() and not (run / "checkpoints").exists()


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk_does_not_keep_from_exporting(tmp_path):
    assert train(1, tmp_path / "full", how="no checkpoint") == 0
    assert (tmp_path / "full" / "run" / "export" / "model.safetensors").exists()
    assert not list((tmp_path / "full" / "run").rglob("*.partial"))
    assert "could not be written" in (tmp_path / "full" / "output.txt").read_text()
