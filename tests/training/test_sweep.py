"""Sweeps as a user runs them: a failed job stops no other, finished ones are skipped, one cache."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults import ROOT, read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TINY = (
    *("+experiment=tiny_random", "evaluation.samples=0", "export.model=false"),
    *("optim.epochs=1000", "checkpoint.save_every_steps=5"),
)


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "train.py", *overrides, *TINY],  # -m comes before any override
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def sweep(folder: Path, *overrides: str) -> tuple[int, str]:
    program = start(folder, "-m", f"hydra.sweep.dir={folder}/sweep", *overrides)
    output = program.communicate(timeout=800)[0]
    return program.returncode, output


def job(folder: Path, override: str) -> Path:
    """The job's folder, which is named after what is swept."""
    return folder / "sweep" / override


def test_a_failed_job_is_said_and_stops_no_other_and_finished_ones_are_skipped(tmp_path):
    # The first job's update overflows, so that its second step has no finite loss.
    jobs = ("optim.lr=1e38,5e-3", "optim.max_steps=6")
    code, output = sweep(tmp_path, *jobs)
    failed, good = (job(tmp_path, f"optim.lr={lr}") for lr in ("1e+38", "0.005"))
    assert code == 1
    assert "not finite" in (failed / "FAILED").read_text() and (good / "COMPLETE").exists()
    assert output.index(f"FAILED {failed}") < output.index(f"of 8 examples, {good}")
    table = output[output.rindex("┏") : output.rindex("┘")]
    assert table.count("complete") == 1 and table.count("failed") == 1

    rows = read_rows(good)
    code, output = sweep(tmp_path, *jobs)
    assert code == 1 and f"{good} is complete: nothing to do" in output
    assert read_rows(good) == rows

    assert len(list((tmp_path / "cache" / "iopo" / "reference").iterdir())) == 1
    page = [sys.executable, "-m", "iopo.training.report", str(tmp_path / "sweep")]
    subprocess.run(page, cwd=ROOT, check=True)
    with open(tmp_path / "sweep" / "sweep.csv", newline="") as file:
        table_rows = {row["run"]: row for row in csv.DictReader(file)}
    assert table_rows[failed.name]["state"] == "failed"
    assert table_rows[good.name]["state"] == "complete" and table_rows[good.name]["optim.lr"]
    html = (tmp_path / "sweep" / "sweep.html").read_text()
    assert html.count('class="best"') == 1 and "data:image/png" in html


def test_a_stopped_sweep_starts_no_other_job_and_goes_on_when_started_again(tmp_path):
    jobs = ("seed=0,1", "optim.max_steps=60")
    program = start(tmp_path, "-m", f"hydra.sweep.dir={tmp_path}/sweep", *jobs)
    while sum(len(read_rows(run)) for run in (tmp_path / "sweep").glob("*seed=0")) < 5:
        assert program.poll() is None, program.communicate()[0]
        time.sleep(0.02)
    program.send_signal(signal.SIGTERM)
    output = program.communicate(timeout=300)[0]
    assert program.returncode == 75, output
    assert not list((tmp_path / "sweep").glob("*seed=1"))
    code, output = sweep(tmp_path, *jobs)
    runs = [job(tmp_path, f"seed={seed}") for seed in (0, 1)]
    assert code == 0 and f"resuming from {runs[0]}" in output
    for run in runs:
        steps = [row["step"] for row in read_rows(run) if row["split"] == "train"]
        assert steps == list(range(1, 61))


def test_jobs_at_the_same_time_fill_the_reference_cache_once(tmp_path):
    programs = [
        start(tmp_path, f"run={tmp_path}/{beta}", f"objective.beta={beta}", "optim.max_steps=2")
        for beta in (0.1, 0.2)
    ]
    outputs = [program.communicate(timeout=300)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], outputs
    # training rows and held-out rows are two files: whoever locked a file first has filled it
    assert sum(output.count("batches") > 0 for output in outputs) >= 1
    filled = [line for output in outputs for line in output.splitlines() if "batches" in line]
    assert len(filled) == len(set(filled)), filled
    assert len(list((tmp_path / "cache" / "iopo" / "reference").iterdir())) == 1
