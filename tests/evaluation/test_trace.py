"""TRACE end to end, over real HTTP against a scripted judge."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers_judge import Answer, StubServer, asked, honest, troubled, true_scores

from iopo.evaluation.benchmarks import trace
from iopo.evaluation.config import (
    BenchmarkSection,
    DataSection,
    EvaluateConfig,
    JudgeSection,
    ResponsesSection,
    Style,
)
from iopo.evaluation.endpoint import Request
from iopo.evaluation.judge.prompts import VERSION
from iopo.evaluation.run import evaluate
from iopo.files import read_records, write_records

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("IOPO_DATA_DIR", ROOT.parent / "shared" / "data"))
FILE = SHARED / "trace" / trace.SOURCE.file
needs_data = pytest.mark.skipif(not FILE.is_file(), reason=f"no {FILE}")


def item(number: int, constraints: list[str], tags: list[str], given: str = "NULL") -> dict:
    text = "\n".join(constraints)
    user = f"任务{number}\n{text}\n" + (f"# Inputs:\n{given}\n" if given != "NULL" else "")
    return {
        "id": str(number),
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": user},
        ],
        "type": "trace",
        "description": f"任务{number}",
        "constraints": text,
        "input": given,
        "constraints_num": len(constraints),
        "constraints_splits": constraints,
        "levels2": tags,
        "category": "trace1.0",
    }


SMALL = [
    item(0, ["a"], ["包含约束"]),
    item(1, ["a", "b"], ["数值约束", "输出格式约束"], given="输入文本"),
    item(2, ["c"], ["·"]),
    item(3, ["a", "b", "c"], ["包含约束", "包含约束", "语气风格约束"]),
]


def config(server: StubServer, out: Path, data: Path, answers: Path, **judge) -> EvaluateConfig:
    section = JudgeSection(
        base_url=server.base_url,
        model="judge",
        **{"timeout_s": 1.5, "backoff_s": 0.01, "concurrency": 32, **judge},
    )
    return EvaluateConfig(
        benchmark=BenchmarkSection("trace"),
        data=DataSection(str(data)),
        judge=section,
        responses=ResponsesSection(str(answers)),
        out=str(out),
        bootstrap=200,
    )


def answer_file(path: Path, items: list[trace.Item]) -> Path:
    write_records(path, [{"id": i.id, "response": f"an answer to {i.id}"} for i in items])
    return path


def test_measures_by_hand(tmp_path: Path) -> None:
    data = tmp_path / "trace.jsonl"
    write_records(data, SMALL)
    items = trace.load(data)
    scores = [[10.0], [10.0, 9.0], [0.0], [10.0, 10.0, 10.0]]
    overall = [10.0, 9.5, None, 5.0]
    verdicts = [{"scores": s, "overall": o} for s, o in zip(scores, overall, strict=True)]
    table = trace.measures(items, verdicts)
    assert table["IF-S"] == {"0": (1.0, 1), "2": (0.0, 1)}
    assert table["IF-M"] == {"1": (0.0, 1), "3": (1.0, 1)}
    assert table["mean_score"]["1"] == (0.95, 1)
    assert table["constraints_met"]["1"] == (1, 2)
    assert table["constraints_at_least_8"]["1"] == (2, 2)
    assert table["dimension/Inclusion"] == {"0": (1.0, 1.0), "3": (2.0, 2.0)}
    assert table["type/Other"] == {"2": (0.0, 1.0)}
    assert table["dimension/Other: ·"] == {"2": (0.0, 1.0)}
    assert table["overall_differs"] == {"0": (0.0, 1), "1": (0.0, 1), "3": (1.0, 1)}
    unparsed = trace.measures(items, [{"scores": None, "overall": None}] + verdicts[1:])
    assert "0" not in unparsed["IF-S"]


def test_a_missing_tag_or_field_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "trace.jsonl"
    write_records(data, [{**SMALL[1], "levels2": ["包含约束"]}])
    with pytest.raises(ValueError, match="item 1: 2 constraints and 1 tags"):
        trace.load(data)
    write_records(data, [{**SMALL[1], "description": None}])
    with pytest.raises(ValueError, match=":1: description: found NoneType, expected str"):
        trace.load(data)
    write_records(data, [SMALL[0], SMALL[0]])
    with pytest.raises(ValueError, match="id 0 is there more than once"):
        trace.load(data)


@needs_data
def test_no_item_loses_its_description_or_input() -> None:
    items = trace.load(FILE)
    assert len(items) == 1042
    assert sum(len(i.row["constraints_splits"]) for i in items) == 5087
    for i in items:
        question = trace.question(i, "answer")
        assert question.task.startswith(i.row["description"])
        if i.row["input"] != "NULL":
            assert question.task.endswith(i.row["input"])
        assert question.criteria == tuple(i.row["constraints_splits"])
    tags = Counter(tag for i in items for tag in i.row["levels2"] if tag not in trace.TYPE_OF)
    assert tags == {"输入格式约束": 1, "·": 1}


@needs_data
def test_all_items_against_a_troubled_judge(tmp_path: Path) -> None:
    answers = answer_file(tmp_path / "answers.jsonl", trace.load(FILE))
    with StubServer(troubled) as server:
        first = evaluate(config(server, tmp_path / "a", FILE, answers))
        faults = sum(server.seen.values()) - 1042
        before = sum(server.seen.values())
        again = evaluate(config(server, tmp_path / "a", FILE, answers))
        assert sum(server.seen.values()) == before, "a second run asks nothing"
    assert faults > 100
    assert first["judge"]["status"] == {"judged": 1042}
    assert first["scores"] == again["scores"]
    assert first["scores"]["IF-S"]["n"] == 200 and first["scores"]["IF-M"]["n"] == 842
    assert again["judge"]["usage"]["requests"] == 0
    expected = {}
    for body in server.bodies:
        token, count = asked(body)
        expected[token] = true_scores(token, count)
    rows = read_records(tmp_path / "a" / "verdicts.jsonl")
    assert [row["id"] for row in rows] == [i.id for i in trace.load(FILE)]
    assert sorted(row["scores"] for row in rows) == sorted(map(list, expected.values()))


def start(server: StubServer, out: Path, answers: Path, limit: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "evaluate.py",
        "+benchmark=trace",
        f"data.path={FILE}",
        f"responses.path={answers}",
        f"out={out}",
        f"judge.base_url={server.base_url}",
        "judge.model=judge",
        "judge.backoff_s=0.01",
        "judge.timeout_s=1.5",
        "judge.concurrency=16",
        "bootstrap=200",
        f"limit={limit}",
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@needs_data
@pytest.mark.parametrize("limit", [120, pytest.param(1042, marks=pytest.mark.slow)])
def test_killed_three_times_and_run_again(tmp_path: Path, limit: int) -> None:
    answers = answer_file(tmp_path / "answers.jsonl", trace.load(FILE))
    out = tmp_path / "killed"
    cache = out / "judge.jsonl"
    kept: set[str] = set()
    with StubServer(troubled) as server:
        for _ in range(3):
            server.seen.clear()
            process = start(server, out, answers, limit)
            while sum(server.seen.values()) < limit // 5:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not kept & _keys(server), "asked again though answered"
            keys = [row["reply"]["key"] for row in read_records(cache, torn_tail=True)]
            assert len(keys) == len(set(keys)), "a reply is stored twice"
            assert kept < set(keys), "a run adds to what is there and loses nothing"
            kept = set(keys)
        with open(cache, "ab") as file:  # a kill in the middle of a write
            file.write(b'{"reply": {"key": "torn')
        server.seen.clear()
        process = start(server, out, answers, limit)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert not kept & _keys(server)
    with StubServer(honest) as server:
        settings = config(server, tmp_path / "whole", FILE, answers)
        settings.limit = limit
        whole = evaluate(settings)
    resumed = json.loads((out / "scores.json").read_text())
    assert resumed["scores"] == json.loads(json.dumps(whole["scores"]))
    assert resumed["judge"]["status"] == {"judged": limit}
    measures = [(folder / "measures.jsonl").read_bytes() for folder in (out, tmp_path / "whole")]
    assert measures[0] == measures[1]


def _keys(server: StubServer) -> set[str]:
    """Cache keys of the requests that the server saw since `seen` was cleared."""
    bodies = server.bodies[-sum(server.seen.values()) :]
    return {
        Request(
            model=body["model"],
            messages=tuple(body["messages"]),
            temperature=body["temperature"],
            max_tokens=body["max_tokens"],
            seed=body.get("seed"),
            version=f"trace-robust-{VERSION}",
        ).key
        for body in bodies
    }


def test_unread_judgements_are_counted_and_bounded(tmp_path: Path) -> None:
    data = tmp_path / "trace.jsonl"
    write_records(data, SMALL)
    answers = answer_file(tmp_path / "answers.jsonl", trace.load(data))

    def script(body, before):
        if "任务0" in str(body):
            return Answer("Constraints Overall Score: [[10]]")
        return honest(body, before)

    with StubServer(script) as server:
        scores = evaluate(config(server, tmp_path / "o", data, answers))
        assert len(server.bodies) == 3 + 3, "asked again twice, then counted"
    assert scores["judge"]["status"] == {"unparsed": 1, "judged": 3}
    assert scores["unparsed"] == 1 and list(scores["judge"]["unparsed"]) == ["0"]
    entry = scores["scores"]["IF-S"]
    assert entry["n"] == 1
    value = entry["value"]
    assert entry["bounds"] == [value / 2, (1 + value) / 2]
    assert "between" in (tmp_path / "o" / "report.html").read_text()


def test_the_published_format_end_to_end(tmp_path: Path) -> None:
    data = tmp_path / "trace.jsonl"
    write_records(data, SMALL)
    answers = answer_file(tmp_path / "answers.jsonl", trace.load(data))

    def script(body, before):
        text = body["messages"][0]["content"]
        count = int(text.split("in order (")[1].split(" in all)")[0])
        pairs = ", ".join(f'"constraint {k}": {10 if k < 3 else 7}' for k in range(1, count + 1))
        return Answer(f"**Fine Grained Score：** [{{{pairs}}}]\n**Overall Score:** [[9/10]]")

    with StubServer(script) as server:
        settings = config(server, tmp_path / "o", data, answers, style=Style.paper)
        scores = evaluate(settings)["scores"]
        assert not any("response_format" in body for body in server.bodies)
    assert scores["IF-S"]["value"] == 1.0 and scores["IF-M"]["value"] == 0.5
    assert scores["overall_is_10"]["value"] == 0.0
