"""Public sets by their columns (rows by hand in tests/fixtures/sets), from a file to quads."""

import json
import logging
from pathlib import Path

import pytest
from helpers_models import SMALL

from iopo.config import DataConfig, TrainConfig
from iopo.construct import importers
from iopo.construct.relabel import SPLITS, RelabelRecipe, relabel_file
from iopo.construct.verify import verify
from iopo.data.rows import Pair, Quad, read_rows
from iopo.training.inputs import load_inputs

SETS = Path(__file__).resolve().parents[1] / "fixtures" / "sets"
PREFERENCES = {
    "tulu3_persona_if": "tulu-3 persona instruction-following pairs",
    "dolci_instruct_dpo": "Dolci-Instruct-DPO",
    "tulu3_preference_mixture": "tulu-3 preference mixture",
    "helpsteer3_preference": "HelpSteer3 preference",
    "ultrafeedback_binarized": "UltraFeedback binarised",
}
SEEDS = {
    "rlvr_ifeval": "RLVR-IFeval",
    "if_multi_constraints_upto5": "IF_multi_constraints_upto5",
    "muldimif": "MulDimIF",
    "verinstruct": "VerInstruct",
}


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (SETS / f"{name}.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("name", PREFERENCES)
def test_from_a_preference_set_to_quads_that_train(name, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="iopo")
    source = SETS / f"{name}.jsonl"
    counts = relabel_file(RelabelRecipe(source=str(source), out=str(tmp_path), heldout_share=0.0))
    assert f"{source}: {PREFERENCES[name]}, read as preferences; not read: " in caplog.text
    assert "unknown columns" not in caplog.text
    assert counts["in"] == 20 and counts["out"]["train"] >= 12
    found, summary = verify([tmp_path / f"{split}.jsonl" for split in SPLITS])
    assert [str(violation) for violation in found] == []
    assert summary.rows == counts["out"]["train"]
    quads = read_rows(tmp_path / "train.jsonl")
    dialogues = sum(isinstance(quad, Quad) and isinstance(quad.x1, tuple) for quad in quads)
    assert (dialogues > 0) == (name in ("dolci_instruct_dpo", "helpsteer3_preference"))
    cfg = TrainConfig(data=DataConfig(train=str(tmp_path / "train.jsonl"), limit_rows=8))
    cfg.model.tiny = {"model_type": "llama", **SMALL}
    cfg.data.cache_dir = str(tmp_path / "cache")
    cfg.data.max_prompt_tokens = cfg.data.max_response_tokens = 2000
    assert len(load_inputs(cfg).train) == 8


@pytest.mark.parametrize("name", set(PREFERENCES) - {"helpsteer3_preference"})
def test_columns_of_trl_train_as_they_are(name):
    pairs = read_rows(SETS / f"{name}.jsonl")
    assert len(pairs) == 20 and all(isinstance(pair, Pair) for pair in pairs)
    relabelled = list(importers.preferences(SETS / f"{name}.jsonl"))
    assert [p.x for p in pairs] == [p.x for p in relabelled if isinstance(p, Pair)]


def test_helpsteer_prefers_the_second_response_above_zero():
    rows = rows_of("helpsteer3_preference")
    pairs = importers.preferences(SETS / "helpsteer3_preference.jsonl")
    for row, pair in zip(rows, pairs, strict=True):
        assert isinstance(pair, Pair)
        first = row["overall_preference"] <= 0
        assert pair.chosen == row["response1" if first else "response2"]
    assert len({row["overall_preference"] for row in rows}) == 7


@pytest.mark.parametrize("name", SEEDS)
def test_prompts_are_seeds(name, caplog):
    caplog.set_level(logging.INFO, logger="iopo")
    seeds = importers.read_seeds(SETS / f"{name}.jsonl")
    assert f"{SEEDS[name]}, read as seeds; not read: " in caplog.text
    assert "unknown columns" not in caplog.text
    assert len(seeds) == 20 and seeds[0]["instruction"].startswith("Explain why bread rises.")
    assert not any("def check" in str(seed) for seed in seeds), "no source of strangers"


def test_unknown_columns_are_listed(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="iopo")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "P", "chosen": "A", "rejected": "B", "lang": "en"}))
    assert len(list(importers.preferences(path))) == 1
    assert (
        f"{path}: columns chosen, prompt, rejected, read as preferences; unknown columns: lang"
        in (caplog.text)
    )


def test_the_authors_quads_are_not_taken_for_dialogues(tmp_path):
    human = [{"from": "human", "value": text} for text in ("A", "B")]
    reply = {"from": "gpt", "value": "C"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"conversations": human, "chosen": reply, "rejected": reply}]))
    assert list(importers.preferences(path)) == ["conversations of x1 and x2: these are quads"]
