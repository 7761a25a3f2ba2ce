"""A sweep through SLURM, without a cluster: what sbatch is given, and what a warning does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults import ROOT, read_rows

pytestmark = pytest.mark.timeout(600)

# Stand-ins for SLURM's programs. sbatch keeps the file that it is given and, if told to, starts its
# tasks; requeued tasks start again; sacct knows that nothing failed.
PROGRAMS = {
    "sbatch": """
cp "${@: -1}" "$CLUSTER/batch.sh"
[ -n "$CLUSTER_RUNS" ] && for i in 0 1; do "$CLUSTER/bin/task" "100_$i"; done
echo "Submitted batch job 100"
""",
    "task": """
export SLURM_JOB_ID=100 SLURM_ARRAY_JOB_ID=100 SLURM_ARRAY_TASK_ID=${1#100_} SLURM_PROCID=0
export SLURM_STEP_ID=0 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_LOCALID=0
setsid bash "$CLUSTER/batch.sh" </dev/null >/dev/null 2>&1 &
""",
    "srun": """
shift 5  # --unbuffered --output FILE --error FILE
echo $$ > "$CLUSTER/pid-$SLURM_ARRAY_TASK_ID"
exec "$@" >> "$CLUSTER/output-$SLURM_ARRAY_TASK_ID" 2>&1
""",
    "scontrol": """
echo "$@" >> "$CLUSTER/requeued"
"$CLUSTER/bin/task" "$2"
""",
    "sacct": """
echo "JobID|State|NodeList"
for i in 0 1; do echo "100_$i|RUNNING|here"; done
""",
}


@pytest.fixture
def sweep(tmp_path):
    """Starts a sweep of two jobs, of 400 steps each, with `+launcher=slurm`."""
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text("#!/bin/bash" + text)
        (tmp_path / "bin" / name).chmod(0o755)
    started = []

    def start(**environ: str) -> subprocess.Popen:
        command = [
            *(sys.executable, "train.py", "+launcher=slurm", "+experiment=tiny_random"),
            *("objective.beta=0.1,0.2", "optim.epochs=1000", "optim.max_steps=400"),
            *("evaluation.samples=0", "export.model=false", f"hydra.sweep.dir={tmp_path}/sweep"),
            *("hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=4"),
        ]
        variables = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "CLUSTER": str(tmp_path),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        with open(tmp_path / "output", "w") as output:
            program = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **variables, **environ},
                stdout=output,
                stderr=output,
            )
        started.append(program)
        return program

    yield start
    for program in started:
        program.kill()
        program.wait()
    for path in tmp_path.glob("pid-*"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def wait_until(condition, tmp_path: Path, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (tmp_path / "output").read_text()[-3000:]
        time.sleep(0.05)


def test_what_sbatch_is_given(sweep, tmp_path):
    program = sweep()
    wait_until(lambda: (tmp_path / "batch.sh").exists() or program.poll() is not None, tmp_path)
    lines = (tmp_path / "batch.sh").read_text().splitlines()
    found = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    expected = {
        *("array=0-1%2", "partition=gpu", "nodes=1", "ntasks-per-node=1", "gpus-per-node=4"),
        *("cpus-per-task=64", "time=1440", "signal=USR2@300", "requeue", "open-mode=append"),
    }
    assert expected <= found, found
    assert "submitit.core._submit" in lines[-1] or "submitit.core._submit" in lines[-2]


@pytest.mark.slow
def test_a_warned_job_saves_is_requeued_and_ends(sweep, tmp_path):
    """SIGUSR2, submitit's warning: save, exit, requeue, resume; the other job notices nothing."""
    program = sweep(CLUSTER_RUNS="1")
    runs = [tmp_path / "sweep" / f"objective.beta={beta}" for beta in (0.1, 0.2)]
    wait_until(lambda: len(read_rows(runs[0])) > 20, tmp_path)
    os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGUSR2)
    wait_until(lambda: (tmp_path / "requeued").exists(), tmp_path)
    assert (tmp_path / "requeued").read_text() == "requeue 100_0\n"
    saved = [path.name for path in (runs[0] / "checkpoints").iterdir()]
    assert program.wait(600) == 0, (tmp_path / "output").read_text()[-3000:]
    for run in runs:
        assert (run / "COMPLETE").exists()
        steps = [row["step"] for row in read_rows(run) if row["split"] == "train"]
        assert steps == list(range(1, 401))
    assert f"resuming from {runs[0]}/checkpoints/{saved[0]}" in (tmp_path / "output-0").read_text()
    assert len(json.loads((runs[1] / "environment.json").read_text())) == 1
