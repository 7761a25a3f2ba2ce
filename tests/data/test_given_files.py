"""Files of rows that users give: every program reads every form of them, and names a bad row."""

import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_hub import serving
from helpers_judge import settings
from helpers_models import SMALL

from iopo import sources
from iopo.config import DataConfig, ModelConfig, TrainConfig
from iopo.construct import audit, exporters, ifseeds, importers, relabel, report, verify
from iopo.construct.trace import taxonomy
from iopo.construct.trace.config import TraceRecipe
from iopo.construct.trace.pipeline import run as run_trace
from iopo.evaluation.benchmarks import quads
from iopo.evaluation.run import evaluate
from iopo.experiments.paper_table import data as paper_table
from iopo.files import read_records, write_records
from iopo.training.inputs import load_inputs

README = Path(__file__).resolve().parents[2] / "data" / "README.md"

HALF = "\ud83d"  # of a surrogate pair: an emoji that was cut in two
CONSTRAINT = [{"kind": "commas", "params": {"relation": "exactly", "number": 0}, "text": "Plain."}]
QUADS = [
    {"id": f"q{n}", "task": f"Task {n} \u2028 é.", "x1": f"A{n}. Plain.", "y1": f"One {n}.",
     "x2": f"B{n}. Plain.", "y2": f"Two, {n}.", "c1": CONSTRAINT, "c2": CONSTRAINT}
    for n in range(4)
]  # fmt: skip
PAIRS = [{"prompt": f"P{n}", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(4)]
SEEDS = [{"id": f"s{n}", "instruction": f"Write {n}."} for n in range(4)]
CHECKED = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"n": None}]}
IFEVAL = [{"key": n, "prompt": f"P{n}", **CHECKED} for n in range(4)]
AUDITED = [row | CHECKED for row in PAIRS]
PROMPTS = [{"prompt": f"word{n} " * 14} for n in range(4)]
ANSWERS = [{"key": n, "response": f"Answer {n}."} for n in range(4)]
DIMENSIONS = [
    {"type": "Style", "dimension": f"D{n}", "tag": f"T{n}", "en": "e", "zh": "z", "count": n + 1}
    for n in range(4)
]


def exported(path: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.jsonl")
        if code := exporters.main([str(path), "--to", "trl", "--out", str(out)]):
            raise SystemExit(code)
        return out.read_text(encoding="utf-8")


def verified(path: Path) -> tuple[list[str], int]:
    found, summary = verify.verify([path])
    # all but the place, which depends on the form
    texts = [str(v) if v.fault in ("json", "keys") else f"{v.fault} {v.detail}" for v in found]
    return texts, summary.rows


def inputs(data: DataConfig, folder: str) -> Any:
    data.cache_dir = folder
    return load_inputs(TrainConfig(data=data, model=ModelConfig(path=None, tiny=TINY)))


def trained(path: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return [example.id for example in inputs(DataConfig(train=str(path)), folder).train]


def held_out(path: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder, "train.jsonl"), QUADS)
        data = DataConfig(train=f"{folder}/train.jsonl", heldout=str(path))
        return [example.id for example in inputs(data, folder).heldout]


def relabelled(path: Path) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        counts = relabel.relabel_file(relabel.RelabelRecipe(source=str(path), out=folder))
        return counts["in"], list(importers.preferences(path))


def audited(path: Path) -> str:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "draw", lambda *_: None)  # the picture takes a second
        return audit.audit(audit.AuditRecipe(source=str(path), out=folder))


def seeded(path: Path) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        assert run_trace(TraceRecipe(seeds=str(path), out=folder, plan=True)) == {}
        return importers.read_seeds(path)


def scored(data: Any, answers: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("data", IFEVAL), ("answers", ANSWERS)):
            write_records(Path(folder, name), rows)
        config = settings(Path(folder, "data"), answers or Path(folder, "answers"))
        config.data.path = str(data or config.data.path)
        scores = evaluate(config)["scores"]
        answered = read_records(Path(folder, "out", "responses.jsonl"))
        return scores, [row["response"] for row in answered]


TINY = {"model_type": "llama", **SMALL}
PLACES: dict[str, tuple[list[dict], Callable[[Path], Any]]] = {  # as in the table of data/README.md
    "`data.train`": (QUADS, trained),
    "`data.heldout`": (QUADS, held_out),
    "`recipe.source` of relabel": (PAIRS, relabelled),
    "`recipe.source` of ifseeds": (IFEVAL, lambda path: ifseeds.read_checkable(path, None)),
    "`recipe.source` of audit": (AUDITED, audited),
    "`recipe.seeds` of trace": (SEEDS, seeded),
    "verify": (QUADS, verified),
    "verify `--against`": (PROMPTS, lambda path: list(verify.benchmark_grams([path]))),
    "exporters": (QUADS, exported),
    "report": (QUADS, lambda path: report.count([path])),
    "an evaluation's `data.path`": (IFEVAL, lambda path: scored(path, None)),
    "`data.path` of `+benchmark=quads`": (QUADS, quads.read),
    "an evaluation's `responses.path`": (ANSWERS, lambda path: scored(None, path)),
}
READERS = PLACES | {
    "paper_table": (QUADS, paper_table._read),
    "taxonomy": (DIMENSIONS, taxonomy.read),
}
TEXTS = ("jsonl", "crlf", "indented", "one line")
FORMS = (*TEXTS, "gzip", "folder", "folder:set", "hub", "parquet")
every_reader = pytest.mark.parametrize("reader", READERS)


