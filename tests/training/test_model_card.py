"""The card of an export, and exports pushed to a hub that this test plays over HTTP."""

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from iopo.config import DataConfig, ExportConfig, LoraConfig, ModelConfig, TrainConfig
from iopo.files import write_records
from iopo.training import export
from iopo.training.model_card import ADAPTER, BASE, FULL, MERGED, Facts, card


def facts(run: Path, **model) -> Facts:
    cfg = TrainConfig(
        run=str(run),
        model=ModelConfig(**model),
        data=DataConfig(train="/home/someone/train.jsonl", heldout="heldout.jsonl"),
    )
    measured = {"loss": 0.5, "group_accuracy": 0.75, "x_preference": 0.5}
    rows = [{"step": step, "split": "heldout", **measured} for step in (7, 8)]
    rows[1]["group_accuracy"] = 1.0
    write_records(run / "metrics.jsonl", rows)
    inputs: Any = SimpleNamespace(
        model_path=run, data_hash="a" * 64 + " " + "b" * 64, heldout=[None] * 40
    )
    return Facts(cfg, inputs, 7)


@pytest.mark.parametrize("kind", [ADAPTER, MERGED, FULL, BASE])
@pytest.mark.parametrize("path", ["demo", "org/base", "folder", None])
def test_a_card_says_what_was_done_in_metadata_that_the_hub_takes(tmp_path, kind, path):
    model = {"path": path} if path else {"path": None, "tiny": {"model_type": "llama"}}
    if path == "folder":
        (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Base\n")
        model["path"] = str(tmp_path)
    found = facts(tmp_path, **model, lora=LoraConfig(rank=12))
    text = card(found, kind)
    data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert data["library_name"] == ("peft" if kind == ADAPTER else "transformers")
    expected = {"demo": "HuggingFaceTB/SmolLM2-135M-Instruct", "org/base": "org/base"}.get(path)
    assert data.get("base_model") == expected
    assert data.get("base_model_relation") == (
        None if expected is None else "adapter" if kind == ADAPTER else "finetune"
    )
    assert data.get("license") == {"demo": "apache-2.0", "folder": "mit"}.get(path)
    for said in ("| Objective | `iopo`, beta 0.1", "rank 12", "`heldout",
                 "`train.jsonl` (sha256 `" + "a" * 64, "7 of 16 examples",
                 "75.0 [59.8, 85.8]", "40 held-out quads"):  # fmt: skip
        assert said in text, said
    assert "/home/someone" not in text and str(tmp_path) not in text
    assert ("--max-lora-rank 16" in text) == (kind == ADAPTER)


def a_hub(httpserver: HTTPServer, pushed: dict[str, bytes], token: str) -> None:
    """Answers as the hub does to one commit; fills `pushed` with its files."""

    def answer(request: Request) -> Response:
        if request.headers.get("Authorization") != f"Bearer {token}":
            return Response(json.dumps({"error": "Invalid token"}), 401)
        path = request.path
        if path == "/api/repos/create":
            asked = request.get_json()
            assert (asked["organization"], asked["name"]) == ("org", "name")
            assert asked["visibility"] == "private"
            return Response(json.dumps({"url": httpserver.url_for("/org/name")}))
        if path == "/api/validate-yaml":
            return Response(json.dumps({"errors": [], "warnings": []}))
        if path.endswith("/preupload/main"):
            files = [file | {"uploadMode": "regular", "shouldIgnore": False}
                     for file in request.get_json()["files"]]  # fmt: skip
            return Response(json.dumps({"files": files}))
        if path.endswith("/commit/main"):
            for line in request.get_data().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    value = row["value"]
                    pushed[value["path"]] = base64.b64decode(value["content"])
            oid = "1" * 40
            url = httpserver.url_for(f"/org/name/commit/{oid}")
            return Response(json.dumps({"commitUrl": url, "commitOid": oid, "success": True}))
        return Response(json.dumps({"id": "org/name", "sha": "0" * 40, "siblings": []}))

    httpserver.expect_request(re.compile(".*")).respond_with_handler(answer)


def test_an_export_is_pushed_whole_with_the_token_of_the_environment(
    tmp_path: Path, httpserver: HTTPServer, monkeypatch
):
    pushed: dict[str, bytes] = {}
    a_hub(httpserver, pushed, "hf_good")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", httpserver.url_for("").rstrip("/"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    folder = tmp_path / "export"
    folder.mkdir()
    (tmp_path / "run").mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text(card(facts(tmp_path / "run", path="demo"), FULL))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(export.ExportError, match="is complete, but was not pushed") as caught:
        export.push(folder, "org/name")
    assert f"hf upload org/name {folder}" in str(caught.value) and not pushed
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    export.push(folder, "org/name")
    assert pushed == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_could_not_be_pushed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    cfg = facts(tmp_path, path="org/base", lora=LoraConfig(rank=4)).cfg
    export.check_push(cfg.export, cfg.model)  # nothing is pushed
    cfg.export = ExportConfig(push_to_hub="org/name")
    with pytest.raises(ValueError, match="HF_TOKEN"):
        export.check_push(cfg.export, cfg.model)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    export.check_push(cfg.export, cfg.model)
    cfg.model.path = "demo"
    with pytest.raises(ValueError, match="export.merged=true export.model=false"):
        export.check_push(cfg.export, cfg.model)
    for options in ({"push_to_hub": "name"}, {"push_to_hub": "org/name", "model": False}):
        with pytest.raises(ValueError, match="push_to_hub"):
            ExportConfig(**options)
