"""README.md of an export, with the hub's metadata: what it is, what it was made from, how to serve.

Numbers are those of the run; what is not known is left out.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData

import iopo
from iopo import stats
from iopo.config import HELDOUT_MEASURES, TrainConfig
from iopo.model.load import DEMO_ID
from iopo.objectives import OBJECTIVES
from iopo.training.inputs import Inputs
from iopo.training.logger import read_metrics

LICENCES = {DEMO_ID: "apache-2.0"}  # of bases whose folder says nothing
PAPER = "[IOPO, arXiv 2411.06208](https://arxiv.org/abs/2411.06208)"
ADAPTER, MERGED, FULL, BASE = "adapter", "merged", "model", "base"


@dataclass(frozen=True)
class Facts:
    """What a card says: of the run in cfg.run, at a step."""

    cfg: TrainConfig
    inputs: Inputs
    step: int

    def heldout(self) -> dict[str, Any]:
        """What was measured on held-out quads at this step; {} if nothing was."""
        run = Path(self.cfg.run)
        rows = read_metrics(run, "heldout") if (run / "metrics.jsonl").exists() else []
        return next((row for row in rows if row["step"] == self.step), {})


def card(facts: Facts, kind: str) -> str:
    """The text of README.md for an export of a kind: adapter, merged, model, base."""
    cfg, of = facts.cfg, facts.cfg.objective
    base, name = hub_id(cfg.model.path), cfg.objective.name
    reads = sorted(OBJECTIVES[name].reads)
    data = ModelCardData(
        license=licence(facts.inputs.model_path, base),
        base_model=base,
        base_model_relation=None if base is None else "adapter" if kind == ADAPTER else "finetune",
        library_name="peft" if kind == ADAPTER else "transformers",
        pipeline_tag="text-generation",
        tags=["iopo", "preference-optimization", "instruction-following", name],
        ignore_metadata_errors=False,
    )
    shown = base or (f"`{Path(str(cfg.model.path)).name}`" if cfg.model.path else "random weights")
    what = {
        ADAPTER: f"A LoRA adapter (PEFT) on {shown}",
        MERGED: f"{shown} with a LoRA adapter merged in",
        FULL: f"{shown}, all weights trained",
        BASE: f"The base of the adapter beside it, {shown} as training began",
    }[kind]
    lora = cfg.model.lora
    rows = {
        "Objective": ", ".join([f"`{name}`", *(f"{key} {getattr(of, key)}" for key in reads)]),
        "Adapter": f"rank {lora.rank}, alpha {lora.alpha:g}, `{lora.targets}`" if lora.rank else "",
        "Data": ", ".join(
            f"`{Path(file).name}` (sha256 `{digest}`)"
            for file, digest in zip(
                filter(None, (cfg.data.train, cfg.data.heldout)),
                facts.inputs.data_hash.split(),
                strict=False,
            )
        ),
        "Steps": f"{facts.step} of {cfg.optim.global_batch_quads} examples, "
        f"learning rate {cfg.optim.lr:g}, seed {cfg.seed}",
        "Versions": f"iopo {iopo.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "Licence": f"that of the base: {data.license}" if data.license else "that of the base",
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items() if value)
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {what}\n",
        f"Trained with `{name}` by an implementation of {PAPER}.\n",
        f"| | |\n|---|---|\n{table}",
        _heldout(facts),
        f"## Serve\n\n```\n{serving(kind, base or 'BASE', lora.rank)}\n```\n\n"
        "The chat template and the ends of a turn are those of training; sampling parameters are "
        "the request's.\n",
    ]
    return "\n".join(part for part in parts if part)


def serving(kind: str, base: str, rank: int) -> str:
    """The vLLM command for a folder of this kind."""
    options = "--host 127.0.0.1 --generation-config vllm"
    if kind == ADAPTER:
        most = max(8, 2 ** (rank - 1).bit_length())  # the ranks that vLLM takes
        return (
            f"vllm serve {base} --enable-lora --lora-modules NAME=FOLDER \\\n"
            f"    --max-lora-rank {most} {options} \\\n"
            "    --chat-template FOLDER/chat_template.jinja"
        )
    return f"vllm serve FOLDER --served-model-name NAME {options}"


def hub_id(path: str | None) -> str | None:
    """The id on the hub of model.path; None for a folder of this machine and for random weights."""
    if path == "demo":
        return DEMO_ID
    return None if path is None or Path(path).expanduser().is_dir() else path


def licence(folder: Path | None, base: str | None) -> str | None:
    """The licence that the base's own card names; None if it is not known."""
    file = folder / "README.md" if folder is not None else None
    text = file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license: *['\"]?([\w.-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else LICENCES.get(base or "")


def _heldout(facts: Facts) -> str:
    """Shares of the held-out quads with Wilson intervals (without scipy: the shares alone)."""
    lines, measured, quads = [], facts.heldout(), len(facts.inputs.heldout)
    for name in HELDOUT_MEASURES[1:]:  # shares; the first is the loss
        if name not in measured:
            continue
        value = measured[name]
        try:
            text = stats.shown(stats.wilson(round(value * quads), quads))
        except ValueError:
            text = f"{100 * value:.1f}"
        lines.append(f"| {name} | {text} |\n")
    if not lines:
        return ""
    return (
        f"## Held out\n\nPercent of {quads} held-out quads by log-probability, with 95 % "
        "intervals: the matched pairs above the mismatched ones; each response preferring its "
        "instruction (x) and each instruction its response (y).\n\n"
        f"| | |\n|---|---|\n{''.join(lines)}"
    )
