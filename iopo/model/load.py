"""Load a transformers causal LM and its tokenizer.

Weights come from safetensors only; code that ships inside a model folder is never run; every
dropout is off, so that a policy and its reference are the same function at step 0. What can never
work is refused here, by name; iopo/agreement.py tries the rest.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.logging import disable_progress_bar

from iopo.kernels import tiled
from iopo.model.demo_model import fetch_demo_model
from iopo.model.headers import read_headers
from iopo.progress import progress

DEMO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# keys of a config -> why a model that sets one of them is refused
UNSUPPORTED = {
    ("auto_map",): "it needs code from its own folder (auto_map), which is never run",
    ("quantization_config",): "its weights are quantised; use the bf16 or fp32 original",
    ("is_encoder_decoder",): "it is an encoder-decoder, not a causal LM",
    ("vision_config", "audio_config"): "it is multimodal; use the text-only model of the family",
}

# what transformers raises, beside ValueError, for files that it cannot use
FAULTS = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def compute_dtype(name: str, device_type: str) -> torch.dtype:
    """The dtype that model.dtype (auto, bf16, fp32, fp64) stands for on this kind of device."""
    return default_dtype(device_type) if name == "auto" else DTYPES[name]


def default_dtype(device_type: str) -> torch.dtype:
    """bf16 on CUDA and on CPUs that multiply it faster than fp32; fp32 on others."""
    fast = device_type == "cuda" or tiled.bf16_speed() > tiled.FAST
    return torch.bfloat16 if fast else torch.float32


def dtype_name(name: str, device_type: str) -> str:
    """The name in DTYPES of compute_dtype: model.dtype without auto."""
    dtype = compute_dtype(name, device_type)
    return next(key for key, value in DTYPES.items() if value is dtype)


def dtype_line(name: str, device_type: str) -> str:
    """What a run says about its dtype in its first lines."""
    line = f"computes in {dtype_name(name, device_type)} (model.dtype={name})"
    if device_type == "cuda":
        return line
    return f"{line}; this CPU multiplies bf16 {tiled.bf16_speed():.2g} times as fast as fp32"


def resolve_model(path: str | Path) -> Path:
    """The local folder of `demo`, of a folder (checked) or of a hub id (downloaded if need be).

    Raises ValueError for a folder without config.json or safetensors.
    """
    if str(path) == "demo":
        return fetch_demo_model()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        name = str(path)
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise ValueError(
                f"model.path: {path} is not a folder; give a folder with config.json and "
                "*.safetensors, a hub id such as org/name, or demo"
            )
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"]
        with progress(None, f"downloading {name}"):
            folder = Path(snapshot_download(name, allow_patterns=patterns))
    require_safetensors(folder)
    return folder


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; Chat (iopo/data/chat.py) checks it."""
    with _refused(path):
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def read_config(path: str | Path) -> PretrainedConfig:
    """config.json of a model folder. Raises ValueError for one that transformers cannot read."""
    with _refused(path):
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)


@contextmanager
def _refused(path: str | Path) -> Iterator[None]:
    """What is wrong with a user's folder is a ValueError, whatever transformers makes of it."""
    try:
        yield
    except (StrictDataclassError, *FAULTS) as error:
        raise ValueError(f"{path}: transformers cannot use it: {error}") from error


