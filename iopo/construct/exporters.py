"""Rows into other formats: `python -m iopo.construct.exporters FILE --to FORMAT --out OUT`.

sharegpt     the authors' JSON list: conversations [x1, x2], chosen y1, rejected y2 (from quads)
pairs        DPO pairs from both rows of each quad
pairs_first  DPO pairs from the first row only, the authors' baseline
sft          x and y from both rows of each quad, or from pairs
trl          like pairs, as messages in prompt, chosen and rejected, the system prompt in `prompt`
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iopo.data.columns import as_written, messages_of
from iopo.data.rows import Pair, Quad, Row, read_rows, rows_for
from iopo.files import write_records, write_text

FORMATS = ("sharegpt", "pairs", "pairs_first", "sft", "trl")


def export(rows: Sequence[Row], to: str) -> Iterator[dict[str, Any]]:
    """The rows in one of FORMATS. Raises ValueError where they hold less than it needs."""
    if to == "sharegpt":
        for row in rows:
            if not isinstance(row, Quad):
                raise ValueError(f"row {row.id!r} is no quad; {to} needs x1, y1, x2, y2")
            yield sharegpt(row)
        return
    kind = "sft" if to == "sft" else "pair"
    for row in rows_for(kind, rows, "first" if to == "pairs_first" else "both"):
        if to == "trl":
            assert isinstance(row, Pair)
            yield conversational(row)
        else:
            kept = {key: value for key, value in asdict(row).items() if value is not None}
            yield kept | {"x": as_written(row.x)}  # type: ignore[union-attr]


def conversational(pair: Pair) -> dict[str, Any]:
    """One row for TRL, which applies the chat template to messages only, never to texts
    (https://huggingface.co/docs/trl/dataset_formats, "Conversational")."""
    system = [] if pair.system is None else [{"role": "system", "content": pair.system}]
    return {
        "prompt": [*system, *messages_of(pair.x)],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def sharegpt(quad: Quad) -> dict[str, Any]:
    """One row of the authors' file. id and constraints stay as further keys, which it ignores."""
    messages = [messages_of(x) for x in (quad.x1, quad.x2)]
    names = {"user": "human", "assistant": "gpt"}
    if len(messages[0]) != len(messages[1]) or messages[0][0]["role"] == "system":
        raise ValueError(
            f"row {quad.id!r}: x1 and x2 have different system prompts, or not as many turns; "
            "sharegpt tells them apart by their number"
        )
    turns = [
        {"from": names[message["role"]], "value": message["content"]}
        for message in (*messages[0], *messages[1])
    ]
    if quad.system is not None:
        turns.insert(0, {"from": "system", "value": quad.system})
    row: dict[str, Any] = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": quad.y1},
        "rejected": {"from": "gpt", "value": quad.y2},
        "id": quad.id,
    }
    if quad.c1 is not None and quad.c2 is not None:
        row |= {"c1": quad.c1, "c2": quad.c2}
    return row


def write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """A JSON list for .json, JSON Lines for .jsonl, else ValueError; returns the number of rows."""
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: the name must end in .json or .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = list(rows)
    if path.suffix == ".json":
        write_text(path, json.dumps(found, ensure_ascii=False, indent=1))
    else:
        write_records(path, found)
    return len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m iopo.construct.exporters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="quads or pairs")
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help=".json or .jsonl")
    options = parser.parse_args(arguments)
    try:
        number = write(options.out, export(read_rows(options.file), options.to))
    except ValueError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {number} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
