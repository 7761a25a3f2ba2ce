"""Whole rounds in processes: two of them, again, killed at ten moments, from a server, stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_rounds import make_talker

from iopo.files import sha256_file

ROOT = Path(__file__).resolve().parents[2]
ASKED = (
    "Name a town.", "Tell me about the sea.", "What is a plan?", "Describe a day.",
    "Name a friend.", "What is cold?", "Tell me about the night.", "Describe a people.",
)  # fmt: skip
SERVE = f"{sys.executable} -m iopo.evaluation.serve {{model}} --port {{port}} --dtype fp32"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker"))


def command(folder: Path, talker: Path, run: str, *more: str) -> list[str]:
    (folder / "seeds.txt").write_text("\n".join(ASKED))
    return [
        sys.executable, "-m", "iopo.rounds", "+experiment=tiny_random", f"model.path={talker}",
        "model.tiny=null", f"run={folder}/{run}", "data.heldout=null", "evaluation.samples=0",
        "optim.epochs=2", "optim.lr=1e-5", "data.max_prompt_tokens=1500",
        f"rounds.prompts={folder}/seeds.txt",
        "rounds.count=2", "rounds.prompts_per_round=8", "rounds.samples=8", "rounds.top_p=1",
        "rounds.most_constraints=1", "rounds.max_new_tokens=80", "rounds.stop_drop=null",
        *(more or ("rounds.heldout=[]", "rounds.seen=null")),
    ]  # fmt: skip


def environment(folder: Path, run: str) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": f"{folder}/cache-{run}", "OMP_NUM_THREADS": "1"}


def completed(folder: Path, talker: Path, run: str, *more: str) -> str:
    words = command(folder, talker, run, *more)
    done = subprocess.run(
        words, cwd=ROOT, env=environment(folder, run), capture_output=True, text=True
    )
    logs = "".join(path.read_text()[-2000:] for path in (folder / run / "logs").glob("*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done.stdout


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def made(run: Path) -> dict[str, str]:
    """Hashes of all that must be the same whatever happened in between."""
    names = ("sample/prompts.jsonl", "sample/responses.jsonl", "rows/new.jsonl",
             "rows/train.jsonl", "train/export/model.safetensors")  # fmt: skip
    files = [run / f"round-0{n}" / name for n in (1, 2) for name in names]
    return {str(path.relative_to(run)): sha256_file(path) for path in files}


def test_two_rounds_and_what_they_leave(tmp_path, talker):
    more = ("rounds.limit=4", "rounds.replay=0.25", "rounds.reference=first",
            f"rounds.seen={ROOT}/data/verified/train.jsonl")  # fmt: skip
    completed(tmp_path, talker, "run", *more)
    run = tmp_path / "run"
    start, first, second = records(run / "rounds.jsonl")
    assert start["drift"]["logratio_matched"] == 0 and first["drift"]["logratio_matched"] != 0
    assert second["rows"]["rows_replayed"] > 0 and first["rows"]["rows_new"] > 4
    assert {"sample", "rows", "train", "evaluate"} == second["stages"].keys()
    assert second["stages"]["train"]["tokens"] > 0 and second["stages"]["sample"]["tokens"] > 0
    assert "data:image/png" in (run / "report.html").read_text()
    # the second round starts from the first's export, with its own schedule and no old moments
    config = (run / "round-02/train/config.yaml").read_text()
    assert f"path: {run}/round-01/train/export" in config
    steps = [
        row for row in records(run / "round-02/train/metrics.jsonl") if row["split"] == "train"
    ]
    assert steps[0]["step"] == 1
    # the reference is the first policy, from which the second round's start differs
    assert abs(steps[0]["margin"]) > 1e-3
    jobs = (run / "jobs.jsonl").read_text()
    completed(tmp_path, talker, "run", *more)
    assert (run / "jobs.jsonl").read_text() == jobs, "a stage that was done ran again"


def test_rounds_killed_at_ten_moments_end_as_unbroken_ones(tmp_path, talker):
    started = time.monotonic()
    completed(tmp_path, talker, "unbroken")
    took = time.monotonic() - started
    rng = random.Random(0)
    words, killed = command(tmp_path, talker, "killed"), 0
    while killed < 10:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(tmp_path, "killed"), start_new_session=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(rng.uniform(0, took / 8))
            assert process.returncode == 0
            break  # it was done before its tenth end
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed >= 5
    completed(tmp_path, talker, "killed")
    assert made(tmp_path / "killed") == made(tmp_path / "unbroken")


def test_lora_rounds_sampled_from_our_server(tmp_path, talker):
    """The server of round 2 serves round 1's adapter, merged; both are ended."""
    completed(
        tmp_path, talker, "run", f"rounds.serve={SERVE}", "model.lora.rank=2", "rounds.samples=4",
        "rounds.heldout=[]", "rounds.seen=null",
    )  # fmt: skip
    run = tmp_path / "run"
    log = (run / "logs/round-02_sample.log").read_text()
    assert f"{run}/round-01/train/export-merged is served as export-merged" in log
    assert len(records(run / "round-02/sample/responses.jsonl")) == 32
    assert not list(run.glob("round-*/sample/server.json"))
    assert (run / "round-02/train/export/adapter_model.safetensors").exists()


def test_a_stop_signal_ends_the_rounds_and_their_stage(tmp_path, talker):
    process = subprocess.Popen(
        command(tmp_path, talker, "run"), cwd=ROOT, env=environment(tmp_path, "run"), text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "round-01 sample" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    assert not (tmp_path / "run/round-01/rows").exists()
