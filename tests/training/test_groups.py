"""Groups of samples with rewards: against a stock model, and as a user runs them."""

import json
from pathlib import Path

import pytest
import torch
from helpers_fork import finish, run_train, start_ranks
from helpers_models import norms_in_own_dtype
from helpers_tokenizer import tiny_tokenizer
from test_configs import config
from test_invariance import WORDS, Capture

from iopo.config import ObjectiveConfig
from iopo.data.chat import Chat
from iopo.data.layout import build_shared
from iopo.data.rows import Group, Quad, read_rows, rows_for
from iopo.data.tokenize import Encoder, Limits, tokenize_rows
from iopo.model.load import tiny_causal_lm
from iopo.objectives import grpo
from iopo.training import loop
from iopo.training.inputs import load_inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.policy import make_policy
from iopo.training.setup import make_job

CPU = torch.device("cpu")
OFFSETS = (1.0, -2.0, 0.5)  # log-ratios that the test gives to the members


def groups(path: Path, count: int = 4) -> Path:
    """Groups of three: an answer, an empty one, and the answer again in every other group; the last
    group has equal rewards."""
    rows = []
    for i in range(count):
        y = " ".join((WORDS * 2)[i : i + 2 + 3 * i % 7])
        again = y if i % 2 else y.upper()
        rewards = [0.5] * 3 if i == count - 1 else [1, 0, 1 if again == y else 0.5]
        rows.append(
            {"x": f"Write about {WORDS[i]}.", "responses": [y, "", again], "rewards": rewards}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny(path: Path, *overrides: str):
    return config(
        "+experiment=tiny_random", "objective=grpo", "objective.kl_weight=0.5", "data.heldout=null",
        f"data.train={path}", f"data.cache_dir={path.parent}/tokens", "model.dtype=fp64",
        "optim.clip_norm=inf", "optim.global_batch_quads=4", *overrides,
    )  # fmt: skip


def stock_log_probs(model, example) -> torch.Tensor:
    """[1, G], one sequence at a time, from the logits of transformers' own forward."""
    out = []
    for prompt, response in example.members():
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        out.append(logp.gather(1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(out)[None]


@pytest.mark.parametrize(
    "layout",
    [(), ("data.layout=plain",), ("optim.tokens_per_microbatch=60",)],
    ids=["shared", "plain", "one by one"],
)
def test_a_step_is_that_of_a_stock_model(tmp_path, layout):
    cfg = tiny(groups(tmp_path / "groups.jsonl"), *layout)
    inputs, ranks = load_inputs(cfg), RankInfo(0, 1, 0, 1, CPU)
    job, train_model = make_job(cfg, inputs, ranks), make_policy(cfg, inputs, ranks)
    norms_in_own_dtype(train_model.model)
    stock = tiny_causal_lm(cfg.model.tiny, seed=0, dtype=torch.float64, attention="sdpa")
    norms_in_own_dtype(stock)

    def reference(rows):
        with torch.no_grad():
            return torch.cat([stock_log_probs(stock, row) for row in rows]) - torch.tensor(OFFSETS)

    optimizer = Capture(list(train_model.parameters.values()), lr=1.0)
    given = loop.Reference(lambda rows, batch: reference(rows), "test", 1.0)
    means = next(loop.train_steps(job, train_model, optimizer, given, first_step=1)).reduce()

    loss = torch.zeros(())
    for example in inputs.train:
        tokens = torch.tensor([[len(y) for y in example.responses[0]]])
        log_probs, rewards = stock_log_probs(stock, example), torch.tensor([example.rewards])
        loss = (
            loss
            + grpo(log_probs, reference([example]), tokens, rewards, clip=0.02, kl_weight=0.5).sum()
        )
    (loss / len(inputs.train)).backward()
    assert means["loss"] == pytest.approx(loss.item() / 4, rel=1e-6)
    assert (means["signal"], means["reward"]) == (0.75, pytest.approx((1.5 + 2 + 1.5 + 1.5) / 12))
    expected = {name: p.grad for name, p in stock.named_parameters()}
    assert len(optimizer.seen) == len(expected) > 10
    for name, gradient in zip(train_model.parameters, optimizer.seen, strict=True):
        wanted = expected[name.removeprefix("causal_lm.")]
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9)
    assert max(gradient.abs().max() for gradient in optimizer.seen) > 1e-3


def test_samples_may_be_equal_empty_and_cut_off():
    """Two equal responses that are cut stay two; a pair's would be dropped."""
    row = Group("g", "Name a fruit.", ["an apple, I say", "an apple, I say"], [1.0, 0.0])
    (example,), report = tokenize_rows(
        [row], Encoder(Chat(tiny_tokenizer()), Limits(99, 3, "truncate"))
    )
    assert [len(y) for y in example.responses[0]] == [3, 3] and report.truncated
    assert example.rewards == (1.0, 0.0)
    empty = Group("g", "Name a fruit.", ["", "an apple"], [1.0, 0.0])
    (example,), _ = tokenize_rows([empty], Encoder(Chat(tiny_tokenizer()), Limits(99, 99)))
    assert example.responses[0][0].tolist() == [2]  # the end of the turn


def test_groups_of_another_size_are_named_with_file_and_line(tmp_path):
    path = groups(tmp_path / "groups.jsonl")
    with open(path, "a") as file:
        file.write(json.dumps({"x": "Ask.", "responses": ["a", "b"], "rewards": [0, 1]}) + "\n")
    expected = "groups.jsonl:5: 'responses' has 2 texts, expected 3 as in .*groups.jsonl:1"
    with pytest.raises(ValueError, match=expected):
        read_rows(path)
    with pytest.raises(ValueError, match="is of kind 'quad', but the objective needs 'group'"):
        rows_for("group", [Quad("q", "x1", "y1", "x2", "y2")])


def test_the_prompt_of_a_group_may_be_turns(tmp_path):
    path = tmp_path / "groups.jsonl"
    said = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes?"), ("user", "A fruit.")]
    turns = [{"role": role, "content": text} for role, text in said]
    path.write_text(json.dumps({"x": turns, "responses": ["a", "b"], "rewards": [0, 1]}))
    (row,) = read_rows(path)
    assert row.system == "Be brief." and row.x == tuple(said[1:])
    path.write_text(json.dumps({"x": turns[1:3], "responses": ["a", "b"], "rewards": [0, 1]}))
    with pytest.raises(ValueError, match="expected one of the user at the end"):
        read_rows(path)


def test_a_held_out_quad_is_two_groups_of_two(tmp_path):
    """The right answer has reward 1: both rows' losses are those of two groups by hand."""
    cfg = tiny(groups(tmp_path / "groups.jsonl"))
    job = make_job(cfg, load_inputs(cfg), RankInfo(0, 1, 0, 1, CPU))
    quad = Quad("q", "Lower case.", "it falls", "Upper case.", "IT FALLS DOWN")
    examples, _ = tokenize_rows([quad], Encoder(Chat(tiny_tokenizer()), Limits(99, 99)))
    policy = torch.tensor([[-5.0, -7.0, -6.0, -4.0]])
    r = torch.tensor([[0.01, -0.01, 0.0, 0.02]])
    batch = build_shared(examples)
    loss_E, values = loop.score(job, batch, examples, policy, policy - r)
    n1, n2, m2, m1 = batch.scored_M.tolist()
    gains = [0.01 / n1 + 0.01 / n2, 0.0 / m2 - 0.02 / m1]
    assert loss_E.tolist() == pytest.approx([-gain / 2 for gain in gains], abs=1e-4)
    assert values.shape[0] == 2 and isinstance(job.options, ObjectiveConfig)


def run(arguments: list[str], folder: Path) -> str:
    output = folder / "output.txt"
    assert finish(start_ranks(1, run_train, arguments, folder / "cache", output)) == [0], (
        output.read_text()[-3000:]
    )
    return output.read_text()


@pytest.mark.slow
def test_it_trains_and_goes_on_where_it_was(tmp_path):
    data = groups(tmp_path / "groups.jsonl", 8)
    quads = [{"id": f"q{i}", "x1": f"Write {w}. Lower.", "x2": f"Write {w}. Upper.", "y1": w,
              "y2": w.upper()} for i, w in enumerate(WORDS[:4])]  # fmt: skip
    (tmp_path / "quads.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quads))
    common = [
        "+experiment=tiny_random", "objective=grpo", f"data.train={data}", "evaluation.samples=0",
        f"data.heldout={tmp_path}/quads.jsonl", "export.model=false", "optim.global_batch_quads=4",
        "checkpoint.save_every_steps=2",
    ]  # fmt: skip
    whole = run([*common, f"run={tmp_path}/whole", "optim.max_steps=4"], tmp_path)
    assert (
        "step 0: loss " in whole
        and abs(float(whole.split("step 0: loss ")[1].split(",")[0])) < 1e-6
    )
    for steps in (2, 4):
        run([*common, f"run={tmp_path}/part", f"optim.max_steps={steps}"], tmp_path)
    of_clock = ("step_s", "tokens_per_s")
    rows = {}
    for name in ("whole", "part"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        read = [json.loads(line) for line in lines]
        rows[name] = [
            {k: v for k, v in row.items() if k not in of_clock}
            for row in read if row["split"] == "train" or row["step"] == 4
        ]  # fmt: skip
    assert rows["whole"] == rows["part"]
    train = [row for row in rows["whole"] if row["split"] == "train"]
    assert max(row["margin"] for row in train) > 0.1 and all(row["reward"] < 1 for row in train)
    shown = run([f"run={tmp_path}/whole", "replay_step=2"], tmp_path)
    assert "y2 (0) " in shown and "reference" in shown
