"""CFBench, FollowBench and ComplexBench: hand-made items, hand-computed scores."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_judge import Answer, StubServer, asked, verdict

from iopo.evaluation.benchmarks import cfbench, complexbench, followbench
from iopo.evaluation.benchmarks.followbench import follows, matches_template
from iopo.evaluation.config import (
    BenchmarkSection,
    DataSection,
    EvaluateConfig,
    JudgeSection,
    ResponsesSection,
    Style,
)
from iopo.evaluation.run import evaluate
from iopo.files import write_records


def scored(*scores: list[float] | None) -> list[dict[str, Any]]:
    return [{"scores": s, "overall": None} for s in scores]


CFBENCH = [
    {
        "idx": 0,
        "prompt": "写一首诗",
        "gold": "",
        "split": "easy",
        "criteria": [
            ["押韵\n而且", "主需", "格式", "韵"],
            ["四句 ", "次需", "数值", ""],
            ["写春", "次需", "", ""],
            ["写花", "次需", "", ""],
        ],
    },
    {"idx": 810, "prompt": "", "split": "hard", "criteria": [["对联", "次需", "", ""]] * 5},
]


def test_cfbench_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "cf.json"
    path.write_text(json.dumps(CFBENCH, ensure_ascii=False), encoding="utf-8")
    items = cfbench.load(path)
    question = cfbench.question(items[0], "answer")
    assert question.criteria == ("押韵\n而且", "四句", "写春", "写花")
    # 1 + 2/3 of secondary: 1/2 + 1/3 = 5/6 > 4/5. Secondary only, 4 of 5: not above 4/5.
    table = cfbench.measures(items, scored([1, 1, 1, 0], [1, 1, 1, 1, 0]))
    assert table["CSR"] == {"0": (0.75, 1), "810": (0.8, 1)}
    assert table["ISR"] == {"0": (0.0, 1), "810": (0.0, 1)}
    assert table["PSR"] == {"0": (1.0, 1), "810": (0.0, 1)}
    assert table["PSR/hard"] == {"810": (0.0, 1)}
    assert table["type/no type"]["0"] == (1, 2)


@pytest.mark.parametrize(
    ("primary", "secondary", "held"),
    [
        ([1, 1], [], True),
        ([1, 0], [], False),
        ([0], [1, 1, 1], False),
        ([1], [1, 1, 1, 0, 0], False),  # 1/2 + 1/2 * 3/5 = 4/5, not above it
        ([1], [1, 1, 0], True),
        ([], [1, 1, 1, 1, 0], False),
        ([], [1, 1, 1, 1, 1, 0], True),
    ],
)
def test_cfbench_priorities(primary: list, secondary: list, held: bool) -> None:
    levels = [cfbench.PRIMARY] * len(primary) + [cfbench.SECONDARY] * len(secondary)
    assert cfbench.priority_satisfied(primary + secondary, levels) is held


def test_complexbench_dependencies() -> None:
    # 3 depends on 2 depends on 1 depends on 0, which failed.
    deps: list[list[int]] = [[], [0], [1], [2], []]
    after = complexbench.after_dependencies
    assert after([0, 1, 1, 1, 1], deps, deep=False) == [False, False, True, True, True]
    assert after([0, 1, 1, 1, 1], deps, deep=True) == [False, False, False, False, True]
    assert after([1, 1], [[1], [0]], deep=True) == [True, True]
    assert after([1, 0], [[1], [0]], deep=True) == [False, False]


def complex_item() -> dict[str, Any]:
    questions = [
        {"point_id": 0, "question": "q0?", "rule": None, "dep": []},
        {"point_id": 1, "question": "q1?", "rule": "model_length:[1,9]", "dep": [0]},
        {"point_id": 2, "question": "q2?", "rule": None, "dep": [1]},
    ]
    for question in questions:
        question |= {"constraint_dimensions": ["Length"], "composition_types": ["And"]}
    return {
        "main_id": 7,
        "instruction": "写",
        "category": "Chain_1",
        "task_types": "Writing",
        "scoring_questions": questions,
    }


def test_complexbench_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "data_final.json"
    path.write_text(json.dumps([complex_item()]), encoding="utf-8")
    items = complexbench.load(path)
    table = complexbench.measures(items, scored([0, 1, 1]))
    assert table["DRFR"] == {"7": (1, 3)}
    assert table["DRFR_transitive"] == {"7": (0, 3)}
    assert table["DRFR_independent"] == {"7": (2, 3)}
    assert table["constraint/Length"] == {"7": (1, 3)}
    bad = complex_item()
    bad["scoring_questions"][0]["dep"] = [5]
    path.write_text(json.dumps([bad]), encoding="utf-8")
    with pytest.raises(ValueError, match="item 7: question 0 depends on \\[5\\]"):
        complexbench.load(path)


def follow_rows() -> list[dict[str, Any]]:
    rows = []
    for kind, source, number in (("content", "quora", 1), ("mixed", "xsum", 2)):
        for level in range(6):
            rows.append(
                {
                    "language": "en",
                    "constraint_type": kind,
                    "example_id": number,
                    "category": kind,
                    "source": source,
                    "level": level,
                    "instruction": f"{kind} with {level} constraints",
                    "target": "",
                }
            )
    return rows


def test_followbench_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "followbench.jsonl"
    write_records(path, follow_rows())
    items = followbench.load(path)
    assert [i.id for i in items][:2] == ["en/content/1/1", "en/content/1/2"]
    question = followbench.question(items[2], "answer")
    assert len(question.criteria) == 3 and "Instruction 3:" in question.task
    assert followbench.question(items[5], "answer") is None, "xsum is checked by code"
    content = [[1], [1, 1], [1, 0, 1], [1] * 4, [1] * 5]
    mixed = [[1], [0] * 2, [0] * 3, [0] * 4, [0] * 5]
    table = followbench.measures(items, scored(*content, *mixed))
    assert table["CSL/en"] == {"en/content/1": (2.0, 1.0), "en/mixed/2": (1.0, 1.0)}
    level3 = table["HSR/en/level 3"]
    assert sum(n for n, _ in level3.values()) / sum(d for _, d in level3.values()) == 0
    soft = table["SSR/en/level 3"]
    assert sum(n for n, _ in soft.values()) / sum(d for _, d in soft.values()) == 1 / 3
    assert table["HSR/en/content"]["en/content/1/3"] == (0.0, 1)
    write_records(path, follow_rows()[:-1])
    with pytest.raises(ValueError, match="en/mixed/2 has the levels"):
        followbench.load(path)


def test_followbench_weighs_types_alike() -> None:
    """Two groups of one type count as much as one group of another."""
    items, verdicts = [], []
    for kind, number, held in (("content", 1, 1), ("style", 1, 0), ("style", 2, 0)):
        for level in range(1, 6):
            row = {"language": "en", "constraint_type": kind, "example_id": number, "level": level}
            items.append(followbench.Item(f"en/{kind}/{number}/{level}", (), row))
            verdicts.append({"scores": [held] * level})
    hard = followbench.measures(items, verdicts)["HSR/en"]
    assert sum(n for n, _ in hard.values()) / sum(d for _, d in hard.values()) == pytest.approx(0.5)


def rule(source: str, level: int, answer: str, target: str = "", language: str = "en") -> bool:
    row = {
        "language": language,
        "constraint_type": "mixed",
        "example_id": 1,
        "source": source,
        "level": level,
        "target": target,
    }
    return follows(row, answer)


def test_followbench_rules() -> None:
    summary = "Police are continuing the operation near the flooded river this morning."
    assert rule("xsum", 5, summary)
    assert not rule("xsum", 5, summary.replace("operation", "work"))
    assert rule("xsum", 4, summary.replace("operation", "work"))
    assert not rule("xsum", 1, summary + " Really.")
    assert rule("gigaword", 5, "two people killed in a southern philippines attack")
    assert not rule("gigaword", 2, "two people killed in a southern philippines attack.")
    assert rule("gigaword", 5, "菲律宾军方在行动", language="zh")
    assert rule("BBH_logical", 3, "Not (A). So it is (C).", "(C)")
    assert not rule("BBH_logical", 3, "(C), no, (A)", "(C)")
    assert rule("gsm_8k", 1, "She pays $3, then $18", "$18")
    assert rule("CONLL2003", 1, "b", "['a', 'b']")
    assert rule("WIKIEVENTS", 1, "x\ny", "y\nz\nx")
    assert not rule("WIKIEVENTS", 1, "x\nw", "y\nz\nx")
    assert rule("E2E", 2, " same \n", "same")
    assert matches_template("{instruction}\n{{'AI': '{answer}'}}", "{'AI': 'yes'}")
    assert not matches_template("{instruction}\n{{'AI': '{answer}'}}", "yes")


def follow_format(number: int, level: int, answer: str, language: str = "en") -> bool:
    row = {
        "language": language,
        "constraint_type": "format",
        "example_id": number,
        "source": "oasst",
        "level": level,
        "target": "",
    }
    return follows(row, answer)


def test_followbench_format_groups() -> None:
    long = " ".join(["word"] * 22)
    three = "\n\n".join(f"{n}. {long}." for n in (1, 2, 3))
    # "1." ends a sentence for the published splitter, so its number is a short sentence.
    assert follow_format(22, 2, "\n\n".join(["One. Two."] * 3))
    assert not follow_format(22, 3, three)
    assert not follow_format(22, 1, long)
    points = " ".join(
        f"**{n} Growth: it adds new work for many people in towns.**" for n in range(5)
    )
    assert follow_format(30, 2, points)
    assert not follow_format(30, 2, "**only one**")


@pytest.mark.parametrize("style", list(Style))
def test_each_benchmark_runs_from_file_to_scores(tmp_path: Path, style: Style) -> None:
    """Over HTTP, with a judge that says yes to everything, in every published format."""

    def script(body: dict, before: int) -> Answer:
        text = body["messages"][0]["content"]
        if style is Style.robust:
            token, count = asked(body)
            return Answer(verdict(token, [1] * count))
        if "检查点" in text:
            return Answer("\n\n".join("检查点\t1" for _ in range(5 if "对联" in text else 4)))
        return Answer("It does.\nAnswer: YES")

    files = {
        "cfbench": (CFBENCH, [c["idx"] for c in CFBENCH]),
        "complexbench": ([complex_item()], [7]),
        "followbench": (follow_rows(), [f"en/content/1/{k}" for k in range(1, 6)]),
    }
    if style is Style.paper:
        del files["followbench"]  # it has no published prompt here
    calls = {}
    for name, (rows, ids) in files.items():
        data, answers = tmp_path / f"{name}.json", tmp_path / f"{name}.answers.jsonl"
        data.write_text(json.dumps(rows), encoding="utf-8")
        write_records(answers, [{"id": i, "response": "fine"} for i in ids])
        with StubServer(script) as server:
            found = evaluate(
                EvaluateConfig(
                    benchmark=BenchmarkSection(name),
                    data=DataSection(str(data)),
                    judge=JudgeSection(base_url=server.base_url, model="j", style=style),
                    responses=ResponsesSection(str(answers)),
                    out=str(tmp_path / name / style.value),
                    bootstrap=50,
                ),
            )
            calls[name] = len(server.bodies)
        assert found["unparsed"] == 0
        metric = found["headline"][0] if name != "followbench" else "HSR/en/content"
        assert found["scores"][metric]["value"] == 1.0
    one_by_one = style is Style.paper
    assert calls == {
        "cfbench": 2,
        "complexbench": 3 if one_by_one else 1,
    } | ({} if one_by_one else {"followbench": 5})
