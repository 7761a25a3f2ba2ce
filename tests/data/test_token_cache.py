"""The token cache: equal to what memory holds, shared, named by all that changes it, never torn."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers_tokenizer import CHATML, tiny_tokenizer

from iopo import files
from iopo.data import token_cache, tokenize
from iopo.data.batching import member_counts, member_tokens, token_counts, tokens
from iopo.data.chat import Chat
from iopo.data.example import Example, content_key
from iopo.data.rows import Group, Quad, rows_for
from iopo.data.token_cache import Examples
from iopo.data.tokenize import Encoder, Limits, tokenize_file, tokenize_rows
from iopo.objectives import THREE

LIMITS = Limits(1000, 1000)
QUAD = Quad("q", "Name a fruit in capitals.", "APPLE", "Name a fruit in small.", "apple, I say")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(tiny_tokenizer())


def assert_same(first: Sequence[Example], second: Sequence[Example]) -> None:
    assert len(first) == len(second)
    for one_, other in zip(first, second, strict=True):
        assert (one_.id, one_.differing, one_.rewards) == (other.id, other.differing, other.rewards)
        assert content_key(one_) == content_key(other)


def kept(rows: Sequence, encoder: Encoder, cache: Path, **more) -> Examples:
    """The rows tokenised into a cache folder, as those of a file."""
    identity = [repr(row) for row in rows]
    return tokenize_file(
        lambda: rows, encoder, identity=identity, cache_dir=cache, source="f", **more
    )


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("quad", 2), ("quad", 1), ("iopo_three", 1), ("pair", 1), ("sft", 1), ("group", 1)],
)
def test_the_mapped_file_holds_what_memory_holds(chat, tmp_path, monkeypatch, kind, workers):
    monkeypatch.setattr(tokenize, "BLOCK_ROWS", 3)  # the last block is not full
    c1, c2 = ([{"kind": kind, "params": {}}] for kind in "ab")
    quads = [
        Quad(f"{n} 苹果", f"ask {n}", "a" * n, "ask", "b", c1=c1, c2=c2 if n % 2 else None)
        for n in range(1, 9)
    ]
    if kind == "group":
        rows = [Group(q.id, q.x1, [q.y1, "", q.y2], [n, 0.1, -1e-9]) for n, q in enumerate(quads)]
    else:
        rows = rows_for("quad" if kind == "iopo_three" else kind, quads)
    columns = THREE.columns if kind == "iopo_three" else tokenize.ALL_MEMBERS
    encoder = Encoder(chat, Limits(1000, 5), columns)
    alone, report = tokenize_rows(rows, encoder)
    assert 0 < report.kept < len(rows)
    mapped = kept(rows, encoder, tmp_path, workers=workers)
    assert mapped.report == report
    assert_same(mapped, alone)
    assert_same(mapped[-3:], alone[-3:])
    assert_same([mapped[-1], mapped[np.int64(2)]], [alone[-1], alone[2]])
    with pytest.raises(IndexError):
        mapped[len(alone)]
    for layout in ("shared", "plain"):
        expected = [tokens(example, layout) for example in alone]
        assert token_counts(mapped, layout).tolist() == expected
        assert token_counts(alone, layout).tolist() == expected
    assert sum(member_counts(mapped)).tolist() == [member_tokens(example) for example in alone]


def test_the_tokens_of_a_file_take_no_memory_of_their_own(chat, tmp_path):
    examples = kept([QUAD], Encoder(chat, LIMITS), tmp_path)
    array = examples[0].responses[0][0]
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap) and not examples[0].prompts[0].flags.writeable


def test_the_second_time_is_read_from_disk(chat, tmp_path):
    rows = [QUAD, dataclasses.replace(QUAD, id="r", y1="\n\nAPPLE"), Quad("s", *["<|im_end|>"] * 4)]
    identity = ["rows"]
    assert not token_cache.knows(tmp_path, identity)
    more = {"identity": identity, "cache_dir": tmp_path, "source": "f"}
    first = tokenize_file(lambda: rows, Encoder(chat, LIMITS), **more)
    assert token_cache.knows(tmp_path, identity)
    second = tokenize_file(lambda: pytest.fail("read again"), Encoder(chat, LIMITS), **more)
    assert_same(first, second)
    assert second.report == first.report
    assert second.report.dropped == {tokenize.SPECIAL_TOKEN: ["s"]}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [dataclasses.replace(QUAD, y1="PEAR")]},
        {"limits": Limits(999, 1000)},
        {"limits": Limits(1000, 1000, "error")},
        {"chat": Chat(tiny_tokenizer("{{ 'Chat: ' }}" + CHATML))},
        {"chat": Chat(tiny_tokenizer(vocab_size=390))},
        {"chat": Chat(tiny_tokenizer(), system="Be brief.")},
        {"columns": THREE.columns},
    ],
)
def test_whatever_changes_the_tokens_misses_the_cache(chat, tmp_path, change):
    before = {"rows": [QUAD], "chat": chat, "limits": LIMITS}
    for arguments in (before, before | change):
        rows = arguments.pop("rows")
        kept(rows, Encoder(**arguments), tmp_path)
    assert len(folders(tmp_path)) == 2


def test_a_write_that_was_cut_off_leaves_nothing_that_is_read(chat, tmp_path, monkeypatch):
    """A writer that fails, and one that is killed in the middle of the second block."""

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(tokenize, "BLOCK_ROWS", 1)
    rows = [dataclasses.replace(QUAD, id=str(n)) for n in range(3)]
    encoder = Encoder(chat, LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            kept(rows, encoder, tmp_path)
    assert folders(tmp_path) == []
    if (child := os.fork()) == 0:
        blocks = iter([encoder.encode, lambda block: killed()])
        encoder.encode = lambda block: next(blocks)(block)
        kept(rows, encoder, tmp_path)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (torn,) = folders(tmp_path)
    assert (torn / "tokens").exists() and not token_cache.knows(tmp_path, [repr(r) for r in rows])
    assert_same(kept(rows, encoder, tmp_path), tokenize_rows(rows, Encoder(chat, LIMITS))[0])
    assert not torn.exists()


@pytest.mark.parametrize("name", ["tokens", "rows", "ids", "meta.json"])
def test_a_damaged_cache_is_refused(chat, tmp_path, name):
    kept([QUAD], Encoder(chat, LIMITS), tmp_path)
    (folder,) = folders(tmp_path)
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(ValueError, match=r"delete this folder"):
        kept([QUAD], Encoder(chat, LIMITS), tmp_path)
