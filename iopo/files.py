"""Files: rows of JSON in and out, replacement in one step, hashes, and the user's cache folder.

Every file that a user gives as rows is read by `iter_records` or `given_records`, whatever the
program; `read_records` is for files that this program wrote. Nothing here needs torch.
"""

import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from iopo.progress import progress
from iopo.sources import files_of, parquet_rows

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # the first bytes of such files
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHOWN_FAULTS = 10  # of a bad file; the rest are counted
SPACE = re.compile(r"[ \t\r\n]*")
HALF_PAIR = re.compile("[\ud800-\udfff]")
ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Place(NamedTuple):
    """Where a row stands, for messages: "rows.jsonl:3", in a JSON list "a.json: row 3 (line 1)",
    in Parquet "a.parquet: row 3"."""

    path: str | Path
    line: int  # from 1; 0 where there are none
    row: int | None = None  # from 1, in a JSON list or Parquet

    def __str__(self) -> str:
        if self.row is None:
            return f"{self.path}:{self.line}"
        if not self.line:
            return f"{self.path}: row {self.row}"
        return f"{self.path}: row {self.row} (line {self.line})"


Decoded = tuple[Place, object, str | None]  # place, value, fault


def cache_root() -> Path:
    """The user's cache folder for this package: $XDG_CACHE_HOME/iopo or ~/.cache/iopo."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "iopo"


# --- rows of JSON --------------------------------------------------------------------------------


def iter_records(source: str | Path) -> Iterator[Decoded]:
    """(place, value, None) for each row of a source, or (place, None, what is wrong with it).

    source: a file, a folder of shards or a data set of the hub (sources.py). A file is Parquet,
    JSON Lines or one JSON list, told apart by its first bytes; the latter two may be gzipped. A
    byte order mark is skipped. Reading goes on after a bad line; in a list nothing can be read
    after a syntax fault. JSON Lines and Parquet are not held in memory; a list is. A row that holds
    half of a surrogate pair, which could not be written again, is a fault too, with its value.
    Raises FileNotFoundError and ValueError as `files_of` does.
    """
    for path in files_of(source):
        with open(path, "rb") as file:
            head = file.read(4)
            file.seek(0)
            if head == PARQUET:
                for number, value, fault in parquet_rows(path):
                    yield Place(path, 0, number), value, fault
            elif head.startswith(GZIP):
                yield from _decode_gzip(path)
            else:
                yield from _decode(file, path)


def given_records(path: str | Path) -> list[tuple[Place, dict[str, Any]]]:
    """The objects of a user's file, each with its place, in order.

    Raises ValueError naming the file and every bad row (not UTF-8, not JSON, not an object, half of
    a surrogate pair).
    """
    return list(_objects(iter_records(path)))


def read_records(path: str | Path, *, torn_tail: bool = False) -> list[dict[str, Any]]:
    """The objects of a file that this program wrote, in order.

    Half of a surrogate pair, which a server's reply may hold, is kept.
    torn_tail: ignore a last line without a line end, which a killed writer leaves behind.
    Raises ValueError naming the file and every bad line (not UTF-8, not JSON, not an object).
    """
    raw = Path(path).read_bytes()
    if torn_tail:
        raw = raw[: raw.rfind(b"\n") + 1]
    decoded = _decode(BytesIO(raw), path)
    return [row for _, row in _objects((at, v, f if v is None else None) for at, v, f in decoded)]


def _objects(decoded: Iterable[Decoded]) -> Iterator[tuple[Place, dict[str, Any]]]:
    faults: list[str] = []
    for place, value, fault in decoded:
        if fault is None and isinstance(value, dict):
            yield place, value
        else:
            found = fault or f"expected an object, found {type(value).__name__}"
            faults.append(f"{place}: {found}")
    if faults:
        raise ValueError("\n".join(shortened(faults, SHOWN_FAULTS)))


def shortened(lines: list[str], most: int) -> list[str]:
    """The first `most` lines and how many more there are."""
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"... and {more} more"]


def write_records(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file by these rows as JSON Lines, in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Journal:
    """A JSON Lines file that is only appended to, by one process at a time.

    Opening it reads the finished rows, cuts off a torn last line (its writer was killed) and takes
    a lock: a second process gets a ValueError instead of a file with mixed rows.
    A row reaches the operating system before `append` returns, so killing the process loses none;
    a power failure may lose the last ones.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")  # noqa: SIM115 - lives as long as the journal
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows = read_records(self.path, torn_tail=True)
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(
                f"{self.path}: another process is writing this file; wait for it, or choose "
                "another output folder"
            ) from error
        except ValueError:
            self._file.close()
            raise

    def append(self, *rows: dict[str, Any]) -> None:
        """Add rows in one write."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _RepeatedKey(Exception):
    """A JSON object names a key twice; Python's json would keep the last and say nothing."""


