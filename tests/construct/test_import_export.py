"""Foreign files in, foreign files out, and relabelling a preference set as a stream."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from iopo import construct
from iopo.construct import exporters, importers
from iopo.construct import relabel as relabelling
from iopo.construct.prose import script_of
from iopo.construct.relabel import RelabelRecipe, relabel_file
from iopo.construct.verify import verify
from iopo.data.rows import Pair, read_rows, rows_for

ROOT = Path(__file__).resolve().parents[2]
QUADS = ROOT / "data" / "verified" / "heldout.jsonl"


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


# --- import ---


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "P", "chosen": "A", "rejected": "B"}, ("P", "A", "B", None)),
        (
            {"prompt": "P", "chosen": [turn("user", "P"), turn("assistant", "A")],
             "rejected": [turn("user", "P"), turn("assistant", "B")]},
            ("P", "A", "B", None),
        ),
        (
            {"chosen": [turn("system", "S"), turn("user", "P"), turn("assistant", "A")],
             "rejected": [turn("system", "S"), turn("user", "P"), turn("assistant", "B")]},
            ("P", "A", "B", "S"),
        ),
        (
            {"prompt": [turn("user", "P")], "chosen": [turn("assistant", "A")],
             "rejected": {"from": "gpt", "value": "B"}},
            ("P", "A", "B", None),
        ),
        ({"prompt": "P", "chosen": "A", "rejected": "A "}, "chosen = rejected"),
        ({"prompt": "P", "chosen": "A"}, "no chosen or no rejected"),
        ({"prompt": "P", "chosen": "A", "rejected": " "}, "empty text"),
        ({"chosen": "A", "rejected": "B"}, "no prompt"),
        (
            {"chosen": [turn("user", "P"), turn("assistant", "Q"), turn("user", "R"),
                        turn("assistant", "A")], "rejected": "B"},
            "'chosen' and 'rejected' differ before their last turn, expected one prompt",
        ),
        (
            {"prompt": [turn("user", "P"), turn("assistant", "Q"), turn("user", "R")],
             "chosen": [turn("user", "R"), turn("assistant", "A")], "rejected": "B"},
            ((("user", "P"), ("assistant", "Q"), ("user", "R")), "A", "B", None),
        ),
        ({"prompt": "P", "chosen": [turn("assistant", "A"), turn("tool", "T")],
          "rejected": "B"},
         "'chosen' has the turns ..., expected one of the assistant at the end"),
        ({"prompt": "P", "system": "S", "chosen": "A", "rejected": "B"}, ("P", "A", "B", "S")),
        (
            {"prompt": "P", "chosen": [turn("user", "Q"), turn("assistant", "A")], "rejected": "B"},
            "'prompt' is not what stands before the last turn of 'chosen'",
        ),
        ({"prompt": "P", "system": " ", "chosen": "A", "rejected": "B"}, ("P", "A", "B", None)),
        (
            {"prompt": "P\n", "chosen": [turn("user", " P"), turn("assistant", "A")],
             "rejected": [turn("human", "P"), turn("gpt", "B")]},
            ("P", "A", "B", None),
        ),
        ({"prompt": "P", "chosen": "A \ud83d", "rejected": "B"}, "half of a surrogate pair"),
        ([1], "no object"),
        # Alpaca
        ({"instruction": "P", "input": "I", "chosen": "A", "rejected": "B"},
         ("P\nI", "A", "B", None)),
        ({"instruction": "P", "input": " ", "history": [], "chosen": "A", "rejected": "B"},
         ("P", "A", "B", None)),
        ({"system": "S", "input": "I", "chosen": "A", "rejected": "B"}, ("I", "A", "B", "S")),
        ({"instruction": "P", "history": [["Q", "R"]], "chosen": "A", "rejected": "B"},
         "'history' is part of the prompt"),
        ({"prompt": [turn("user", "P")], "input": "I", "chosen": "A", "rejected": "B"},
         "'input' is part of the prompt"),
        ({"prompt": "P", "question": "Q", "chosen": "A", "rejected": "B"},
         "'question' is part of the prompt"),
        # ShareGPT
        ({"conversations": [{"from": "human", "value": "P"}], "tools": "",
          "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
         ("P", "A", "B", None)),
        ({"conversations": [{"from": "human", "value": "P"}], "tools": "[search]",
          "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
         "'tools' is part of the prompt"),
        ({"prompt": "P", "chosen": "A", "rejected": "B", "images": ["a.png"]},
         "'images' is part of the prompt"),
        # TRL, and sets that repeat the prompt in `messages`
        ({"prompt": [turn("user", "P")], "chosen": [turn("assistant", "A")],
          "rejected": [turn("assistant", "B")], "tools": [{"name": "search"}]},
         "'tools' is part of the prompt"),
        ({"prompt": "P", "messages": [turn("user", "P"), turn("assistant", "A")],
          "chosen": "A", "rejected": "B"}, ("P", "A", "B", None)),
        ({"prompt": "P", "messages": [turn("user", "O"), turn("assistant", "A")],
          "chosen": "A", "rejected": "B"}, "'messages' is part of the prompt"),
    ],
)  # fmt: skip
def test_preferences(tmp_path, row, expected):
    (found,) = importers.preferences(write(tmp_path / "a.jsonl", [row]))
    if isinstance(expected, str):
        assert found == expected
    else:
        assert isinstance(found, Pair)
        assert (found.x, found.chosen, found.rejected, found.system) == expected


def test_bad_lines_are_skipped_and_named(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "P", "chosen": "A", "rejected": "B"}\n\n{oops\n\xff\xfe\n')
    found = list(importers.preferences(path))
    assert isinstance(found[0], Pair) and found[1:] == ["not JSON", "not JSON"]
    assert f"{path}:3: skipped: the row is not JSON" in caplog.text
    assert f"{path}:4: skipped: the line is not UTF-8" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("form", ["list", "crlf"])
def test_preferences_come_in_any_form(tmp_path, encoding, form):
    rows = [{"prompt": f"P{n}", "chosen": "A", "rejected": "B"} for n in range(3)]
    text = json.dumps(rows, indent=1) if form == "list" else "\r\n".join(map(json.dumps, rows))
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(encoding))
    assert [pair.x for pair in importers.preferences(path)] == ["P0", "P1", "P2"]
    seeds = [{"instruction": row["prompt"]} for row in rows]
    path.write_bytes(json.dumps(seeds).encode(encoding))
    assert len(importers.read_seeds(path)) == 3


def test_seeds(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("Write.\n\nRead.\nWrite.\n")
    found = importers.read_seeds(text)
    assert [row["instruction"] for row in found] == ["Write.", "Read.", "Write."]
    assert len({row["id"] for row in found}) == 3
    with pytest.raises(ValueError, match="id 'a' occurs twice"):
        importers.read_seeds(
            write(tmp_path / "b.jsonl", [{"id": "a", "x": "1"}, {"id": "a", "x": "2"}])
        )
    alpaca = [{"instruction": "Sum up.", "input": "A text."}]
    assert importers.read_seeds(write(tmp_path / "d.jsonl", alpaca))[0]["instruction"] == (
        "Sum up.\nA text."
    )
    with pytest.raises(ValueError, match=r"e.jsonl:1: 'tools' is part of the prompt"):
        importers.read_seeds(write(tmp_path / "e.jsonl", [alpaca[0] | {"tools": "[search]"}]))
    with pytest.raises(ValueError, match=r"c.jsonl:1: keys \['text'\]"):
        importers.read_seeds(write(tmp_path / "c.jsonl", [{"text": "1"}]))


# --- export ---


def test_sharegpt_comes_back_as_it_went(tmp_path):
    quads = read_rows(QUADS, "quad")
    path = tmp_path / "quads.json"
    assert exporters.write(path, exporters.export(quads, "sharegpt")) == len(quads)
    assert read_rows(path, "quad") == quads
    row = json.loads(path.read_text())[0]
    assert [turn["from"] for turn in row["conversations"]] == ["human", "human"]
    assert row["rejected"]["value"] == quads[0].y2  # the right answer to x2


def test_pairs_and_sft(tmp_path):
    quads = read_rows(QUADS, "quad")[:3]
    both, first = (list(exporters.export(quads, to)) for to in ("pairs", "pairs_first"))
    assert len(both) == 6 and both[::2] == first
    assert both[1]["chosen"] == quads[0].y2 and both[1]["rejected"] == quads[0].y1
    assert [row["y"] for row in exporters.export(quads, "sft")][:2] == [quads[0].y1, quads[0].y2]
    assert exporters.main([str(QUADS), "--to", "pairs", "--out", str(tmp_path / "p.jsonl")]) == 0
    assert len(read_rows(tmp_path / "p.jsonl", "pair")) == 2 * len(read_rows(QUADS))
    assert exporters.main([str(tmp_path / "p.jsonl"), "--to", "sharegpt", "--out", "x.json"]) == 2


def test_trl_rows_are_conversations_and_come_back(tmp_path):
    plain, told = read_rows(QUADS, "quad")[:2]
    quads = [plain, dataclasses.replace(told, system="Be brief.")]
    rows = list(exporters.export(quads, "trl"))
    assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in rows)
    assert rows[0] == {
        "prompt": [turn("user", plain.x1)],
        "chosen": [turn("assistant", plain.y1)],
        "rejected": [turn("assistant", plain.y2)],
    }
    assert rows[2]["prompt"] == [turn("system", "Be brief."), turn("user", told.x1)]
    imported = importers.preferences(write(tmp_path / "a.jsonl", rows))
    pairs = [dataclasses.replace(pair, id="") for pair in rows_for("pair", quads)]
    assert [dataclasses.replace(pair, id="") for pair in imported] == pairs


# --- relabelling a preference set ---


def pairs_of_quads() -> list[dict]:
    rows = [json.loads(line) for line in QUADS.open(encoding="utf-8")]
    return [{"prompt": f"{r['task']} Case {n}.", "chosen": r["y1"], "rejected": r["y2"]}
            for n, r in enumerate(rows)]  # fmt: skip


def made(folder: Path, rows: list[dict], **changes):
    source = write(folder / "pairs.jsonl", rows)
    recipe = RelabelRecipe(
        **({"source": str(source), "out": str(folder / "out"), "heldout_share": 0.4} | changes)
    )
    counts = relabel_file(recipe)
    files = [folder / "out" / f"{split}.jsonl" for split in relabelling.SPLITS]
    return counts, files


def test_relabelled_pairs_pass_verify_and_splits_hold(tmp_path):
    pairs = pairs_of_quads()
    counts, files = made(tmp_path, pairs)
    found, summary = verify(files)
    assert [str(v) for v in found] == []
    assert summary.rows == sum(counts["out"].values()) > 100
    assert summary.rows + sum(counts["dropped"].values()) == counts["in"] == len(pairs)
    held = set(RelabelRecipe().heldout_kinds)
    kinds: dict[str, Counter] = {}
    for path in files:
        rows = [json.loads(line) for line in path.open(encoding="utf-8")]
        kinds[path.stem] = Counter(c["kind"] for r in rows for c in r["c1"] + r["c2"])
    assert not held & {*kinds["train"], *kinds["heldout"]}
    assert {*kinds["heldout_kinds"]} <= held
    assert max(kinds["train"].values()) <= 0.15 * max(40, kinds["train"].total())
    before = [path.read_text() for path in files]
    made(tmp_path, pairs)
    assert [path.read_text() for path in files] == before


def test_blocks_processes_and_a_kill_change_nothing(tmp_path, monkeypatch):
    """Small blocks over two processes, against this one; then a run that dies after two blocks."""
    monkeypatch.setattr(construct, "BLOCK_ROWS", 40)
    pairs = pairs_of_quads()
    counts, files = made(tmp_path, [*pairs, pairs[0] | {"prompt": "Another prompt."}])
    texts = [path.read_text() for path in files]
    assert counts["dropped"]["repeated response"] == 1, "found across blocks"
    assert [str(v) for v in verify(files)[0]] == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert made(tmp_path, [*pairs, pairs[0] | {"prompt": "Another prompt."}])[0] == counts
    assert [path.read_text() for path in files] == texts
    write_text, asked = relabelling.write_text, []

    def dies(path: Path, text: str) -> None:
        write_text(path, text)
        asked.append(path)
        if len(asked) == 2:
            files[0].open("a").write("torn")
            raise KeyboardInterrupt

    source = tmp_path / "pairs.jsonl"
    recipe = RelabelRecipe(source=str(source), out=str(tmp_path / "out"), heldout_share=0.4)
    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr(relabelling, "write_text", dies)
        relabel_file(recipe)
    read = []
    monkeypatch.setattr(
        relabelling, "_relabel_block",
        lambda r, n, p, work=relabelling._relabel_block: read.append(len(p)) or work(r, n, p),
    )  # fmt: skip
    assert relabel_file(recipe) == counts and sum(read) == len(pairs) + 1 - 80
    assert [path.read_text() for path in files] == texts
    assert not (tmp_path / "out" / "progress.json").exists()


def test_relabelling_leaves_out_what_is_no_use(tmp_path):
    good = {
        "prompt": "Describe an old mill.",
        "chosen": "The old mill was empty for years. Students repaired it, and it works again.",
        "rejected": "A mill stands by the river! It makes bread possible for everyone here.",
    }
    rows = [
        {**good, "rejected": "I'm sorry, but I cannot help you with this one today."},
        {**good, "rejected": "This one just stops in the middle of"},
        {**good, "rejected": "这是另一种语言的回答，不能使用。"},
        {**good, "rejected": "Too short."},
        good,
        {**good, "prompt": "Another prompt."},
    ]
    counts, _ = made(tmp_path, rows, heldout_share=0.0)
    assert counts["dropped"] == {
        "refusal": 1, "unfinished": 1, "another script than the prompt": 1,
        "no answer: too_short": 1, "repeated response": 1,
    }  # fmt: skip


def test_half_of_a_surrogate_pair_stops_no_relabelling(tmp_path):
    pairs = pairs_of_quads()[:4]
    whole, files = made(tmp_path, pairs, heldout_share=0.0)
    written = files[0].read_text()
    pairs.insert(2, {**pairs[0], "chosen": "An emoji that was cut: \ud83d"})
    counts, files = made(tmp_path, pairs, heldout_share=0.0)
    assert counts["dropped"] == {"half of a surrogate pair": 1, **whole["dropped"]}
    assert files[0].read_text() == written


def test_chinese_pairs_get_chinese_instructions(tmp_path):
    row = {
        "prompt": "介绍一下西湖。",
        "chosen": "西湖位于杭州，湖光山色。春天桃花开放，夏天荷花盛开，秋天桂花飘香，游人很多！",
        "rejected": "西湖是一个湖。\n\n它在杭州。你去过吗？",
    }
    _, files = made(tmp_path, [row], heldout_share=0.0)
    (quad,) = [json.loads(line) for line in files[0].open(encoding="utf-8")]
    assert all(script_of(c["text"]) == "chinese" for c in quad["c1"] + quad["c2"])
    assert verify(files)[0] == []


def test_a_prompt_that_speaks_of_a_kind_does_not_get_it(tmp_path):
    pairs = [
        {**row, "prompt": row["prompt"] + " Use few words and no list."} for row in pairs_of_quads()
    ]
    _, files = made(tmp_path, pairs)
    kinds = {c["kind"] for f in files for line in f.open() for c in json.loads(line)["c1"]}
    assert kinds and not kinds & {"words", "bullets", "numbered_items", "layout", "include_words"}


def test_scripts():
    assert script_of("これはペンです") == "kana" and script_of("Это ручка") == "cyrillic"
    assert script_of("한국어 문장") == "hangul" and script_of("!? 12") == "none"
