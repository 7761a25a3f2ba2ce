"""Tokenised rows on disk: one folder a result, plain numpy files, read through memory maps.

Several processes of a machine that map one folder share its pages. No pickle is written or read.
"""

import fcntl
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tokenizers

from iopo.data.example import Example, Report
from iopo.files import replacing, sha256_text

CODE = ("chat.py", "tokenize.py", "example.py", "token_cache.py")
Result = tuple[list[Example], Report]


def key(parts: Sequence[object]) -> str:
    """Name of the result: hash of `parts` (JSON values), this code and tokenizers' version."""
    sources = [(Path(__file__).parent / name).read_text() for name in CODE]
    return sha256_text(json.dumps([*parts, *sources, tokenizers.__version__]))[:32]


def get(cache_dir: Path, name: str, work: Callable[[], Result]) -> Result:
    """The stored result `name`, made by `work()` first if it is not there.

    Of several processes one works and the others wait for it. The folder appears under its name
    only when it is complete; a process that dies leaves nothing that would be read.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / name
    with open(cache_dir / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            examples, report = work()
            if not examples:
                return examples, report
            _write(folder, examples, report)
    return _read(folder)


def _write(folder: Path, examples: list[Example], report: Report) -> None:
    segments = [
        segment
        for example in examples
        for prompt, responses in zip(example.prompts, example.responses, strict=True)
        for segment in (prompt, *responses)
    ]
    shapes = {tuple(map(len, example.responses)) for example in examples}
    assert len(shapes) == 1, "one file holds one kind of row"
    meta = {
        "ids": [example.id for example in examples],
        "differing": [example.differing for example in examples],
        "responses_per_prompt": list(shapes.pop()),
        "report": asdict(report),
    }
    with replacing(folder) as new:
        new.mkdir()
        np.save(new / "tokens.npy", np.concatenate(segments).astype(np.int32))
        np.save(new / "offsets.npy", np.cumsum([0, *map(len, segments)], dtype=np.int64))
        (new / "meta.json").write_text(json.dumps(meta))


def _read(folder: Path) -> Result:
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.asarray(np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False))
    offsets = np.load(folder / "offsets.npy", allow_pickle=False)
    per_example = sum(1 + count for count in meta["responses_per_prompt"])
    if len(offsets) != per_example * len(meta["ids"]) + 1 or offsets[-1] != len(tokens):
        raise ValueError(f"{folder}: the files do not fit together; delete this folder")
    segments = iter(tokens[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True))
    examples = []
    for row_id, differing in zip(meta["ids"], meta["differing"], strict=True):
        prompts, responses = [], []
        for count in meta["responses_per_prompt"]:
            prompts.append(next(segments))
            responses.append(tuple(next(segments) for _ in range(count)))
        examples.append(Example(row_id, tuple(prompts), tuple(responses), differing))
    return examples, Report(**meta["report"])
