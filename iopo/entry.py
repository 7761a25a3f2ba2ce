"""The one door from Hydra to the programs: composed, typed, and without keys that nothing reads.

Hydra takes any key that is written with + or ++, and where it refuses a misspelt one it advises
just that. Here both are refused, with the key that was probably meant.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iopo.redact import redact

REFUSED = 2  # exit code
UNKNOWN = re.compile(r"Key '.*' (?:is )?not in .*\s+full_key: (\S+)")  # in OmegaConf's messages
ADDED = re.compile(r"\+\+?(?!hydra\.)(\w+(?:\.\w+)+)=")  # of the command line; not of a group
# what transformers and TRL call our keys
SYNONYMS = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "num_train_epochs": "optim.epochs",
    "max_grad_norm": "optim.clip_norm",
    "per_device_train_batch_size": "optim.micro_batch_quads",
    "gradient_accumulation_steps": "optim.global_batch_quads",
    "gradient_checkpointing": "parallel.checkpointing",
    "max_length": "data.max_response_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "model_name_or_path": "model.path",
    "output_dir": "run",
    "save_steps": "checkpoint.save_every_steps",
    "lora_alpha": "model.lora.alpha",
}


def run(main: Callable[[], Any], known: list[str]) -> None:
    """Call a @hydra.main function; what Hydra cannot compose is one message and exit code 2.

    known: the keys that there are, as `keys` gives them.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints its own advice, and exits 1
    _check([match[1] for word in sys.argv[1:] if (match := ADDED.match(word))], known)
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
        found = UNKNOWN.search(text)
        # construct's files leave keys out that its schemas have: there Hydra's advice is right
        if found is not None and found[1] not in known and not found[1].startswith("hydra."):
            text = _unknown(found[1], known)
        _refuse(text)


def keys(schema: type, prefix: str = "") -> list[str]:
    """The dotted keys of a dataclass of dataclasses. What a free dict holds is not looked at."""
    found: list[str] = []
    for name, kind in get_type_hints(schema).items():
        section = isinstance(kind, type) and is_dataclass(kind)
        found += keys(kind, f"{prefix}{name}.") if section else [prefix + name]
    return found


def check_keys(composed: DictConfig, known: list[str]) -> None:
    """Exit with code 2, naming every key that is not known; in a sweep, no further job starts."""
    _check(_flat(OmegaConf.to_container(composed, resolve=False)), known)


def _check(given: list[str], known: list[str]) -> None:
    # a key, something in a free dict, or a whole section
    wrong = [
        key
        for key in given
        if not any(k == key or k.startswith(f"{key}.") or key.startswith(f"{k}.") for k in known)
    ]
    if wrong:
        _refuse("\n".join(_unknown(key, known) for key in wrong))


def _refuse(message: str) -> None:
    print(f"refused: {redact(message)}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


def _flat(value: Any, prefix: str = "") -> list[str]:
    if not isinstance(value, Mapping):
        return [prefix]
    return [k for name, v in value.items() for k in _flat(v, f"{prefix}.{name}".lstrip("."))]


def _unknown(key: str, known: list[str]) -> str:
    """The sentence on an unknown key: by the name others give it, by its place, by its letters."""
    name = key.rpartition(".")[2]
    place = key.removesuffix(name)
    below = [k.removeprefix(place) for k in known if k.startswith(place)]
    beside = list(dict.fromkeys(k.partition(".")[0] for k in below))
    anywhere = {k.rpartition(".")[2]: k for k in known}
    same = [k for k in known if k.rpartition(".")[2] == name]
    meant = [k for k in [SYNONYMS.get(name)] if k in known]
    meant += difflib.get_close_matches(key, same, 1, cutoff=0)
    meant += [place + k for k in difflib.get_close_matches(name, beside, 1)]
    meant += [anywhere[k] for k in difflib.get_close_matches(name, anywhere, 1, cutoff=0.75)]
    if meant:
        return f"{key} is no key; did you mean {meant[0]}?"
    names = beside or dict.fromkeys(k.partition(".")[0] for k in known)
    return f"{key} is no key; expected one of {', '.join(names)}"
