"""Prompts with checkable constraints: quads from sampled answers, and the audit of a set."""

import json
import logging
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers_judge import Answer, StubServer
from helpers_models import tiny_llama
from helpers_tokenizer import tiny_tokenizer
from test_schemas import SEEDS

from iopo.construct.audit import AuditRecipe, audit, constraints_of
from iopo.construct.ifseeds import IfSeedsRecipe, build, read_checkable
from iopo.construct.importers import read_seeds
from iopo.construct.relabel import split_of
from iopo.construct.verify import verify
from iopo.data.chat import Chat
from iopo.data.rows import read_rows
from iopo.evaluation.config import EndpointSection
from iopo.evaluation.serve import Served, make_server
from iopo.files import read_records, write_records

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
    by_id = {seed.id: seed for seed in seeds}
    for row in rows:
        if row["source"] == "relabel":  # both answers follow what the prompt asked for already
            seed = by_id[row["origin"]]
            assert row["task"] == seed.task.line and row["x1"].startswith(f"{seed.prompt}\n1. ")
            assert all(c.check(row[y]) for c in seed.constraints for y in ("y1", "y2"))
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


LOWER = {"kind": "case", "params": {"style": "lower"}}
HIGHLIGHT = {"kind": "highlights", "params": {"relation": "exactly", "number": 1}}
FORMS = {"in capital": str.upper, "title case": str.title, "lowercase": str.lower}


def obedient(prompts: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """Stands for a model that heeds case and highlights; half of its answers ask something."""
    texts = []
    for n, (prompt, (text, _)) in enumerate(zip(prompts, writer(prompts, seed), strict=True)):
        text += " Is that all there is to it?" if n % 2 else ""
        wanted = re.search(r"(\d) parts?", prompt)
        number = int(wanted[1]) if wanted else "Highlight" in prompt
        text += " It is *so* and no other way." * number
        form = next((of for said, of in FORMS.items() if said in prompt), str)
        texts.append((form(text), "stop"))
    return texts


def test_no_file_holds_a_task_or_a_held_out_kind_of_another(tmp_path):
    """The prompt and its task have other hashes: one of them must decide for both sources."""
    tasks = [f"Name {n} rivers of the country." for n in range(40)]
    wishes = (("Use lowercase only.", LOWER), ("Highlight one part.", HIGHLIGHT))
    rows = [
        {"prompt": f"{task} {said}", "constraint": said, "constraints": [constraint]}
        for task in tasks
        for said, constraint in wishes
    ]
    write_records(tmp_path / "a.jsonl", rows)
    recipe = IfSeedsRecipe(source=str(tmp_path / "a.jsonl"), out=str(tmp_path), samples=6,
                           heldout_share=0.5, most_share=1.0)  # fmt: skip
    told = build(recipe, obedient)
    files = {split: read_records(tmp_path / f"{split}.jsonl")
             for split in ("train", "heldout", "heldout_kinds")}  # fmt: skip
    for split, quads in files.items():
        assert {quad["source"] for quad in quads} == {"relabel", "follow"}, split
        for quad in quads:
            assert quad["task"] in tasks and split_of(quad["task"], 0.5) == split
            kinds = {c["kind"] for c in quad["c1"] + quad["c2"]}
            assert bool(kinds & {"highlights", "questions"}) == (split == "heldout_kinds")
            assert split == "heldout_kinds" or "Highlight" not in quad["x1"] + quad["x2"]
    away = sum(split_of(task, 0.5) != "heldout_kinds" for task in tasks)
    assert f"prompts left out, asks for a held-out kind: {away}" in told


def served(tmp_path: Path, **options) -> IfSeedsRecipe:
    section = EndpointSection(base_url="http://localhost:1/v1", model=options.pop("model", "m"))
    given = {"samples": 2, "limit": 3} | options
    return IfSeedsRecipe(source=str(SETS / "rlvr_ifeval.jsonl"), out=str(tmp_path),
                         endpoint=section, **given)  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [{"model": "n"}, {"max_new_tokens": 8}, {"temperature": 0.1}, {"seed": 1},
     {"template_options": {"enable_thinking": False}}],
)  # fmt: skip
def test_answers_of_other_settings_are_refused(tmp_path, other):
    told = build(served(tmp_path), writer)
    assert build(served(tmp_path, most_words=601), writer) == told
    (name,) = other
    with pytest.raises(ValueError, match=f"made with other settings .*{name.split('_')[0]}|extra"):
        build(served(tmp_path, **other), writer)
    # without a source of answers those that are there are read
    alone = IfSeedsRecipe(
        source=str(SETS / "rlvr_ifeval.jsonl"), out=str(tmp_path), samples=2, limit=3
    )
    assert build(alone, alone.sampler()) == told
    (tmp_path / "responses.manifest.json").unlink()
    with pytest.raises(ValueError, match=r"responses.jsonl: expected responses.manifest.json"):
        build(served(tmp_path), writer)


