"""Reading rows: what is accepted, what is refused, and that every fault is reported at once."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest

from iopo.data import checks
from iopo.data.rows import CLASSES, Pair, Quad, Sft, read_rows, rows_for
from iopo.files import sha256_file

ROOT = Path(__file__).parents[2]
QUAD = {"x1": "ask 1", "y1": "tell 1", "x2": "ask 2", "y2": "tell 2"}


@pytest.fixture
def write(tmp_path):
    def write_file(*rows: object, name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write_file


def error_of(path: Path, kind: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        read_rows(path, kind)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "cls"), CLASSES.items())
def test_the_good_rows_of_the_messages_are_good(write, kind, cls):
    (row,) = read_rows(write(checks.GOOD_ROW[kind]))
    assert isinstance(row, cls)
    expected = {**checks.GOOD_ROW[kind], "id": row.id}
    assert {k: v for k, v in dataclasses.asdict(row).items() if v is not None} == expected


def test_id_is_the_hash_of_the_texts_unless_given(write):
    rows = read_rows(write(QUAD, {**QUAD, "id": "mine"}, {**QUAD, "system": "Be brief."}))
    texts = json.dumps(["ask 1", "tell 1", "ask 2", "tell 2"]).encode()
    assert rows[0].id == hashlib.sha256(texts).hexdigest()[:16]
    assert rows[1].id == "mine"
    assert rows[2].id not in (rows[0].id, "mine")


def test_other_keys_and_constraints_are_kept_apart(write):
    c1 = [{"kind": "commas", "params": {}, "text": "No commas."}]
    row = {**QUAD, "c1": c1, "task": "ask", "input": "", "match": [1, 0, 1, 0], "split": "train"}
    (quad,) = read_rows(write(row))
    assert quad.c1 == c1 and quad.c2 is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y2": None}, "'y2' is null (None), expected a string"),
        ({"y2": 3}, "'y2' is a number (3), expected a string"),
        ({"y2": " \n"}, "'y2' is empty"),
        ({"y2": " tell 1\n"}, "'y1' and 'y2' are equal"),
        ({"x2": "ask 1"}, "'x1' and 'x2' are equal"),
        ({"y1": "tell \ud800"}, "half of a surrogate pair after"),
        ({"id": ""}, "'id' is empty"),
        ({"id": 4}, "'id' is a number (4)"),
        ({"system": ["a"]}, "'system' is a list"),
        ({"c1": "no commas"}, "'c1' is a string, expected a list"),
        ({"c1": [{"kind": "commas"}]}, "'c1'[0] is {'kind': 'commas'}, expected a list of"),
        ({"sytem": "a"}, "unknown key 'sytem' (did you mean 'system'?)"),
        ({"system_prompt": "a"}, "did you mean 'system'?"),
        ({"C1": []}, "did you mean 'c1'?"),
    ],
)
def test_one_fault(write, change, message):
    text = error_of(write({**QUAD, **change}))
    assert ":1: " in text and message in text and "1 of 1 rows" in text
    assert "A good row: {" in text


PAIR = {"x": "Describe a stall.", "chosen": "It sells tea.", "rejected": "A dog."}
TURNS = [{"role": "user", "content": PAIR["x"]}, {"role": "assistant", "content": PAIR["chosen"]}]
SHAREGPT = {
    "conversations": [{"from": "human", "value": "ask 1"}, {"from": "human", "value": "ask 2"}],
    "chosen": {"from": "gpt", "value": "tell 1"},
    "rejected": {"from": "gpt", "value": "tell 2"},
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"input": "Tea only."}, "'input' ('Tea only.') is part of the prompt and would be "
         "lost: join it to the prompt, or delete it"),
        (PAIR | {"query": "Tea only."}, "join it to the prompt"),
        (PAIR | {"prompt": "Another."}, "'prompt' ('Another.') is part of the prompt"),
        (PAIR | {"history": [["Who are you?", "A shop."]]}, "write its turns into the prompt"),
        (PAIR | {"messages": [{"role": "user", "content": "Hi."}, *TURNS]}, "write its turns"),
        (PAIR | {"tools": [{"name": "search"}]}, "write it into the prompt or 'system'"),
        (PAIR | {"tools": '[{"name": "search"}]'}, "write it into the prompt or 'system'"),
        (PAIR | {"images": ["a.png"]}, "text only here"),
        (PAIR | {"videos": [{"bytes": None}]}, "text only here"),
        ({"x": "Describe.", "y": "A stall.", "input": "Tea only."}, "'input' ('Tea only.')"),
        ({"instruction": "Describe.", "input": "Tea.", "output": "A stall."}, "neither quad"),
        ({"instruction": "Describe.", "input": "Tea.", "y": "A stall."}, "'input' ('Tea.')"),
        (QUAD | {"input": "ask 1"}, "'input' ('ask 1')"),  # x2 lacks it
        (SHAREGPT | {"tools": "[search]"}, "'tools' ('[search]')"),
        (SHAREGPT | {"images": ["a.png"]}, "text only here"),
    ],
)  # fmt: skip
def test_a_key_that_holds_part_of_the_prompt_is_never_dropped(write, row, message):
    assert message in error_of(write(row))


@pytest.mark.parametrize(
    "more",
    [
        dict.fromkeys(("input", "history", "tools", "images", "messages")),
        {"input": " ", "history": [], "tools": "", "images": [[]], "functions": {}},
        {"prompt": PAIR["x"], "messages": TURNS, "input": "a stall."},  # used already
        {"conversations": [{"from": "human", "value": PAIR["x"]}], "source": "s", "turn": 1},
    ],
)
def test_a_key_that_is_empty_or_only_repeats_is_fine(write, more):
    (row,) = read_rows(write(PAIR | more), kind="pair")
    assert row.x == PAIR["x"]


def test_a_misspelt_key_is_not_also_missing(write):
    row = {"x1": "ask 1", "y_1": "tell 1", "x2": "ask 2", "y2": "tell 2"}
    text = error_of(write(row))
    assert "did you mean 'y1'?" in text and "missing" not in text


def test_all_bad_rows_in_one_message(write):
    without_y2 = {key: QUAD[key] for key in ("x1", "y1", "x2")}
    path = write(
        QUAD,  # 1
        without_y2,  # 2
        b"",  # 3: blank lines are no rows
        b"{not json",  # 4
        b'{"x1": "\xff"}',  # 5
        [1],  # 6
        QUAD,  # 7: the texts of line 1
        {**QUAD, "id": "a"},  # 8
        {**QUAD, "id": "a", "y1": "other"},  # 9: the id of line 8
        b'{"x1": "a", "x1": "b"}',  # 10
        {**QUAD, "x1": "", "y1": 3},  # 11: two faults, one row
    )
    text = error_of(path)
    lines = {int(m[1]): m[2] for m in re.finditer(r"rows\.jsonl:(\d+): (.*)", text)}
    assert sorted(lines) == [2, 4, 5, 6, 7, 9, 10, 11]
    assert lines[2] == "'y2' is missing; found the keys x1, x2, y1"
    assert lines[4].startswith("the row is not JSON (Expecting property name")
    assert lines[5] == "the line is not UTF-8 (byte 8 of it is 0xff)"
    assert lines[6] == "the row is of type list, expected an object"
    assert lines[7] == f"all texts are those of {path}:1, expected each row once"
    assert lines[9] == f"'id' 'a' is that of {path}:8, expected each row once"
    assert lines[10] == "the row names the key 'x1' twice"
    assert lines[11] == "'x1' is empty, expected text; 'y1' is a number (3), expected a string"
    assert text.startswith(f"{path}: 8 of 10 rows cannot be used")
    assert text.count("A good row") == 1


def test_a_long_list_of_bad_rows_is_cut_and_counted(write):
    text = error_of(write(*[{"x1": str(number)} for number in range(50)]))
    assert text.count("rows.jsonl:") == 1 + 20
    assert "... and 30 more" in text and "50 of 50 rows" in text


def test_one_file_holds_one_kind(write):
    path = write(QUAD, {"x": "ask", "y": "tell"})
    assert ":2: 'x1' is missing; 'y1' is missing" in re.sub(
        "; found the keys x, y", "", error_of(path)
    )
    assert "'chosen' is missing" in error_of(write(QUAD), "pair")
    assert "neither quad, pair, sft nor group; found the keys text" in error_of(
        write({"text": "a"})
    )


def test_line_separators_inside_a_text_do_not_split_rows(write):
    row = {**QUAD, "y1": "one\u2028two\x85three"}
    raw = json.dumps(row, ensure_ascii=False).encode()
    (quad,) = read_rows(write(b"\xef\xbb\xbf" + raw + b"\r"))  # a byte order mark and CRLF, too
    assert quad.y1 == row["y1"]


def test_json_lists_have_line_numbers(write):
    good, bad = json.dumps(QUAD), json.dumps({**QUAD, "y1": ""})
    text = f"[\n{good},\n\n{bad},\n{json.dumps({**QUAD, 'id': 'b'})}]"
    path = write(text.encode(), name="rows.json")
    message = error_of(path)
    assert f"{path}: row 2 (line 4): 'y1' is empty" in message and "1 of 3 rows" in message


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt"])
def test_content_and_not_the_name_says_whether_a_file_is_a_list(write, name):
    lines = json.dumps(QUAD).encode()
    mark = b"\xef\xbb\xbf"
    for content in (lines, b"[" + lines + b"]", mark + b"[\r\n" + lines + b"\r\n]"):
        assert read_rows(write(content, name=name)) == read_rows(write(QUAD))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"x": "a",\n}]', " row 1 (line 3): the row is not JSON (Illegal trailing comma"),
        ('[{"x": "a", "y": "b"} {"x"', "after a row, expected ',' or ']'"),
        ('[{"x": "a", "y": "b"}]\n[]', ":2: found '[]"),
        ("[]", "holds no rows"),
    ],
)
def test_broken_json_lists(write, text, message):
    if "Illegal" in message:  # worded differently before Python 3.13
        message = message.split("Illegal")[0]
    assert message in error_of(write(text.encode(), name="rows.json"))


def test_files_that_are_not_rows(write, tmp_path):
    assert "holds no rows" in error_of(write())
    text = error_of(tmp_path / "none.jsonl")
    assert text.startswith(f"{tmp_path}/none.jsonl: no such file.")
    assert "never released" in text and "construct" in text and "data/verified" in text


def test_the_released_format_is_read_as_it_is():
    chinese, english = read_rows(ROOT / "tests/fixtures/sharegpt_released.json")
    assert chinese.x1.endswith("1. 标题不超过10个字；\n") and chinese.y1 == "海边的猫"
    assert chinese.x2.endswith("1. 标题为16至20个字；\n")
    assert chinese.y2 == "一只住在海边小屋里的猫和它的三位朋友"  # "rejected" is the answer to x2
    assert english.system == "Be brief." and english.x2.endswith("small letters only.")
    assert chinese.system is None


def test_released_and_own_format_of_a_quad_have_the_same_id(write):
    (_, released) = read_rows(ROOT / "tests/fixtures/sharegpt_released.json")
    own = {key: getattr(released, key) for key in ("x1", "y1", "x2", "y2", "system")}
    assert read_rows(write(own)) == [released]


def human(*texts: str) -> list[dict]:
    return [{"from": "human", "value": text} for text in texts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": human("a")}, "ordinary preference pair: give it as x, chosen, rejected"),
        (
            {"conversations": human(*"abcdef")},
            "two dialogues of one length, each from a user turn to",
        ),
        ({"conversations": human(*"abc")}, "expected two user turns"),
        ({"conversations": "a"}, "'conversations': found str, expected a list of messages"),
        ({"conversations": []}, "'conversations': found empty, expected a list of messages"),
        ({"conversations": [{"role": "user"}]}, "message 0 is ['role'], expected"),
        (
            {"chosen": {"from": "human", "value": "a"}},
            "'chosen' has the turns ['user'], expected one of",
        ),
        ({"rejected": "a"}, "'rejected': found str, expected a list of messages"),
        ({"conversations": human("a", "a")}, "'x1' and 'x2' are equal"),
        ({"conversations": human("a", "")}, "'x2' is empty"),
        (
            {"system": "s", "conversations": [{"from": "system", "value": "t"}, *human("a", "b")]},
            "both in 'system' and in 'conversations'",
        ),
    ],
)
def test_bad_sharegpt_rows(write, change, message):
    row = {
        "conversations": human("a", "b"),
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": {"from": "gpt", "value": "d"},
    }
    text = error_of(write({**row, **change}))
    assert message in text and 'A good row: {"conversations"' in text


@pytest.mark.parametrize("speaker", ["human", "user"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_turns_have_either_keys_and_either_roles(write, speaker, keys):
    other = "gpt" if speaker == "human" else "assistant"
    said = [("system", ""), (speaker, "ask 1"), (speaker, "ask 2"), (other, "tell 1")]
    system, first, second, reply = (dict(zip(keys, turn, strict=True)) for turn in said)
    row = {"conversations": [system, first, second], "chosen": reply, "system": "",
           "rejected": [{**reply, keys[1]: "tell 2"}]}  # fmt: skip
    assert read_rows(write(row)) == read_rows(write(QUAD))


@pytest.mark.parametrize("empty", ["", " \n\t", None])
@pytest.mark.parametrize("kind", CLASSES)
def test_an_empty_system_prompt_is_none(write, kind, empty):
    good = checks.GOOD_ROW[kind]
    assert read_rows(write({**good, "system": empty})) == read_rows(write(good))


def test_quads_feed_pairs_and_sft():
    quad = Quad("q", "x1", "y1", "x2", "y2", system="s")
    assert rows_for("quad", [quad]) == [quad]
    assert rows_for("pair", [quad]) == [
        Pair("q/1", "x1", "y1", "y2", "s"),
        Pair("q/2", "x2", "y2", "y1", "s"),
    ]
    assert rows_for("sft", [quad]) == [Sft("q/1", "x1", "y1", "s"), Sft("q/2", "x2", "y2", "s")]
    assert rows_for("pair", [quad], "first") == [Pair("q/1", "x1", "y1", "y2", "s")]
    assert rows_for("sft", [Pair("p", "x", "c", "r")]) == [Sft("p", "x", "c")]
    with pytest.raises(
        ValueError, match="row 'p' is of kind 'pair', but the objective needs 'quad'"
    ):
        rows_for("quad", [Pair("p", "x", "c", "r")])


def test_file_hash_is_sha256(write):
    path = write(QUAD)
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def readme_blocks() -> list[tuple[str, str, str, str | None]]:
    """(good or bad, kind, row, message) of data/README.md."""
    text = (ROOT / "data/README.md").read_text()
    pattern = r"```json (good|bad) (\w+)\n(.*?)```\n(?:```text\n(.*?)\n```)?"
    return [match.groups() for match in re.finditer(pattern, text, flags=re.S)]


def test_the_readme_shows_one_good_and_three_bad_rows_of_each_format():
    kinds = [(block[1], block[0]) for block in readme_blocks()]
    for kind in (*CLASSES, "sharegpt"):
        assert kinds.count((kind, "good")) == 1 and kinds.count((kind, "bad")) == 3


@pytest.mark.parametrize("block", readme_blocks())
def test_the_readme_shows_real_messages(write, block):
    state, kind, row, message = block
    path = write(row.encode())
    if state == "good":
        assert len(read_rows(path)) == 1
    else:
        shown = error_of(path, kind if kind in checks.GOOD_ROW else None).splitlines()[1].strip()
        assert shown.replace(str(path), path.name) == message
