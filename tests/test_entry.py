"""Misspelt keys are refused by every program, however they are given, and nothing is written."""

import importlib
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from iopo import entry

CONF = Path(__file__).resolve().parents[1] / "conf"
sys.path.insert(0, str(CONF.parent))
BASE = {
    "train": ("+method=dpo",),
    "evaluate": ("+benchmark=ifeval", "model.path=demo"),
    "iopo.construct.__main__": ("+recipe=relabel",),
    "iopo.training.reference.__main__": ("+method=dpo",),
}
CASES = [
    ("train", "optim.learning_rate", "optim.lr"),
    ("evaluate", "generate.temprature", "generate.temperature"),
    ("iopo.construct.__main__", "recipe.sauce", "recipe.source"),
    ("iopo.training.reference.__main__", "objective.betta", "objective.beta"),
]


def refusal(monkeypatch, capsys, program: str, *arguments: str) -> str:
    """What a program says before it exits with code 2."""
    module = importlib.import_module(program)
    known = getattr(module, "KEYS", None) or entry.keys(module.SCHEMAS["relabel"], "recipe.")
    words = sorted(arguments, key=lambda word: not word.startswith("-"))
    monkeypatch.setattr(sys, "argv", [program, f"--config-path={CONF}", *words])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stopped:
        entry.run(module.main, known)
    assert stopped.value.code == entry.REFUSED
    return capsys.readouterr().err


@pytest.mark.parametrize("form", ["{}=7", "+{}=7", "++{}=7", "overlay", "sweep"])
@pytest.mark.parametrize(("program", "wrong", "meant"), CASES)
def test_a_misspelt_key_is_refused_with_the_right_one(
    tmp_path, monkeypatch, capsys, program, wrong, meant, form
):
    monkeypatch.chdir(tmp_path)
    if form == "overlay":
        (tmp_path / "own" / "overlay").mkdir(parents=True)
        *path, last = wrong.split(".")
        text = "".join(" " * i + f"{name}:\n" for i, name in enumerate(path))
        text = f"# @package _global_\n{text}{' ' * len(path)}{last}: 7\n"
        (tmp_path / "own" / "overlay" / "bad.yaml").write_text(text)
        given = ["--config-dir=own", "+overlay=bad"]
        if program == "iopo.construct.__main__":  # its base has no schema: checked once composed
            with initialize_config_dir(str(CONF), version_base=None):
                composed = compose("construct", ["+recipe=relabel", f"+{wrong}=7"])
            module = importlib.import_module(program)
            with pytest.raises(SystemExit):
                module.make(composed)
            assert f"{wrong} is no key; did you mean {meant}?" in capsys.readouterr().err
            return
    elif form == "sweep":
        given = ["-m", f"+{wrong}=7,8"]
    else:
        given = [form.format(wrong)]
    said = refusal(monkeypatch, capsys, program, *BASE[program], *given)
    assert said == f"refused: {wrong} is no key; did you mean {meant}?\n"
    left = {path.name for path in tmp_path.rglob("*")} - {"own", "overlay", "bad.yaml"}
    assert not left, left


def test_what_hydra_cannot_compose_is_refused_in_its_words(monkeypatch, capsys):
    said = refusal(monkeypatch, capsys, "train", "optim.lr=fast")
    assert "could not be converted to Float" in said and "optim.lr" in said
    assert "Available options in 'objective'" in refusal(
        monkeypatch, capsys, "train", "objective=ipoo"
    )
    # a key of the schema that the recipe's file leaves out: Hydra's advice is right
    recipe = ("+recipe=relabel", "recipe.name.x=1")
    assert "refused" in refusal(monkeypatch, capsys, "iopo.construct.__main__", *recipe)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("optim.per_device_train_batch_size", "optim.micro_batch_quads"),
        ("objective.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("model.lora.ranks", "model.lora.rank"),
        ("optm.lr", "optim.lr"),
        ("optm", "optim"),
        ("model.lorra", "model.lora"),
        ("output_dir", "run"),
    ],
)
def test_the_key_that_was_meant(capsys, wrong, meant):
    with pytest.raises(SystemExit):
        entry._check([wrong], importlib.import_module("train").KEYS)
    assert capsys.readouterr().err == f"refused: {wrong} is no key; did you mean {meant}?\n"


def checked(*overrides: str) -> None:
    train = importlib.import_module("train")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        entry.check_keys(compose("config", list(overrides)), train.KEYS)


def test_what_a_free_dict_holds_is_left_open(capsys):
    checked("+experiment=tiny_random", "+model.tiny.rope_scaling={rope_type: linear, factor: 2}")
    with pytest.raises(SystemExit):
        checked("+data.zz={y: 1}", "+wurst=1")
    data, wurst = capsys.readouterr().err.splitlines()
    assert data.startswith("refused: data.zz.y is no key; expected one of run, seed")
    assert wurst.startswith("wurst is no key; expected one of run, seed")


@pytest.mark.parametrize("name", sorted(entry.SYNONYMS))
def test_synonyms_are_keys(name):
    assert entry.SYNONYMS[name] in importlib.import_module("train").KEYS
