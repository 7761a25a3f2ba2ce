"""Keep secrets out of everything that is written or printed."""

import os
import re
from collections.abc import Mapping
from typing import Any

# Whole words between underscores: HF_TOKEN and WANDB_API_KEY, but not TOKENIZERS_PARALLELISM.
_SECRET_NAME = re.compile(
    r"(^|_)(KEY|APIKEY|TOKEN|SECRET|PASS|PASSWORD|PASSWD|CREDENTIAL|CREDENTIALS)(_|$)", re.I
)
_SHORTEST = 8  # a shorter value would also hide harmless words of the same spelling

# Values that are secret by their shape, whoever set them.
_SECRET_SHAPES = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|AKIA[A-Z0-9]{16}|xox[abpr]-[\w-]{10,})"
)
_BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}", re.I)
_URL_PASSWORD = re.compile(r"(://[^\s/:@]*:)[^\s/@]+@")
# `api_key: value`, `judge.api_key=value`, `"password": "value"`; not `api_key_env: NAME`,
# not the tokens a tokenizer has (`pad_token`), not an empty value or an interpolation.
_ASSIGNMENT = re.compile(
    r"""((?:api_?key|secret(?:_?key)?|access_key|private_key|passw(?:or)?d
        |(?:auth|access|api|hf|hub|bearer)_token)["']?\s*[=:]\s*["']?)
        (?!null\b|None\b|~|\$\{|<redacted)([^\s"',}\]]+)""",
    re.I | re.X,
)

_REDACTED = re.compile(r"<redacted(:\w+)?>")


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without secrets: each one replaced by `<redacted>`, or `<redacted:NAME>`.

    Hidden are the values of environment variables whose name says key, token, secret, password or
    credential (8 characters or more), values with the shape of a known key, bearer tokens,
    passwords in URLs, and what stands behind a secret's name (`api_key=...`). Used on config
    dumps, argv, environment.json, the git diff and exception messages.
    """
    named = [(v, k) for k, v in environ.items() if len(v) >= _SHORTEST and _SECRET_NAME.search(k)]
    # Longest first, so that a secret that contains another one goes as a whole.
    for value, name in sorted(named, key=lambda pair: -len(pair[0])):
        text = text.replace(value, f"<redacted:{name}>")
    text = _SECRET_SHAPES.sub("<redacted>", text)
    text = _BEARER.sub(r"\1<redacted>", text)
    text = _URL_PASSWORD.sub(r"\1<redacted>@", text)
    return _ASSIGNMENT.sub(r"\1<redacted>", text)


def redact_values(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """A copy of JSON values (dicts, lists, texts) with `redact` done on every text in them.

    What stands under a secret's name goes whole. `redact` on their JSON would miss what JSON
    escapes, and could leave what is no JSON. Keys, numbers and what else holds no text stay.
    """
    if isinstance(value, str):
        return redact(value, environ)
    if isinstance(value, list | tuple):
        return [redact_values(item, environ) for item in value]
    if not isinstance(value, Mapping):
        return value
    found = {name: redact_values(item, environ) for name, item in value.items()}
    for name, item in found.items():
        named = _ASSIGNMENT.search(f"{name}=x") and item not in (None, "")
        if named and not _REDACTED.fullmatch(str(item)):
            found[name] = "<redacted>"
    return found
