"""No secret of a config or of the environment is printed or stored by what asks a server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_judge import PLAIN, Answer, StubServer, honest, ifeval_rows, settings

from iopo.construct.trace.config import TraceRecipe
from iopo.construct.trace.pipeline import run
from iopo.evaluation.benchmarks import quads
from iopo.evaluation.config import (
    BenchmarkSection,
    EndpointSection,
    EvaluateConfig,
    GenerateSection,
    JudgeSection,
    ModelSection,
)
from iopo.evaluation.endpoint import EndpointError, Request
from iopo.evaluation.responses import check_manifest
from iopo.evaluation.run import evaluate
from iopo.files import read_records, write_records
from iopo.redact import redact_values
from iopo.rounds import stage
from iopo.rounds.config import Round, RoundsConfig

ROOT = Path(__file__).resolve().parents[2]
PASSWORD, GIVEN, NAMED = "hunter2hunter2", "sk-abcdefghijklmnop1234", "q8Zr-plain-letters-0042"
SECRETS = (PASSWORD, GIVEN, NAMED)
HALF_A_SECRET = NAMED[:12]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_records(tmp_path / "data.jsonl", ifeval_rows(1000, 1001))
    answers = [{"key": key, "response": PLAIN} for key in (1000, 1001)]
    write_records(tmp_path / "answers.jsonl", answers)
    return tmp_path / "data.jsonl"


def secretly(section: type, server: StubServer, **changes):
    """A section with a password in its address and a key in what is added to each request."""
    url = server.base_url.replace("://", f"://user:{PASSWORD}@")
    fields = {"model": "m", "backoff_s": 0.01, "extra": {"api_key": GIVEN}} | changes
    return section(base_url=url, **fields)


def check(folder: Path, *said: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            said = (*said, path.read_text(encoding="utf-8", errors="replace"))
    for text in said:
        assert not [s for s in (*SECRETS, HALF_A_SECRET) if s in text], text[:2000]


def test_answers_of_a_server(data: Path, capfd, caplog) -> None:
    caplog.set_level("INFO", logger="iopo")
    with StubServer(lambda *_: Answer(PLAIN)) as server:
        evaluate(settings(data, generate=secretly(GenerateSection, server)))
        assert server.bodies[0]["api_key"] == GIVEN, "the server gets it"
        changed = secretly(GenerateSection, server, extra={"api_key": "sk-zyxwvutsrqponmlk9876"})
        evaluate(settings(data, generate=changed))
        assert len(server.bodies) == 2, "a new key asks nothing again"
        again = secretly(GenerateSection, server, extra={"api_key": GIVEN, "top_k": 1})
        with pytest.raises(ValueError, match="made with other settings") as error:
            evaluate(settings(data, generate=again))
    check(data.parent / "out", str(error.value), *capfd.readouterr(), caplog.text)


def test_judgements(data: Path, capfd, caplog) -> None:
    caplog.set_level("INFO", logger="iopo")
    config = settings(
        data, data.parent / "answers.jsonl", benchmark=BenchmarkSection("judge_check")
    )
    with StubServer(honest) as server:
        config.judge = secretly(JudgeSection, server)
        evaluate(config)
        sent = len(server.bodies)
        config.judge = secretly(JudgeSection, server, extra={"api_key": "another-key-of-theirs"})
        evaluate(config)
        assert len(server.bodies) == sent, "a new key asks nothing again"
    found = json.loads((data.parent / "out/scores.json").read_text())["config"]["judge"]
    assert found["extra"] == {"api_key": "<redacted>"} and "user:<redacted>@" in found["base_url"]
    check(data.parent / "out", *capfd.readouterr(), caplog.text)


@pytest.mark.parametrize("status", [401, 403, 404, 400, 500, 200])
def test_a_server_that_echoes_the_key(status: int, data: Path, monkeypatch, caplog) -> None:
    """Under a name of the user's, and where the part that is quoted ends within it."""
    caplog.set_level("INFO", logger="iopo")
    monkeypatch.setenv("MY_GATEWAY", NAMED)
    before_it = "x" * (187 if status == 200 else 287)

    def echo(body: dict, before: int) -> Answer:
        return Answer(status=status, body=f"{before_it}{NAMED} of {PASSWORD}")

    with StubServer(echo) as server:
        section = secretly(
            GenerateSection, server, api_key_env="MY_GATEWAY", max_retries=0, extra={}
        )
        with pytest.raises(EndpointError) as error:
            evaluate(settings(data, generate=section))
        assert "xxx" in str(error.value)
        check(data.parent / "out", str(error.value), caplog.text)


