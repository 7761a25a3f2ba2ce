"""The same held-out prompts answered before and after training, for a person to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iopo import constraints
from iopo.config import EvaluationConfig
from iopo.constraints.answers import hollow
from iopo.constraints.text import after_thinking
from iopo.data.chat import Chat
from iopo.data.columns import text_of
from iopo.data.rows import Quad
from iopo.files import read_records, write_records
from iopo.model.generate import Decoding, generate
from iopo.model.parallel import TrainModel, language_model
from iopo.progress import progress
from iopo.training.inputs import Inputs
from iopo.training.prechecks import checkable

FILE = "samples.jsonl"


def before(run: Path, cfg: EvaluationConfig, inputs: Inputs, train_model: TrainModel) -> None:
    """Write samples.jsonl with the answers of the starting weights, on rank 0.

    Nothing without held-out quads, and for sharded weights, which cannot generate here:
    `evaluate.py` does it from the export.
    """
    few = inputs.samples(cfg.samples)
    if few and not train_model.sharded:
        answers = answer(cfg, inputs.chat, few, train_model)
        rows = [{"id": a["id"], "prompt": a["prompt"], "before": a} for a in answers]
        write_records(run / FILE, rows)


def after(run: Path, cfg: EvaluationConfig, inputs: Inputs, train_model: TrainModel) -> None:
    """Add the answers of the trained weights to the rows that `before` wrote: the file says which
    prompts those are, for a run may be resumed with other settings."""
    if not cfg.samples or train_model.sharded or not (run / FILE).exists():
        return
    rows = read_records(run / FILE)
    quads = {quad.id: quad for quad in inputs.heldout_quads}
    known = [quads[row["id"]] for row in rows if row["id"] in quads]
    answers = {a["id"]: {"after": a} for a in answer(cfg, inputs.chat, known, train_model)}
    write_records(run / FILE, [row | answers.get(row["id"], {}) for row in rows])


def answer(
    cfg: EvaluationConfig, chat: Chat, quads: Sequence[Quad], train_model: TrainModel
) -> list[dict[str, Any]]:
    """Greedy answers to x1 of every quad, with what code says of the constraints it can check.

    Rows {"id", "prompt", "text", "constraints": [{"text", "follows"}], "hollow": reasons}, those of
    `iopo.constraints.answers.hollow`. Not for sharded models.
    """
    model = language_model(train_model.model)
    attention = model.config._attn_implementation
    conversations = [chat.messages(quad.x1, quad.system) for quad in quads]
    decoding = Decoding(cfg.max_new_tokens, batch_size=cfg.batch_size)
    model.set_attn_implementation("sdpa")
    try:
        with progress(len(quads), "sample answers") as show:
            generations = generate(model, chat, conversations, decoding, lambda n, _: show(n))
    finally:
        model.set_attn_implementation(attention)
    answers = []
    for quad, generation in zip(quads, generations, strict=True):
        rows = checkable(quad)
        rules, text = [constraints.from_dict(row) for row in rows], generation.text.strip()
        prompt = text_of(quad.x1)
        verdicts = zip(rows, constraints.follows(rules, after_thinking(text)), strict=True)
        answers.append(
            {
                "id": quad.id,
                "prompt": prompt,
                "text": text,
                "constraints": [{"text": row["text"], "follows": bool(ok)} for row, ok in verdicts],
                "hollow": hollow(text, prompt, rules, ended=generation.finish_reason == "stop"),
            }
        )
    return answers