def _no_repeated_key(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise _RepeatedKey(f"the row names the key {', '.join(map(repr, repeated))} twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_no_repeated_key)


def _half_pair(value: object) -> str | None:
    """The fault of a row that holds half of a surrogate pair; None if it holds none."""
    text = json.dumps(value, ensure_ascii=False)
    if (found := HALF_PAIR.search(text)) is None:
        return None
    before = text[max(0, found.start() - 20) : found.start()]
    return f"half of a surrogate pair after {before!r}, which is not valid Unicode text"


def _decode_gzip(path: Path) -> Iterator[Decoded]:
    place = Place(path, 1)
    try:
        with gzip.open(path) as file:
            for place, value, fault in _decode(file, path):
                yield place, value, fault
    except (EOFError, OSError, zlib.error) as error:
        fault = f"the compressed file is damaged ({error}); the rows after this one were not read"
        yield place, None, fault


def _decode(file: IO[bytes] | gzip.GzipFile, path: str | Path) -> Iterator[Decoded]:
    head = [file.readline().removeprefix(BYTE_ORDER_MARK)]
    while head[-1] and not head[-1].strip():
        head.append(file.readline())
    if not head[-1].lstrip().startswith(b"["):
        yield from _lines(chain(head, file), path)
        return
    raw = b"".join(chain(head, file))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        yield Place(path, line), None, f"the file is not UTF-8 (byte {error.start} of it)"
    else:
        yield from _elements(text, path)


def _lines(lines: Iterable[bytes], path: str | Path) -> Iterator[Decoded]:
    # Lines of bytes end at \n alone: str.splitlines would also split on U+2028 inside a text.
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place, value, fault = Place(path, number), None, None
        try:
            text = line.removesuffix(b"\n").decode("utf-8")
            value = _DECODER.decode(text)
            fault = _half_pair(value) if ESCAPED_HALF.search(text) else None
        except UnicodeDecodeError as error:
            fault = f"the line is not UTF-8 (byte {error.start} of it is 0x{line[error.start]:02x})"
        except json.JSONDecodeError as error:
            fault = f"the row is not JSON ({error.msg} at column {error.colno})"
        except RecursionError:
            fault = "the row is nested too deeply"
        except _RepeatedKey as error:
            fault = str(error)
        yield place, value, fault


def _elements(text: str, path: str | Path) -> Iterator[Decoded]:
    """The elements of a JSON list, each with its number and the line on which it starts."""
    line, counted = 1, 0

    def place(position: int) -> Place:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return Place(path, line, number)

    def skip(position: int) -> int:
        found = SPACE.match(text, position)
        assert found is not None  # the pattern matches the empty string
        return found.end()

    number, at = 1, skip(skip(0) + 1)  # the bracket that made this a list
    while text[at : at + 1] != "]":
        start, begin = place(at), at
        try:
            value, at = _DECODER.raw_decode(text, at)
            fault = _half_pair(value) if ESCAPED_HALF.search(text, begin, at) else None
        except json.JSONDecodeError as error:
            fault = f"the row is not JSON ({error.msg} at column {error.colno})"
            yield Place(path, error.lineno, number), None, fault
            return
        except (_RepeatedKey, RecursionError) as error:
            yield start, None, f"{error}; the rows after it were not read"
            return
        yield start, value, fault
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            number += 1
        elif text[at : at + 1] != "]":
            fault = f"found {text[at : at + 20]!r} after a row, expected ',' or ']'"
            yield place(at), None, fault
            return
    rest = skip(at + 1)
    if rest != len(text):
        fault = f"found {text[rest : rest + 20]!r} after the list, expected the end of the file"
        yield Place(path, place(rest).line), None, fault


# --- replacement in one step ---------------------------------------------------------------------


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """A path beside `target` for a new file or folder, which takes its place when the block ends.

    A reader, or a crash, sees the old one or the new one, whole. After an error nothing is left.
    The folders above it are made; the files of a folder get the mode of the umask.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{kind}.{os.getpid()}.{target.name}") for kind in ("new", "old"))
    try:
        yield new
        if new.is_dir():  # safetensors writes 0600 whatever the umask says
            mode = 0o666 & ~_umask()
            for file in new.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
        if target.is_dir():
            target.rename(old)
        os.replace(new, target)
    finally:
        for leftover in (new, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def _umask() -> int:
    """The mode bits that new files do not get; os.umask could tell only by changing it."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x[:6] == "Umask:")
    return int(line.split()[1], 8)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file, in one step and on the disk when it returns.

    A lone surrogate (from an escaped "\\ud800" in a reply) is not UTF-8: it is kept as an escape.
    """
    with replacing(path) as new, open(new, "wb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


# --- hashes --------------------------------------------------------------------------------------


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_rows(source: str | Path) -> str:
    """sha256 of a source of rows: of its file's bytes; of several, of their sha256 in order."""
    digests = [sha256_file(path) for path in files_of(source)]
    return digests[0] if len(digests) == 1 else sha256_text(" ".join(digests))


def sha256_text(text: str) -> str:
    """sha256 of a text in UTF-8, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def weights_hash(path: str | Path) -> str:
    """sha256 (64 hex digits) over names and content of a folder's safetensors files and index.

    The digest of each file is kept in the user's cache under its path, size and modification
    time, so that 15 GB are read once. Sharding differently gives another hash.
    """
    files = sorted(Path(path).glob("*.safetensors*"))
    if not files:
        raise ValueError(f"{path}: no *.safetensors to hash; a hub id must be downloaded first")
    with progress(None, f"hashing {path}"):
        return sha256_text("".join(f"{file.name}\0{_file_hash(file)}\n" for file in files))


def _file_hash(file: Path) -> str:
    """sha256_file, remembered in the cache under (path, size, modification time in ns)."""
    stat = file.stat()
    identity = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    folder = cache_root() / "hashes"
    note = folder / (sha256_text(identity) + ".json")
    if not note.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        digest = sha256_file(file)
        write_text(note, json.dumps({"file": str(file.resolve()), "sha256": digest}))
    return json.loads(note.read_text())["sha256"]
