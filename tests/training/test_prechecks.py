"""What is known before the weights load is refused before they load, and nothing is written."""

import json
from pathlib import Path

import pytest
import torch
from helpers_models import SMALL, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from iopo.config import (
    DataConfig,
    EvaluationConfig,
    Layout,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)
from iopo.evaluation import responses
from iopo.evaluation.config import BenchmarkSection, EvaluateConfig, ModelSection
from iopo.evaluation.run import evaluate
from iopo.model import load, lora
from iopo.model.load import byte_tokenizer
from iopo.training import prechecks
from iopo.training.inputs import load_inputs

ROWS = [
    {"id": f"q{i}", "x1": "Say it in lower case.", "x2": "Say it in upper case.",
     "y1": "rain " * i, "y2": "RAIN " * i}
    for i in range(1, 8)
]  # fmt: skip


def make(path: Path, model_type: str = "llama", **keys) -> Path:
    """A model folder with random weights and the byte tokenizer, whose ids end at 257, and <tool>,
    which is 258."""
    config = AutoConfig.for_model(model_type, **{"vocab_size": 260} | SMALL | keys)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="30KB")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens("<tool>")
    tokenizer.save_pretrained(path)
    return path


def edit(path: Path, **keys) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | keys))
    return path


def rewrite(path: Path, change) -> Path:
    """Change the tensors of the one file that holds model.norm.weight."""
    file = next(f for f in path.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def damage(path: Path, content: bytes | None) -> Path:
    file = sorted(path.glob("*.safetensors"))[2]
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content or file.read_bytes()[:-8])
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def folder(base, tmp_path):
    """A copy of a good model, to be spoiled."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def config(tmp_path: Path, folder: Path, rows=ROWS, heldout=None, **sections) -> TrainConfig:
    files = {}
    for name, of in (("train", rows), ("heldout", heldout)):
        if of is not None:
            files[name] = str(tmp_path / f"{name}.jsonl")
            Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in of))
    options = {"model": {}, "data": {}, "evaluation": {"samples": 0}, "objective": {}} | sections
    lora_cfg = LoraConfig(**options["model"].pop("lora", {}))
    return TrainConfig(
        run=str(tmp_path / "run"),
        model=ModelConfig(path=str(folder), lora=lora_cfg, **options["model"]),
        data=DataConfig(**files, cache_dir=str(tmp_path / "tokens"), **options["data"]),
        evaluation=EvaluationConfig(**options["evaluation"]),
        objective=ObjectiveConfig(**options["objective"]),
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
SHARD = "model-00003-of-"
NORM = "model.norm.weight"
# of the model folder: how it is spoiled, and the words of the message
FOLDERS = {
    "git-lfs": (lambda p: damage(p, POINTER), [SHARD, "63 bytes, a git-lfs pointer", "lfs pull"]),
    "truncated": (lambda p: damage(p, b""), [SHARD, "bytes, truncated"]),
    "shard is missing": (lambda p: damage(p, None), [SHARD, "missing", "index.json names it"]),
    "tensor is missing": (lambda p: rewrite(p, lambda t: t.pop(NORM)), ["1 weights", NORM]),
    "other shape": (
        lambda p: rewrite(p, lambda t: t.update({NORM: torch.ones(7)})), [NORM, "[7]", "[32]"],
    ),
    "int8": (
        lambda p: rewrite(p, lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        ["quantised", NORM, "I8"],
    ),
    "another depth": (lambda p: edit(p, num_hidden_layers=3), ["9 weights", "model.layers.2"]),
    "quantised": (lambda p: edit(p, quantization_config={"bits": 4}), ["'llama'", "quantised"]),
    "unsupported": (lambda p: edit(p, model_type="gemma2"), ["'gemma2'", "soft-capped"]),
    "config": (lambda p: edit(p, num_attention_heads=5), ["hidden size (32)", "heads (5)"]),
    "no json": (lambda p: (p / "config.json").write_text("{") and p, ["config.json", "valid JSON"]),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink() or p, ["tokenizer"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_model_folder_is_refused_from_its_config_and_headers(folder, tmp_path, case):
    spoil, words = FOLDERS[case]
    spoil(folder)
    with pytest.raises(ValueError) as refused:
        load_inputs(config(tmp_path, folder))
    assert [word for word in words if word not in str(refused.value)] == []
    assert not (tmp_path / "tokens").exists() and not (tmp_path / "run").exists()


C1 = {"kind": "words", "params": {"max": 100}, "text": "At most 100 words."}
LONG = [ROWS[0], ROWS[1] | {"id": "long", "y1": "rain " * 60}]
# model type and keys of its config, options of the run, and the words
ROWS_REFUSED = {
    "token": (("llama", {"vocab_size": 258}),
              {"rows": [*ROWS, ROWS[0] | {"id": "a1", "y2": "<tool>"}]},
              ["train.jsonl: row a1 holds <tool> (id 258)", "258 embeddings", "resize"]),
    "end of turn": (("llama", {"vocab_size": 257}), {}, ["<|im_end|> (id 257)", "257 embeddings"]),
    "learned": (("gpt2", {"max_position_embeddings": 256}), {"rows": LONG},
                ["train.jsonl: row long", "tokens; the model has 256 learned positions"]),
    "learned, held out": (("gpt2", {"max_position_embeddings": 256}), {"heldout": LONG},
                          ["heldout.jsonl: row long", "256 learned positions"]),
    "learned with an offset": (("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
                               {"rows": [LONG[1] | {"y1": "rain " * 100}]}, ["row long", "512"]),
    "window": (("mistral", {"sliding_window": 200}), {"rows": LONG},
               ["row long", "Mistral", "window of 200"]),
    "window of some layers, held out": (
        ("gemma3_text", {"sliding_window": 200, "head_dim": 8}), {"heldout": LONG},
        ["heldout.jsonl: row long", "window of 200"],
    ),
    "samples": (("llama", {"max_position_embeddings": 256}),
                {"heldout": ROWS, "evaluation": {"samples": 2, "max_new_tokens": 220}},
                ["evaluation.samples", "220 new ones", "256 positions"]),
    "a kind of ours with other parameters": (
        ("llama", {}),
        {"heldout": [row | {"c1": [C1]} for row in ROWS], "evaluation": {"samples": 2}},
        ["data.heldout: row q1, c1", "'words'", "'max'", "another name"],
    ),
    "margin, held out": (
        ("llama", {}),
        {"rows": [row | {"c1": [C1], "c2": [C1]} for row in ROWS], "heldout": ROWS,
         "objective": {"margin_per_constraint": 0.5}},
        ["7 rows of", "heldout.jsonl", "c1 and c2"],
    ),
    "adapters of no layer": (("gpt2", {}), {"model": {"lora": {"rank": 2}}}, ["'gpt2'", "Conv1D"]),
    "targets": (("llama", {}), {"model": {"lora": {"rank": 2, "targets": "c_attn"}}},
                ["model.lora.targets: c_attn", "q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS_REFUSED)
def test_rows_and_adapters_that_do_not_fit_the_model_are_refused(tmp_path, case):
    (kind, keys), options, words = ROWS_REFUSED[case]
    model = make(tmp_path / "model", kind, **keys)
    with pytest.raises(ValueError) as refused:
        load_inputs(config(tmp_path, model, **options))
    assert [word for word in words if word not in str(refused.value)] == []
    assert not (tmp_path / "run").exists()


def test_the_plain_layout_takes_windows_and_rotary_positions_have_no_end(tmp_path):
    keys = {"sliding_window": 50, "max_position_embeddings": 64}
    model = make(tmp_path / "model", "mistral", **keys)
    inputs = load_inputs(config(tmp_path, model, data={"layout": Layout.plain}))
    (note,) = inputs.notes
    assert "row q7 is the longest" in note and "more than the 64 positions" in note
    edit(model, rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4})
    assert load_inputs(config(tmp_path, model, data={"layout": Layout.plain})).notes == []


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    other = tiny_llama(hidden_size=16)
    generator = torch.Generator().manual_seed(0)
    lora.add_lora(other, rank=2, alpha=4.0, dropout=0.0, targets="q_proj", generator=generator)
    named = {n: p for n, p in other.named_parameters() if ".lora_" in n}
    lora.write_adapter(tmp_path / "adapter", lora.adapter_config(other, "base"), named)
    for refuse in (
        lambda: load_inputs(config(tmp_path, base, model={"adapter": str(tmp_path / "adapter")})),
        lambda: responses.require_model(ModelSection(str(base), str(tmp_path / "adapter"))),
    ):
        with pytest.raises(ValueError, match=r"q_proj.lora_A has shape \(2, 16\), expected"):
            refuse()


def test_experts_that_no_adapter_reaches_are_named(tmp_path):
    keys = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    model = make(tmp_path / "model", "qwen3_moe", **keys)
    inputs = load_inputs(config(tmp_path, model, model={"lora": {"rank": 2}}))
    # q, k, v, o of two layers: rank times (in + out)
    assert f"LoRA: {2 * 2 * (64 + 48 + 48 + 64):,} parameters in 8 layers" in inputs.notes[0]
    assert "model.layers.*.mlp.experts.gate_up_proj (2)" in inputs.notes[0]
    described = lora.describe(load.load_causal_lm(model, torch.float32), "all-linear", 2)
    assert described == inputs.notes[0]
    policy = load.load_causal_lm(model, torch.float32)
    generator = torch.Generator().manual_seed(0)
    lora.add_lora(policy, rank=2, alpha=1, dropout=0, targets="all-linear", generator=generator)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert f"LoRA: {trained:,} parameters" in described


def test_missing_weights_are_not_drawn_at_random_where_a_model_loads(folder):
    rewrite(folder, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ValueError, match=rf"no file holds 1 weights .*{NORM}"):
        load.load_causal_lm(folder, torch.float32)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt2", "opt", "gemma3_text"])
def test_a_model_that_loads_passes_and_so_do_its_weights(tmp_path, kind):
    """What headers say of a good folder is what loading it says: nothing is missing or left."""
    keys = {
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
        "gemma3_text": {"head_dim": 8},
    }
    model = make(tmp_path / "model", kind, **keys.get(kind, {}))
    skeleton, notes = prechecks.check_model(model, None)
    assert notes == []
    loaded = load.load_causal_lm(model, torch.float32)
    shapes = {n: p.shape for n, p in loaded.named_parameters()}
    assert {n: p.shape for n, p in skeleton.named_parameters()} == shapes


def test_an_evaluation_in_process_refuses_before_it_makes_its_folder(folder, tmp_path):
    damage(folder, POINTER)
    quads, model = BenchmarkSection("quads"), ModelSection(str(folder))
    asked = EvaluateConfig(benchmark=quads, model=model, out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="git-lfs pointer"):
        evaluate(asked)
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_model_does_not_use_are_told(folder, tmp_path):
    edit(folder, num_hidden_layers=1)
    (note,) = load_inputs(config(tmp_path, folder)).notes
    assert "9 tensors" in note and "model.layers.1" in note
