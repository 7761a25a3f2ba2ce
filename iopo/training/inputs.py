"""What a run needs and can be known before weights load: the model folder, rows and tokens.

Called in the main process before the run folder is made and before any process group exists, and
again by every rank, which then finds the tokens in the cache.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iopo import objectives
from iopo.config import Overlong, TrainConfig
from iopo.data.rows import Quad, Row, read_rows, rows_for, spread
from iopo.data.tokenize import (
    Chat,
    Encoder,
    Example,
    Limits,
    Report,
    tokenize_rows,
    tokenizer_hash,
)
from iopo.files import cache_root, sha256_file
from iopo.model.load import byte_tokenizer, load_tokenizer, resolve_model


@dataclass
class Inputs:
    """Rows and tokens of a run. `heldout` are quads whatever the objective (4 members each)."""

    model_path: Path | None  # None: model.tiny
    chat: Chat
    train: list[Example]
    heldout: list[Example]
    heldout_quads: list[Quad]
    reports: dict[str, Report]
    data_hash: str
    tokenizer_hash: str


def load_inputs(cfg: TrainConfig) -> Inputs:
    """Read, check and tokenise the rows of `cfg`.

    Raises ValueError for missing files and bad rows (all of them in one message), rows that break
    the template's prefix property, and held-out rows that are not quads.
    """
    of = objectives.OBJECTIVES[cfg.objective.name].rows
    read = read_rows(_path(cfg.data.train, "data.train"))[: cfg.data.limit_rows]
    train_rows = rows_for(of.kind, read, cfg.data.quad_rows)
    heldout_quads = _heldout_quads(cfg)
    if cfg.objective.margin_per_constraint > 0:
        _check_constraints(cfg, train_rows)

    model_path = None if cfg.model.tiny is not None else resolve_model(str(cfg.model.path))
    tokenizer = byte_tokenizer() if model_path is None else load_tokenizer(model_path)
    chat = Chat(tokenizer, cfg.model.system)
    limits = Limits(
        cfg.data.max_prompt_tokens,
        cfg.data.max_response_tokens,
        "raise" if cfg.data.on_overlong is Overlong.error else cfg.data.on_overlong.value,
    )
    workers = cfg.data.workers or _workers(len(train_rows))
    cache = Path(cfg.data.cache_dir) if cfg.data.cache_dir else cache_root() / "tokens"
    train, report = tokenize_rows(
        train_rows,
        Encoder(chat, limits, of.columns),
        workers=workers,
        cache_dir=cache,
        source=str(cfg.data.train),
    )
    reports = {"train": report}
    heldout: list[Example] = []
    if heldout_quads:
        heldout, reports["heldout"] = tokenize_rows(
            heldout_quads,
            Encoder(chat, limits),
            workers=workers,
            cache_dir=cache,
            source=str(cfg.data.heldout),
        )
        kept = {example.id for example in heldout}
        heldout_quads = [quad for quad in heldout_quads if quad.id in kept]
    files = [cfg.data.train] + ([cfg.data.heldout] if cfg.data.heldout else [])
    return Inputs(
        model_path=model_path,
        chat=chat,
        train=train,
        heldout=heldout,
        heldout_quads=heldout_quads,
        reports=reports,
        data_hash=" ".join(sha256_file(str(file)) for file in files),
        tokenizer_hash=tokenizer_hash(chat),
    )


def _check_constraints(cfg: TrainConfig, rows: Sequence[Row]) -> None:
    bare = [row.id for row in rows if not (isinstance(row, Quad) and row.c1 and row.c2)]
    if bare:
        raise ValueError(
            f"objective.margin_per_constraint={cfg.objective.margin_per_constraint} counts the "
            f"constraints that differ, but {len(bare)} rows of {cfg.data.train} have no c1 and c2 "
            f"(first: {bare[:5]}); add them, or remove the option"
        )


def _workers(rows: int) -> int:
    """One per core where there is work for them: starting a process costs seconds."""
    return len(os.sched_getaffinity(0)) if rows > 20_000 else 1


def _heldout_quads(cfg: TrainConfig) -> list[Quad]:
    if cfg.data.heldout is None:
        return []
    rows = read_rows(_path(cfg.data.heldout, "data.heldout"), kind="quad")
    return spread([row for row in rows if isinstance(row, Quad)], cfg.evaluation.quads)


def _path(value: str | None, key: str) -> Path:
    if value is None:
        raise ValueError(f"{key}: not set; give a .jsonl or .json file (formats: data/README.md)")
    return Path(value)
