"""Model folders that older readers understand too: transformers 4, and what reads its files.

transformers 5 writes rotary settings under `rope_parameters` alone, the dtype as `dtype`, and the
tokenizer as `TokenizersBackend`. A reader of the older keys takes its defaults instead (another
model, and no word of it), or finds no such tokenizer.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

# of a model folder, what makes its tokenizer; weights and config.json are not among them
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template.*", "additional_chat_templates/*"),
)
FULL, SLIDING = "full_attention", "sliding_attention"  # layers with rotary settings of their own


def write_older_keys(file: Path, **settings: Any) -> None:
    """Write the keys of transformers 4 beside those of transformers 5 into a config.json.

    Both say the same, and transformers 5 reads them as one. settings: take the place of keys there.
    """
    config = json.loads(file.read_text(encoding="utf-8")) | settings
    older: dict[str, Any] = {}
    if config.get("dtype"):
        older["torch_dtype"] = config["dtype"]
    if rope := config.get("rope_parameters"):
        if FULL in rope:  # Gemma 3: two bases; what is scaled are the full layers
            older["rope_local_base_freq"] = (rope.get(SLIDING) or {}).get("rope_theta")
            rope = rope[FULL]
        apart = ("rope_theta", "partial_rotary_factor")
        older |= {key: rope[key] for key in apart if key in rope}
        scaling = {key: value for key, value in rope.items() if key not in apart}
        scaled = scaling.get("rope_type", "default") != "default"
        older["rope_scaling"] = scaling if scaled else None
    file.write_text(json.dumps(config | older, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, template: str) -> None:
    """Write a tokenizer's files: those of the folder it was loaded from, unchanged, where it has
    one; then the chat template, where readers of any version look for it.

    template: takes the place of the default template; others that the tokenizer has stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(tokenizer.name_or_path)
    if tokenizer.name_or_path and (source / "tokenizer.json").is_file():
        for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    else:
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = tokenizer.chat_template
    named = (kept if isinstance(kept, dict) else {}) | {"default": template}
    several = [{"name": name, "template": text} for name, text in named.items()]
    wanted = config | {"chat_template": several if len(several) > 1 else template}
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        wanted["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):  # of transformers 5 alone
            wanted.pop(key, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 wants names for them
        wanted["additional_special_tokens"] = wanted.pop("extra_special_tokens")
    for name, text in named.items():
        short = f"additional_chat_templates/{name}" if name != "default" else "chat_template"
        target = folder / f"{short}.jinja"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
    if wanted != config:
        text = json.dumps(wanted, indent=2, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
