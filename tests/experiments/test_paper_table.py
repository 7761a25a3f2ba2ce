"""The comparison: its sweeps, its plan for 7 B models, and the whole of it on a random model."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_models import tiny_llama
from test_configs import CONF, composed, config

from iopo import objectives
from iopo.experiments.paper_table.__main__ import (
    STRENGTH,
    Comparison,
    jobs_of,
    keep_arguments,
    parse,
)
from iopo.jobs import Runner
from iopo.model.load import byte_tokenizer
from iopo.training.plan.report import plan_report

ROOT = Path(__file__).resolve().parents[2]
IFEVAL = {
    "key": 1, "prompt": "Use no commas.", "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}  # fmt: skip
TINY = (
    "optim.max_steps=1", "optim.micro_batch_quads=6", "optim.tokens_per_microbatch=null",
    "data.max_prompt_tokens=1000", "data.max_response_tokens=600", "parallel.device=cpu",
)  # fmt: skip


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "iopo.experiments.paper_table", *TINY, f"--run={folder}/run",
        f"--model={folder}/model", f"--ifeval={folder}/ifeval.jsonl", "--quads=16",
        "--validation=2", "--test=4", "--grid-steps=1", *more,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_llama(vocab=300)
    model.config.eos_token_id = model.generation_config.eos_token_id = 257
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "ifeval.jsonl").write_text(json.dumps(IFEVAL) + "\n")
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def jobs(folder: Path) -> list[dict]:
    path = folder / "run/jobs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_method_sees_as_many_members_a_step():
    for path in (CONF / "method").glob("*.yaml"):
        cfg = config("+sweep=paper_table", f"+method={path.stem}")
        members = len(objectives.OBJECTIVES[cfg.objective.name].rows.members)
        if cfg.objective.name == "grpo":
            members = 4  # as many as `python -m iopo.rounds` samples
        of_three = members == 3
        assert cfg.optim.global_batch_quads * members == (18 if of_three else 16), path.stem
        assert cfg.optim.max_steps == 120
        rows = parse(["--without-ifeval"]).quads * (2 if members < 3 else 1)
        assert cfg.optim.global_batch_quads * 120 <= rows, "a row is seen twice"


def test_the_sweep_holds_its_methods_with_five_seeds_a_seed_at_a_time():
    jobs, methods = jobs_of("paper_table"), parse(["--without-ifeval"]).methods
    assert [job["+method"] for job in jobs[: len(methods)]] == methods
    assert set(methods) <= set(STRENGTH)
    assert [job["seed"] for job in jobs] == [s for s in "12345" for _ in methods]


def test_the_best_point_is_chosen_once(tmp_path):
    args = parse([f"--run={tmp_path}", "--without-ifeval", "--methods", "iopo", "dpo"])
    comparison = Comparison(args, Runner(tmp_path, 1))
    for n, (_, folder, _) in enumerate(comparison.grid_points()):
        scores = folder / "validation/scores.json"
        scores.parent.mkdir(parents=True)
        scores.write_text(
            json.dumps({"follows_and_answers": {"value": [0.1, 0.2, 0.2, 0.0][n % 4]}})
        )
    chosen = comparison.choose()
    assert chosen == dict.fromkeys(("iopo", "dpo"), ["optim.lr=2e-5", "objective.beta=0.2"])
    assert not list(comparison.grid_points()) and comparison.choose() == chosen
    late = tmp_path / "late"
    shutil.copytree(tmp_path / "grid/iopo", late / "grid/iopo")
    args = parse([f"--run={late}", "--without-ifeval", "--methods", "iopo"])
    failed = Comparison(args, Runner(late, 1))
    missing = list(failed.grid_points())[1][1] / "validation/scores.json"
    moved = missing.rename(late / "scores.json")
    third = failed.choose()
    assert third == {"iopo": ["optim.lr=5e-5", "objective.beta=0.05"]}
    assert len(list(failed.grid_points())) == 4, "what failed is tried again"
    moved.rename(missing)
    assert failed.choose() == third and not list(failed.grid_points()), "the choice stands"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "choice.json", elsewhere)
    args = parse([f"--run={elsewhere}", "--without-ifeval", "--methods", "iopo", "sft"])
    other = Comparison(args, Runner(elsewhere, 1))
    assert {method for method, _, _ in other.grid_points()} == {"sft"}
    assert other.choose() == chosen


@pytest.mark.parametrize("sweep", sorted(p.stem for p in (CONF / "sweep").glob("ablation_*")))
def test_every_job_of_an_ablation_is_a_valid_run(sweep):
    params = composed(f"+sweep={sweep}", hydra=True).hydra.sweeper.params
    values = [str(v).split(",") for key, v in params.items() if key != "seed"]
    keys = [key for key in params if key != "seed"]
    for job in itertools.product(*values):
        given = dict(zip(keys, job, strict=True))
        cfg = config(f"+sweep={sweep}", *(f"{key}={value}" for key, value in given.items()))
        assert cfg.optim.max_steps == int(given.get("optim.max_steps", 120))


@pytest.mark.parametrize("model", ["qwen2_7b", "llama31_8b"])
@pytest.mark.parametrize("method", ["iopo", "iopo_three", "dpo"])
def test_the_sweep_is_planned_for_a_7b_model(model, method):
    plan = plan_report(config("+sweep=paper_table", f"model={model}", f"+method={method}"))
    assert plan.fits and 7e9 < plan.sizes.total < 9e9
    assert "2 GPUs" in str(plan)


def test_ifeval_is_left_out_only_when_asked(monkeypatch, capsys):
    monkeypatch.delenv("IOPO_DATA_DIR", raising=False)
    with pytest.raises(SystemExit):
        parse([])
    assert "--ifeval FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--without-ifeval", "--sweeps", "ablation_anchor", "--methods", "iopo"])
    assert "ablation_anchor: none of its jobs" in capsys.readouterr().err
    assert parse(["--without-ifeval", "optim.lr=1", "--jobs", "2"]).overrides == ["optim.lr=1"]


def test_a_run_goes_on_only_with_the_arguments_that_it_began_with(tmp_path):
    given = ["--without-ifeval", f"--run={tmp_path}"]
    keep_arguments(parse([*given, "--grid-steps=2"]))
    keep_arguments(parse([*given, "--grid-steps=2", "--jobs=2", "--methods", "iopo"]))
    with pytest.raises(ValueError, match=r"other settings \(grid_steps: there 2, now 3; overrides"):
        keep_arguments(parse([*given, "--grid-steps=3", "optim.lr=1"]))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stopped_and_a_killed_comparison_end_with_every_job_done_once(folder):
    run = command(folder, "--methods", "iopo", "--seeds", "1", "2", "3", "--jobs", "2")
    for kill in (signal.SIGTERM, signal.SIGKILL):
        done = len(jobs(folder))
        process = subprocess.Popen(run, cwd=ROOT, env=environment(folder))
        while len(jobs(folder)) < done + 4:
            time.sleep(0.2)
            assert process.poll() is None
        process.send_signal(kill)
        assert process.wait(120) == (75 if kill is signal.SIGTERM else -signal.SIGKILL)
    last = subprocess.run(
        run, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=900
    )
    assert last.returncode == 0, last.stdout + last.stderr
    ended = [row["job"] for row in jobs(folder) if row["code"] == 0]
    assert len(ended) == len(set(ended)), "a job that was done ran again"
    text = (folder / "run/paper_table.md").read_text()
    for word in ("| IOPO | 3 |", "| SFT | - |", "IFEval prompt strict", "commit: "):
        assert word in text
    again = subprocess.run(
        run, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and len(jobs(folder)) == len(set(ended)) + _stopped(folder)


def _stopped(folder: Path) -> int:
    return sum(row["code"] != 0 for row in jobs(folder))
