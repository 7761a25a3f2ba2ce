"""Tokenised rows on disk: one folder a result, plain arrays of numbers, read through memory maps.

Processes of a machine that map one folder share its pages: a rank of its own holds a few numbers a
row, whatever the texts. No pickle is written or read.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
import tokenizers

from iopo.data.example import Example, Report
from iopo.files import replacing, sha256_text

Add = Callable[[Sequence[Example]], None]
ROW = 2  # columns of `rows`, int64: the id's end, differing, the bits of rewards, segments' ends


def key(parts: Sequence[object]) -> str:
    """Hash of `parts` (JSON values), of all code that reads rows and makes tokens of them, and of
    tokenizers' version."""
    here = Path(__file__).parent
    readers = (here.parent / name for name in ("files.py", "sources.py"))
    sources = [path.read_text() for path in (*sorted(here.glob("*.py")), *readers)]
    return sha256_text(json.dumps([*parts, *sources, tokenizers.__version__]))[:32]


def knows(cache_dir: Path, rows: Sequence[object]) -> bool:
    """Whether these rows were read and tokenised, in whatever way. rows: their identity."""
    return any(cache_dir.glob(f"{key(rows)}-*/meta.json"))


class Examples(Sequence[Example]):
    """The examples of a result, in order; each is put together when it is asked for.

    responses: how many follow each prompt, the same in all examples. Its token arrays are views of
    the mapped file and cannot be written to. Raises ValueError for files that do not fit together.
    """

    def __init__(self, folder: Path):
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.report = Report(**meta["report"])
            self.responses: tuple[int, ...] = tuple(meta["responses"])
            self._row = ROW + meta["rewards"]  # columns before the segments' ends
            self._tokens, self._ids, rows = (
                np.asarray(np.memmap(folder / name, dtype=dtype, mode="r"))
                for name, dtype in (("tokens", "<i4"), ("ids", "u1"), ("rows", "<i8"))
            )
            columns = self._row + sum(1 + n for n in self.responses)
            self._rows = rows.reshape(self.report.kept, columns)
            fits = self._rows[-1, [0, -1]].tolist() == [len(self._ids), len(self._tokens)]
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: {error}; delete this folder") from error
        if not fits:
            raise ValueError(f"{folder}: the files do not fit together; delete this folder")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # IndexError beyond the end
        row = self._rows[index]
        (id_end, differing), ends = row[:ROW].tolist(), row[self._row :].tolist()
        id_start, start = self._rows[index - 1, [0, -1]].tolist() if index else (0, 0)
        starts = iter(zip([start, *ends], ends, strict=False))

        def segment() -> np.ndarray:
            a, b = next(starts)
            return self._tokens[a:b]

        forest = [(segment(), tuple(segment() for _ in range(n))) for n in self.responses]
        prompts, responses = zip(*forest, strict=True)
        rewards = tuple(row[ROW : self._row].view("<f8").tolist())
        name = bytes(self._ids[id_start:id_end]).decode()
        return Example(name, prompts, responses, differing, rewards)

    def lengths(self) -> np.ndarray:
        """Tokens of each segment, int64 [N, prompts + responses]: a prompt, then its responses."""
        before = np.append(0, self._rows[:-1, -1])[:, None]
        return np.diff(self._rows[:, self._row :], axis=1, prepend=before)


def get(
    cache_dir: Path, rows: Sequence[object], how: Sequence[object], work: Callable[[Add], Report]
) -> Examples:
    """The stored result of these rows, made by `work(add)` first if it is not there.

    rows, how: JSON values that name the rows, and the way they become tokens.
    work: calls add(examples) for each block of rows, in order, and returns the report; an error of
    it leaves nothing. Of several processes one works and the others wait for it. The folder appears
    under its name only when all of it is on the disk; a process that dies leaves nothing that would
    be read.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / f"{key(rows)}-{key(how)}"
    with open(cache_dir / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            for torn in cache_dir.glob(f".new.*.{folder.name}"):
                shutil.rmtree(torn)  # its writer was killed: the lock is free
            with replacing(folder) as new:
                new.mkdir()
                _write(new, work)
    return Examples(folder)


def _write(folder: Path, work: Callable[[Add], Report]) -> None:
    shapes: set[tuple[tuple[int, ...], int]] = set()
    end = id_end = 0
    with (
        _on_disk(folder / "tokens") as tokens,
        _on_disk(folder / "ids") as ids,
        _on_disk(folder / "rows") as rows,
    ):

        def add(examples: Sequence[Example]) -> None:
            nonlocal end, id_end
            for example in examples:
                segments = example.segments()
                ends = end + np.cumsum([*map(len, segments)], dtype=np.int64)
                end, id_end = int(ends[-1]), id_end + ids.write(example.id.encode())
                tokens.write(np.concatenate(segments).astype("<i4").tobytes())
                rewards = np.array(example.rewards, dtype="<f8").view("<i8")
                row = [id_end, example.differing, *rewards, *ends]
                rows.write(np.array(row, dtype="<i8").tobytes())
                shapes.add((tuple(map(len, example.responses)), len(rewards)))

        report = work(add)
    assert len(shapes) == 1, "one file holds one kind of row"
    responses, count = shapes.pop()
    about = {"responses": responses, "rewards": count, "report": asdict(report)}
    with _on_disk(folder / "meta.json") as meta:
        meta.write(json.dumps(about).encode())


@contextmanager
def _on_disk(path: Path) -> Iterator[BinaryIO]:
    """A new file, which is on the disk when the block ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
