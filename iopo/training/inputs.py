"""What a run needs and can be known before weights load: model folder, rows, tokens, batches.

Called in the main process before the run folder is made and before any process group exists, and
again by every rank, which then finds the tokens in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from iopo import objectives
from iopo.agreement import check_family
from iopo.config import Layout, OptimConfig, TrainConfig
from iopo.data import token_cache
from iopo.data.batching import Batching
from iopo.data.chat import Chat
from iopo.data.example import Example
from iopo.data.rows import Quad, Row, read_rows, rows_for, spread
from iopo.data.tokenize import Encoder, Limits, Report, tokenize_file
from iopo.files import cache_root, sha256_rows
from iopo.model.attention import SHARED
from iopo.model.host_memory import trim_malloc
from iopo.model.load import (
    byte_tokenizer,
    config_of_tiny,
    load_tokenizer,
    read_config,
    resolve_model,
)
from iopo.progress import progress
from iopo.training.prechecks import check_policy, check_precision, check_rows, check_samples


@dataclass
class Inputs:
    """Rows and tokens of a run. `heldout` are quads whatever the objective (4 members each)."""

    model_path: Path | None  # None: model.tiny
    chat: Chat
    train: Sequence[Example]
    heldout: Sequence[Example]
    heldout_quads: list[Quad]
    reports: dict[str, Report]
    data_hash: str
    notes: list[str]  # on the model, and on the model and the rows

    def report_lines(self) -> list[str]:
        """What was kept and dropped, for people: one text per file; then the notes."""
        files = [f"{name}: " + "\n  ".join(r.lines()) for name, r in self.reports.items()]
        return [*files, *self.chat.notes(), *self.notes]

    def samples(self, count: int) -> list[Quad]:
        """At most so many held-out quads, spread over the file, to answer before and after."""
        quads = self.heldout_quads
        return quads[:: max(1, len(quads) // count)][:count] if count else []


def load_inputs(cfg: TrainConfig) -> Inputs:
    """Read, check and tokenise the rows of `cfg`.

    Raises ValueError for missing files and bad rows (all of them in one message), rows that break
    the template's prefix property, held-out rows that are not quads, and whatever is known of the
    model before its weights load (prechecks.py).
    """
    data = cfg.data
    if data.train is None:
        raise ValueError("data.train: not set; give a file of rows (data/README.md)")
    of = objectives.OBJECTIVES[cfg.objective.name].rows
    cache = Path(data.cache_dir or cache_root() / "tokens")
    files = [file for file in (data.train, data.heldout) if file is not None]
    with progress(None, "hashing the data"):
        hashes = [_hash(file) for file in files]
    counted = cfg.objective.margin_per_constraint > 0
    train_id = [hashes[0], of.kind, data.limit_rows, data.quad_rows, counted]
    # Rows that were tokenised before were checked then, and are not read again.
    new_rows = [] if token_cache.knows(cache, train_id) else [_train_rows(cfg)]
    heldout_quads: list[Quad] = []
    if data.heldout is not None:
        with progress(None, f"reading {data.heldout}"):
            rows = read_rows(data.heldout, kind="quad")
        heldout_quads = spread([r for r in rows if isinstance(r, Quad)], cfg.evaluation.quads)
        _check_counted(heldout_quads, data.heldout, cfg.objective.margin_per_constraint)

    model_path = None if cfg.model.tiny is not None else resolve_model(str(cfg.model.path))
    check_precision(cfg.model.dtype, data.layout, cfg.parallel.device)
    config = config_of_tiny(cfg.model.tiny or {}) if model_path is None else read_config(model_path)
    where = str(model_path or "model.tiny")
    check_family(config, where=where, attention=attention_of(data.layout))
    policy, notes = check_policy(cfg.model, model_path)
    tokenizer = byte_tokenizer() if model_path is None else load_tokenizer(model_path)
    chat = Chat(tokenizer, cfg.model.system, cfg.model.template_options)
    limits = Limits(data.max_prompt_tokens, data.max_response_tokens, data.on_overlong.value)
    tokenize = partial(tokenize_file, cache_dir=cache, workers=data.workers)
    train = tokenize(
        lambda: new_rows.pop() if new_rows else _train_rows(cfg),
        Encoder(chat, limits, of.columns),
        identity=train_id,
        source=data.train,
    )
    trim_malloc()  # the texts are gone
    reports = {"train": train.report}
    heldout: Sequence[Example] = []
    if heldout_quads:
        source, heldout_id = str(data.heldout), [hashes[1], "quad", cfg.evaluation.quads]
        quads, encoder = heldout_quads, Encoder(chat, limits)
        heldout = tokenize(lambda: quads, encoder, identity=heldout_id, source=source)
        reports["heldout"] = heldout.report
        kept = {example.id for example in heldout}
        heldout_quads = [quad for quad in heldout_quads if quad.id in kept]
    of_file = {data.train: train, str(data.heldout): heldout}
    notes += check_rows(policy, chat, of_file, shared=data.layout is Layout.shared)
    data_hash = " ".join(hashes)
    inputs = Inputs(model_path, chat, train, heldout, heldout_quads, reports, data_hash, notes)
    check_samples(
        policy, chat, inputs.samples(cfg.evaluation.samples), cfg.evaluation.max_new_tokens
    )
    return inputs


def _hash(source: str) -> str:
    """sha256_rows; "" for a missing file: reading it says what to do."""
    try:
        return sha256_rows(source)
    except FileNotFoundError:
        return ""


def _train_rows(cfg: TrainConfig) -> list[Row]:
    """The rows that the objective trains on; raises ValueError as load_inputs does."""
    kind = objectives.OBJECTIVES[cfg.objective.name].rows.kind
    file = str(cfg.data.train)
    with progress(None, f"reading {file}"):
        rows = rows_for(kind, read_rows(file)[: cfg.data.limit_rows], cfg.data.quad_rows)
    _check_counted(rows, file, cfg.objective.margin_per_constraint)
    return rows


def _check_counted(rows: Sequence[Row], file: str, margin: float) -> None:
    """Raises ValueError if the margin counts constraints that rows do not name."""
    bare = [row.id for row in rows if not (isinstance(row, Quad) and row.c1 and row.c2)]
    if margin > 0 and bare:
        raise ValueError(
            f"objective.margin_per_constraint={margin} counts the constraints that differ, but "
            f"{len(bare)} rows of {file} have no c1 and c2 (first: {bare[:5]}); add them, or "
            "remove the option"
        )


def attention_of(layout: Layout) -> str:
    """The attention function that the model runs with: in the plain layout the stock one, as of a
    plain trainer."""
    return SHARED if layout is Layout.shared else "sdpa"


def batching(cfg: OptimConfig, layout: Layout, seed: int, world_size: int) -> Batching:
    """How examples become steps; raises ValueError if the ranks do not divide the batch."""
    return Batching(
        global_batch_quads=cfg.global_batch_quads,
        ranks=world_size,
        seed=seed,
        layout=layout.value,
        micro_batch_quads=cfg.micro_batch_quads,
        tokens_per_microbatch=cfg.tokens_per_microbatch,
    )
