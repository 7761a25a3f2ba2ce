"""`python train.py` as a user runs it: what it writes, what it refuses, what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_models import tiny_llama

from iopo.model.load import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = "rain wind sun moon tree river stone bird cloud light grass road".split()


def quads(count: int = 8) -> list[dict]:
    """Quads of unequal length: lower case against upper case."""
    rows = []
    for i in range(count):
        y = " ".join(WORDS[i % 5 : i % 5 + 2 + i % 6])
        rows.append({
            "id": f"q{i}", "x1": f"Write about {WORDS[i]}. Lower case.",
            "x2": f"Write about {WORDS[i]}. Upper case, please.", "y1": y, "y2": y.upper(),
        })  # fmt: skip
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny(tmp_path):
    """Runs train.py on a random two-layer model; returns the process and its run folder."""
    data = write(tmp_path / "train.jsonl", quads())

    def run(*overrides: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        command = [
            sys.executable, str(ROOT / "train.py"), *flags, "+experiment=tiny_random",
            f"run={tmp_path}/run", f"data.train={data}", f"data.heldout={data}",
            "evaluation.samples=0", "export.model=false", *overrides,
        ]  # fmt: skip
        environment = os.environ | {
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
        )

    return run


def test_thirty_steps_overfit_eight_quads(tiny, tmp_path):
    done = tiny("evaluation.samples=2", "export.model=true")
    assert done.returncode == 0, done.stderr
    assert "step 0: loss 0.6931472" in done.stdout
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 30
    assert summary["heldout"][1]["group_accuracy"] == 1.0
    assert summary["train"]["accuracy"] == 1.0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 31))
    for name in ("config.yaml", "environment.json", "data.json", "curves.png", "report.html",
                 "samples.jsonl", "COMPLETE", "export/config.json"):  # fmt: skip
        assert (run / name).exists(), name
    shown, _, folded = (run / "report.html").read_text().partition("more numbers")
    assert shown.index("<img") < shown.index("heldout: loss") and shown.count('class="n"') == 20
    assert "train: tokens_per_s" in folded and "hollow: cut_off" in folded
    again = tiny()
    assert again.returncode == 0 and "nothing to do" in again.stdout


@pytest.mark.parametrize("source", ["live", "cache", "adapter_off"])
def test_loss_at_step_0_is_ln2(tiny, source):
    lora = ["model.lora.rank=2"] if source == "adapter_off" else []
    done = tiny(f"reference.source={source}", "optim.max_steps=1", *lora)
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("step 0: loss"))
    assert abs(float(line.split()[3].rstrip(",")) - 0.6931472) <= 1e-6


@pytest.mark.parametrize(
    "reference",
    [("live",), ("adapter_off", "model.lora.rank=2", "parallel.shard_processes=2")],
    ids=lambda options: options[0],
)
def test_a_rank_without_quads_takes_part_in_a_sharded_reference(tiny, tmp_path, reference):
    """Three quads in steps of two, and three held out, leave the second rank without any."""
    source, *more = reference
    lora = [option for option in more if "lora" in option]
    losses = {}
    for processes, options in (("1", lora), ("2", more)):
        done = tiny(f"run={tmp_path}/{processes}", f"parallel.processes={processes}", *options,
                    f"reference.source={source}", "data.limit_rows=3", "evaluation.quads=3",
                    "optim.global_batch_quads=2", "optim.max_steps=3", "optim.lr=1e-5",
                    "parallel.timeout_s=60")  # fmt: skip
        assert done.returncode == 0, done.stderr
        text = (tmp_path / processes / "metrics.jsonl").read_text()
        losses[processes] = [json.loads(line)["loss"] for line in text.splitlines()]
    assert losses["1"] == pytest.approx(losses["2"], abs=1e-5)


def test_all_weights_train_on_from_a_merged_adapter(tiny, tmp_path):
    first = tiny("model.lora.rank=2", "optim.max_steps=1", "export.model=true")
    assert first.returncode == 0, first.stderr
    adapter = tmp_path / "run" / "export"
    done = tiny(f"run={tmp_path}/on", f"model.adapter={adapter}", "optim.max_steps=2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "on" / "summary.json").read_text())
    assert summary["train"]["grad_norm"] > 0


def change(row: dict, **values) -> list[dict]:
    return quads(3) + [{k: v for k, v in (row | values).items() if v is not None}]


BAD = {
    "missing file": ("data.train=nowhere.jsonl", None, ["nowhere.jsonl", "no such file"]),
    "no y2": (None, change(quads(4)[3], y2=None), ["train.jsonl:4", "y2"]),
    "y1 is y2": (None, change(quads(4)[3], y2=quads(4)[3]["y1"]), ["train.jsonl:4", "y1", "y2"]),
    "empty response": (None, change(quads(4)[3], y1=""), ["train.jsonl:4", "y1", "empty"]),
    "prompt too long": ("data.on_overlong=error", change(quads(4)[3], x1="long " * 400),
                        ["q3", "max_prompt_tokens"]),
    "unknown key": ("optim.learning_rate=1", None, ["learning_rate"]),
    "beta 0": ("objective.beta=0", None, ["objective.beta", "more than 0"]),
    "world size": ("parallel.processes=3", None, ["global_batch_quads is 8", "3 ranks"]),
    "adapter off without adapters": ("reference.source=adapter_off", None, ["model.lora.rank"]),
    "cuda": ("parallel.device=cuda", None, ["parallel.device", "no CUDA device"]),
    "margin without constraints": ("objective.margin_per_constraint=0.5", None, ["c1", "q0"]),
    "offload alone": ("parallel.offload=true", None, ["parallel.offload", "two processes"]),
    "shards that do not divide": ("parallel.processes=2 parallel.shard_processes=3", None,
                                  ["parallel.shard_processes is 3", "2"]),
    "a folder that is no model": ("model.tiny=null model.path=/tmp", None, ["/tmp", "config.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_message(tiny, tmp_path, case):
    override, rows, words = BAD[case]
    if rows is not None:
        write(tmp_path / "train.jsonl", rows)
    done = tiny(*(override or "").split())
    assert done.returncode not in (0, 75), done.stdout
    for word in words:
        assert word in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "a half-made run folder is left"


def test_weights_that_are_not_there_are_refused_before_anything_is_written(tiny, tmp_path):
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    done = tiny("model.tiny=null", f"model.path={model}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model.safetensors: 43 bytes, a git-lfs pointer" in done.stderr
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache" / "iopo" / "tokens").exists()


def test_the_file_without_a_row_left_is_named(tiny, tmp_path):
    write(tmp_path / "long.jsonl", [quads(1)[0] | {"x1": "long " * 400}])
    done = tiny(f"data.heldout={tmp_path}/long.jsonl", "data.on_overlong=drop")
    assert done.returncode == 2
    assert "long.jsonl: no row is left" in done.stderr and "0 of 1 rows kept" in done.stderr


def test_the_papers_data_is_not_there(tiny, tmp_path):
    done = tiny("data.train=data/trace/train.jsonl")
    assert done.returncode == 2
    assert "never released" in done.stderr and "iopo/construct" in done.stderr


@pytest.mark.slow
def test_multirun_gives_six_folders_and_a_table(tiny, tmp_path):
    done = tiny("objective.beta=0.05,0.1,0.2", "seed=0,1", "optim.max_steps=3",
                "optim.global_batch_quads=4", f"hydra.sweep.dir={tmp_path}/sweep",
                flags=("-m",))  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = [path.parent for path in (tmp_path / "sweep").rglob("COMPLETE")]
    losses = {json.loads((run / "summary.json").read_text())["train"]["loss"] for run in runs}
    assert len(runs) == len(losses) == 6  # a step holds half of the quads, so seeds differ, too
    table = done.stdout[done.stdout.rindex("┏") :]
    assert table.count("complete") == 6 and "group_accuracy" in table


def test_planted_secrets_reach_no_file_and_no_output(tiny, tmp_path, monkeypatch):
    """From the environment, the config, argv and an error's message; also what wandb keeps."""
    planted = {"MY_SERVICE_TOKEN": "correct-horse-battery", "WANDB_API_KEY": "0123456789abcdef" * 2}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    secrets = [*planted.values(), "sk-abcdefghijklmnop1234", "hunter2hunter2"]
    arguments = (
        *("tracker.wandb=offline", f"tracker.project=key-{secrets[2]}", "optim.max_steps=1"),
        *(
            f"tracker.tags=['password={secrets[3]}','{secrets[0]}']",
            "checkpoint.save_every_steps=1",
        ),
    )
    done = tiny(*arguments)
    assert done.returncode == 0, done.stderr
    refused = tiny(*arguments, f"data.train=/nowhere/{secrets[0]}/{secrets[2]}")
    assert refused.returncode == 2 and "no such file" in refused.stderr
    printed = done.stdout + done.stderr + refused.stdout + refused.stderr
    assert [secret for secret in secrets if secret in printed] == []
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for path in written:
        content = path.read_bytes()
        assert [secret for secret in secrets if secret.encode() in content] == [], path
