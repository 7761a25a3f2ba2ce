"""What every benchmark has: a file, items with a conversation each, measures of the verdicts."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# metric -> unit (an item, or a group of items) -> (numerator, denominator); a metric's value is the
# sum of the numerators over the sum of the denominators.
Measures = dict[str, dict[str, tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Source:
    """A benchmark's data file: where it comes from and how to know it."""

    benchmark: str
    file: str
    origin: str
    licence: str
    sha256: str | None  # None: not known to us


@dataclass(frozen=True, slots=True)
class Item:
    """One test item. `messages` is the conversation that the model under test gets."""

    id: str
    messages: tuple[dict[str, str], ...]
    row: dict[str, Any]  # the row of the data file


def locate(source: Source, path: str | None) -> Path:
    """The data file: `path`, or $IOPO_DATA_DIR/<benchmark>/<file>.

    Raises ValueError that says where the file comes from.
    """
    folder = os.environ.get("IOPO_DATA_DIR")
    if path is not None:
        found, tried = Path(path), f"data.path={path}"
    elif folder:
        found = Path(folder) / source.benchmark / source.file
        tried = f"$IOPO_DATA_DIR/{source.benchmark}/{source.file} ({found})"
    else:
        found, tried = None, "data.path and IOPO_DATA_DIR, which are not set"
    if found is None or not found.is_file():
        raise ValueError(
            f"{source.benchmark}: no data file at {tried}. It is not part of this repository: get "
            f"{source.file} from {source.origin} (licence: {source.licence}; sha256: "
            f"{source.sha256 or 'not known'}) and set data.path=FILE"
        )
    return found


def require_fields(path: Path, rows: list[dict[str, Any]], fields: Mapping[str, type]) -> None:
    """Raise ValueError naming the first rows that lack a field or hold another type there."""
    if not rows:
        raise ValueError(f"{path}: no rows")
    errors = []
    for number, row in enumerate(rows, 1):
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                found = type(row[name]).__name__ if name in row else "nothing"
                errors.append(f"{path}: row {number}: {name}: found {found}, expected {kind}")
    if errors:
        raise ValueError("\n".join(errors[:10] + ["is this the right file?"]))


def require_unique(path: Path, items: list[Item]) -> list[Item]:
    """The items; raises ValueError if two share an id."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{path}: the id {item.id} is there more than once")
        seen.add(item.id)
    return items


def user_turn(text: str) -> tuple[dict[str, str], ...]:
    """A conversation of one user message."""
    return ({"role": "user", "content": text},)