def test_a_run_without_an_answer_leaves_the_settings_open(tmp_path):
    def fails(prompts, seed):
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        build(served(tmp_path, model="typo"), fails)
    assert build(served(tmp_path), writer).startswith("3 prompts")


def test_answers_of_another_model_are_refused(tmp_path):
    folder, other = tmp_path / "model", tmp_path / "other"
    tiny_llama(vocab=400).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    recipe = IfSeedsRecipe(source=str(SETS / "rlvr_ifeval.jsonl"), out=str(tmp_path / "out"),
                           samples=2, limit=3, model_path=str(folder))  # fmt: skip
    told = build(recipe, writer)
    assert build(recipe, writer) == told
    kept = json.loads((tmp_path / "out" / "responses.manifest.json").read_text())
    assert {"weights", "tokenizer and template", "dtype", "chat", "top_p"} <= kept.keys()
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    recipe.model_path = str(other)
    with pytest.raises(ValueError, match=r"made with other settings \(config.json: there"):
        build(recipe, writer)


def test_an_answer_that_was_cut_off_is_left_out_and_counted(tmp_path):
    def cut_off(prompts, seed):
        return [(text, "length") for text, _ in writer(prompts, seed)]

    source = str(SETS / "rlvr_ifeval.jsonl")
    recipe = IfSeedsRecipe(source=source, out=str(tmp_path), samples=6, heldout_share=0.0)
    told = build(recipe, cut_off)
    asked = len(read_records(tmp_path / "responses.jsonl"))
    assert told.startswith("20 prompts; quads: train 0, heldout 0, heldout_kinds 0\n")
    assert f"\nresponses cut off: {asked}\n" in told and "follow: cut off: 18" in told
    assert json.loads((tmp_path / "counts.json").read_text())["followed"] == {}


def test_a_prompt_of_which_a_part_would_be_lost_is_left_out(tmp_path):
    asked = {"role": "user", "content": "Name a river. Use lowercase only."}
    system, answer = ({"role": r, "content": "Be kind."} for r in ("system", "assistant"))
    text = {"prompt": asked["content"]}
    lost = [
        {"messages": [system, asked]}, {"x": [system, asked]}, text | {"system": "Be kind."},
        text | {"context": "A map."}, text | {"history": [["Which?", "That."]]},
    ]  # fmt: skip
    whole = [{"messages": [{**system, "content": " "}, asked, answer]}, text | {"system": ""}]
    whole[1]["prompt"] += " Now."
    write_records(tmp_path / "a.jsonl", [row | {"constraints": [LOWER]} for row in lost + whole])
    seeds, dropped = read_checkable(str(tmp_path / "a.jsonl"), None)
    assert [seed.prompt for seed in seeds] == [asked["content"], asked["content"] + " Now."]
    reasons = [re.match(r"'(\w+)' is part of the prompt and would be lost: ", r) for r in dropped]
    assert {m[1]: n for m, n in zip(reasons, dropped.values(), strict=True)} == {
        "system": 3, "context": 1, "history": 1,
    }  # fmt: skip
    for row in lost:
        write_records(tmp_path / "b.jsonl", [row])
        with pytest.raises(ValueError, match=r"b.jsonl:1: '\w+' is part of the prompt and would"):
            read_seeds(tmp_path / "b.jsonl")


def test_a_server_is_sent_the_template_options(tmp_path):
    with StubServer(lambda body, before: Answer("The sea is cold and the town is old.")) as server:
        section = EndpointSection(base_url=server.base_url, model="stub")
        recipe = IfSeedsRecipe(
            source=str(SETS / "rlvr_ifeval.jsonl"), out=str(tmp_path), samples=2, limit=1,
            endpoint=section, template_options={"enable_thinking": False},
        )  # fmt: skip
        build(recipe, recipe.sampler())
        sent = [request["chat_template_kwargs"] for request in server.bodies]
    assert sent and all(options == {"enable_thinking": False} for options in sent)


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        ({"model": "m"}, {"model_path": "demo"}, "recipe.model_path is 'demo'; expected null"),
        ({}, {}, "set without recipe.endpoint.model"),
        ({"model": "m", "extra": {"chat_template_kwargs": {"a": 1}}},
         {"template_options": {"a": 2}}, "would replace recipe.endpoint.extra"),
    ],
)  # fmt: skip
def test_what_a_server_would_not_heed_is_refused(given, options, told):
    with pytest.raises(ValueError, match=told):
        IfSeedsRecipe(endpoint=EndpointSection("http://localhost:1/v1", **given), **options)


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
