"""Sources of rows that are not one plain file: what is picked, and what is refused."""

import gzip
import sys

import pytest
from helpers_hub import serving

from iopo import sources
from iopo.files import given_records, iter_records, sha256_rows
from iopo.sources import files_of

ROWS = b'{"n": 1}\n{"n": 2}\n'


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (["a-00001-of-00002.jsonl", "a-00000-of-00002.jsonl"], None, ["a-00000", "a-00001"]),
        (["0000.parquet", "0001.parquet", "notes.txt"], None, ["0000", "0001"]),
        (["data/train.jsonl.gz", "data/test.jsonl"], "train", ["data/train"]),
        (["de/train/0.json", "en/train/0.json", "en/test/0.json"], "en/train", ["en/train/0"]),
        (["train_sft-0.jsonl", "train_gen-0.jsonl"], "train_sft", ["train_sft-0"]),
    ],
)
def test_the_shards_of_one_set(names, wanted, found):
    picked = sources._one_set(names, wanted, "x")
    assert [name.partition("-of")[0].partition(".")[0] for name in picked] == found


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["train.jsonl", "heldout.jsonl"], None, "x: several sets of rows in it: heldout, train; "),
        (["en/train/0.json", "de/train/0.json"], "train", "several sets of rows in it: de/train"),
        (["train.jsonl"], "test", "x: no 'test' in it: train; pick one with a colon: x:NAME"),
        (["README.md", ".cache/train.jsonl"], None, "x: no .jsonl.gz, .json.gz, .jsonl, "),
    ],
)
def test_which_set_is_never_guessed(names, wanted, message):
    with pytest.raises(ValueError) as refused:
        sources._one_set(names, wanted, "x")
    assert message in str(refused.value)


@pytest.mark.parametrize("source", ["nothing.jsonl", "nothing:train"])
def test_what_is_not_there(source):
    with pytest.raises(FileNotFoundError, match=f"{source}: no such file or folder"):
        list(iter_records(source))


def test_a_damaged_gzip_file_gives_the_rows_before_it_and_a_fault(tmp_path):
    lines = b"".join(b'{"n": %d}\n' % n for n in range(5000))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-4000])
    *rows, (place, value, fault) = iter_records(path)
    assert [row["n"] for _, row, _ in rows] == list(range(len(rows))) and len(rows) > 10
    assert value is None and "the compressed file is damaged" in fault
    assert place.line == len(rows)


def test_the_hash_of_several_files_is_that_of_their_content(tmp_path):
    for n in range(2):
        (tmp_path / f"part-{n}.jsonl").write_bytes(ROWS)
    before = sha256_rows(tmp_path)
    (tmp_path / "part-1.jsonl").write_bytes(ROWS * 2)
    assert sha256_rows(tmp_path) != before == before.lower()


def test_parquet_streams_names_what_json_lacks_and_says_what_is_missing(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="Parquet needs the extra data")
    pq = pytest.importorskip("pyarrow.parquet")
    import datetime

    day = datetime.date(2026, 11, 30)
    path = tmp_path / "rows.parquet"
    table = pa.table({"n": list(range(5)), "day": [day] * 5, "raw": [b"ab"] * 5})
    pq.write_table(table, path, row_group_size=2)
    assert next(iter_records(path))[1] == {"n": 0, "day": "2026-11-30", "raw": "b'ab'"}
    damaged = path.read_bytes()
    path.write_bytes(damaged[:10] + b"\0" * 100 + damaged[110:])
    with pytest.raises(ValueError, match=r"row \d: the file cannot be read as Parquet"):
        given_records(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"rows.parquet: Parquet needs pyarrow; pip install"):
        given_records(path)


def test_the_hub_by_revision_and_without_a_network(tmp_path, monkeypatch):
    constants = "huggingface_hub.constants"
    sets = {
        ("org/a", "main"): {"data.jsonl": ROWS}, ("org/a", "v2"): {"train.jsonl": ROWS[9:]},
        ("org/a", "refs/convert/parquet"): {"default/train/0000.jsonl": ROWS},
    }  # fmt: skip
    with serving(sets) as address:
        monkeypatch.setattr(f"{constants}.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path))
        sources._from_hub.cache_clear()
        assert [row["n"] for _, row in given_records("hf://org/a")] == [1, 2]
        assert [row["n"] for _, row in given_records("hf://org/a@v2:train")] == [2]
        converted = given_records("hf://org/a@refs/convert/parquet:default/train")
        assert [row["n"] for _, row in converted] == [1, 2]
        with pytest.raises(ValueError, match="hf://org/b: the hub does not give it .*check the"):
            files_of("hf://org/b")
        with pytest.raises(ValueError, match="no 'test' in it: data"):
            files_of("hf://org/a:test")
        with pytest.raises(ValueError, match="expected hf://ORG/NAME"):
            files_of("hf://org")
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", True)
    sources._from_hub.cache_clear()
    assert [row["n"] for _, row in given_records("hf://org/a@v2:train")] == [2]
