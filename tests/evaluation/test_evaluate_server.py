"""Answers of a server: what is sent, kept and refused, and what a run without answers says."""

import json
from pathlib import Path

import pytest
from helpers_judge import PLAIN, Answer, StubServer, ifeval_rows, settings

from iopo.evaluation.config import (
    GenerateSection,
)
from iopo.evaluation.endpoint import EndpointError
from iopo.evaluation.run import evaluate
from iopo.files import read_records, write_records


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_records(tmp_path / "data.jsonl", ifeval_rows(1000, 1001, 1005, 1012))
    return tmp_path / "data.jsonl"


def test_answers_from_a_server_are_kept_when_it_fails(data: Path, tmp_path: Path) -> None:
    broken = True

    def script(body: dict, before: int) -> Answer:
        if broken and "1005" in body["messages"][-1]["content"]:
            return Answer(status=401, body="no key", wait_s=0.3)
        return Answer(PLAIN, finish_reason="length")

    with StubServer(script) as server:
        section = GenerateSection(base_url=server.base_url, model="m", concurrency=2)
        config = settings(data, generate=section)
        with pytest.raises(EndpointError, match="OPENAI_API_KEY"):
            evaluate(config)
        kept = {row["key"] for row in read_records(data.parent / "out" / "responses.jsonl")}
        assert kept and 1005 not in kept
        broken = False
        server.bodies.clear()
        scores = evaluate(config)
        assert len(server.bodies) == 4 - len(kept), "only what was missing is asked"
    assert scores["responses"]["answers"] == 4
    assert scores["responses"]["cut_at_token_limit"] == 4
    with pytest.raises(ValueError, match="made with other settings .*temperature"):
        changed = GenerateSection(base_url="http://x", model="m", temperature=0.5)
        evaluate(settings(data, generate=changed))
    answers = tmp_path / "answers.jsonl"
    write_records(answers, [{"key": 1000, "response": "a"}])
    with pytest.raises(ValueError, match="choose another out="):
        evaluate(settings(data, answers))


def test_answers_read_back_are_scored_as_when_they_were_made(data: Path, tmp_path: Path) -> None:
    """Where the token limit cut them off, too. Their copy is not taken for answers made there."""

    def script(body: dict, before: int) -> Answer:
        whole = "1000" in body["messages"][-1]["content"]
        return Answer(PLAIN, finish_reason="stop" if whole else "length")

    with StubServer(script) as server:
        config = settings(data, generate=from_server(server))
        made = evaluate(config)
        kept = data.parent / "out" / "responses.jsonl"
        assert made["responses"]["cut_at_token_limit"] == 3
        once, twice = tmp_path / "once", tmp_path / "twice"
        for answers, out in ((kept, once), (once / "responses.jsonl", twice)):
            read = evaluate(settings(data, answers, out=str(out)))
            assert read["scores"] == made["scores"] and read["notes"] == made["notes"]
        with pytest.raises(ValueError, match="holds answers read from a file; choose another out="):
            evaluate(settings(data, generate=from_server(server), out=str(once)))
        assert len(server.bodies) == 4
    assert not (once / "responses.manifest.json").exists()


def from_server(server: StubServer, **changes) -> GenerateSection:
    fields = {"model": "m", "backoff_s": 0.01, "max_retries": 0} | changes
    return GenerateSection(base_url=server.base_url, **fields)


def test_another_model_behind_the_same_name_is_refused(data: Path) -> None:
    with StubServer(lambda *_: Answer(PLAIN), [{"id": "m", "root": "runs/a"}]) as server:
        config = settings(data, generate=from_server(server), limit=2)
        evaluate(config)
        manifest = json.loads((data.parent / "out" / "responses.manifest.json").read_text())
        assert manifest["served"] == {"root": "runs/a", "parent": None}
        assert manifest["seed"] is None and manifest["pinned"]["repetition_penalty"] == 1.0
        server.models = [{"id": "m", "root": "runs/b"}]
        with pytest.raises(ValueError, match="made with other settings .*runs/a.*runs/b"):
            evaluate(settings(data, generate=from_server(server)))
        assert len(server.bodies) == 2
    evaluate(config)  # no answer is pending: no server is needed


def test_a_run_without_an_answer_has_no_score(data: Path) -> None:
    """Exit code 1 of the command, from EndpointError."""
    bad = {"1000", "1001", "1005", "1012"}

    def script(body: dict, before: int) -> Answer:
        failing = any(key in body["messages"][-1]["content"] for key in bad)
        return Answer(status=400, body="too long") if failing else Answer(PLAIN)

    with StubServer(script) as server:
        config = settings(data, generate=from_server(server))
        with pytest.raises(EndpointError, match="all 4 requests failed.*too long"):
            evaluate(config)
        assert not (data.parent / "out" / "scores.json").exists()
        bad -= {"1001", "1005", "1012"}
        scores = evaluate(config)
    assert any("1 of 4 items (25.0%" in note for note in scores["notes"])
    entry = scores["scores"]["prompt_strict"]
    assert entry["n"] == 4 and entry["value"] == 0.75 and entry["bounds"] == [0.75, 1.0]
    assert scores["scores"]["answers"]["bounds"][1] > scores["scores"]["answers"]["value"]


def test_a_seed_is_for_sampling(data: Path) -> None:
    with StubServer(lambda *_: Answer(PLAIN)) as server:
        for changes in ({}, {"temperature": 0.5}, {"temperature": 0.5, "seed": None}):
            out = str(data.parent / f"out{len(server.bodies)}")
            evaluate(settings(data, generate=from_server(server, **changes), limit=1, out=out))
        assert [body.get("seed") for body in server.bodies] == [None, 0, None]
    with pytest.raises(ValueError, match="generate.seed=null"):
        GenerateSection(seed=None)
