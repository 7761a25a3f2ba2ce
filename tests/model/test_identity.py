"""Each file of a model folder, changed alone: it changes no number, or every place notices it."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from helpers_models import tiny_llama
from helpers_tokenizer import tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_configs import config

from iopo.evaluation import responses
from iopo.evaluation.config import BenchmarkSection, EvaluateConfig, ModelSection
from iopo.model import lora
from iopo.model.identity import CONFIG_NO_EFFECT, identity, weights_hash
from iopo.training.checkpoint import resume
from iopo.training.inputs import load_inputs
from iopo.training.reference.cache import Cache
from iopo.training.reference.sources import manifest

CONFIG, STOPS, TOKENS = "config.json", "generation_config.json", "tokenizer and template"
ADAPTER = "adapter/adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model folder with an adapter inside, and rows."""
    folder = tmp_path_factory.mktemp("identity")
    model = tiny_llama(400)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / STOPS).write_text('{"eos_token_id": 2, "temperature": 0.6}')
    (folder / "README.md").write_text("A model.")
    generator = torch.Generator().manual_seed(0)
    lora.add_lora(model, rank=2, alpha=4.0, dropout=0.0, targets="q_proj", generator=generator)
    tensors = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    lora.write_adapter(folder / "adapter", lora.adapter_config(model, "base"), tensors)
    rows = [{"x": "Name a fruit.", "chosen": "Pear.", "rejected": "Sea."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def set_key(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def swap(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def shift(file: Path) -> None:
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, file, metadata={"format": "pt"})


# (file, change, the part that notices it; None: it changes no number, and why)
CHANGES = {
    "rope theta": (
        CONFIG,
        lambda f: set_key(f, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        CONFIG,
    ),
    "norm eps": (CONFIG, lambda f: set_key(f, rms_norm_eps=0.1), CONFIG),
    "logit scale": (CONFIG, lambda f: set_key(f, logit_scale=0.5), CONFIG),
    "model type": (CONFIG, lambda f: set_key(f, model_type="mistral"), CONFIG),
    "name": (CONFIG, lambda f: set_key(f, _name_or_path="x", transformers_version="9"), None),
    "dtype: the run's config decides": (CONFIG, lambda f: set_key(f, dtype="float64"), None),
    "order of keys": (
        CONFIG,
        lambda f: f.write_text(json.dumps(dict([*json.loads(f.read_text()).items()][::-1]))),
        None,
    ),
    "stops": (STOPS, lambda f: set_key(f, eos_token_id=[2, 7]), STOPS),
    "no generation config: config.json names the stops": (STOPS, Path.unlink, STOPS),
    "sampling: our config decides": (STOPS, lambda f: set_key(f, temperature=0.1), None),
    "normalisation": (
        "tokenizer.json",
        lambda f: swap(f, '"normalizer": null', '"normalizer": {"type": "Lowercase"}'),
        TOKENS,
    ),
    "special token": (
        "tokenizer_config.json",
        lambda f: set_key(f, eos_token="<|endoftext|>"),
        TOKENS,
    ),
    "blanks of decoded text": (
        "tokenizer_config.json",
        lambda f: set_key(f, clean_up_tokenization_spaces=True),
        TOKENS,
    ),
    "length: the run's limits decide": (
        "tokenizer_config.json",
        lambda f: set_key(f, model_max_length=7),
        None,
    ),
    "side of padding: rows are not padded, or by generate": (
        "tokenizer_config.json",
        lambda f: set_key(f, padding_side="left"),
        None,
    ),
    "template": (
        "chat_template.jinja",
        lambda f: swap(f, "['content']", "['content'] | trim"),
        TOKENS,
    ),
    "map of special tokens": (
        "special_tokens_map.json",
        lambda f: f.write_text('{"eos_token": "<|endoftext|>"}'),
        TOKENS,
    ),
    "weights": ("model.safetensors", shift, "weights"),
    "index of shards": (
        "model.safetensors.index.json",
        lambda f: f.write_text('{"weight_map": {}}'),
        "weights",
    ),
    "adapter weights": ("adapter/adapter_model.safetensors", shift, "adapter weights"),
    "alpha": (ADAPTER, lambda f: set_key(f, lora_alpha=8.0), "adapter_config.json"),
    "base of an adapter": (ADAPTER, lambda f: set_key(f, base_model_name_or_path="y"), None),
    "order of targets: tensors name them": (
        ADAPTER,
        lambda f: set_key(f, target_modules=["q_proj", "v_proj"]),
        None,
    ),
    "text for people": ("README.md", lambda f: f.write_text("Another."), None),
}


def states(folder: Path):
    """The fingerprint of a run, the manifest of its reference, and that of answers."""
    cfg = config(
        "+experiment=tiny_random", "model.tiny=null", f"model.path={folder}", "objective=dpo",
        f"model.adapter={folder}/adapter", f"data.train={folder}/rows.jsonl", "data.heldout=null",
        f"data.cache_dir={folder}/cache",
    )  # fmt: skip
    inputs = load_inputs(cfg)
    model = ModelSection(str(folder), f"{folder}/adapter", dtype="fp32")
    asked = EvaluateConfig(BenchmarkSection("ifeval"), model=model)
    return (
        resume.fingerprint(cfg, inputs, 1),
        manifest(cfg.model, cfg.data, inputs, "cpu"),
        responses.manifest(asked, "hash of the data", responses.load_chat(model)),
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_noticed_everywhere_or_changes_no_number(made, monkeypatch, change):
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "home"))
    name, act, part = CHANGES[change]
    file = made / name
    before, reference, answers = states(made)
    kept = file.read_bytes() if file.exists() else None
    try:
        act(file)
        now, reference_now, answers_now = states(made)
    finally:
        if kept is None:
            file.unlink()
        else:
            file.write_bytes(kept)
    found = {
        key for key in reference | reference_now if reference.get(key) != reference_now.get(key)
    }
    assert found == ({part} if part else set())
    root, told = made / "reference", made / "answers.manifest.json"
    old = Cache(root, reference)
    old.folder.mkdir(parents=True, exist_ok=True)
    (old.folder / "manifest.json").write_text(json.dumps(reference))
    told.unlink(missing_ok=True)
    responses.check_manifest(told, answers)
    if part is None:
        assert resume.check_resume(before, now) == []
        assert Cache(root, reference_now).folder == old.folder
        responses.check_manifest(told, answers_now)
        return
    with pytest.raises(ValueError, match=f"the {part} is not the one the run began with"):
        resume.check_resume(before, now)
    assert Cache(root, reference_now).nearest() == [part]
    with pytest.raises(ValueError, match=f"made with other settings .{part}: there"):
        responses.check_manifest(told, answers_now)


def test_a_part_that_went_is_noticed_too(made):
    cfg_with, *_ = states(made)
    without = json.loads(json.dumps(cfg_with))
    del without["identity"]["adapter_config.json"]
    for one, other in ((cfg_with, without), (without, cfg_with)):
        with pytest.raises(ValueError, match="the adapter_config.json is not the one"):
            resume.check_resume(one, other)


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(made):
    now, *_ = states(made)
    old = now | {"identity": {"data": "d", "reference and starting weights": "r"}}
    with pytest.raises(ValueError, match="an earlier version of iopo saved it") as caught:
        resume.check_resume(old, now)
    assert "None" not in str(caught.value)


def test_config_keys_without_effect_have_a_reason():
    assert all(CONFIG_NO_EFFECT.values())


def test_weights_hash_follows_content(made):
    before = weights_hash(made)
    assert before == weights_hash(made)
    file = made / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(1, 1))
    assert weights_hash(made) != before
    file.write_bytes(content)
    expected = hashlib.sha256(
        f"{file.name}\0{hashlib.sha256(content).hexdigest()}\n".encode()
    ).hexdigest()
    assert weights_hash(made) == expected == before


def test_a_folder_that_is_no_model_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"no \*.safetensors to hash"):
        weights_hash(tmp_path)
    (made / "broken").mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        (made / "broken" / name).write_text("[1")
    from iopo.data.chat import Chat

    with pytest.raises(ValueError, match=r"config.json: expected a JSON object"):
        identity(made / "broken", Chat(tiny_tokenizer()), None)
