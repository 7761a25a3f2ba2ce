"""JSON values of a .jsonl file or a .json list, each with its line, faults included."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Decoded = tuple[int, object, str | None]  # line (from 1), value, fault; value is None with a fault


def read_objects(path: Path) -> Iterator[Decoded]:
    """(line, value, None) for each row of the file, or (line, None, what is wrong with it).

    Reading goes on after a bad line of a .jsonl file; in a .json list nothing can be read after a
    fault of syntax. Raises ValueError for other file names.
    """
    raw = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    if path.suffix == ".jsonl":
        yield from _lines(raw)
    elif path.suffix == ".json":
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            yield line, None, f"the file is not UTF-8 (byte {error.start} of it)"
        else:
            yield from _elements(text)
    else:
        raise ValueError(f"{path}: the name ends in {path.suffix!r}, expected .jsonl or .json")


class _RepeatedKey(Exception):
    """A JSON object names a key twice; Python's json would keep the last and say nothing."""


def _no_repeated_key(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise _RepeatedKey(f"the row names the key {', '.join(map(repr, repeated))} twice")
    return row


def _lines(raw: bytes) -> Iterator[Decoded]:
    # Split on the byte: str.splitlines would also split on U+2028 inside a text.
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"), object_pairs_hook=_no_repeated_key)
        except UnicodeDecodeError as error:
            fault = f"the line is not UTF-8 (byte {error.start} of it is 0x{line[error.start]:02x})"
            yield number, None, fault
        except json.JSONDecodeError as error:
            yield number, None, f"the row is not JSON ({error.msg} at column {error.colno})"
        except _RepeatedKey as error:
            yield number, None, str(error)
        else:
            yield number, value, None


def _elements(text: str) -> Iterator[Decoded]:
    """The elements of a JSON list, each with the line on which it starts."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_repeated_key)
    space = re.compile(r"[ \t\r\n]*")
    line, counted = 1, 0

    def line_at(position: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return line

    def skip(position: int) -> int:
        found = space.match(text, position)
        assert found is not None  # the pattern matches the empty string
        return found.end()

    at = skip(0)
    if text[at : at + 1] != "[":
        yield (
            line_at(at),
            None,
            f"the file begins with {text[at : at + 20]!r}, expected a JSON list",
        )
        return
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        start = line_at(at)
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, None, f"the row is not JSON ({error.msg} at column {error.colno})"
            return
        except _RepeatedKey as error:
            yield start, None, f"{error}; the rows after it were not read"
            return
        yield start, value, None
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            fault = f"found {text[at : at + 20]!r} after a row, expected ',' or ']'"
            yield line_at(at), None, fault
            return
    rest = skip(at + 1)
    if rest != len(text):
        fault = f"found {text[rest : rest + 20]!r} after the list, expected the end of the file"
        yield line_at(rest), None, fault