def load_causal_lm(
    path: str | Path, dtype: torch.dtype, attention: str = "sdpa"
) -> PreTrainedModel:
    """A causal LM from a local folder (resolve_model), on the CPU, dropout and KV cache off.

    dtype: of every parameter. Full fine-tuning loads fp32 and computes in bf16 (parallel.prepare);
        a frozen base (LoRA), a reference and generation load in the dtype of the computation.
    attention: SHARED of iopo.model.attention, or one of transformers' own (sdpa, eager, ...).
    Raises ValueError, naming the model and the reason, for pickled weights, code in the model
    folder, quantised weights, architectures that are not supported, and weights that are missing:
    transformers would draw them at random.
    """
    require_safetensors(path)
    read_headers(Path(path))  # names the file that cannot be read
    disable_progress_bar()  # transformers draws one per load, on every rank
    config = read_config(path)
    check_config(config, where=str(path))
    with progress(None, f"loading the weights of {path}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    _refuse_missing(report["missing_keys"], where=str(path))
    return _finish(model, where=str(path))


def tiny_causal_lm(
    config: dict[str, Any], *, seed: int, dtype: torch.dtype, attention: str = "sdpa"
) -> PreTrainedModel:
    """A randomly initialised model from keys of a transformers config, the same for one seed.

    config: must hold `model_type`; the rest overrides that type's defaults. The random numbers
    are drawn on the CPU in fp32, so all dtypes hold the same weights up to rounding.
    """
    made = config_of_tiny(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_config(made, torch.float32, attention, where="model.tiny")
    nn.Module.to(model, dtype)
    return model


def config_of_tiny(config: dict[str, Any]) -> PretrainedConfig:
    """The transformers config of keys such as model.tiny. Raises ValueError if there is none."""
    if "model_type" not in config:
        raise ValueError("model.tiny: 'model_type' is missing; add for example model_type: llama")
    with _refused("model.tiny"):
        return AutoConfig.for_model(**config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of toy size, so that the whole program runs without any download.

    One token per UTF-8 byte (256) plus <|im_start|>, <|im_end|> (end of turn and padding).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def architecture(path: str | Path) -> PretrainedConfig:
    """The config of a model whose weights need not be here: a folder, a hub id or `demo`.

    The project's own models come from architectures/, which holds the keys that decide sizes (not
    rotary settings); any other hub id costs the download of its config.json.
    Raises ValueError if there is no config.
    """
    name = DEMO_ID if str(path) == "demo" else str(path)
    shipped = Path(__file__).parent / "architectures" / (name.replace("/", "--") + ".json")
    if shipped.is_file():
        return AutoConfig.for_model(**json.loads(shipped.read_text()))
    try:
        return AutoConfig.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"model.path: no config.json for {path} here or on the hub ({error}); give a folder "
            "with a config.json"
        ) from error


def meta_causal_lm(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, *, where: str = "model.path"
) -> PreTrainedModel:
    """A model without values, on the meta device: its operators compute shapes only.

    Raises ValueError for a config that is not supported or that transformers cannot build.
    """
    with _refused(where), torch.device("meta"):
        return _from_config(config, dtype, attention, where=where)


def check_tensors(model: PreTrainedModel, folder: Path) -> list[str]:
    """Compare the files' headers with a model on the meta device, which is changed.

    Returns names of tensors that the model does not use. Raises ValueError for files that are
    missing or damaged, and for tensors that are missing or have another shape.
    """
    disable_progress_bar()
    meta = torch.device("meta")
    state = {n: torch.empty(shape, device=meta) for n, shape in read_headers(folder).items()}
    # What from_pretrained does with values, done with shapes: it renames and merges tensors, too.
    renames: Any = get_model_conversion_mapping(model)
    options = LoadStateDictConfig(device_map={"": meta}, dtype=model.dtype, weight_mapping=renames)
    found, _ = convert_and_load_state_dict_in_model(model, state, options)
    model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(found)
    _refuse_missing(found.missing_keys, where=str(folder))
    if found.mismatched_keys:
        name, has, expected = sorted(found.mismatched_keys)[0]
        raise ValueError(
            f"{folder}: {len(found.mismatched_keys)} tensors have other shapes than config.json "
            f"says, among them {name}: found {list(has)}, expected {list(expected)}"
        )
    return sorted(found.unexpected_keys)


def _from_config(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, *, where: str
) -> PreTrainedModel:
    check_config(config, where=where)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    return _finish(model, where=where)


def require_safetensors(path: str | Path) -> None:
    """Raise ValueError unless `path` is a folder with config.json and *.safetensors."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a transformers model folder")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    found = ", ".join(pickles) if pickles else "no weights"
    raise ValueError(
        f"{folder}: found {found}, expected *.safetensors. Pickled weights can run code when they "
        "are opened and are not loaded; convert them once, on a machine where you trust them: "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('SOURCE').save_pretrained('TARGET')\""
    )


def check_config(config: PretrainedConfig, *, where: str) -> None:
    """Turn dropout off; raise ValueError, with all reasons, for an unsupported model."""
    fields = config.to_dict()
    reasons = [reason for keys, reason in UNSUPPORTED.items() if any(map(fields.get, keys))]
    layers = set(fields.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if layers:
        reasons.append(f"it has layers of kind {', '.join(sorted(layers))}, which mix packed rows")
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if not reasons and type(config) not in known:
        reasons.append("transformers has no causal LM for it")
    elif not reasons and not known[type(config)]._supports_attention_backend:
        reasons.append("its attention cannot be replaced through AttentionInterface")
    if reasons:
        kind, why = config.model_type, "; ".join(reasons)
        raise ValueError(f"{where}: model type '{kind}' is not supported: {why}")
    for key, value in fields.items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)


def _refuse_missing(names: Collection[str], *, where: str) -> None:
    if names:
        raise ValueError(
            f"{where}: no file holds {len(names)} weights that the model needs, among them "
            f"{', '.join(sorted(names)[:3])}; is the download complete, and is config.json its own?"
        )


def _finish(model: PreTrainedModel, *, where: str) -> PreTrainedModel:
    on = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if on:
        raise ValueError(f"{where}: dropout is still on in {', '.join(on[:3])}")
    model.config.use_cache = False  # generation asks for it explicitly
    return model
