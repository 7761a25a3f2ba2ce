"""Exports served by vLLM answer as in process: pytest -s -m slow tests/environments/test_vllm.py

Makes an environment with vLLM's CPU build at the first run (minutes, 3.4 GB).
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers_environments import vllm_python

from iopo.config import ExportConfig
from iopo.data.chat import Chat
from iopo.evaluation.config import (
    BenchmarkSection,
    DataSection,
    EvaluateConfig,
    GenerateSection,
    ModelSection,
)
from iopo.evaluation.responses import load_model
from iopo.evaluation.run import evaluate
from iopo.files import read_records, write_records
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.demo_model import fetch_demo_model
from iopo.model.load import load_causal_lm, load_tokenizer
from iopo.model.parallel import prepare
from iopo.training import export
from iopo.training.launch.placement import RankInfo

ROOT = Path(__file__).resolve().parents[2]
IFEVAL = Path(os.environ.get("IOPO_DATA_DIR", ROOT.parent / "shared" / "data"), "ifeval")
ITEMS, SCORED, NEW_TOKENS = 30, 20, 64
# as in Qwen2's generation_config.json
SAMPLING = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8,
            "top_k": 20}  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def rows() -> list[dict]:
    """IFEval's first prompts, if its file is here; else held-out instructions in its form."""
    if (IFEVAL / "input_data.jsonl").is_file():
        return read_records(IFEVAL / "input_data.jsonl")[:ITEMS]
    quads = read_records(ROOT / "data" / "verified" / "heldout.jsonl")[:ITEMS]
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    return [{"key": key, "prompt": quad["x1"], **rule} for key, quad in enumerate(quads)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base/, full/export, lora/export (an adapter of base/) and lora/export-merged."""
    folder = tmp_path_factory.mktemp("made")
    base = folder / "base"
    shutil.copytree(fetch_demo_model(), base)
    config = json.loads((base / "generation_config.json").read_text()) | SAMPLING
    (base / "generation_config.json").write_text(json.dumps(config))
    for name in ("full", "lora"):
        model = load_causal_lm(base, torch.float32)
        if name == "lora":
            options = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear"}
            lora.add_lora(model, generator=torch.Generator().manual_seed(0), **options)
        train_model = prepare(
            LogProbs(model), device=torch.device("cpu"), dtype=torch.float32, mesh=None
        )
        generator = torch.Generator().manual_seed(1)
        for key, parameter in train_model.parameters.items():
            size = 0.01 if "lora_" in key else 0.02 * parameter.std().item()
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
        cfg = ExportConfig(merged=name == "lora")
        alone = RankInfo(0, 1, 0, 1, torch.device("cpu"))
        chat = Chat(load_tokenizer(base))
        export.write_exports(train_model, folder / name, cfg, chat, export.Origin(str(base)), alone)
    written = json.loads((folder / "full/export/generation_config.json").read_text())
    assert written.items() >= SAMPLING.items()
    write_records(folder / "data.jsonl", rows())
    return folder


@contextmanager
def vllm(log: Path, *arguments: str) -> Iterator[str]:
    """The address of a vLLM server with these arguments, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
               "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | options
    command = [str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "2048"]
    with open(log, "w") as file:
        server = subprocess.Popen(command, env=environ, stdout=file, stderr=subprocess.STDOUT)
    try:
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def answers(made: Path, out: str, **source) -> list[dict]:
    """Rows of responses.jsonl by key, and the scores' verdicts beside them."""
    generate = source.pop("generate", {})
    config = EvaluateConfig(
        benchmark=BenchmarkSection("ifeval"),
        data=DataSection(str(made / "data.jsonl")),
        generate=GenerateSection(max_new_tokens=NEW_TOKENS, timeout_s=3600, **generate),
        out=str(made / out),
        bootstrap=10,
        **source,
    )
    evaluate(config)
    texts = {row["key"]: row["response"] for row in read_records(made / out / "responses.jsonl")}
    verdicts = read_records(made / out / "verdicts.jsonl")
    return [{"response": texts[row["key"]], **row} for row in verdicts]


def log_probs(made: Path, url: str, name: str, section: ModelSection, found: list[dict]):
    """Log-probs of responses: (of the server, in process), in nats, summed over their tokens."""
    model, chat = load_model(section), Chat(load_tokenizer(made / "base"))
    prompts = read_records(made / "data.jsonl")
    out = []
    for prompt, row in list(zip(prompts, found, strict=True))[:SCORED]:
        before = chat.prompt_ids(chat.messages(prompt["prompt"]))
        response = chat.tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        ids = before + response + [chat.end_of_turn()]
        body = {"model": name, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 1}
        asked = urllib.request.Request(
            f"{url}/completions",
            json.dumps(body | {"temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as reply:
            each = json.load(reply)["choices"][0]["prompt_logprobs"]
        scored = range(len(before), len(ids))
        served = sum(each[i][str(ids[i])]["logprob"] for i in scored)
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        out.append((served, sum(logp[i - 1, ids[i]].item() for i in scored)))
    return out


@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
def test_served_answers_are_those_in_process(made, kind):
    """full: without --generation-config, so that the sampling keys of the export are in force where
    the request says nothing."""
    adapter, folder = made / "lora/export", made / "lora/export-merged"
    pins = ("--generation-config", "vllm")
    if kind == "adapter":
        section = ModelSection(str(made / "base"), str(adapter), dtype="fp32")
        named = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{kind}={adapter}")
        arguments = ("--model", str(made / "base"), *named, *pins)
    else:
        folder = made / "full/export" if kind == "full" else folder
        section = ModelSection(str(folder), dtype="fp32")
        named = ("--model", str(folder), "--served-model-name", kind)
        arguments = named if kind == "full" else (*named, *pins)
    here = answers(made, f"{kind}-here", model=section)
    with vllm(made / f"{kind}.log", *arguments) as url:
        generate = {"base_url": url, "model": kind}
        there = answers(made, f"{kind}-served", generate=generate)
        pairs = log_probs(made, url, kind, section, here)
    manifest = json.loads((made / f"{kind}-served/responses.manifest.json").read_text())
    root = str(adapter if kind == "adapter" else folder)
    assert manifest["served"]["root"] == root and len(manifest["served"]["weights"]) == 64
    same = sum(a == b for a, b in zip(here, there, strict=True))
    worst = max(abs(served - expected) for served, expected in pairs)
    print(f"{kind}: {same} of {len(here)} texts and verdicts equal, log-probs within {worst:.1e}")
    assert same == len(here) == ITEMS
    assert len(pairs) == SCORED and worst < 0.01
