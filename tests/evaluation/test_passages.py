"""Passages that a judge picks out, ComplexBench's rules on them, and both through the judge."""

import asyncio
import json

import pytest
from helpers_judge import Answer, StubServer, asked, verdict
from hypothesis import given
from hypothesis import strategies as st

from iopo.evaluation.benchmarks.complexbench_rules import parse
from iopo.evaluation.config import JudgeSection, Style
from iopo.evaluation.endpoint import Endpoint
from iopo.evaluation.judge import engine as judge
from iopo.evaluation.judge import passages
from iopo.evaluation.judge.engine import Judgement
from iopo.evaluation.judge.parse import Unreadable
from iopo.evaluation.judge.prompts import Question, token

ANSWER = "标题：春天\n\n第一篇很短。\n第二篇也很短。\n完成。"
RULES = (
    ("model_length:[1,2]", ["春天"], ["第一篇"]),
    ("model_length:[2,2]", ["“春天”"], ["“春天来”"]),
    ("model_length_word:[2,3]", ["two words"], ["one"]),
    ("model_length_each:[1,3]", ["ab", "", "abc"], ["ab", "abcd"]),
    ("keyword:[春,a.b]", ["春 a。b"], ["春"]),
    ("model_keyword_each:[春]", ["春天", "春"], ["春天", "夏"]),
    ("model_keyword_num:[1,2,春,夏,秋]", ["春夏"], ["春夏秋"]),
    ("model_forbidden_word:[福田, 南山]", ["罗湖"], ["在南山"]),
    (
        "model_keyword_num_each:[1,1,春,夏]\nmodel_forbidden_word_each:[冬]",
        ["春", "夏"],
        ["春", "夏冬"],
    ),
    ("model_number_each:[2,3]", ["a", "b"], ["a"]),
    ("model_startswith:以下,修正", ["以下，修正内容"], ["修正"]),
    ("model_starts_with_list_each:[一,二]", ["一、a", "二、b"], ["二、a", "一、b"]),
    ("startswith:开\nendswith:完", ["开始，完。"], ["开始"]),
    ("model_endswith:完成", ["完成。"], ["完成了"]),
    ("model_endswith_each:;", ["a；", "b;", "c"], ["a", "b；", "c；"]),
    ("not endswith:再见", ["你好"], ["再见？"]),
    ("model_not_startswith:我", ["你"], ["我们"]),
    ("match:请重新输入", ["请重新输入."], ["请重新输入吧"]),
    ("model_constraint_punc_each:[。]", ["短。", "句."], ["短，句。"]),
    ('Json:["名字", ""]', ['```json\n{"名字": ["a}"]}\n```'], ['{"名字": 1, "年龄": 2}']),
    ("Json:[]", ['{"a": 1}'], ["[1]"]),
)


@pytest.mark.parametrize(("text", "kept", "broken"), RULES)
def test_rules(text: str, kept: list[str], broken: list[str]) -> None:
    rule = parse(text)
    assert rule is not None
    assert rule.holds(kept) and not rule.holds(broken)
    assert rule.several == ("_each" in text)


@pytest.mark.parametrize(("text", "kept"), [("keyword:[a]", False), ("forbidden_word:[a]", True)])
def test_without_a_passage_only_what_forbids_is_kept(text: str, kept: bool) -> None:
    rule = parse(text)
    assert rule is not None
    assert rule.holds([]) is kept and rule.holds([" "]) is kept


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "model_rhymes:[1,2]",
        "length:[1]",
        "length:many",
        "length:[1,2]\nthe rest",
        "keyword_num:[a,b]",
        "length:[__import__('os').getpid(),2]",
    ],
)
def test_unknown_rules_are_left_to_the_judge(text: str | None) -> None:
    assert parse(text) is None


@given(st.text("a 春\n", max_size=30), st.data())
def test_a_copied_passage_is_found(answer: str, data) -> None:
    start = data.draw(st.integers(0, len(answer)))
    copied = answer[start : data.draw(st.integers(start, len(answer)))]
    if not copied.strip():
        return
    found = passages.locate("  ".join(copied.split()), answer)
    assert "".join(found.split()) == "".join(copied.split()) and found in answer


