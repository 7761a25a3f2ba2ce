"""The same held-out prompts answered before and after training, for a person to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iopo import constraints
from iopo.config import TrainConfig
from iopo.data.chat import Chat
from iopo.data.rows import Quad
from iopo.files import read_records, write_records
from iopo.model.generate import Decoding, generate
from iopo.model.parallel import TrainModel, language_model
from iopo.training.inputs import Inputs
from iopo.training.launch.placement import RankInfo

FILE = "samples.jsonl"


def before(
    run: Path, cfg: TrainConfig, inputs: Inputs, train_model: TrainModel, ranks: RankInfo
) -> None:
    """Write samples.jsonl with the answers of the starting weights (rank 0; see `_answers`)."""
    if _wanted(cfg, inputs, train_model, ranks):
        step = max(1, len(inputs.heldout_quads) // cfg.evaluation.samples)
        few = inputs.heldout_quads[::step][: cfg.evaluation.samples]
        answers = _answers(cfg, inputs, train_model, few)
        write_records(
            run / FILE, [{"id": a["id"], "prompt": a["prompt"], "before": a} for a in answers]
        )


def after(
    run: Path, cfg: TrainConfig, inputs: Inputs, train_model: TrainModel, ranks: RankInfo
) -> None:
    """Add the answers of the trained weights to the rows that `before` left.

    Which prompts those are is the file's to say: a run may be resumed with other settings.
    """
    if not _wanted(cfg, inputs, train_model, ranks) or not (run / FILE).exists():
        return
    rows = read_records(run / FILE)
    quads = {quad.id: quad for quad in inputs.heldout_quads}
    known = [quads[row["id"]] for row in rows if row["id"] in quads]
    answers = {a["id"]: {"after": a} for a in _answers(cfg, inputs, train_model, known)}
    write_records(run / FILE, [row | answers.get(row["id"], {}) for row in rows])


def _wanted(cfg: TrainConfig, inputs: Inputs, train_model: TrainModel, ranks: RankInfo) -> bool:
    """Sharded weights cannot generate here; `evaluate.py` does it from the export."""
    some = cfg.evaluation.samples > 0 and bool(inputs.heldout_quads)
    return ranks.is_main and some and not train_model.sharded


def _answers(
    cfg: TrainConfig, inputs: Inputs, train_model: TrainModel, quads: Sequence[Quad]
) -> list[dict[str, Any]]:
    return answer(
        train_model,
        inputs.chat,
        quads,
        max_new_tokens=cfg.evaluation.max_new_tokens,
        batch_size=cfg.evaluation.batch_size,
    )


def answer(
    train_model: TrainModel,
    chat: Chat,
    quads: Sequence[Quad],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Greedy answers to x1 of every quad, with what code says of the constraints it can check.

    Rows {"id", "prompt", "text", "constraints": [{"text", "follows"}]}. The model computes with
    stock attention meanwhile. Not for sharded models.
    """
    model = language_model(train_model.model)
    attention = model.config._attn_implementation
    conversations = [chat.messages(quad.x1, quad.system) for quad in quads]
    decoding = Decoding(max_new_tokens, batch_size=batch_size)
    model.set_attn_implementation("sdpa")
    try:
        generations = generate(model, chat, conversations, decoding)
    finally:
        model.set_attn_implementation(attention)
    return [
        {
            "id": quad.id,
            "prompt": quad.x1,
            "text": generation.text.strip(),
            "constraints": _verdicts(quad.c1 or [], generation.text.strip()),
        }
        for quad, generation in zip(quads, generations, strict=True)
    ]


def _verdicts(rows: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    rows = [row for row in rows if row.get("kind") in constraints.KINDS]  # the others need a judge
    checks = [constraints.from_dict(row) for row in rows]
    follows = constraints.follows(checks, text)
    return [
        {"text": row["text"], "follows": bool(ok)} for row, ok in zip(rows, follows, strict=True)
    ]
