"""What code can check in a text: each kind renders, checks and measures one rule. No torch.

>>> c = make("sentences", relation="exactly", number=2)
>>> c.render(), c.check("One. Two.")
('Your answer must contain exactly 2 sentences.', True)
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from iopo.constraints import (  # with what they import: all kinds, which join KINDS
    copies,
    ifeval,
    iftrain,
)
from iopo.constraints.base import KINDS, Constraint
from iopo.constraints.ids import IFTRAIN_IDS, from_function, from_id
from iopo.constraints.ifeval import IFEVAL_IDS, from_ifeval
from iopo.constraints.text import after_thinking

__all__ = [
    "IFEVAL_IDS",
    "IFTRAIN_IDS",
    "KINDS",
    "MEASURED_KINDS",
    "Constraint",
    "Value",
    "compatible",
    "follows",
    "follows_loosely",
    "from_dict",
    "from_function",
    "from_id",
    "from_ifeval",
    "from_name",
    "loose_variants",
    "make",
    "value_of",
]

Value = tuple[str, str]  # a kind and its parameters as JSON

# kinds that measure quickly and need nothing but Python: what training data is made of
MEASURED_KINDS: dict[str, type[Constraint]] = {
    kind: cls
    for kind, cls in KINDS.items()
    if cls.__module__ not in (copies.__name__, ifeval.__name__, iftrain.__name__)
}


def make(kind: str, **params: Any) -> Constraint:
    """The constraint of this kind with these parameters.

    Raises ValueError on an unknown kind, on missing or unknown parameters, on bad values.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown constraint kind {kind!r}; known kinds: {sorted(KINDS)}")
    try:
        return KINDS[kind](**params)
    except TypeError as error:
        names = [field.name for field in fields(KINDS[kind])]
        raise ValueError(
            f"constraint '{kind}': got parameters {sorted(params)}; expected {names} ({error})"
        ) from error


def from_dict(row: Mapping[str, Any]) -> Constraint:
    """The constraint of a row {"kind", "params", ...}, as in c1 and c2; other keys are ignored.

    Parameters that are None are ignored: a column of Parquet has those of all kinds in every row.
    Raises ValueError on a row without kind or params, and as `make` does.
    """
    if not isinstance(row.get("kind"), str) or not isinstance(row.get("params"), Mapping):
        raise ValueError(
            f"constraint row {dict(row)!r}: expected a string 'kind' and an object 'params'"
        )
    return make(row["kind"], **_given(row))


def value_of(row: Mapping[str, Any]) -> Value:
    """Of a row as `from_dict` takes it: what is asked for, whatever its wording."""
    return row["kind"], json.dumps(_given(row), sort_keys=True)


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row["params"].items() if value is not None}


def from_name(name: str, kwargs: Mapping[str, Any]) -> Constraint:
    """The constraint of an id of IFEval with its kwargs, or of a kind with its parameters.

    Raises ValueError as `from_ifeval` and `from_dict` do.
    """
    if name in KINDS:
        return from_dict({"kind": name, "params": kwargs})
    return from_ifeval(name, kwargs)


def compatible(constraints: Iterable[Constraint]) -> bool:
    """Whether no two of them are of conflicting kinds."""
    seen: set[str] = set()
    for constraint in constraints:
        if seen & constraint.conflicts:
            return False
        seen.add(constraint.kind)
    return True


def follows(constraints: Iterable[Constraint], text: str) -> list[bool]:
    """Strict verdicts by position on what stands after thinking; an empty text follows nothing."""
    text = after_thinking(text)
    filled = bool(text.strip())
    return [filled and constraint.check(text) for constraint in constraints]


def loose_variants(text: str) -> list[str]:
    """The text as it is, without its first line, its last, both, and each without asterisks.

    IFEval's loose rule; blank variants are left out, repeated ones appear once.
    """
    lines = text.split("\n")
    cuts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = [variant for text in cuts for variant in (text, text.replace("*", ""))]
    return [variant for variant in dict.fromkeys(variants) if variant.strip()]


def follows_loosely(constraints: Iterable[Constraint], text: str) -> list[bool]:
    """Loose verdicts by position: some variant of what stands after thinking follows it."""
    variants = loose_variants(after_thinking(text))
    return [any(map(constraint.check, variants)) for constraint in constraints]
