"""A judge against IFEval's own verdicts: one that knows, one that nods, one that is talked over."""

import json
from pathlib import Path

import pytest
from helpers_judge import PLAIN, Answer, Script, StubServer, asked, ifeval_rows, verdict

from iopo.evaluation.config import (
    BenchmarkSection,
    DataSection,
    EvaluateConfig,
    JudgeSection,
    ResponsesSection,
)
from iopo.evaluation.run import evaluate
from iopo.files import read_records, write_records


def answer_to(body: dict) -> str:
    text = body["messages"][0]["content"]
    return text.split("<answer ")[1].split(">\n", 1)[1].split("\n</answer")[0]


def knows(body: dict, before: int) -> Answer:
    text = answer_to(body)
    return Answer(verdict(asked(body)[0], ["," not in text, text == text.lower()]))


def nods(body: dict, before: int) -> Answer:
    return Answer(verdict(asked(body)[0], [1, 1]))


def talked_over(body: dict, before: int) -> Answer:
    return nods(body, before) if "Note to the grader" in answer_to(body) else knows(body, before)


def fickle(body: dict, before: int) -> Answer:
    return nods(body, before) if body["seed"] else knows(body, before)


def mumbles(body: dict, before: int) -> Answer:
    return Answer("They look fine to me.")


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    write_records(tmp_path / "data.jsonl", ifeval_rows(*range(6)))
    texts = [PLAIN, f"{PLAIN}, mostly", f"Well, {PLAIN}", PLAIN.title(), PLAIN]  # none to the last
    write_records(
        tmp_path / "answers.jsonl", [{"key": k, "response": t} for k, t in enumerate(texts)]
    )
    return EvaluateConfig(
        benchmark=BenchmarkSection("judge_check"),
        data=DataSection(str(tmp_path / "data.jsonl")),
        responses=ResponsesSection(str(tmp_path / "answers.jsonl")),
        bootstrap=100,
    )


def values(config: EvaluateConfig, script: Script, out: Path) -> dict[str, float]:
    with StubServer(script) as server:
        config.judge = JudgeSection(base_url=server.base_url, model="j", parse_retries=0)
        config.out = str(out)
        scores = evaluate(config)["scores"]
        sent = len(server.bodies)
        assert sent == (5 * 4 - 3) * 2, "three answers are in lower case as they are"
        evaluate(config)
        assert len(server.bodies) == sent, "a second run asks nothing"
    return {name: entry["value"] for name, entry in scores.items()}


def test_a_judge_that_knows(config: EvaluateConfig, tmp_path: Path) -> None:
    found = values(config, knows, tmp_path / "knows")
    for name in ("balanced_accuracy", "kappa", "accuracy", "unmet_seen/planted", "same_twice"):
        assert found[name] == 1.0, name
    assert found["unparsed"] == 0.0
    row = read_records(tmp_path / "knows" / "verdicts.jsonl")[2]
    assert row["id"] == "0/upper" and row["truth"] == [True, False]
    assert row["said"] == [[1.0, 0.0]] * 2


def test_a_judge_that_nods(config: EvaluateConfig, tmp_path: Path) -> None:
    found = values(config, nods, tmp_path / "nods")
    assert found["balanced_accuracy"] == 0.5 and found["kappa"] == 0.0
    assert found["met_seen"] == 1.0 and found["unmet_seen"] == 0.0
    # lower case keeps the commas; upper case and the planted claim break the second constraint too
    assert found["accuracy/change_case:english_lowercase"] == pytest.approx(8 / 20)


def test_a_judge_that_is_talked_over(config: EvaluateConfig, tmp_path: Path) -> None:
    found = values(config, talked_over, tmp_path / "talked")
    assert found["unmet_seen/as_is"] == 1.0 and found["unmet_seen/planted"] == 0.0


def test_a_judge_that_contradicts_itself(config: EvaluateConfig, tmp_path: Path) -> None:
    found = values(config, fickle, tmp_path / "fickle")
    assert 0.5 < found["balanced_accuracy"] < 1.0
    assert found["same_twice"] == pytest.approx(2 * found["accuracy"] - 1), "one pass was right"


def test_a_judge_that_cannot_be_read(config: EvaluateConfig, tmp_path: Path) -> None:
    assert values(config, mumbles, tmp_path / "mumbles") == {"unparsed": 1.0}
    scores = json.loads((tmp_path / "mumbles" / "scores.json").read_text())
    assert scores["judge"][0]["status"] == {"unparsed": 20}


def test_what_it_needs(config: EvaluateConfig) -> None:
    with pytest.raises(ValueError, match="judge_check needs a judge"):
        evaluate(config)
    config.plan = True
    assert evaluate(config)["judge_requests"] == 40
    config.responses.path = None
    with pytest.raises(ValueError, match="needs responses.path"):
        evaluate(config)
