"""The lines of data/README.md as they are written there: a public set, quads, a training step."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers_trace
import pytest
from helpers_hub import serving
from helpers_judge import Answer, Script, StubServer
from test_ifseeds import writer
from test_schemas import PREFERENCES, SETS

from iopo.construct.importers import read_seeds
from iopo.construct.verify import main as verify
from iopo.files import read_records, write_records

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| .* \| `(\+recipe=.*)` \|$", README, re.MULTILINE)
FIXTURES = (  # in the order of the lines
    "tulu3_persona_if", "dolci_instruct_dpo", "tulu3_preference_mixture",
    "ultrafeedback_binarized", "helpsteer3_preference", "rlvr_ifeval",
    "if_multi_constraints_upto5", "muldimif", "verinstruct",
)  # fmt: skip


def answer(body: dict, before: int) -> Answer:
    """Of a model in place of MODEL: one of several forms, by the seed of the request."""
    number = body["seed"] % 12
    asked = [body["messages"][-1]["content"]] * (number + 1)
    return Answer(writer(asked, body["seed"])[number][0])


def scripted(file: Path) -> Script:
    """The pipeline's scripted server, which writes numbered notes, for other seeds."""
    seeds = [seed["instruction"] for seed in read_seeds(file)]

    def script(body: dict, before: int) -> Answer:
        first, *others = body["messages"]
        for number, seed in enumerate(seeds):
            noted = first["content"].replace(seed, f"Write note number {number}.")
            first = first | {"content": noted}
        return helpers_trace.honest(body | {"messages": [first, *others]}, before)

    return script


def run(environment: dict[str, str], *command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_line_for_every_set():
    assert len(LINES) == len(FIXTURES) == len(list(SETS.glob("*.jsonl")))
    assert {*FIXTURES} >= {*PREFERENCES}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("line", "name"), zip(LINES, FIXTURES, strict=True), ids=FIXTURES)
def test_from_the_set_to_quads_to_a_training_step(line, name, tmp_path):
    file = SETS / f"{name}.jsonl"
    repo, _, split = re.sub(".*hf://", "", line.split()[1]).partition(":")
    sets = {(repo, "main"): {f"{split or 'data/train'}-00000-of-00001.jsonl": file.read_bytes()}}
    out = tmp_path / "out"
    script = scripted(file) if "trace" in line else answer
    with serving(sets) as hub, StubServer(script) as server:
        environment = os.environ | {
            "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }  # fmt: skip
        asked = f"recipe.endpoint.base_url={server.base_url} recipe.endpoint.model=stub"
        if "ifseeds" in line:
            asked += " recipe.samples=6"
        given = line.replace("recipe.model_path=MODEL", asked).replace("=FILE", f"={file}")
        given = given.replace("=URL", f"={server.base_url}").replace("=NAME", "=stub")
        run(environment, "-m", "iopo.construct", *given.split(), f"recipe.out={out}")
    quads = out / ("quads.jsonl" if "trace" in line else "train.jsonl")
    assert verify([str(path) for path in out.glob("*.jsonl") if path.stem in
                   ("train", "heldout", "heldout_kinds", "quads")]) == 0  # fmt: skip
    if name in ("dolci_instruct_dpo", "helpsteer3_preference"):  # dialogues among them: these alone
        dialogues = [row for row in read_records(quads) if isinstance(row["x1"], list)]
        assert all(len(row["x1"]) >= 3 for row in dialogues) and len(dialogues) >= 2
        write_records(quads, dialogues)
    run(
        environment, "train.py", "+experiment=tiny_random", f"run={tmp_path / 'run'}",
        f"data.train={quads}", "data.heldout=null", "data.max_prompt_tokens=4000",
        "data.max_response_tokens=4000", "data.limit_rows=2", "optim.global_batch_quads=2",
        "optim.epochs=1", "evaluation.samples=0", "export.model=false",
    )  # fmt: skip
    (step,) = read_records(tmp_path / "run" / "metrics.jsonl")
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (tmp_path / "run" / "COMPLETE").exists()
