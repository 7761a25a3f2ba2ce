"""The identity of a model: what gives its tensors their meaning, part by part.

Whatever is kept under a model's name compares it: cached reference log-probs, a run that goes on,
answers of an evaluation. The parts keep their names, so that a refusal says which file changed.
"""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from iopo.data.chat import Chat, tokenizer_hash
from iopo.files import sha256_text, weights_hash
from iopo.model.lora import NO_EFFECT

# Keys of config.json that change no number; a key that is not here changes the identity.
CONFIG_NO_EFFECT = {
    "_name_or_path": "where the model was once loaded from",
    "transformers_version": "who wrote the file; the version that reads it is named elsewhere",
    "dtype": "model.dtype decides",
    "torch_dtype": "the older name of dtype",
    "use_cache": "set by who calls the model",
}
GENERATION_READ = ("eos_token_id",)  # of generation_config.json; sampling is set in our config


def identity(folder: Path | None, chat: Chat, adapter: str | Path | None) -> dict[str, str]:
    """{part: its hash, or its value where that is short} of a model as this package computes it.

    folder: from resolve_model; None leaves the parts out that a folder has (model.tiny).
    Raises ValueError for a folder without weights or with JSON that cannot be read.
    """
    parts = {"tokenizer and template": tokenizer_hash(chat)}
    if folder is not None:
        stops = folder / "generation_config.json"
        found = _read(stops) if stops.is_file() else None  # None: transformers takes config.json's
        read = found and {key: found.get(key) for key in GENERATION_READ}
        parts["weights"] = weights_hash(folder)
        parts["config.json"] = _hash_without(folder / "config.json", CONFIG_NO_EFFECT)
        parts[stops.name] = json.dumps(read)
    if adapter is not None:
        parts["adapter weights"] = weights_hash(adapter)
        parts["adapter_config.json"] = _hash_without(
            Path(adapter) / "adapter_config.json", NO_EFFECT
        )
    return parts


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the parts that are not the same in both, those that only one has among them."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON object ({error})") from error


def _hash_without(file: Path, no_effect: Container[str]) -> str:
    kept = {key: value for key, value in _read(file).items() if key not in no_effect}
    return sha256_text(json.dumps(kept, sort_keys=True))
