"""Other projects' columns and prompts of several turns: what is read, and what is refused."""

import json

import pytest

from iopo.data.columns import as_written, own_columns, read_prompt
from iopo.data.rows import Pair, Quad, Row, Sft, read_rows


def said(*texts: str, system: str | None = None, first: str = "user") -> list[dict]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def read(tmp_path, row: dict) -> Row:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (found,) = read_rows(path)
    return found


ASK = (("user", "Hi."), ("assistant", "Hello."), ("user", "Name a fruit."))
LONG = [text for _, text in ASK]


@pytest.mark.parametrize(
    ("row", "x", "system"),
    [
        ({"prompt": "Ask.", "chosen": "A.", "rejected": "B."}, "Ask.", None),
        ({"prompt": said("Ask.", system="S"), "chosen": said("A.", first="assistant"),
          "rejected": said("B.", first="assistant")}, "Ask.", "S"),
        ({"prompt": "Ask.", "chosen": "A.", "rejected": "B.", "system": "S"}, "Ask.", "S"),
        ({"chosen": said("Ask.", "A.", system="S"), "rejected": said("Ask.", "B.", system="S")},
         "Ask.", "S"),
        ({"prompt": "Ask.", "prompt_id": "p", "chosen": said("Ask.", "A."),
          "rejected": said("Ask.", "B."), "messages": said("Ask.", "A."), "score_chosen": 8.5,
          "score_rejected": 2.0}, "Ask.", None),
        ({"prompt": said(*LONG), "chosen": "A.", "rejected": "B."}, ASK, None),
        ({"chosen": said(*LONG, "A."), "rejected": said(*LONG, "B.")}, ASK, None),
        ({"prompt": "Hi.", "chosen": said(*LONG, "A."), "rejected": said(*LONG, "B.")}, ASK, None),
        ({"x": said(*LONG, system="S"), "chosen": "A.", "rejected": "B."}, ASK, "S"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Ask."}]}],
          "chosen": "A.", "rejected": "B."}, "Ask.", None),
    ],
)  # fmt: skip
def test_pairs(tmp_path, row, x, system):
    found = read(tmp_path, row)
    assert found == Pair(found.id, x, "A.", "B.", system)


@pytest.mark.parametrize(
    ("row", "x", "system"),
    [
        ({"prompt": "Ask.", "completion": "A."}, "Ask.", None),
        ({"prompt": said("Ask."), "completion": said("A.", first="assistant")}, "Ask.", None),
        ({"messages": said("Ask.", "A.", system="S")}, "Ask.", "S"),
        ({"messages": said(*LONG, "A.")}, ASK, None),
        ({"prompt": "Ask.", "messages": said("Ask.", "A."), "constraints": ["c"]}, "Ask.", None),
        ({"x": said(*LONG), "y": "A."}, ASK, None),
    ],
)
def test_sft(tmp_path, row, x, system):
    found = read(tmp_path, row)
    assert found == Sft(found.id, x, "A.", system)


def test_other_columns_give_the_row_that_ours_give(tmp_path):
    ours = read(tmp_path, {"x": "Ask.", "chosen": "A.", "rejected": "B.", "system": "S"})
    theirs = {"prompt": said("Ask.", system="S"), "chosen": "A.", "rejected": "B."}
    assert read(tmp_path, theirs) == ours
    assert read(tmp_path, theirs | {"id": 7}).id == "7"


def test_quads_whose_prompts_differ_in_any_turn(tmp_path):
    other = ["Hi.", "Good day.", "Name a fruit."]
    row = {"x1": said(*LONG), "y1": "A.", "x2": said(*other), "y2": "B."}
    quad = read(tmp_path, row)
    assert isinstance(quad, Quad) and quad.x1 == ASK and quad.x2[1] == ("assistant", "Good day.")
    same = read(tmp_path, {k: [{"role": "system", "content": "S"}, *v] if k[0] == "x" else v
                           for k, v in row.items()})  # fmt: skip
    assert (same.x1, same.x2, same.system) == (quad.x1, quad.x2, "S")
    systems = read(tmp_path, row | {"x1": said("Ask.", system="S"), "x2": said("Ask.", system="T")})
    assert systems.x1 == (("system", "S"), ("user", "Ask.")) and systems.system is None
    assert read_prompt(as_written(systems.x2)) == systems.x2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "Ask. A.", "rejected": "Ask. B."}, "'x' is missing"),
        ({"prompt": said("Ask.", "A."), "chosen": "A.", "rejected": "B."},
         "'prompt' has the turns ['user', 'assistant'], expected one of the user at the end"),
        ({"prompt": "Ask.", "chosen": said("Ask."), "rejected": "B."},
         "'chosen' has the turns ['user'], expected one of the assistant at the end"),
        ({"prompt": "Other.", "chosen": said("Ask.", "A."), "rejected": said("Ask.", "B.")},
         "'prompt' is not what stands before the last turn of 'chosen'"),
        ({"chosen": said("Ask.", "A."), "rejected": said("Tell.", "B.")},
         "'chosen' and 'rejected' differ before their last turn"),
        ({"prompt": said("Ask.", system="S"), "system": "T", "chosen": "A.", "rejected": "B."},
         "several system prompts"),
        ({"prompt": said("Ask."), "chosen": "A.", "rejected": "B.", "tools": ["f"]}, "'tools'"),
        ({"prompt": said("Ask."), "chosen": "A.", "rejected": "B.", "images": ["a.png"]},
         "text only here"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *said("A.")]},
         "'messages': message 0 holds a part of type 'image': text only here"),
        ({"messages": [*said("Ask."), {"role": "assistant", "content": "", "tool_calls": [{}]}]},
         "'messages': message 1 calls tools, which are not supported"),
        ({"prompt": [*said("Ask."), {"role": "tool", "content": "3"}, *said("And?")],
          "completion": "A."}, "'prompt' has turns of tool: tools are not supported"),
        ({"x1": said(*LONG), "y1": "A.", "x2": said(*LONG), "y2": "B."}, "'x1' and 'x2' are equal"),
        ({"x1": said("Hi.", " ", "Ask."), "y1": "A.", "x2": "Ask.", "y2": "B."},
         "'x1': turn 1 is empty"),
        ({"x1": said("Ask.", system="S"), "y1": "A.", "x2": "Tell.", "y2": "B.", "system": "T"},
         "a system prompt stands both in 'system' and in a prompt"),
    ],
)  # fmt: skip
def test_refused(tmp_path, row, message):
    with pytest.raises(ValueError) as refused:
        read(tmp_path, row)
    assert message in str(refused.value) and "rows.jsonl:1: " in str(refused.value)


def test_rows_of_ours_are_left_as_they_are():
    row = {"x": "a", "chosen": "b", "rejected": "c", "messages": said("d")}
    assert own_columns(row) == (row, [])
