"""Faults injected one by one into a resumed run, each with its expected outcome.

`python -m pytest tests/test_faults.py -m slow -s` ends with the table.
"""

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
from helpers_tokenizer import tiny_tokenizer

from benchmarks.faults import ROOT, read_rows
from iopo.training.checkpoint.folders import folder_of, latest, partial_of, step_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SAVED, LAST = 12, 18  # the steps of the run that is harmed, and of its continuation


def verified_quads(name: str) -> list[dict]:
    lines = (ROOT / "data" / "verified" / f"{name}.jsonl").read_text().splitlines()[:8]
    return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Place:
    """A folder with a model, data, caches and a run of 12 steps (checkpoints at 9 and 12)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.model, self.data = folder / "model", folder / "quads.jsonl"
        self.heldout = folder / "heldout.jsonl"
        self.output = ""
        self.started: list[subprocess.Popen] = []

    def make(self) -> None:
        # Untied, so that a broken row of the embedding breaks only the quads that use it.
        tiny_llama(vocab=400, tied=False).save_pretrained(self.model)
        tiny_tokenizer().save_pretrained(self.model)
        write_rows(self.data, verified_quads("train"))
        write_rows(self.heldout, verified_quads("heldout"))
        assert self.train(SAVED) == 0, self.output
        (self.run / "COMPLETE").unlink()

    def command(self, steps: int, *overrides: str) -> list[str]:
        return [
            *(sys.executable, "train.py", "+experiment=tiny_random", f"run={self.run}"),
            *("model.tiny=null", f"model.path={self.model}", f"data.train={self.data}"),
            f"data.heldout={self.heldout}",
            *("optim.epochs=100", f"optim.max_steps={steps}", "optim.global_batch_quads=4"),
            *("data.limit_rows=null", "data.max_prompt_tokens=2000", "export.model=false"),
            *("evaluation.samples=0", "checkpoint.save_every_steps=3"),
            *overrides,
        ]

    def start(
        self, steps: int, *overrides: str, limit_bytes: int | None = None
    ) -> subprocess.Popen:
        shell = [] if limit_bytes is None else ["prlimit", f"--fsize={limit_bytes}"]
        cache = str(self.folder / "cache")
        program = subprocess.Popen(
            [*shell, *self.command(steps, *overrides)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(program)
        return program

    def stop_all(self) -> None:
        """Leave no run behind, whatever a test did."""
        for program in self.started:
            program.kill()  # its ranks die with it
            program.wait()

    def train(self, steps: int, *overrides: str, limit_bytes: int | None = None) -> int:
        program = self.start(steps, *overrides, limit_bytes=limit_bytes)
        self.output = program.communicate(timeout=600)[0]
        return program.returncode

    def failed(self) -> str:
        return (self.run / "FAILED").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("made"))
    place.make()
    return place


@pytest.fixture
def place(made, tmp_path):
    """A copy to harm, at the path of the original: paths are part of the config."""
    backup = tmp_path / "backup"
    shutil.copytree(made.folder, backup, symlinks=True)
    yield made
    made.stop_all()
    shutil.rmtree(made.folder)
    shutil.copytree(backup, made.folder, symlinks=True)


@pytest.fixture(scope="module")
def table():
    rows: list[tuple[str, str]] = []
    yield rows
    width = max((len(fault) for fault, _ in rows), default=0)
    print("\n\n" + "\n".join(f"{fault:{width}}  {outcome}" for fault, outcome in rows))


def finishes(place: Place, *overrides: str) -> None:
    assert place.train(LAST, *overrides) == 0, place.output
    steps = [row["step"] for row in read_rows(place.run) if row["split"] == "train"]
    assert steps == list(range(1, LAST + 1))


def test_nothing_wrong(place, table):
    finishes(place)
    assert f"step {SAVED} is done" in place.output
    table.append(("none", f"resumes after step {SAVED}"))


def test_disk_full_in_a_save(place, table):
    assert place.train(LAST, limit_bytes=100_000) == 1
    assert "step 15 could not be written" in place.failed()
    assert latest(place.run)[0] == folder_of(place.run, SAVED)
    table.append(("disk full in a save", "exit 1, says so; step 12 stays whole; restart resumes"))
    finishes(place)


def test_truncated_shard(place, table):
    os.truncate(folder_of(place.run, SAVED) / "__0_0.distcp", 1000)
    finishes(place)
    assert "__0_0.distcp has 1000 bytes" in place.output and "step 9 is done" in place.output
    table.append(("truncated shard", "reported, resumes from the checkpoint before (step 9)"))


def test_flipped_bit(place, table):
    shard = folder_of(place.run, SAVED) / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    finishes(place)
    assert "another sha256" in place.output and "step 9 is done" in place.output
    table.append(("flipped bit in a shard", "reported, resumes from step 9"))


def test_deleted_complete_file(place, table):
    (folder_of(place.run, SAVED) / "COMPLETE").unlink()
    finishes(place)
    assert "has no COMPLETE file: ignored" in place.output
    table.append(("deleted COMPLETE", "reported, resumes from step 9"))


def test_corrupted_reference_cache(place, table):
    caches = list((place.folder / "cache").rglob("logps-*.npz"))
    assert caches
    for cache in caches:
        data = bytearray(cache.read_bytes())
        data[::97] = bytes(len(data[::97]))
        cache.write_bytes(data)
    assert place.train(LAST) == 1
    assert "reference cache is damaged" in place.output
    for cache in caches:
        cache.unlink()
    finishes(place)
    table.append(("corrupted reference cache", "exit 1, names the file; deleted, it is made again"))


def test_edited_data(place, table):
    text = place.data.read_text()
    place.data.write_text(text.replace("the", "teh", 1))
    assert place.train(LAST) == 2
    assert "the data is not the one the run began with" in place.output
    table.append(("edited data file", "exit 2, refused by name, run folder untouched"))


def test_another_tokenizer(place, table):
    tiny_tokenizer(vocab_size=390).save_pretrained(place.model)
    assert place.train(LAST) == 2
    assert "the tokenizer and template is not the one the run began with" in place.output
    table.append(("other tokenizer", "exit 2, refused by name"))


def test_another_objective(place, table):
    assert place.train(LAST, "objective.beta=0.5", "tracker.log_every_steps=2") == 2
    assert "objective.beta: 0.1 -> 0.5" in place.output
    table.append(("other beta", "exit 2, refused by name"))


def test_not_a_number_in_one_quad(tmp_path, table):
    """A character that only one quad has gets an embedding that is not a number."""
    place = Place(tmp_path)
    model = tiny_llama(vocab=400, tied=False)
    tokenizer = tiny_tokenizer()
    (token,) = set(tokenizer.encode("\x07")) - set(tokenizer.encode(""))
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.save_pretrained(place.model)
    tokenizer.save_pretrained(place.model)
    quads = verified_quads("train")
    quads[5]["y1"] += " \x07"
    write_rows(place.data, quads)
    write_rows(place.heldout, verified_quads("heldout"))
    # Without a reference: with one, the check of step 0 or the cache refuses such a model earlier.
    assert place.train(LAST, "objective=simpo") == 1, place.output
    assert "not finite" in place.failed() and "step " in place.failed()
    table.append(("NaN in one quad", "exit 1 before the update, names the step and its quads"))


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks_of(program: subprocess.Popen) -> list[int]:
    """Process ids of the spawned ranks, in order."""
    found = [p for p in children(program.pid) if b"spawn_main" in _command(p)]
    return sorted(found)


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for(condition, program: subprocess.Popen) -> None:
    end = time.monotonic() + 400
    while not condition():
        assert program.poll() is None and time.monotonic() < end
        time.sleep(0.002)


def start_two(place: Place, *overrides: str) -> subprocess.Popen:
    """Two ranks that have gone on beyond the saved step and have many steps to go."""
    program = place.start(5000, "parallel.processes=2", *overrides)
    wait_for(lambda: len(read_rows(place.run)) > SAVED + 2, program)
    return program


def test_a_rank_that_dies(place, table):
    program = start_two(place)
    victim = ranks_of(program)[1]
    os.kill(victim, signal.SIGKILL)
    program.communicate(timeout=200)
    assert program.returncode == 1
    assert "rank 1 was ended by SIGKILL" in place.failed()
    table.append(("a rank that exits", "all end within 10 s, exit 1, FAILED names rank and signal"))


def test_a_rank_that_hangs(place, table):
    program = start_two(place, "parallel.timeout_s=30")
    victim = ranks_of(program)[1]
    os.kill(victim, signal.SIGSTOP)  # the worst kind: it cannot even write its stacks
    program.communicate(timeout=200)
    assert program.returncode == 1
    assert "no progress" in place.failed()
    # where rank 0 waits depends on the moment: in a gather of weights, a sum, or should_stop
    assert 'train.py", line' in (place.run / "errors" / "rank-0.stacks.txt").read_text()
    table.append(("a rank that hangs", "all end after timeout_s, exit 1, stacks in errors/"))


def test_sigterm_in_a_save(place, table):
    program = place.start(5000)
    folder = place.run / "checkpoints"
    wait_for(lambda: any(step_of(p) > SAVED for p in folder.glob("step-????????")), program)
    wait_for(lambda: any(folder.glob("*.partial")), program)
    program.send_signal(signal.SIGTERM)
    program.communicate(timeout=200)
    assert program.returncode == 75
    newest, remarks = latest(place.run)
    assert newest is not None and remarks == []
    assert step_of(newest) == max(row["step"] for row in read_rows(place.run))
    assert not partial_of(place.run, step_of(newest)).exists()
    table.append(("SIGTERM in a save", "exit 75, that save and the last step's are complete"))


def test_a_clock_that_jumps_back(place, table):
    os.utime(folder_of(place.run, SAVED), (0, 0))
    for path in folder_of(place.run, SAVED).iterdir():
        os.utime(path, (0, 0))
    finishes(place)
    assert f"step {SAVED} is done" in place.output
    table.append(("clock jumping back", f"resumes from step {SAVED}: order is by step, not time"))


def test_a_live_run(place, table):
    program = place.start(5000)
    wait_for(lambda: len(read_rows(place.run)) > SAVED + 2, program)
    assert place.train(5000) == 2
    assert f"in use by a live run (pid {program.pid}" in place.output
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    program.communicate(timeout=200)
    assert program.returncode == 75
    table.append(("folder of a live run", "exit 2, names the process; the live run goes on"))