def write(folder: Path, rows: list[dict], form: str, third: str | None = None) -> tuple[Path, str]:
    """The file, and the place of its third row, in whose stead `third` may stand."""
    texts = [json.dumps(row, indent=1 if form == "indented" else None) for row in rows]
    texts[2] = third or texts[2]
    path = folder / ("rows.json" if form in ("indented", "one line") else "rows.jsonl")
    if path.suffix == ".jsonl":
        end, encoding = ("\r\n", "utf-8-sig") if form == "crlf" else ("\n", "utf-8")
        path.write_bytes("".join(text + end for text in texts).encode(encoding))
        return path, f"{path}:3: "
    between = ",\n" if form == "indented" else ", "
    before = "[" + between[1:] + "".join(text + between for text in texts[:2])
    path.write_text(before + between.join(texts[2:]) + "]")
    return path, f"{path}: row 3 (line {before.count(chr(10)) + 1}): "


@pytest.fixture
def give(tmp_path, monkeypatch):
    """As `write`, for every form."""
    hubs = []

    def source(rows: list[dict], form: str, third: str | None = None) -> tuple[Any, str]:
        if form in TEXTS:
            return write(tmp_path, rows, form, third)
        if form == "parquet":
            pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the extra data")
            pa = pytest.importorskip("pyarrow")
            path = tmp_path / "rows.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
            return path, f"{path}: row 3: "
        path, place = write(tmp_path, rows, "jsonl", third)
        lines = path.read_bytes().splitlines(keepends=True)
        if form == "gzip":
            path = path.with_suffix(".jsonl.gz")
            path.write_bytes(gzip.compress(b"".join(lines)))
            return path, f"{path}:3: "
        shards = {"train-00000-of-00002.jsonl": lines[:2], "train-00001-of-00002.jsonl": lines[2:]}
        files = {f"data/{name}": b"".join(of) for name, of in shards.items()}
        files["README.md"] = b"of a data set"
        if form != "folder":
            files["data/test.jsonl"] = b"no rows"
        if form.startswith("folder"):
            for name, content in files.items():
                file = tmp_path / "shards" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            of_set = "" if form == "folder" else ":train"
            return (
                tmp_path / f"shards{of_set}",
                f"{tmp_path}/shards/data/train-00001-of-00002.jsonl:1: ",
            )
        hubs.append(serving({("org/rows", "main"): files}))
        address = hubs[-1].__enter__()
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
        sources._from_hub.cache_clear()
        return "hf://org/rows:train", "/data/train-00001-of-00002.jsonl:1: "

    yield source
    for hub in hubs:
        hub.__exit__(None, None, None)


@pytest.mark.parametrize("form", FORMS[1:])
@every_reader
def test_every_form_of_a_source_is_read_alike(give, tmp_path, reader, form):
    rows, read = READERS[reader]
    expected = read(give(rows, "jsonl")[0])
    assert expected and read(give(rows, form)[0]) == expected


def test_the_table_of_places_in_the_docs():
    table = re.findall(r"^\| (.*) \|$", README.read_text().partition("| place |")[2], re.MULTILINE)
    places = [row.split(" | ")[0] for row in table[: len(PLACES)]]
    assert places == list(PLACES)


@pytest.mark.parametrize("form", FORMS)
@every_reader
def test_a_bad_row_is_named_by_file_row_and_line(give, capsys, caplog, reader, form):
    rows, read = READERS[reader]
    if form == "parquet":  # a row that is not JSON cannot be written
        key = next((k for k in ("x1", "instruction", "response", "key") if k in rows[0]), None)
        if key is None or "ifseeds" in reader:
            pytest.skip("has no row that can be read and is an error")
        rows = [*rows[:2], rows[2] | {key: None}, rows[3]]
    source, place = give(rows, form, third='{"broken": }')
    assert place.removesuffix(" ") in said(read, source, capsys, caplog)


@every_reader
def test_half_of_a_surrogate_pair_stops_no_program_in_its_middle(tmp_path, capsys, caplog, reader):
    rows, read = READERS[reader]
    broken = {k: v + HALF if isinstance(v, str) else v for k, v in rows[2].items()}
    path, place = write(tmp_path, rows, "one line", third=json.dumps(broken))
    if "responses.path" in reader:  # an answer is scored as it is
        assert read(path)[1][2] == f"Answer 2.{HALF}"
    elif "--against" not in reader:
        told = said(read, path, capsys, caplog)
        assert place in told and "half of a surrogate pair after" in told


def said(read: Callable[[Path], Any], path: Path, capsys: Any, caplog: Any) -> str:
    """All that a user is told, and what was read."""
    result = None
    try:
        result = read(path)
    except (ValueError, SystemExit) as error:
        result = error
    printed = capsys.readouterr()
    return f"{result} {printed.out} {printed.err} {caplog.text}"
