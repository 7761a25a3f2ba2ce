"""A scripted writer and judge for the TRACE pipeline: replies are functions of the prompt alone."""

import hashlib
import json
import re
from typing import Any

from helpers_judge import Answer, asked, verdict


def chance(text: str, name: str) -> float:
    """0 .. 1, from the text."""
    digest = hashlib.sha256(f"{name}/{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def tagged(prompt: str, name: str) -> str:
    found = re.search(rf"<{name} [0-9a-f]{{12}}>\n(.*?)\n</{name} ", prompt, re.S)
    assert found, (name, prompt)
    return found.group(1)


def task_number(text: str) -> str:
    found = re.search(r"number (\d+)", text)
    assert found, text
    return found.group(1)


def write(prompt: str) -> str:
    """What the writer says to a prompt."""
    if prompt.startswith("Make a simple instruction harder"):
        return json.dumps({"instruction": f"{tagged(prompt, 'instruction')} Be brief and polite."})
    if prompt.startswith("Take an instruction apart"):
        text = tagged(prompt, "instruction")
        if chance(text, "reject") < 0.1:
            return '{"reject": "it contradicts itself"}'
        constraints: list[Any] = [
            {"text": "1. Be brief.", "type": "Numerical"},
            {"text": "Be polite.", "type": "语气风格约束"},
        ]
        if chance(text, "double") < 0.05:
            constraints.append(constraints[1])
        row = {
            "description": f"Write note number {task_number(text)}.",
            "constraints": constraints,
            "input": None,
        }
        return f"Here it is:\n```json\n{json.dumps(row, ensure_ascii=False)}\n```"
    if prompt.startswith("Decide whether an instruction that was taken apart"):
        return json.dumps({"reason": "r", "complete": chance(prompt, "complete") > 0.1})
    if prompt.startswith("Decide whether the constraints of an instruction say again"):
        return json.dumps({"reason": "r", "redundant": chance(prompt, "redundant") < 0.1})
    if prompt.startswith("Below are a task"):
        return f"A worse note {task_number(prompt)}."
    if prompt.startswith("Change the constraints of a task"):
        number = task_number(prompt)
        changed = [{"text": "Be long.", "type": "Numerical"}, {"text": "Be polite."}]
        if "add one or more" in prompt:
            changed = [{"text": "Be brief."}, {"text": "Be polite."}, {"text": "Rhyme."}]
        if "delete some" in prompt:
            changed = [{"text": "Be polite."}]
        if chance(number, "unchanged") < 0.1:
            changed = [{"text": "Be polite."}, {"text": "Be brief."}]
        return json.dumps({"constraints": changed})
    kind = "long" if "Be long" in prompt else "rhyming" if "Rhyme" in prompt else "brief"
    return f"A {kind} note {task_number(prompt)}, with thanks."


def follows(criterion: str, answer: str) -> bool:
    wanted = {"Be brief.": ("brief", "rhyming"), "Be long.": ("long",), "Rhyme.": ("rhyming",)}
    return criterion == "Be polite." or any(w in answer for w in wanted[criterion])


def judge(body: dict[str, Any]) -> str:
    """Scores that are true of the writer's answers, with some that are not full."""
    prompt = body["messages"][0]["content"]
    mark, count = asked(body)
    criteria = re.findall(r"^\[\d+\] (.*)$", tagged(prompt, "constraints"), re.M)
    answer = tagged(prompt, "answer")
    scores = [10 if follows(c, answer) else 0 for c in criteria]
    assert len(scores) == count
    if chance(answer, "strict") < 0.1:
        scores[0] = min(scores[0], 8)
    return verdict(mark, scores)


def honest(body: dict[str, Any], before: int) -> Answer:
    prompt = body["messages"][0]["content"]
    if prompt.startswith("You check whether an answer obeys"):
        return Answer(judge(body))
    return Answer(write(prompt))


def troubled(body: dict[str, Any], before: int) -> Answer:
    """The same behind a bad network; a request asked for again succeeds, a rejection stays one."""
    good = honest(body, before)
    prompt = body["messages"][0]["content"]
    plain = prompt.startswith(("Write note", "Below are"))  # any text is an answer to these
    if before > 0 or len(body["messages"]) > 1 or body.get("seed", 0) % 2:
        return good
    return {
        0: Answer(status=429, body="{}", headers={"Retry-After": "0"}),
        1: Answer(status=500, body="oops"),
        2: Answer(body='{"choices": [{"mess'),
        3: Answer(text=good.text[:10], finish_reason="length"),
        4: Answer(text=""),
        5: good if plain else Answer(text="{" * 500),
        6: Answer(body="<html>gateway</html>"),
        7: Answer(status=503, body=""),
    }.get(int(chance(prompt, "trouble") * 32), good)
