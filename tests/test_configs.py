"""Every experiment and sweep composes and validates; unknown keys and wrong values fail by name."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iopo.config import TrainConfig, plain

CONF = Path(__file__).resolve().parents[1] / "conf"
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
SWEEPS = sorted(p.stem for p in (CONF / "sweep").glob("*.yaml"))
ConfigStore.instance().store(name="base_config", node=TrainConfig)


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)


def config(*overrides: str) -> TrainConfig:
    cfg = OmegaConf.to_object(composed(*overrides))
    assert isinstance(cfg, TrainConfig)
    return cfg


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_validates(name):
    cfg = config(f"+experiment={name}")
    assert cfg.run == f"runs/{name}"


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_composes_and_each_job_validates(name):
    cfg = composed("+experiment=tiny_random", f"+sweep={name}", hydra=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    for key, values in cfg.hydra.sweeper.params.items():
        for value in str(values).split(","):
            config("+experiment=tiny_random", f"{key}={value}")


def test_the_demo_experiment_is_the_default_with_an_anchor_at_its_rate():
    changed = ("run=runs/iopo", "objective.sft_weight=0", "optim.lr=2e-5")
    default, demo = config(), config("+experiment=smollm2_135m_iopo")
    assert (demo.objective.sft_weight, demo.optim.lr) == (1.0, 3e-5)
    assert plain(default) == plain(config("+experiment=smollm2_135m_iopo", *changed))


def test_qwen2_is_the_papers_recipe():
    cfg = config("+experiment=qwen2_7b_iopo")
    assert (cfg.model.lora.rank, cfg.model.lora.alpha, cfg.model.lora.targets) == (
        8,
        16,
        "all-linear",
    )
    assert (cfg.optim.lr, cfg.optim.schedule.value, cfg.optim.warmup_ratio) == (5e-6, "cosine", 0.1)
    assert (cfg.optim.epochs, cfg.optim.global_batch_quads) == (3, 256)
    assert (cfg.objective.name, cfg.objective.beta) == ("iopo", 0.1)
    assert cfg.data.max_prompt_tokens + cfg.data.max_response_tokens == 6000


@pytest.mark.parametrize("override", ["optim.learning_rate=1", "objective.bet=0.1", "modle.path=x"])
def test_unknown_keys_fail_by_name(override):
    key = override.split("=")[0].split(".")[-1] if "." in override else "modle"
    with pytest.raises(ConfigCompositionException) as error:
        config(override)
    assert key in str(error.value) or key in str(error.value.__cause__)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "fast"),
        ("objective.link=sigmiod", "sigmiod"),
        ("objective.beta=0", "objective.beta: found 0.0, expected more than 0"),
        ("objective.beta=-1", "objective.beta"),
        ("objective.name=ippo", "objective.name.*one of iopo"),
        ("objective.gamma=1", "objective.gamma=1.0 has no effect with objective.name=iopo"),
        ("objective.clip=0.1", "objective.clip=0.1 has no effect .*used by grpo"),
        ("objective.clip=1", "objective.clip: found 1.0, expected 0 < clip < 1"),
        ("objective.label_smoothing=0.5", "0 <= e < 0.5"),
        ("objective.link=exo", "more than 0 with objective.link=exo"),
        ("optim.warmup_ratio=1", "optim.warmup_ratio"),
        ("optim.micro_batch_quads=2", "exactly one of"),
        ("optim.adam_beta1=1", "optim.adam_beta1: found 1.0, expected 0 <= beta < 1"),
        ("optim.adam_beta2=-0.1", "optim.adam_beta2"),
        ("optim.adam_eps=-1e-8", "optim.adam_eps: found -1e-08, expected 0 or more"),
        ("optim.weight_decay=-0.1", "optim.weight_decay: found -0.1, expected 0 or more"),
        ("seed=-1", "seed: found -1, expected 0 or more"),
        ("checkpoint.keep=1", "checkpoint.keep: found 1, expected 2 or more"),
        ("model.path=null", "model.path"),
        ("data.on_overlong=cut", "cut"),
        ("parallel.timeout_s=0", "parallel.timeout_s"),
        ("evaluation.every_steps=0", "evaluation.every_steps: found 0, expected 1 or more"),
        ("evaluation.quads=0", "evaluation.quads"),
        ("tracker.log_every_steps=0", "tracker.log_every_steps"),
        ("data.quad_rows=first", "data.quad_rows=first has no effect"),
        ("parallel.checkpoint_every_k=3", "checkpoint_every_k=3 has no effect"),
        ("model.lora.dropout=0.1", "no effect at model.lora.rank=0"),
    ],
)
def test_wrong_values_fail_by_name(override, message):
    with pytest.raises((ValueError, OmegaConfBaseException, ConfigCompositionException)) as error:
        config(override)
    texts = f"{error.value} {error.value.__cause__}"
    assert re.search(message, texts), texts


@pytest.mark.parametrize(
    ("objective", "override", "message"),
    [
        ("orpo", "objective.beta=0.2", "objective.beta=0.2 has no effect"),
        ("grpo", "objective.beta=0.2", "objective.beta=0.2 has no effect"),
        ("grpo", "data.quad_rows=first", "objective.name=grpo, which takes whole groups"),
        ("grpo", "parallel.split_quads=true", "two prompts"),
        ("sft", "reference.source=live", "reference.source=live has no effect"),
    ],
)
def test_options_that_an_objective_does_not_read_are_refused(objective, override, message):
    with pytest.raises(ValueError, match=message):
        config(f"objective={objective}", override)


def test_every_key_has_a_comment_in_conf():
    """A reader finds meaning and unit of every key of the default config in conf/."""
    commented = set()
    for path in CONF.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            if found := re.match(r"\s*(\w+):.*#", line):
                commented.add(found[1])
    keys = {key for section in plain(config()).values() if isinstance(section, dict)
            for key in section}  # fmt: skip
    obvious = {"lora", "project", "tags"}
    assert keys - commented - obvious == set()
