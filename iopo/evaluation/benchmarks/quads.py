"""`evaluate.py +benchmark=quads`: a model on held-out quads, by log-prob and by its answers."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from iopo import stats
from iopo.constraints.text import thinking_note
from iopo.data.rows import Quad, read_rows, spread
from iopo.data.tokenize import Encoder, Limits, tokenize_rows
from iopo.evaluation import quad_metrics as heldout
from iopo.evaluation.config import BOOTSTRAP, EvaluateConfig, JudgeSection
from iopo.evaluation.quad_metrics import Answer
from iopo.evaluation.responses import default_out, load_chat, placing, require_model
from iopo.files import given_records, write_records, write_text
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED
from iopo.model.load import resolve_model
from iopo.redact import redact_values
from iopo.training.metrics import preferences

Rows = Sequence[tuple[Quad, str]]  # a quad and what it is held out for ("heldout" if it says not)
DEFAULT = Path(__file__).resolve().parents[3] / "data" / "verified" / "heldout.jsonl"

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score config.model (and config.benchmark.reference) on config.data.path; write and return.

    Writes verdicts.jsonl (one row per answer), logps.jsonl (one row per quad that was scored) and,
    last, scores.json into the output folder. Raises ValueError for a config without a model of its
    own, since log-probs need the weights, for options that quads do not read, and for a folder that
    holds scores of another config.
    """
    values = {
        "plan": config.plan,
        "seed": config.seed,
        "generate.seed": config.generate.seed,
        "bootstrap": config.bootstrap != BOOTSTRAP,
        "judge": config.judge != JudgeSection(),
        "generate.temperature": config.generate.temperature,
    }
    idle = [name for name, value in values.items() if value]
    if idle:
        raise ValueError(f"+benchmark=quads does not read {', '.join(idle)}; remove")
    if config.model.path is None:
        raise ValueError("quads needs the weights: set model.path (an endpoint gives no log-probs)")
    rows = read(config.data.path or DEFAULT, config.limit)
    out = Path(config.out or default_out(config))
    settings = redact_values(asdict(config) | {"out": None})
    path = out / "scores.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if redact_values(found.get("config", settings)) != settings:  # an earlier version's are not
        raise ValueError(f"{out}: holds scores made with other settings; choose another out=")
    require_model(config.model)
    scores, answers = score_model(config, rows, details=out)
    if not answers:
        log.info("note: following is left out: some quads have constraints that code cannot check")
    if note := thinking_note(a.raw for a in answers if a.raw is not None):
        log.info("note: %s", note)
        scores["notes"] = [note]
    scores["config"] = settings
    scores["made_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_records(out / "verdicts.jsonl", [asdict(answer) for answer in answers])
    write_text(path, json.dumps(scores, indent=1) + "\n")
    for name, cell in scores.items():
        if isinstance(cell, dict) and "low" in cell:
            interval = f"[{cell['low']:.3f}, {cell['high']:.3f}]"
            log.info("%s", f"{name:36s} {cell['value']:8.3f} {interval}")
    logps = "" if config.benchmark.scored == 0 else ", logps.jsonl"
    log.info("written: %s/scores.json, verdicts.jsonl%s", out, logps)
    return scores


def read(path: str | Path, limit: int | None = None) -> Rows:
    """Quads of a file with their "split", spread evenly over the file if limited."""
    quads = [row for row in read_rows(path, kind="quad") if isinstance(row, Quad)]
    splits = [row.get("split", "heldout") for _, row in given_records(path)]
    return spread(list(zip(quads, splits, strict=True)), limit)


def score_model(
    config: EvaluateConfig, rows: Rows, details: Path | None = None
) -> tuple[dict[str, Any], list[Answer]]:
    """Preferences, their controls, margins against a reference; by greedy answers following and
    answering.

    Every share is {"value", "low", "high", "n"}. Answers are left out for quads without constraints
    that code can check. details: a folder that gets logps.jsonl, {"id", "logps"} with
    nats in the order of MEMBERS; plain text is scored too, then.
    """
    quads = [quad for quad, _ in rows]
    path = resolve_model(config.model.path or "")
    base_path = resolve_model(config.benchmark.base) if config.benchmark.base else None
    device, dtype = placing(config.model)
    chat = load_chat(config.model, config.generate.system_prompt)
    if details is not None:  # not before the template is known to be of use
        details.mkdir(parents=True, exist_ok=True)
    limits = Limits(max_prompt_tokens=4096, max_response_tokens=4096, on_overlong="error")
    policy = heldout.load_for_scoring(path, config.model.adapter, device, dtype)

    def logps(model: LogProbs, of: Sequence[Quad]) -> torch.Tensor:
        return heldout.score(model, tokenize_rows(of, Encoder(chat, limits))[0])

    few = spread(quads, config.benchmark.scored)
    out: dict[str, Any] = {}
    if few:
        policy_Q4 = logps(policy, few)
        for name, right_Q in preferences(policy_Q4).items():
            out[name] = stats.wilson(int(right_Q.sum()), len(right_Q))
    if few and details is not None:
        logps_Q = zip(few, policy_Q4.tolist(), strict=True)
        write_records(details / "logps.jsonl", [{"id": q.id, "logps": row} for q, row in logps_Q])
    if config.benchmark.controls:
        out["controls"] = {
            "constraints_blanked": heldout.group_share(logps(policy, heldout.blanked(few))),
            "instructions_shuffled": heldout.group_share(logps(policy, heldout.shuffled(few))),
        }
    if config.benchmark.reference is not None:
        folder = resolve_model(config.benchmark.reference)
        reference = heldout.load_for_scoring(folder, None, device, dtype)
        out |= heldout.margins(policy_Q4, logps(reference, few))
    model = policy.causal_lm
    model.set_attn_implementation("sdpa")  # to generate; `logps` does not work after this
    if few and details is not None:
        out["plain_text"] = heldout.plain_text_score(model, chat.tokenizer)
    if not all(heldout.checkable(quad) for quad in quads):
        return out, []
    splits = [split for _, split in rows]
    answers = heldout.answer_prompts(model, chat, quads, splits, config.generate)
    if base_path is None or (base_path == path and config.model.adapter is None):
        model.set_attn_implementation(SHARED)
        base = policy
    else:
        base = heldout.load_for_scoring(base_path, None, device, dtype)
        section = replace(config.model, path=str(base_path), adapter=None)
        chat = load_chat(section, config.generate.system_prompt)
    answers = heldout.with_task_ranks(base, chat, answers)
    return out | heldout.shares(answers) | {"degeneration": heldout.degeneration(answers)}, answers
