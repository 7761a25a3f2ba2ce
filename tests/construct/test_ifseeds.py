"""Prompts with checkable constraints: quads from sampled answers, and the audit of a set."""

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers_models import tiny_llama
from helpers_tokenizer import tiny_tokenizer
from test_schemas import SEEDS

from iopo.construct.audit import AuditRecipe, audit, constraints_of
from iopo.construct.ifseeds import IfSeedsRecipe, build, read_checkable
from iopo.construct.verify import verify
from iopo.data.chat import Chat
from iopo.data.rows import read_rows
from iopo.evaluation.config import EndpointSection
from iopo.evaluation.serve import Served, make_server

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
def test_from_prompts_with_constraints_to_quads(name, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="iopo")
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
    assert f"{name}.jsonl: {SEEDS[name]}, read as prompts with constraints" in caplog.text
    assert f"{len(asked)} of {len(asked)} responses to sample, 50 at a time" in caplog.text
    assert f"written: {tmp_path}/train.jsonl, " in caplog.text
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


def test_a_server_answers_in_place_of_a_model(tmp_path):
    """The project's own, with a random model: over HTTP, each sample with a seed of its own."""
    served = Served("tiny", tiny_llama(vocab=400), Chat(tiny_tokenizer()))
    server = make_server(served, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    host, port = server.server_address[:2]
    recipe = IfSeedsRecipe(
        source=str(SETS / "rlvr_ifeval.jsonl"), out=str(tmp_path), samples=2, max_new_tokens=8,
        limit=3, endpoint=EndpointSection(base_url=f"http://{host}:{port}/v1", model="tiny"),
    )  # fmt: skip
    try:
        told = build(recipe, recipe.sampler())
    finally:
        server.shutdown()
        server.server_close()
    assert told.startswith("3 prompts; quads: train 0, heldout 0, heldout_kinds 0\n")
    rows = {r["key"]: r for r in map(json.loads, (tmp_path / "responses.jsonl").open())}
    assert len(rows) >= 6 and all(r["finish_reason"] in ("length", "stop") for r in rows.values())
    samples = [key.removesuffix("-0") for key in rows if key.endswith("-0")]
    assert all(rows[f"{key}-0"]["text"] != rows[f"{key}-1"]["text"] for key in samples)
    assert build(recipe, recipe.sampler()) == told, "a second run asks nothing: the server is gone"


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
