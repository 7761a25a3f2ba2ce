"""Where rows come from: a file, a folder of shards, a data set of the Hugging Face hub; Parquet.

A folder or a data set may hold several sets of shards (train, test, ...). They are told apart by
their names without numbers: train-00000-of-00002.parquet and train-00001-of-00002.parquet are
"train". `:NAME` after the folder or the data set picks one.
"""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json", ".parquet")
# Path() makes one slash of two
HUB = re.compile(r"hf:/{1,2}(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::(.+))?")
BATCH_ROWS = 1000  # of a row group, decoded together
_NUMBERS = re.compile(r"[-_.]?\d+(?:[-_]of[-_]\d+)?$")


def files_of(source: str | Path) -> list[Path]:
    """The files of a source, in order: a file, FOLDER[:NAME] or hf://ORG/NAME[@REVISION][:NAME].

    What the hub has is downloaded into its own cache; without a network the cache serves.
    Raises FileNotFoundError for what is not there, ValueError for a folder without rows or with
    several sets, and for what the hub refuses.
    """
    if (found := HUB.fullmatch(str(source))) is not None:
        return list(_from_hub(*found.groups()))
    if str(source).startswith("hf:"):
        raise ValueError(f"{source}: expected hf://ORG/NAME[@REVISION][:SPLIT]")
    if not str(source):
        raise FileNotFoundError("no file or folder is named")
    path = Path(source)
    folder, colon, name = str(source).rpartition(":")
    if not path.exists() and colon and Path(folder).is_dir():
        path = Path(folder)
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        return [path / n for n in _one_set(names, name if str(path) != str(source) else None, path)]
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file or folder")
    return [path]


def _one_set(names: Iterable[str], wanted: str | None, where: object) -> list[str]:
    """The names of the shards of the wanted set, or of the only one, in order."""
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if name.endswith(SUFFIXES) and not any(part.startswith(".") for part in parts):
            stem = next(parts[-1].removesuffix(s) for s in SUFFIXES if name.endswith(s))
            key = "/".join(filter(None, (*parts[:-1], _NUMBERS.sub("", stem))))
            sets.setdefault(key, []).append(name)
    asked = set((wanted or "").split("/")) - {""}
    fitting = [key for key in sets if asked <= {*key.split("/"), key}]
    if len(fitting) == 1:
        return sets[fitting[0]]
    if not sets:
        raise ValueError(f"{where}: no {', '.join(SUFFIXES)} in it")
    found = ", ".join(key or "(numbers only)" for key in sets)
    what = "several sets of rows" if fitting else f"no {wanted!r}"
    raise ValueError(f"{where}: {what} in it: {found}; pick one with a colon: {where}:NAME")


@cache  # a program reads one commit, however often it asks
def _from_hub(repo: str, revision: str | None, wanted: str | None) -> tuple[Path, ...]:
    from huggingface_hub import HfApi, snapshot_download

    where = f"hf://{repo}" + (f"@{revision}" if revision else "")
    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
    except Exception:  # no network, or no such data set: snapshot_download knows which
        patterns = [f"*{wanted or ''}*{suffix}" for suffix in SUFFIXES]
    else:
        patterns = _one_set(names, wanted, where)
    try:
        folder = Path(
            snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        )
    except Exception as error:  # of the hub, its cache, or the network: a dozen classes
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{where}: the hub does not give it ({type(error).__name__}: {said}); "
            "check the name and the revision, accept the terms of a gated set and run "
            "`hf auth login`, or set HF_ENDPOINT to a mirror"
        ) from error
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return tuple(folder / name for name in _one_set(names, wanted, where))


def parquet_rows(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """(number from 1, row, None) of a Parquet file, row group by row group; a fault ends it.

    Values that JSON has not (dates, bytes) become texts. Raises ValueError without pyarrow.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs pyarrow; pip install 'iopo[data]'") from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            plain = all(map(_is_json, file.schema_arrow.types))
            for batch in file.iter_batches(BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row if plain else json.loads(json.dumps(row, default=str)), None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield number + 1, None, f"the file cannot be read as Parquet ({error})"


def _is_json(kind: Any) -> bool:
    """Whether the values of an Arrow type are JSON: numbers, texts, lists and objects of them."""
    import pyarrow.types as t

    if t.is_struct(kind):
        return all(_is_json(kind.field(n).type) for n in range(kind.num_fields))
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    tests = (t.is_string, t.is_large_string, t.is_integer, t.is_floating, t.is_boolean, t.is_null)
    return any(test(kind) for test in tests)