def test_a_failed_judgement(data: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", NAMED)
    out = data.parent / "out"

    def some_fail(body: dict, before: int) -> Answer:
        if "Write 1001" in body["messages"][0]["content"]:
            return Answer(status=400, body=f"Incorrect key: {NAMED}")
        return honest(body, before)

    config = settings(
        data, data.parent / "answers.jsonl", benchmark=BenchmarkSection("judge_check")
    )
    with StubServer(some_fail) as server:
        config.judge = JudgeSection(base_url=server.base_url, model="m", structured=False)
        evaluate(config)
    assert "<redacted:OPENAI_API_KEY>" in (out / "scores.json").read_text()
    check(out)


def test_nobody_listens(data: Path) -> None:
    url = f"http://user:{PASSWORD}@127.0.0.1:9/v1"
    section = GenerateSection(base_url=url, model="m", backoff_s=0.01)
    with pytest.raises(EndpointError, match="user:<redacted>@127.0.0.1:9") as error:
        evaluate(settings(data, generate=section))
    check(data.parent, str(error.value))


def test_the_commands(data: Path, tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("Write a note.\n")
    with StubServer(lambda *_: Answer(status=401, body=f"Incorrect key: {NAMED}")) as server:
        url = server.base_url.replace("://", f"://user:{PASSWORD}@")
        asks = {
            "stopped: HTTP 401": [
                "evaluate.py", "+benchmark=ifeval", f"data.path={data}", f"out={tmp_path}/out",
                f"generate.base_url={url}", "generate.model=m",
                f"+generate.extra={{api_key: {GIVEN}}}",
            ],
            "refused: ": [
                "evaluate.py", "+benchmark=ifeval", f"data.path=/no/{GIVEN}", "model.path=x",
            ],
            "construct: HTTP 401": [
                "-m", "iopo.construct", "+recipe=trace", f"recipe.seeds={tmp_path}/seeds.txt",
                f"recipe.out={tmp_path}/trace", f"recipe.endpoint.base_url={url}",
                "recipe.endpoint.model=m", f"+recipe.endpoint.extra={{api_key: {GIVEN}}}",
            ],
        }  # fmt: skip
        for message, words in asks.items():
            done = subprocess.run(
                [sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                env=os.environ | {"OPENAI_API_KEY": NAMED},
            )  # fmt: skip
            assert message in done.stderr, done.stderr
            check(tmp_path / "out", done.stdout, done.stderr)
    check(tmp_path / "trace")


def test_a_stage_of_rounds(tmp_path: Path, monkeypatch, capsys) -> None:
    def fails(of: Round) -> None:
        raise EndpointError(f"the log ends with {GIVEN}")

    monkeypatch.setattr(stage, "sample", fails)
    Round(str(tmp_path), 1, "pair", 0, ModelSection("x"), None, RoundsConfig()).write()
    assert stage.main(["sample", str(tmp_path)]) == 1
    check(tmp_path, *capsys.readouterr())


def test_replies_of_a_construction(tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("Write a note.\n")
    with StubServer(lambda *_: Answer("no JSON")) as server:
        endpoint = secretly(EndpointSection, server)
        run(
            TraceRecipe(seeds=f"{tmp_path}/seeds.txt", out=str(tmp_path / "out"), endpoint=endpoint)
        )
    assert len(read_records(tmp_path / "out/replies.jsonl")) == 2
    check(tmp_path)


def test_quads_compare_settings_without_secrets(tmp_path: Path, monkeypatch) -> None:
    """Also with the scores of an earlier version, which hold them."""
    monkeypatch.setattr(quads, "require_model", lambda _: None)
    monkeypatch.setattr(quads, "score_model", lambda *_, **__: ({}, []))

    def scores(**extra) -> None:
        generate = GenerateSection(extra=extra)
        quads.evaluate(
            EvaluateConfig(
                benchmark=BenchmarkSection("quads", scored=0, controls=False), generate=generate,
                model=ModelSection("x"), out=str(tmp_path),
            )
        )  # fmt: skip

    scores(api_key=GIVEN)
    check(tmp_path)
    scores(api_key="sk-zyxwvutsrqponmlk9876")
    path = tmp_path / "scores.json"
    path.write_text(path.read_text().replace("<redacted>", "sk-of-an-earlier-version"))
    scores(api_key=GIVEN)
    with pytest.raises(ValueError, match="other settings"):
        scores(api_key=GIVEN, top_k=1)


def test_manifests_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "responses.manifest.json"
    path.write_text(json.dumps({"served": None, "extra": {"api_key": GIVEN}, "seed": 0}))
    check_manifest(path, {"extra": {"api_key": GIVEN}, "seed": 0})
    with pytest.raises(ValueError, match="seed: there 0, now 1") as error:
        check_manifest(path, {"extra": {}, "seed": 1})
    assert GIVEN not in str(error.value)


def test_names_of_requests_without_secrets_stay() -> None:
    """Keys that an earlier version wrote."""

    def key(**extra) -> str:
        return Request("m", ({"role": "user", "content": "a"},), 0.0, 5, extra=extra).key

    assert key() == "276f07cf481a78aa1f34e3675ccb0d5b7c6038e694b6196c22c7e0f737d992e6"
    assert (
        key(top_k=1, logit_bias={9: 1, 10: 2}, stop=["key: x"])
        == "513ab875f3d983958157e0c8c80b744e06a6ba8243ba984ff992a9a971241640"
    )
    assert key(api_key=GIVEN) == key(api_key="another") != key()


def test_values_without_secrets() -> None:
    value = {
        "api_key": 12345678, "password": 'a "b c', "hub_token": ["x", "y"], "access_key": None,
        "api_key_env": "NAME", "pad_token": "<pad>", 10: [1.5, True, None, "Bearer abc.def.ghi"],
        "deep": {"secret": {"a": "b"}}, "url": "http://u:p@h",
    }  # fmt: skip
    assert redact_values(value, {}) == {
        "api_key": "<redacted>", "password": "<redacted>", "hub_token": "<redacted>",
        "access_key": None, "api_key_env": "NAME", "pad_token": "<pad>",
        10: [1.5, True, None, "Bearer <redacted>"],
        "deep": {"secret": "<redacted>"}, "url": "http://u:<redacted>@h",
    }  # fmt: skip
    found = redact_values(
        {"api_key": "abcdefgh", "note": 'a"bcdefgh'}, {"A_KEY": "abcdefgh", "B_KEY": 'a"bcdefgh'}
    )
    assert found == {"api_key": "<redacted:A_KEY>", "note": "<redacted:B_KEY>"}