def rule_question(rule: str, answer: str = ANSWER) -> Question:
    return Question("7", "写", ("标题不超过2字？",), answer, 1, "yes_no", rules=(parse(rule),))


def reply(question: Question, found: list[str], whole: bool = False) -> str:
    return json.dumps({"check": token(question), "whole": whole, "passages": found})


def test_replies_that_name_passages() -> None:
    one, each = rule_question("length:[1,2]"), rule_question("model_length_each:[1,9]")
    robust, paper = Style.robust, Style.paper
    assert passages.parse(one, robust, reply(one, ["第一篇很短。第二篇也很短。"])) == [
        "第一篇很短。\n第二篇也很短。"
    ]
    assert passages.parse(one, robust, reply(one, [], whole=True)) == [ANSWER]
    assert passages.parse(each, robust, reply(each, [])) == []
    assert passages.parse(one, paper, "评分对象：是标题。\n**评分对象：**春天") == ["春天"]
    assert passages.parse(one, paper, "评测对象:all") == [ANSWER]
    assert passages.parse(one, paper, "评分对象：None") == []
    assert passages.parse(each, paper, "评分对象：春天||第一篇很短。\\n") == [
        "春天",
        "第一篇很短。",
    ]


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (["夏天"], "does not hold this passage"),
        (["春天", "完成。"], "2 passages; the question is about one"),
        ([1], "not a list of texts"),
    ],
)
def test_replies_that_cannot_be_used(found: list, problem: str) -> None:
    question = rule_question("length:[1,2]")
    with pytest.raises(Unreadable, match=problem):
        passages.parse(question, Style.robust, reply(question, found))
    with pytest.raises(Unreadable, match='no JSON object with "check"'):
        passages.parse(question, Style.robust, reply(rule_question("length:[1,2]", "x"), found))
    with pytest.raises(Unreadable, match="without passages"):
        passages.parse(question, Style.robust, reply(question, ["春天"], whole=True))
    with pytest.raises(Unreadable, match="no 评分对象"):
        passages.parse(question, Style.paper, "春天")


def judged(question: Question, style: Style) -> tuple[Judgement, list[str]]:
    """The judgement of a judge who calls 春天 the title, and what it was asked."""

    def script(body: dict, before: int) -> Answer:
        text = body["messages"][0]["content"]
        if "评测对象" in text:
            return Answer("是标题。\n评分对象：春天")
        if '"whole": false' in text:
            return Answer(text.splitlines()[-1].replace('"...", ...', '"春天"'))
        if style is Style.paper:
            return Answer("Answer: " + ("NO" if "没有？" in text else "YES"))
        number, count = asked(body)
        return Answer(verdict(number, [1, 0][:count]))

    async def run(base_url: str) -> Judgement:
        section = JudgeSection(base_url=base_url, model="j", style=style, parse_retries=0)
        endpoint = Endpoint(section)
        try:
            return (await judge.judge_all(endpoint, [question], section, lambda *_: None))[0]
        finally:
            await endpoint.close()

    with StubServer(script) as server:
        found = asyncio.run(run(server.base_url))
        return found, [body["messages"][0]["content"] for body in server.bodies]


@pytest.mark.parametrize("style", list(Style))
def test_scores_of_judge_and_code_come_back_in_order(style: Style) -> None:
    rules = (parse("length:[1,2]"), None, parse("length:[3,9]"), None)
    criteria = ("标题至多2字？", "有标题？", "标题至少3字？", "没有？")
    question = Question("7", "写", criteria, ANSWER, 1, "yes_no", rules=rules)
    found, asked_for = judged(question, style)
    assert found.status == "judged", found.reason
    assert found.scores == (1.0, 1.0, 0.0, 0.0)
    assert len(asked_for) == (3 if style is Style.robust else 4)
    assert len(found.replies) == len(asked_for)
