"""The TRACE pipeline against a scripted server over HTTP: counts, faults, kills, second runs."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import helpers_trace
import pytest
from helpers_judge import Answer, StubServer
from omegaconf import OmegaConf

from iopo.construct.trace import replies as trace_replies
from iopo.construct.trace import stages as trace_stages
from iopo.construct.trace import taxonomy
from iopo.construct.trace.config import LANGUAGES, OPERATIONS, TraceRecipe
from iopo.construct.trace.pipeline import run
from iopo.construct.trace.replies import Rejected, Unreadable
from iopo.construct.trace.stages import STAGES
from iopo.construct.verify import verify
from iopo.data.rows import read_rows
from iopo.evaluation.benchmarks import trace
from iopo.evaluation.config import EndpointSection
from iopo.evaluation.endpoint import EndpointError

ROOT = Path(__file__).resolve().parents[2]


def seeds(folder: Path, number: int) -> Path:
    path = folder / "seeds.txt"
    path.write_text("".join(f"Write note number {n}.\n" for n in range(number)))
    return path


def recipe(folder: Path, base_url: str, number: int = 40, **changes) -> TraceRecipe:
    endpoint = EndpointSection(
        base_url=base_url, model="stub", backoff_s=0.01, timeout_s=20, concurrency=8
    )
    fields = {"seeds": str(seeds(folder, number)), "out": str(folder / "out"), "endpoint": endpoint}
    return TraceRecipe(**(fields | changes))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outputs(out: Path) -> dict[str, str]:
    """All files but the replies, whose order is that of arrival."""
    return {p.name: p.read_text() for p in sorted(out.iterdir()) if p.name != "replies.jsonl"}


def check_counts(out: Path, number: int) -> None:
    """Every row that entered a stage left it once, as passed or as dropped with a reason."""
    counts = json.loads((out / "counts.json").read_text())
    assert list(counts) == list(STAGES)
    for name, stage in STAGES.items():
        found = counts[name]
        assert found["in"] == (number if stage.source is None else counts[stage.source]["out"])
        assert found["in"] == found["out"] + sum(found["dropped"].values())
        kept, dropped = lines(out / f"{name}.jsonl"), lines(out / f"{name}.dropped.jsonl")
        assert len(kept) == found["out"] and all(row["reason"] for row in dropped)
        if name != "cells":
            ids = [row["id"] for row in kept + dropped]
            assert len(set(ids)) == len(ids) == found["in"]
            before = None if stage.source is None else lines(out / f"{stage.source}.jsonl")
            assert before is None or {row["id"] for row in before} == set(ids)


def test_every_stage_counts_and_the_quads_are_good(tmp_path, caplog):
    caplog.set_level("INFO", logger="iopo.construct")
    with StubServer(helpers_trace.honest) as server:
        settings = recipe(tmp_path, server.base_url, 60)
        run(settings)
        first = outputs(tmp_path / "out")
        calls = len(server.bodies)
        run(settings)
        assert len(server.bodies) == calls  # nothing is asked twice
        assert max(server.seen.values()) == 1
    assert outputs(tmp_path / "out") == first
    out = tmp_path / "out"
    check_counts(out, 60)
    counts = json.loads(first["counts.json"])
    assert {"not fit to be taken apart"} <= set(counts["structure"]["dropped"])
    assert {"not complete", "redundant"} <= set(counts["check"]["dropped"])
    assert set(counts["score"]["dropped"]) == {"not a full score"}
    # what is only added or deleted cannot tell both responses apart
    assert set(counts["cells"]["operations_out"]) <= {"revise"}
    assert any(
        "expand: 60 rows, 60 requests to send (0 cached), about" in line for line in caplog.messages
    )
    assert any(
        "expand: 60 rows, 0 requests to send (60 cached)" in line for line in caplog.messages
    )

    quads = read_rows(out / "quads.jsonl", "quad")
    pairs, sft = read_rows(out / "pairs.jsonl", "pair"), read_rows(out / "sft.jsonl", "sft")
    assert len(quads) == counts["cells"]["out"] > 5
    assert len(pairs) == counts["worse"]["out"] == len(sft) > len(quads)
    for row in quads:
        assert "1. Be brief.\n2. Be polite." in row.x1 and "1. Be long.\n" in row.x2
        assert "brief" in row.y1 and "long" in row.y2
    assert [c["params"]["type"] for c in quads[0].c1] == ["Numerical", "Tone and style"]
    found, summary = verify([out / "quads.jsonl"])
    assert found == [] and summary.judged == len(quads)


def test_a_stage_runs_alone_and_says_what_it_needs(tmp_path, caplog):
    caplog.set_level("INFO", logger="iopo.construct")
    with StubServer(helpers_trace.honest) as server:
        run(recipe(tmp_path, server.base_url, 8, stages=["expand"]))
        assert len(server.bodies) == 8
        with pytest.raises(ValueError, match="run stage 'structure' before 'check'"):
            run(recipe(tmp_path, server.base_url, 8, stages=["check"]))
        run(recipe(tmp_path, server.base_url, 8, stages=["structure"]))
        caplog.clear()
        run(recipe(tmp_path, server.base_url, 8, plan=True))
        assert len(server.bodies) == 16
    said = [r.getMessage() for r in caplog.records if r.name.startswith("iopo.construct")]
    assert said[0].startswith("expand: 8 rows, 0 requests")
    assert said[2].startswith("check: ") and "requests to send" in said[2]
    assert "respond: not known before 'check' has run" in said


def test_faults_change_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with StubServer(helpers_trace.troubled) as server:
        run(recipe(tmp_path / "a", server.base_url, 40, attempts=3))
        statuses = len(server.bodies) - len(server.seen)
    with StubServer(helpers_trace.honest) as server:
        run(recipe(tmp_path / "b", server.base_url, 40, attempts=3))
    assert statuses > 5
    found, expected = outputs(tmp_path / "a" / "out"), outputs(tmp_path / "b" / "out")
    assert found == expected
    check_counts(tmp_path / "a" / "out", 40)


def test_what_a_small_model_says_is_dropped_with_reasons(tmp_path):
    def babble(body, before):
        return Answer("Sure! I can help you with that.")

    with StubServer(babble) as server:
        counts = run(recipe(tmp_path, server.base_url, 5))
    assert counts["expand"] == {"in": 5, "out": 0, "dropped": {"unreadable reply": 5}}
    dropped = lines(tmp_path / "out" / "expand.dropped.jsonl")
    assert all("no JSON object with 'instruction'" in row["detail"] for row in dropped)
    assert counts["cells"] == {"in": 0, "out": 0, "dropped": {}}


@pytest.mark.parametrize("always", [False, True])
def test_half_of_a_surrogate_pair_is_asked_for_again(tmp_path, always):
    """It is not valid text, and a quad of it has no id."""

    def script(body, before):
        good = helpers_trace.honest(body, before)
        said = good.text.startswith("A long note")
        return Answer(good.text + " \ud83d") if said and (always or not body["seed"]) else good

    with StubServer(script) as server:
        counts = run(recipe(tmp_path, server.base_url, 20))
    dropped = lines(tmp_path / "out" / "respond2.dropped.jsonl")
    halves = [row for row in dropped if "'response' holds half of a surrogate" in row["detail"]]
    assert bool(halves) == always and (counts["cells"]["out"] > 0) != always
    assert counts["respond2"]["dropped"].get("unreadable reply", 0) == len(halves)


def test_a_dead_server_stops_the_run_and_keeps_the_replies(tmp_path):
    def dying(body, before):
        prompt = body["messages"][0]["content"]
        if prompt.startswith("Take"):
            return Answer(status=401, body="no")
        return helpers_trace.honest(body, before)

    with StubServer(dying) as server, pytest.raises(EndpointError, match="OPENAI_API_KEY"):
        run(recipe(tmp_path, server.base_url, 5))
    assert len(lines(tmp_path / "out" / "expand.jsonl")) == 5
    with StubServer(helpers_trace.honest) as server:
        run(recipe(tmp_path, server.base_url, 5))
        assert not any(
            b["messages"][0]["content"].startswith("Make a simple") for b in server.bodies
        )


def kill_after(command: list[str], server: StubServer, calls: int) -> int:
    """Run until so many more calls arrived, then SIGKILL; the exit status."""
    before = len(server.bodies)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(server.bodies) < before + calls:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def killed_twice(tmp_path: Path, number: int, first: int, second: int) -> None:
    out = tmp_path / "out"
    with StubServer(helpers_trace.troubled) as server:
        settings = recipe(tmp_path, server.base_url, number, attempts=3)
        command = [
            sys.executable, "-m", "iopo.construct", "+recipe=trace",
            f"recipe.seeds={settings.seeds}", f"recipe.out={out}", "recipe.attempts=3",
            f"recipe.endpoint.base_url={server.base_url}", "recipe.endpoint.model=stub",
            "recipe.endpoint.backoff_s=0.01", "recipe.endpoint.concurrency=8",
        ]  # fmt: skip
        assert kill_after(command, server, first) == -signal.SIGKILL
        assert kill_after(command, server, second) == -signal.SIGKILL
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        # asked again is only what failed or was under way at a kill
        again = Counter(server.seen.values())
        assert max(again) <= 4
        calls = len(server.bodies)
        result = outputs(out)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0 and len(server.bodies) == calls
        assert outputs(out) == result
    check_counts(out, number)
    (tmp_path / "whole").mkdir()
    with StubServer(helpers_trace.honest) as server:
        run(recipe(tmp_path / "whole", server.base_url, number, attempts=3))
    whole = outputs(tmp_path / "whole" / "out")
    assert result == whole


def test_killed_twice(tmp_path):
    killed_twice(tmp_path, 12, 10, 15)


@pytest.mark.slow
def test_500_seeds_killed_twice(tmp_path):
    killed_twice(tmp_path, 500, 300, 1500)


# --- prompts, replies, taxonomy ---


def test_taxonomy_is_the_papers():
    dimensions = taxonomy.read()
    assert {d.tag: d.type for d in dimensions} == trace.TYPE_OF
    assert len(dimensions) == 26 and sum(d.count for d in dimensions) == 5085
    assert sum(taxonomy.TRAINING_COUNTS) == 119_345
    assert taxonomy.named(" 数值约束 ", dimensions) == "Numerical"
    assert taxonomy.named("numerical", dimensions) == "Numerical"
    assert taxonomy.named("Length", dimensions) is None and taxonomy.named(3, dimensions) is None
    rng = random.Random(0)
    numbers = [taxonomy.draw_number(rng) for _ in range(4000)]
    assert 4.2 < sum(numbers) / len(numbers) < 4.5 and 1 <= min(numbers) <= max(numbers) <= 15
    menu = taxonomy.draw_menu(dimensions, 15, rng)
    assert len({d.dimension for d in menu}) == len(menu) == 18


@pytest.mark.parametrize("language", LANGUAGES)
def test_prompts_fill_and_hold_no_stray_blank(language):
    blanks = dict.fromkeys(
        ("instruction", "dimensions", "description", "constraints", "input", "answer", "operation"),
        "a {brace} and </instruction>",
    )
    names = {p.name.split(".")[0] for p in trace_stages.PROMPTS.glob("*.txt")} - {"operations"}
    assert len(names) == 6
    for name in names:
        text = trace_stages.fill(name, language, number=3, **blanks)
        assert "{{" not in text and "{mark}" not in text and "a {brace}" in text
    operations = trace_stages._template("operations", language).splitlines()
    assert {line.split(": ", 1)[0] for line in operations} == set(OPERATIONS)
    assert trace_stages.language_of("写一首诗") == "zh"
    assert trace_stages.language_of("Write 诗.") == "en"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("no json", Unreadable, "no JSON object"),
        ('{"description": "d", "constraints": ["a"], "input": "\\ud83d"}', Unreadable, "put.*half"),
        ('{"description": "d", "constraints": ["\\ud83d"]}', Unreadable, "surrogate pair"),
        ('{"reject": "vague"}', Rejected, "vague"),
        ('{"description": "", "constraints": ["a"]}', Unreadable, "description"),
        ('{"description": "d", "constraints": []}', Rejected, "no constraints"),
        ('{"description": "d", "constraints": "NULL"}', Rejected, "no constraints"),
        ('{"description": "d", "constraints": "a; b"}', Unreadable, "expected a list"),
        ('{"description": "Be brief. Go.", "constraints": ["be brief"]}', Rejected, "two fields"),
        ('{"description": "Sum: 1 2", "constraints": ["a"], "input": "1 2"}', Rejected, "two"),
        ('{"description": "d", "constraints": ["a b", "1. A B."]}', Rejected, "twice"),
        ('{"description": "d", "constraints": [{"text": 3}]}', Unreadable, "constraints"),
        ('{"description": "d", "constraints": ["a"], "input": 3}', Unreadable, "input"),
        (json.dumps({"description": "d", "constraints": list("abcdefghijklmnop")}), Rejected, "16"),
        ('{"a":' * 9000, Unreadable, "deep"),
    ],
)
def test_structure_refuses(text, error, message):
    with pytest.raises(error, match=message):
        trace_replies.fields(text, taxonomy.read())


def test_recipe_refuses():
    for changes, message in (
        ({"operations": {"swap": 1}}, "recipe.operations"),
        ({"operations": {"add": 0}}, "not all 0"),
        ({"language": "fr"}, "recipe.language"),
        ({"mismatch_at_most": 10}, "recipe.mismatch_at_most"),
        ({"attempts": 0}, "recipe.attempts"),
    ):
        with pytest.raises(ValueError, match=message):
            TraceRecipe(**changes)
    with pytest.raises(ValueError, match="unknown .*'cook'"):
        run(TraceRecipe(stages=["cook"]))


def test_recipe_file_has_known_keys():
    loaded = OmegaConf.load(ROOT / "conf" / "recipe" / "trace.yaml")
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TraceRecipe), loaded))
    assert made == TraceRecipe()
