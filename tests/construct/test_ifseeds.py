"""Prompts with checkable constraints: quads from sampled answers, and the audit of a set."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from iopo.construct.audit import AuditRecipe, audit, constraints_of
from iopo.construct.ifseeds import IfSeedsRecipe, build, read_checkable
from iopo.construct.verify import verify
from iopo.data.rows import read_rows

SETS = Path(__file__).resolve().parents[1] / "fixtures" / "sets"
BODY = (
    "Water and light are all that it takes",
    "In the morning the garden is quiet and cool",
    "Nobody had asked the old captain before",
    "It begins with a plan and a good deal of patience",
)


def writer(prompts: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """Stands for a model: four forms of an answer, half of which heed commas, case and length."""
    texts = []
    for n, prompt in enumerate(prompts):
        words = " ".join(prompt.split()[:4]).strip(".?!,")
        first = f"{BODY[(n + seed) % 4]} when you read {words} for the {n + seed}th time. "
        text = first + ("Then it is over!" if n % 2 else "The people of the town know it well.")
        if "lowercase" in prompt or n % 4 == 3:
            text = text.lower()
        texts.append((text if n % 3 else "- " + text.replace(". ", ".\n- "), "stop"))
    return texts


@pytest.mark.parametrize("name", ["rlvr_ifeval", "if_multi_constraints_upto5"])
def test_from_prompts_with_constraints_to_quads(name, tmp_path):
    asked = []

    def sampler(prompts, seed):
        asked.extend(prompts)
        return writer(prompts, seed)

    recipe = IfSeedsRecipe(source=str(SETS / f"{name}.jsonl"), out=str(tmp_path), samples=6,
                           heldout_share=0.0)  # fmt: skip
    told = build(recipe, sampler)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    sources = {row["source"] for row in rows}
    assert "20 prompts" in told and len(rows) >= 4 and "relabel" in sources
    assert verify([tmp_path / "train.jsonl"])[0] == []
    assert len(read_rows(tmp_path / "train.jsonl")) == len(rows)
    seeds, _ = read_checkable(recipe.source, None)
    prompts = {seed.prompt: seed for seed in seeds}
    for row in rows:
        if row["source"] == "relabel":  # both answers follow what the prompt asked for already
            own = prompts[row["task"]].constraints
            assert all(c.check(row[y]) for c in own for y in ("y1", "y2"))
    before, n = (tmp_path / "train.jsonl").read_text(), len(asked)
    assert build(recipe, sampler) == told and len(asked) == n, "nothing is sampled twice"
    assert (tmp_path / "train.jsonl").read_text() == before
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["prompts"] == 20 and counts["followed"]


def test_follow_replaces_one_constraint_by_another(tmp_path):
    row = {"prompt": "Name two rivers. Use lowercase only.", "constraint": "Use lowercase only.",
           "constraints": [{"kind": "case", "params": {"style": "lower"}}]}  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps(row))

    def sampler(prompts, seed):
        text = "The Rhine and the Danube are two long rivers of the middle of Europe."
        forms = {"title case": text.title(), "(no l": text.upper(), "lowercase": text.lower()}
        return [
            (next((f for key, f in forms.items() if key in prompt), text), "stop")
            for prompt in prompts
        ]

    recipe = IfSeedsRecipe(source=str(tmp_path / "a.jsonl"), out=str(tmp_path), samples=2,
                           heldout_share=0.0)  # fmt: skip
    assert "follow: accepted: 1" in build(recipe, sampler)
    (quad,) = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    assert (
        quad["x1"].startswith("Name two rivers.\n1. ") and "Use lowercase only." not in quad["x1"]
    )
    assert (
        {c["params"]["style"] for c in quad["c1"]}
        == {"lower"}
        != {c["params"]["style"] for c in quad["c2"]}
    )


def test_audit(tmp_path, capsys):
    no_comma = {"func_name": "validate_no_commas", "N": None}
    two = (
        "[{'instruction_id': ['punctuation:no_comma', 'count:count_unique'], 'kwargs': [None, {}]}]"
    )
    rows = [
        {"chosen": "One two.", "rejected": "One, two.", "ground_truth": json.dumps(no_comma)},
        {"chosen": "One, two.", "rejected": "One two.", "ground_truth": json.dumps(no_comma)},
        {"chosen": "One one.", "rejected": "One, two.", "ground_truth": two},
        {"chosen": "One two.", "rejected": "Two three.", "ground_truth": two},
        {"chosen": "A.", "rejected": "B."},
        {"chosen": "A.", "rejected": "B.", "ground_truth": "__import__('os').system('true')"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"P{n}", **r}) + "\n" for n, r in enumerate(rows))
    )
    table = audit(AuditRecipe(source=str(path), out=str(tmp_path / "out")))
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    everything = found["kinds"]["all constraints"]
    shares = [everything[k] for k in ("both", "chosen only", "rejected only", "neither")]
    assert found["rows"] == 4 and shares == [0.25, 0.25, 0.25, 0.25]
    assert everything["chosen"]["value"] == 0.5
    assert found["kinds"]["punctuation:no_comma"]["neither"] == 0
    assert found["kinds"]["count:count_unique"]["rejected only"] == 0.5
    assert "| all constraints | 4 | 50.0% [" in table and sum(found["skipped"].values()) == 2
    assert any("neither JSON nor a literal" in reason for reason in found["skipped"])
    assert (tmp_path / "out" / "audit.png").stat().st_size > 1000
    path.write_text(json.dumps({"prompt": "P", "chosen": "A.", "rejected": "B."}))
    with pytest.raises(ValueError, match="no row can be audited .*no constraints that"):
        audit(AuditRecipe(source=str(path), out=str(tmp_path / "out")))


def test_an_id_that_occurs_twice_is_checked_twice():
    twice = {"instruction_id_list": ["keywords:word_once"] * 2, "kwargs": [{"keyword": "a"},
             {"keyword": "b"}]}  # fmt: skip
    assert list(constraints_of(twice)) == ["keywords:word_once", "keywords:word_once#2"]
