"""Which changes a resume accepts, and where the metrics of a resumed run end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_tokenizer import tiny_tokenizer
from test_configs import config

from iopo.config import Resume
from iopo.data.chat import Chat
from iopo.kernels import tiled
from iopo.training.checkpoint.folders import folder_of
from iopo.training.checkpoint.resume import (
    check_resume,
    fingerprint,
    flatten,
    is_finished,
    refuse_or_note,
    truncate_metrics,
)
from iopo.training.launch.run_folder import mark_complete

META = {
    "config": {
        "run": "a",
        "seed": 0,
        "objective": {"name": "iopo", "beta": 0.1},
        "optim": {"lr": 1e-5, "max_steps": 10},
        "tracker": {"log_every_steps": 1},
        "data": {"train": "x.jsonl", "workers": 0},
    },
    "identity": {"data": "d0", "reference": "r0"},
    "world_size": 2,
}


def changed(**flat) -> dict:
    meta = json.loads(json.dumps(META))
    for key, value in flat.items():
        *path, last = key.split("__")
        place = meta
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return meta


def test_the_same_run_has_nothing_to_report():
    assert check_resume(META, changed()) == []


def test_an_option_of_another_objective_that_came_later_is_no_change():
    assert check_resume(META, changed(config__objective__clip=0.02)) == []
    with pytest.raises(ValueError, match="objective.link: None -> 'hinge'"):
        check_resume(META, changed(config__objective__link="hinge"))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"config__run": "b"}, "run: 'a' -> 'b'"),
        ({"config__tracker__log_every_steps": 5}, "tracker.log_every_steps: 1 -> 5"),
        ({"config__data__workers": 2}, "data.workers: 0 -> 2"),
        ({"config__optim__max_steps": 20}, "schedule now ends elsewhere"),
        ({"world_size": 4}, "bitwise equality is given up"),
    ],
)
def test_harmless_changes_are_reported(change, note):
    (found,) = check_resume(META, changed(**change))
    assert note in found


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"config__objective__beta": 0.2}, "objective.beta: 0.1 -> 0.2"),
        ({"config__seed": 1}, "seed: 0 -> 1"),
        ({"config__optim__lr": 2e-5}, "optim.lr"),
        ({"config__data__train": "y.jsonl"}, "data.train"),
        ({"config__data__new_key": 1}, "data.new_key: None -> 1"),
        ({"config__runner": 1}, "runner"),  # not "run", although it begins so
        ({"identity__data": "d1"}, "the data is not the one"),
        ({"identity__reference": "r1"}, "the reference is not the one"),
        ({"identity__tokenizer": "t"}, "the tokenizer is not the one"),
        (
            {"identity": {"data": "d0"}},
            "the reference is not the one the run began with: r0",
        ),
    ],
)
def test_what_alters_the_experiment_is_refused_by_name(change, name):
    with pytest.raises(ValueError, match="cannot be resumed") as caught:
        check_resume(META, changed(**change))
    assert name in str(caught.value)


def test_all_refused_keys_are_named_at_once():
    with pytest.raises(ValueError) as caught:
        check_resume(META, changed(config__seed=1, config__objective__beta=1.0))
    assert "seed" in str(caught.value) and "objective.beta" in str(caught.value)


def test_a_fingerprint_holds_no_secret_and_what_json_changes_is_no_change(monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "very-secret-1")
    overrides = ["objective.link=hinge", "optim.clip_norm=inf", "tracker.project=very-secret-1"]
    inputs = SimpleNamespace(data_hash="d", chat=Chat(tiny_tokenizer()), model_path=None)
    now = fingerprint(config("+experiment=tiny_random", *overrides), inputs, 1)
    saved = json.loads(json.dumps(now))
    assert saved["config"]["objective"]["link"] == "hinge" and "very-secret" not in str(saved)
    assert check_resume(saved, now) == []


def test_auto_is_saved_as_the_dtype_that_it_stood_for(monkeypatch):
    inputs = SimpleNamespace(data_hash="d", chat=Chat(tiny_tokenizer()), model_path=None)

    def on(speed, dtype):
        monkeypatch.setattr(tiled, "bf16_speed", lambda: speed)
        overrides = ["+experiment=tiny_random", "parallel.device=cpu", f"model.dtype={dtype}"]
        return fingerprint(config(*overrides), inputs, 1)

    saved = on(2.2, "auto")
    with pytest.raises(ValueError, match=r"model\.dtype: 'bf16' -> 'fp32'"):
        check_resume(saved, on(0.6, "auto"))
    assert check_resume(saved, on(0.6, "bf16")) == []


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def rows(*steps) -> str:
    return "".join(json.dumps({"step": s, "loss": 0.5}) + "\n" for s in steps)


@pytest.mark.parametrize(
    ("text", "step", "kept", "cut"),
    [
        (rows(1, 2, 3), 3, rows(1, 2, 3), 0),
        (rows(0, 1, 1, 2, 3), 1, rows(0, 1, 1), 2),
        (rows(1, 2) + '{"step": 3, "lo', 2, rows(1, 2), 1),
        (rows(1, 2) + '{"step": 3, "lo', 3, rows(1, 2), 1),
        (rows(1, 2), 0, "", 2),
        ("", 5, "", 0),
    ],
)
def test_metrics_end_with_the_step_of_the_checkpoint(tmp_path, text, step, kept, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert truncate_metrics(path, step) == cut
    assert path.read_text() == kept


def test_no_metrics_yet(tmp_path):
    assert truncate_metrics(tmp_path / "metrics.jsonl", 3) == 0


# ---- what a run folder allows, from its files alone -------------------------------------------


def save(run: Path, step: int) -> Path:
    folder = folder_of(run, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(META | {"step": step}))
    entry = {"bytes": (folder / "state.json").stat().st_size, "sha256": ""}
    (folder / "COMPLETE").write_text(json.dumps({"files": {"state.json": entry}}))
    return folder


def test_an_empty_folder_begins_unless_it_must_go_on(tmp_path):
    assert refuse_or_note(tmp_path, META, resume=Resume.auto) == []
    with pytest.raises(ValueError, match="holds no complete checkpoint.*nothing to resume"):
        refuse_or_note(tmp_path, META, resume=Resume.must)
    folder_of(tmp_path, 3).with_suffix(".partial").mkdir(parents=True)
    assert refuse_or_note(tmp_path, META, resume=Resume.auto) == []
    with pytest.raises(ValueError, match="was being written when the run ended"):
        refuse_or_note(tmp_path, META, resume=Resume.must)


def test_a_saved_run_goes_on_unless_it_must_not(tmp_path):
    save(tmp_path, 3)
    assert refuse_or_note(tmp_path, META, resume=Resume.auto) == []
    assert refuse_or_note(tmp_path, META, resume=Resume.must) == []
    with pytest.raises(ValueError, match="step-00000003 and checkpoint.resume is never"):
        refuse_or_note(tmp_path, META, resume=Resume.never)


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_begin_anew(tmp_path):
    for step in (3, 6):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="none of them is intact") as caught:
        refuse_or_note(tmp_path, META, resume=Resume.auto)
    assert "step-00000003 is damaged" in str(caught.value) and "begin at step 1" in str(
        caught.value
    )


def test_a_finished_run_is_finished_for_the_same_config_and_no_more_steps(tmp_path):
    assert not is_finished(tmp_path, META, 6)
    mark_complete(tmp_path, META | {"step": 6})
    assert is_finished(tmp_path, META, 6) and is_finished(tmp_path, META, 5)
    with pytest.raises(ValueError, match="objective.beta: 0.1 -> 0.2"):
        is_finished(tmp_path, changed(config__objective__beta=0.2), 6)
    with pytest.raises(ValueError, match="ended after 6 steps and left no checkpoint"):
        is_finished(tmp_path, META, 9)
    save(tmp_path, 6)
    assert not is_finished(tmp_path, META, 9)
