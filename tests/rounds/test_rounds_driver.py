"""Rounds from the command line: refusals, what each stage is told, when they stop, the page."""

import json
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from iopo.files import read_records, write_records, write_text
from iopo.rounds import report
from iopo.rounds.__main__ import build
from iopo.rounds.config import Round, RoundsConfig, round_folder
from iopo.rounds.driver import quoted
from iopo.stats import wilson

ROOT = Path(__file__).resolve().parents[2]
TINY = ("+experiment=tiny_random", "model.path=demo", "model.tiny=null")


def test_every_key_of_conf_is_an_option_with_the_default_that_stands_there():
    file = OmegaConf.load(ROOT / "conf/rounds.yaml")
    assert set(file) == set(RoundsConfig.__dataclass_fields__)
    given = build(TINY).rounds
    assert (given.count, given.serve, given.reference) == (3, None, "start")
    for line in (ROOT / "conf/rounds.yaml").read_text().splitlines():
        assert line.startswith("#") or " # " in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rounds.count=0"], "rounds.count is 0; expected 1 or more"),
        (["rounds.samples=3"], "rounds.samples is 3; expected an even number"),
        (["rounds.most_constraints=6"], "rounds.most_constraints is 6; expected 1 to 5"),
        (["rounds.serve='vllm serve {model}'"], r"expected null, vllm, or a command with {port}"),
        (["rounds.temperature=0"], "equal responses teach nothing"),
        (["rounds.reward=share"], "has no effect with objective.name=iopo"),
        (["rounds.reward=share", "objective=sft"], "has no effect with objective.name=sft"),
        (["rounds.reference=first", "objective=sft"], "reference.path=demo has no effect"),
        (["rounds.reference=first", "objective=grpo"], "its ratios are to the policy that sampled"),
        (["rounds.reference=first", "model.adapter=A"], "merge the adapter into model.path"),
        (["rounds.serve=vllm", "model.adapter=A"], "the server gets a whole model"),
        (["rounds.heldout=[]"], "rounds.seen has no effect"),
        (["data.max_response_tokens=100"], "100 with rounds.max_new_tokens=512: longer responses"),
        (["data.train=rows.jsonl"], "data.train=rows.jsonl: rounds set it"),
        (["export.model=false"], "the next round starts from the export"),
        (["-m"], "-m: rounds take key=value only, and no sweeps"),
        (["optim.lr=0"], "optim.lr"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(words, message):
    with pytest.raises(ValueError, match=message):
        build([*TINY, *words])


def test_a_model_that_is_in_no_folder_is_refused():
    with pytest.raises(ValueError, match="model.tiny: rounds start from model.path"):
        build(["+experiment=tiny_random"])


@pytest.mark.parametrize(
    ("word", "meant"),
    [("rounds.sample=4", "rounds.samples"), ("+optim.learning_rate=1", "optim.lr")],
)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(word, meant, capsys):
    with pytest.raises(SystemExit) as left:
        build([*TINY, word])
    assert left.value.code == 2 and f"did you mean {meant}?" in capsys.readouterr().err


def test_rounds_of_a_7b_model_are_planned():
    """The paper's recipe as rounds: LoRA on Qwen2-7B, a vLLM server for each policy."""
    words = ["+experiment=qwen2_7b_iopo", "plan=true", "rounds.serve=vllm", "optim.epochs=1",
             "rounds.prompts_per_round=2048", "plan_for.gpus=2", "run=runs/rounds_7b"]  # fmt: skip
    rounds = build(words)
    text = rounds.plan()
    assert "2 GPUs" in text and "2048 prompts x 8 = 16384 responses" in text
    assert "from `vllm serve {model} --port {port}`" in text
    first, second = rounds.train(1), rounds.train(2)
    assert "model.path='Qwen/Qwen2-7B-Instruct'" in first.command
    assert f"model.path='{rounds.folder}/round-01/train/export-merged'" in second.command
    assert "export.merged=true" in second.command


def test_each_train_py_gets_the_users_words_and_the_rounds_own(tmp_path):
    words = [*TINY, "optim.lr=1e-4", f"run={tmp_path}", "rounds.reference=first"]
    rounds = build(words)
    first, second = (rounds.train(n).command for n in (1, 2))
    assert first[1:5] == [word for word in words if not word.startswith("rounds.")][:4]
    assert f"data.train='{tmp_path}/round-01/rows/train.jsonl'" in first
    assert "data.limit_rows=null" in first, "the experiment's own rows were limited to eight"
    assert "export.dtype=fp32" in first
    assert "data.max_response_tokens=512" in first, "what was sampled is not dropped"
    assert "reference.path='demo'" in second
    assert not any(word.startswith("reference.path") for word in first)
    assert f"model.path='{tmp_path}/round-01/train/export'" in second
    assert rounds.train(2).marker == tmp_path / "round-02/train/COMPLETE"
    given = build([*words, "data.limit_rows=4", "export.dtype=bf16"]).train(1).command
    assert "data.limit_rows=null" not in given and "export.dtype=fp32" not in given


def test_an_adapter_belongs_to_the_first_policy_alone(tmp_path):
    rounds = build([*TINY, f"run={tmp_path}", "model.adapter=ADAPTER"])
    assert rounds.policy(0).adapter == "ADAPTER" and rounds.policy(1).adapter is None
    assert "model.adapter=null" not in rounds.train(1).command
    assert "model.adapter=null" in rounds.train(2).command
    before, after = (rounds.evaluate(n) for n in (0, 1))
    assert before is not None and "model.adapter='ADAPTER'" in before.command
    assert after is not None and not any(w.startswith("model.adapter") for w in after.command)


@pytest.mark.parametrize("value", ["a=b/c d", "it's", "a\\b", "{x}", 3, True, "[1, 2]"])
def test_any_value_passes_through_hydras_grammar(value):
    (override,) = OverridesParser.create().parse_overrides([f"key={quoted(value)}"])
    assert override.value() == value


def test_a_round_is_read_back_as_it_was_written(tmp_path):
    rounds = build([*TINY, f"run={tmp_path}", "+model.template_options.a=1"])
    rounds.sample(2)
    of = Round.read(round_folder(tmp_path, 2))
    assert (of.number, of.kind, of.rounds) == (2, "quad", rounds.rounds)
    assert of.policy == rounds.policy(1) and of.policy.template_options == {"a": 1}


def a_row(number: int, rows: int = 50, following: int = 50) -> dict:
    return {
        "round": number, "following": {"all": wilson(following, 100)},
        "rows": {"acceptance": wilson(rows, 100)},
    }  # fmt: skip


def test_rounds_stop_when_a_measure_surely_fell():
    assert report.fallen([a_row(1), a_row(2, 45, 45), a_row(3)], 0.5) is None
    assert report.fallen([a_row(1), a_row(2, 10)], 0.5) == (
        "acceptance fell in round 2: 0.100 [0.055, 0.174], below 0.250 "
        "(rounds.stop_drop=0.5; best so far 0.500)",
        0,
    )
    what, good = report.fallen([a_row(1), a_row(2), a_row(3, 50, 10)], 0.5) or ("", -1)
    assert what.startswith("following fell in round 3") and good == 2
    assert report.fallen([a_row(1), a_row(2, 1, 1)], None) is None
    # below the bound, but not surely: the interval reaches above it
    assert report.fallen([a_row(1), a_row(2, 22)], 0.5) is None
    # a slow fall is one from the best, not from the round before
    slow = [a_row(n, 80 - 15 * n) for n in range(1, 5)]
    assert report.fallen(slow, 0.5) is not None


def test_the_page_and_its_rows_come_from_the_files_of_the_stages(tmp_path):
    degeneration = {"words": 20.0, "repetitive": 0.1, "cut_off": 0.0, "empty": 0.0}
    for number in (0, 1):
        folder = round_folder(tmp_path, number)
        (folder / "evaluate").mkdir(parents=True)
        cell = wilson(30 + number, 100)
        scores = {"follows_and_answers": cell, "follows_and_answers_unseen_kinds": cell,
                  "degeneration": degeneration, "plain_text": {"perplexity": 12.5}}  # fmt: skip
        write_text(folder / "evaluate/scores.json", json.dumps(scores))
        logps = [-10.0 + number, -20.0, -10.0 + 2 * number, -20.0 - number]
        write_records(folder / "evaluate/logps.jsonl", [{"id": "a", "logps": logps}])
    counts = {
        "prompts": 10, "rows_new": 5, "rows_replayed": 1, "acceptance": wilson(5, 10),
        "with_rows": wilson(4, 10), "by_source": {"relabel": 5},
        "by_constraints": {"2": {"prompts": 10, "with_rows": 4, "rows": 5, "responses": 40,
                                 "follow_and_answer": 3}},
        "by_kind": {"words": {"asked": 4, "followed": 2, "in_rows": 3}},
        "outcomes": {"relabel: accepted": 5},
    }  # fmt: skip
    sampled = {"prompt_tokens": 100, "response_tokens": 300}
    for name, content in (("rows/counts.json", counts), ("sample/done.json", sampled)):
        (tmp_path / "round-01" / name).parent.mkdir()
        write_text(tmp_path / "round-01" / name, json.dumps(content))
    job = {"job": "round-01 sample", "code": 0, "seconds": 7.5, "peak_rss_gb": 1}
    write_records(tmp_path / "jobs.jsonl", [job])
    start, first = report.collect(tmp_path)
    assert start["drift"]["logratio_matched"] == 0 and start["drift"]["perplexity"] == 12.5
    assert first["drift"]["logratio_matched"] == 1.5
    assert first["drift"]["logratio_mismatched"] == -0.5
    assert first["stages"] == {"sample": {"seconds": 7.5, "tokens": 400}}
    assert set(first["following"]) == {"all", "unseen_kinds"} and "rows" not in start
    report.write(tmp_path, [start, first], "1 of 1 rounds.")
    assert [r["round"] for r in map(json.loads, (tmp_path / "rounds.jsonl").open())] == [0, 1]
    text = (tmp_path / "report.html").read_text()
    for part in ("31.0 [22.8, 40.6]", "1 of 1 rounds.", "50% of 4; 3 in rows", "relabel: accepted"):
        assert part in text


def test_a_round_without_rows_keeps_its_policy(tmp_path):
    made = build([*TINY, "rounds.stop_drop=null", f"run={tmp_path}"])
    for number, rows in enumerate((4, 0, 0), 1):
        write_text(
            round_folder(tmp_path, number) / "rows/counts.json", json.dumps({"rows_new": rows})
        )
    kept = str(round_folder(tmp_path, 1) / "train/export")
    assert [made.policy(n).path for n in (1, 2, 3)] == [kept] * 3
    assert made.policy(0).path != kept


def test_files_of_another_content_are_refused(tmp_path, monkeypatch):
    """Later rounds would be scored on other quads, or ask other prompts, than the first."""
    monkeypatch.setattr("iopo.rounds.driver.require_model", lambda model: None)
    rows = read_records(ROOT / "data/verified/heldout.jsonl")
    given = {"heldout": tmp_path / "heldout.jsonl", "seen": tmp_path / "seen.jsonl",
             "prompts": tmp_path / "prompts.txt"}  # fmt: skip
    write_records(given["heldout"], rows[:40])
    write_records(given["seen"], rows[40:80])
    write_text(given["prompts"], "Name a river.\nName a lake.\n")
    words = [f"rounds.{name}={path}" for name, path in given.items() if name != "heldout"]
    words += [f"rounds.heldout=[{given['heldout']}]", "rounds.prompts_per_round=2"]
    for _ in range(2):
        build([*TINY, f"run={tmp_path}/run", *words]).prepare()
    for path in given.values():
        kept = path.read_bytes()
        path.write_bytes(b"\n".join(kept.splitlines()[:-1]) + b"\n")
        with pytest.raises(ValueError, match=f"made with other settings .*content.*{path.name}"):
            build([*TINY, f"run={tmp_path}/run", *words]).prepare()
        path.write_bytes(kept)


def test_prompts_that_are_refused_leave_no_folder_behind(tmp_path, monkeypatch):
    """Its arguments.json would refuse the same run with the prompts set right."""
    monkeypatch.setattr("iopo.rounds.driver.require_model", lambda model: None)
    rounds = build([*TINY, f"run={tmp_path}/run", f"rounds.prompts={tmp_path}/none.jsonl"])
    with pytest.raises(OSError, match="none.jsonl"):
        rounds.prepare()
    assert not (tmp_path / "run").exists()
