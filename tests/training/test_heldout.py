"""Held-out quads: shares, controls and the command, on a random tiny model."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_models import tiny_llama
from peft import LoraConfig, get_peft_model

from iopo.config import EvaluationConfig
from iopo.constraints import from_dict
from iopo.constraints.answers import hollow
from iopo.data.chat import Chat
from iopo.data.rows import Quad
from iopo.evaluation import on_task
from iopo.evaluation import quad_metrics as heldout
from iopo.evaluation.benchmarks import quads
from iopo.evaluation.config import (
    BenchmarkSection,
    EvaluateConfig,
    GenerateSection,
    ModelSection,
)
from iopo.files import read_records, write_records
from iopo.model import lora
from iopo.model.demo_model import fetch_demo_model
from iopo.model.generate import Generation
from iopo.model.load import byte_tokenizer, load_causal_lm, load_tokenizer
from iopo.training import samples

LOWER = {"kind": "case", "params": {"style": "lower"}, "text": "Use lower case only."}
UPPER = {"kind": "case", "params": {"style": "upper"}, "text": "Use capitals only."}


def quad(i: int) -> Quad:
    task = f"Write about {'rain wind sun moon'.split()[i % 4]} {i}."
    return Quad(
        id=f"q{i}", x1=f"{task}\n1. Use lower case only.", y1=f"it falls {i}",
        x2=f"{task}\n1. Use capitals only.", y2=f"IT FALLS {i}", c1=[LOWER], c2=[UPPER],
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = tiny_llama(vocab=300)
    model.config.eos_token_id = model.generation_config.eos_token_id = 257
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def config(model: Path, **benchmark) -> EvaluateConfig:
    return EvaluateConfig(
        BenchmarkSection("quads", **benchmark),
        model=ModelSection(str(model), device="cpu"),
        generate=GenerateSection(max_new_tokens=4),
    )


def test_shuffled_gives_every_quad_foreign_instructions():
    rows = [quad(i) for i in range(9)]
    out = heldout.shuffled(rows)
    for before, after in zip(rows, out, strict=True):
        assert (before.y1, before.y2) == (after.y1, after.y2)
        assert not {before.x1, before.x2} & {after.x1, after.x2}
        assert after.x1.split("\n")[0] == after.x2.split("\n")[0]


def test_blanked_leaves_one_instruction():
    (row,) = heldout.blanked([quad(0)])
    assert row.x1 == row.x2 == "Write about rain 0."


def test_group_share_counts_ties_half():
    logps = torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0.01, 0, 0, 0]])
    assert heldout.group_share(logps)["value"] == 0.5


def answer(name: str, follows: bool, *hollow: str, text: str = "") -> heldout.Answer:
    return heldout.Answer(name, "", text, "stop", "seen", ("case",), (follows,), ("t",), hollow)


def test_gains_are_paired():
    before, better = answer("q1/1", False), answer("q1/1", True)
    found = heldout.gain([before] * 4, [better] * 4)
    assert found["follows_and_answers"]["value"] == found["constraint_accuracy"]["value"] == 1
    assert found["answers"]["value"] == 0
    with pytest.raises(ValueError, match="same prompts"):
        heldout.gain([before], [answer("q2/1", True)])


def test_a_hollow_answer_follows_but_does_not_count():
    rows = [answer("q1/1", True), answer("q1/2", True, "echo"), answer("q2/1", False)]
    found = heldout.shares(rows)
    assert found["constraint_accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["answers"]["value"] == pytest.approx(2 / 3)
    assert found["follows_and_answers_seen"]["value"] == pytest.approx(1 / 3)
    assert found["hollow"]["echo"]["value"] == pytest.approx(1 / 3)
    assert found["hollow"]["of_following"]["value"] == 0.5


def test_health_sees_damage():
    texts = ["", "a b c d a b c d", "fine words here"]
    rows = [heldout.Answer("q", "", t, "length", "s", (), (), (), ()) for t in texts]
    degeneration = heldout.degeneration(rows)
    assert degeneration["empty"] == degeneration["repetitive"] == pytest.approx(1 / 3)
    assert degeneration["cut_off"] == 1


def test_evaluate_folder_scores_everything(model, tmp_path):
    rows = [(quad(i), "seen" if i else "unseen_kinds") for i in range(3)]
    scores, answers = quads.score_model(config(model, reference=str(model)), rows, tmp_path)
    assert scores["margin"]["value"] == pytest.approx(0, abs=1e-3)
    assert scores["controls"]["constraints_blanked"]["value"] == 0.5
    assert [a.id for a in answers] == [f"q{i}/{side}" for i in range(3) for side in (1, 2)]
    assert scores["follows_and_answers_unseen_kinds"]["n"] == 2
    assert scores["group_accuracy"]["n"] == 3
    json.dumps(scores)
    logps = [json.loads(line) for line in (tmp_path / "logps.jsonl").read_text().splitlines()]
    assert [row["id"] for row in logps] == ["q0", "q1", "q2"]
    right = [a + c > b + d for a, b, c, d in (row["logps"] for row in logps)]
    assert sum(right) / 3 == pytest.approx(scores["group_accuracy"]["value"])


def test_following_is_judged_after_thinking(model, monkeypatch, tmp_path, caplog):
    said = ["<think>A PLAN</think>\nlower", "<think>A PLAN", "lower", "UPPER"]
    made = [Generation(text, "stop", 3) for text in said]
    monkeypatch.setattr(heldout, "generate", lambda *_: made)
    monkeypatch.setattr(quads, "read", lambda *_: [(quad(i), "seen") for i in range(2)])
    caplog.set_level("INFO")
    asked = config(model, scored=0, controls=False)
    scores = quads.evaluate(dataclasses.replace(asked, out=str(tmp_path / "out")))
    rows = read_records(tmp_path / "out" / "verdicts.jsonl")
    assert [row["follows"] for row in rows] == [[True], [False], [True], [True]]
    assert [row["text"] for row in rows] == ["lower", "", "lower", "UPPER"]
    assert [row["raw"] for row in rows] == [*said[:2], None, None]
    assert scores["degeneration"]["empty"] == 0.25
    assert scores["notes"] == ["thinking removed from 2 answers, 1 unclosed, which are empty"]


@pytest.mark.parametrize("head", [False, True])
def test_an_adapter_is_scored_as_it_computes_in_training(model, tmp_path, head):
    """Merged into bf16 weights, small updates would be rounded away."""
    folder, ids = tmp_path / "adapter", torch.arange(40).view(2, 20) * 7 % 256
    trained = load_causal_lm(model, torch.bfloat16, "sdpa").eval()
    names = ["q_proj", "down_proj"] + ["lm_head"] * head
    wrapped = get_peft_model(trained, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    read = load_causal_lm(model, torch.bfloat16, "sdpa").eval()
    lora.load_adapter(read, folder)
    loaded = heldout.load_for_scoring(model, str(folder), "cpu", torch.bfloat16).causal_lm
    loaded.set_attn_implementation("sdpa")
    adapters = lora.adapters(loaded)
    assert adapters and adapters.keys() == lora.adapters(read).keys() - {"lm_head"}
    with torch.inference_mode():
        hidden, expected = (m.get_decoder()(ids).last_hidden_state for m in (loaded, read))
        assert torch.equal(hidden, expected)
        torch.testing.assert_close(loaded(ids).logits, read(ids).logits, rtol=0.02, atol=2e-3)


@pytest.mark.slow
def test_planted_hollow_answers_are_caught_with_the_demo_models_ranks():
    """Those that nothing in their text gives away answer another task, or are gibberish."""
    rows = read_records(Path(__file__).parents[1] / "fixtures" / "hollow_answers.jsonl")
    folder = fetch_demo_model()
    base = heldout.load_for_scoring(folder, None, "cpu", torch.float32)
    tasks, texts = ([row[name] for row in rows] for name in ("task", "text"))
    ranks = on_task.task_ranks(base, Chat(load_tokenizer(folder)), tasks, texts, tasks)
    caught = [
        rank > on_task.MOST_RANK
        or bool(
            hollow(
                r["text"], r["prompt"], [from_dict(c) for c in r["constraints"]], ended=r["ended"]
            )
        )
        for r, rank in zip(rows, ranks, strict=True)
    ]
    assert sum(caught) >= 0.95 * len(rows)
    foreign = [row["kind"] == "another task's answer" for row in rows]
    assert all(rank > 1 for rank, other in zip(ranks, foreign, strict=True) if other)


def test_an_answer_is_ranked_after_its_own_task_as_the_stock_model_would(model):
    """Twelve tasks, so that the last of them compete with the first; against plain log-softmax."""
    tasks = [f"Write about {word}." for word in "abcdefghijkl"] + ["Write about a."]
    texts = [f"{task[-2]} is {'very ' * i}fine, we say." for i, task in enumerate(tasks)]
    chat = Chat(load_tokenizer(model))
    base = heldout.load_for_scoring(model, None, "cpu", torch.float32)
    ranks = on_task.task_ranks(base, chat, tasks, texts, tasks)
    stock = load_causal_lm(model, torch.float32, "sdpa").eval()

    @torch.inference_mode()
    def logp(task: str, text: str) -> float:
        prompt = chat.prompt_ids(chat.messages(task))
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"][: on_task.FIRST_TOKENS]
        logits = stock(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()

    order = on_task._apart(tasks)
    assert sorted(order) == sorted(set(tasks))
    for task, text, rank in zip(tasks, texts, ranks, strict=True):
        start = order.index(task) // on_task.CANDIDATES * on_task.CANDIDATES
        window = (order * 2)[start : start + on_task.CANDIDATES]
        own = logp(task, text)
        assert rank == 1 + sum(logp(other, text) > own + 1e-4 for other in window if other != task)
    assert max(ranks) > 1
    some = on_task.task_ranks(base, chat, tasks[3:5], texts[3:5], tasks)
    assert some == ranks[3:5]  # whichever other texts are ranked
    assert on_task.task_ranks(base, chat, tasks[:1], texts[:1], tasks[:1]) is None


def test_tasks_about_one_text_do_not_compete():
    tasks = [f"{verb} it.\n# Inputs:\n{text}" for text in "abcdefgh" for verb in ("Read", "Retell")]
    order = on_task._apart(tasks)
    first = order[: on_task.CANDIDATES]
    assert len({task[-1] for task in first}) == on_task.CANDIDATES


def test_answers_off_their_task_are_hollow(monkeypatch):
    rows = [answer("q1/1", True, text="a"), answer("q1/2", True, "echo"), answer("q2/1", True)]
    asked = []

    def ranked(*_, among):
        asked.extend(among)
        return [1, on_task.MOST_RANK + 1]

    monkeypatch.setattr(heldout, "task_ranks", ranked)
    found = heldout.with_task_ranks(None, None, rows)
    assert [row.hollow for row in found] == [(), ("echo",), ("off_task",)]
    assert [row.task_rank for row in found] == [1, None, on_task.MOST_RANK + 1]
    assert len(asked) == len(rows)  # the hollow one's task is a candidate, too
    monkeypatch.setattr(heldout, "task_ranks", lambda *_, among: None)
    assert heldout.with_task_ranks(None, None, rows) == rows


def test_constraints_that_need_a_judge_are_left_out_before_any_answer(model, monkeypatch):
    judged = {"kind": "judged", "params": {}, "text": "Be kind."}
    row = dataclasses.replace(quad(0), c1=[LOWER, judged])
    monkeypatch.setattr(heldout, "generate", None)
    scores, answers = quads.score_model(config(model, controls=False), [(row, "seen")])
    assert not answers and "constraint_accuracy" not in scores and "group_accuracy" in scores


def test_samples_say_what_code_can_and_why_an_answer_is_hollow(monkeypatch):
    judged = {"kind": "judged", "params": {}, "text": "Be kind."}
    row = dataclasses.replace(quad(0), c1=[LOWER, judged])
    model = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="stock"), set_attn_implementation=lambda _: None
    )
    monkeypatch.setattr(samples, "language_model", lambda _: model)
    told = SimpleNamespace(text="<think>AH</think> hm", finish_reason="length")
    monkeypatch.setattr(samples, "generate", lambda *_: [told])
    chat = SimpleNamespace(messages=lambda *_: [])
    (said,) = samples.answer(EvaluationConfig(), chat, [row], SimpleNamespace(model=None))
    assert said["constraints"] == [{"text": LOWER["text"], "follows": True}]
    assert said["text"] == told.text and said["hollow"] == ("cut_off", "too_short")


def test_samples_after_a_resume_with_other_settings(tmp_path, monkeypatch):
    """The file says which prompts were answered before; without one there is nothing to add."""
    new = lambda cfg, chat, few, train_model: [{"id": q.id, "text": "new"} for q in few]  # noqa: E731
    monkeypatch.setattr(samples, "answer", new)
    inputs = SimpleNamespace(heldout_quads=[quad(0), quad(1)], chat=None)
    whole = SimpleNamespace(sharded=False)
    samples.after(tmp_path, EvaluationConfig(), inputs, whole)
    assert not (tmp_path / samples.FILE).exists()
    rows = [{"id": name, "prompt": "a\u2028b", "before": {}} for name in ("q1", "gone")]
    write_records(tmp_path / samples.FILE, rows)
    samples.after(tmp_path, EvaluationConfig(), inputs, whole)
    after = read_records(tmp_path / samples.FILE)
    assert [row.get("after") for row in after] == [{"id": "q1", "text": "new"}, None]


def test_quads_refuse_what_they_do_not_read_and_other_settings(model, tmp_path):
    def asked(**changes) -> EvaluateConfig:
        benchmark = BenchmarkSection("quads", controls=False)
        section = ModelSection(path=str(model), device="cpu")
        generate = GenerateSection(max_new_tokens=2)
        out = str(tmp_path / "out")
        return EvaluateConfig(benchmark, model=section, generate=generate, out=out, **changes)

    with pytest.raises(ValueError, match="does not read plan, seed"):
        quads.evaluate(asked(plan=True, seed=1))
    quads.evaluate(asked(limit=1))
    quads.evaluate(asked(limit=1))
    with pytest.raises(ValueError, match="other settings"):
        quads.evaluate(asked(limit=2))


def test_without_log_probs_answers_alone_are_judged(model, tmp_path):
    rows = [(quad(i), "seen") for i in range(2)]
    asked = config(model, scored=0, controls=False)
    scores, answers = quads.score_model(asked, rows, tmp_path)
    names = {f"{name}{split}" for name in heldout.SHARES for split in ("", "_seen")}
    assert set(scores) == names | {"hollow", "degeneration"}
    assert len(answers) == 4 and not list(tmp_path.iterdir())


def test_plain_text_is_scored_as_one_sequence_per_block(model):
    """Against the model's own loss, whose labels are shifted inside transformers."""
    causal_lm, tokenizer = load_causal_lm(model, torch.float32, "sdpa"), load_tokenizer(model)
    found = heldout.plain_text_score(causal_lm.eval(), tokenizer)
    ids = tokenizer(heldout.plain_text(), add_special_tokens=False)["input_ids"]
    first = torch.tensor([ids[: heldout.BLOCK_TOKENS]])
    expected = causal_lm(input_ids=first, labels=first).loss.item()
    assert found["nats_per_token"][0] == pytest.approx(expected, rel=1e-5)
    assert len(found["nats_per_token"]) == heldout.BLOCKS
    mean = sum(found["nats_per_token"]) / heldout.BLOCKS
    assert math.log(found["perplexity"]) == pytest.approx(mean)


def test_a_limit_is_spread_over_the_whole_file(tmp_path):
    path = tmp_path / "quads.jsonl"
    splits = ["seen"] * 6 + ["unseen_kinds"] * 3
    rows = [{"id": f"q{i}", "x1": f"a{i}", "x2": f"b{i}", "y1": "y", "y2": "z", "split": split}
            for i, split in enumerate(splits)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = quads.read(path, 6)
    assert [split for _, split in read] == ["seen"] * 4 + ["unseen_kinds"] * 2
    assert len(quads.read(path, 99)) == 9
