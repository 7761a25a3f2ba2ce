"""Answers to a benchmark's items: read from a file, or made by a server or in this process.

What is made is appended to responses.jsonl as it arrives; a killed run goes on from there.
"""

import asyncio
import itertools
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iopo.constraints.text import THINK_END, THINK_START, after_thinking, thinking_note
from iopo.evaluation.config import EvaluateConfig, GenerateSection, ModelSection
from iopo.evaluation.endpoint import (
    PINNED,
    Endpoint,
    EndpointError,
    Request,
    RequestFailed,
    run_together,
)
from iopo.evaluation.items import Item, whole
from iopo.files import Journal, iter_records, read_records, sha256_text, shortened, write_text
from iopo.progress import progress
from iopo.redact import redact_values

NAMED = 5  # ids shown in a message; the rest are counted

log = logging.getLogger(__name__)


@dataclass
class Responses:
    """Answers by item id, and what is odd about them. An item without an answer is not in it."""

    text: dict[str, str] = field(default_factory=dict)  # as it came
    complete: dict[str, str] = field(init=False)  # with the <think> that the prompt ended with
    said: dict[str, str] = field(init=False)  # what is scored: the text after thinking
    missing: list[str] = field(default_factory=list)  # scored as not following anything
    unknown: list[str] = field(default_factory=list)  # ids in the file that the data lacks
    repeated: int = 0  # rows that give an answer once more, word for word
    failed: dict[str, str] = field(default_factory=dict)  # the server gave no answer, and why
    cut: list[str] = field(default_factory=list)  # ended at the token limit
    unpinned: list[str] = field(default_factory=list)  # the server's own sampling defaults decided

    def __post_init__(self) -> None:
        # Where a template opens the thinking, an answer holds its end alone, or none if cut off.
        ended = [text for name, text in self.text.items() if name not in self.cut]
        opened = sum(THINK_END in t and THINK_START not in t.partition(THINK_END)[0] for t in ended)
        unclosed = [name for name in self.cut if THINK_END not in self.text[name]]
        unclosed = unclosed if 0 < len(ended) <= 2 * opened else []
        self.complete = self.text | {name: THINK_START + self.text[name] for name in unclosed}
        self.said = {name: after_thinking(text) for name, text in self.complete.items()}

    def counts(self) -> dict[str, int]:
        return {
            "answers": len(self.text),
            "empty": sum(not text.strip() for text in self.said.values()),
            "missing": len(self.missing),
            "unknown": len(self.unknown),
            "repeated": self.repeated,
            "failed": len(self.failed),
            "cut_at_token_limit": len(self.cut),
            "unpinned": len(self.unpinned),
        }

    def notes(self) -> list[str]:
        """What the user must know about the answers before reading the scores."""
        empty = self.counts()["empty"]
        name, reason = next(iter(self.failed.items()), ("", ""))
        nothing = "scored as following nothing"
        notes = {
            f"no answer to {len(self.missing)} items ({some(self.missing)}): {nothing}": (
                self.missing
            ),
            f"the server failed on {len(self.failed)} of {len(self.failed) + len(self.text)} items "
            f"({len(self.failed) / max(1, len(self.failed) + len(self.text)):.1%}; first {name}: "
            f"{reason}): {nothing}, and the bounds say what they could change; run the same "
            "command again to ask for them again": self.failed,
            f"answers to {len(self.unknown)} ids that the data lacks ({some(self.unknown)}): "
            "ignored": self.unknown,
            f"{self.repeated} answers are there twice, word for word: counted once": self.repeated,
            f"{empty} empty answers: {nothing}": empty,
            f"{len(self.cut)} answers ended at the token limit": self.cut,
            f"the server does not take {', '.join(PINNED)}: its own defaults decided "
            f"{len(self.unpinned)} answers": self.unpinned,
        }
        thinking = thinking_note(self.complete.values())
        return [*filter(None, [thinking]), *(note for note, found in notes.items() if found)]


def row_key(item: Item) -> dict[str, Any]:
    """How an item is named in output files: by its data's "key" where it has one."""
    return {"key": item.row["key"]} if "key" in item.row else {"id": item.id}


def read_responses(path: str | Path, items: list[Item], known: list[Item]) -> Responses:
    """Answers from a file of rows {"key", "id" or "prompt", "response"}, joined by id (1.0 is 1),
    or else by the prompt, as IFEval's authors join them. A "finish_reason" of "length", where
    there is one, says that the token limit cut the answer off.

    items: what is scored; known: all of the data file. Missing answers and unknown ids are
    reported, not fatal. Raises ValueError without a file or rows, on rows of another form, on two
    different answers to one item, on a prompt of several items, and if no id fits.
    """
    ids = {item.id for item in known}
    asked: dict[str, str | None] = {}  # prompt -> id; None: of several items
    for item in known:
        prompt = item.messages[-1]["content"]
        asked[prompt] = None if prompt in asked else item.id
    texts: dict[str, str] = {}
    cut: set[str] = set()
    reasons: list[str] = []
    try:
        rows = list(iter_records(path))
    except FileNotFoundError as error:
        raise ValueError(f"responses.path={error}") from error
    for place, row, fault in rows:
        if not isinstance(row, dict):  # half of a surrogate pair is scored as any other answer
            reasons.append(f"{place}: {fault or f'expected an object, found {type(row).__name__}'}")
            continue
        name = whole(row["id"] if "id" in row else row.get("key"))
        if "id" not in row and "key" not in row and isinstance(row.get("prompt"), str):
            name = asked.get(row["prompt"], row["prompt"])
        if not isinstance(name, str | int) or isinstance(name, bool):
            reasons.append(
                f'{place}: expected "id" or "key" with text or a whole number, or else a "prompt" '
                "that only one item has"
            )
        elif not isinstance(row.get("response"), str):
            found = type(row["response"]).__name__ if "response" in row else "nothing"
            reasons.append(f'{place}: "response": expected text, found {found}')
        elif texts.setdefault(str(name), row["response"]) != row["response"]:
            reasons.append(f"{place}: a second, different answer to {name}")
        elif row.get("finish_reason") == "length":
            cut.add(str(name))
    if reasons:
        raise ValueError("\n".join(shortened(reasons, 10)))
    if not texts:
        raise ValueError(f"{path}: no answers in it")
    unknown = [name for name in texts if name not in ids]
    if len(unknown) == len(texts):
        raise ValueError(
            f"{path}: none of {len(texts)} ids is in the data (data: {some(sorted(ids))}; "
            f"responses: {some(unknown)}); are these answers to this benchmark?"
        )
    kept = {item.id: texts[item.id] for item in items if item.id in texts}
    missing = [item.id for item in items if item.id not in texts]
    repeated = len(rows) - len(texts)
    return Responses(
        text=kept, missing=missing, unknown=unknown, repeated=repeated,
        cut=[name for name in kept if name in cut],
    )  # fmt: skip


def some(names: list[str]) -> str:
    """The first of the names, for a message."""
    rest = f", ... ({len(names)} in all)" if len(names) > NAMED else ""
    return ", ".join(name[:60] for name in names[:NAMED]) + rest


def conversation(item: Item, section: GenerateSection) -> list[dict[str, str]]:
    """The item's conversation; `system_prompt`, where set, takes the place of its own."""
    messages = [dict(message) for message in item.messages]
    if section.system_prompt is None:
        return messages
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": section.system_prompt}, *rest]


def make_responses(config: EvaluateConfig, items: list[Item], data: str, out: Path) -> Responses:
    """Answers from the server or the model in the config; finished ones are read, not made again.

    data: sha256 of the data file. out: the folder, made once the chat template is known to be of
    use. Raises ValueError when `out` holds answers made otherwise, and EndpointError when the
    server cannot be used; what was answered stays in responses.jsonl.
    """
    chat = None if config.generate.base_url is not None else load_chat(config.model)
    settings = manifest(config, data, chat)
    out.mkdir(parents=True, exist_ok=True)
    with Journal(out / "responses.jsonl") as journal:
        if journal.rows and not (out / "responses.manifest.json").exists():
            raise ValueError(f"{out}: holds answers read from a file; choose another out=")
        done = _by_id(journal.rows)
        pending = [item for item in items if item.id not in done]
        if pending and config.generate.base_url is not None:
            settings["served"] = asyncio.run(_served(config.generate))
        check_manifest(out / "responses.manifest.json", settings)
        log.info("%d of %d answers are there already", len(items) - len(pending), len(items))
        failed: dict[str, str] = {}
        if pending and config.generate.base_url is not None:
            failed = asyncio.run(_ask_server(config.generate, pending, journal))
        elif pending:
            _in_process(config, chat, items, set(done), journal)
    rows = _by_id(read_records(out / "responses.jsonl"))
    found = {item.id: rows[item.id] for item in items if item.id in rows}
    if failed and not found:
        name, reason = next(iter(failed.items()))
        raise EndpointError(
            f"all {len(failed)} requests failed, the first ({name}) with: {reason}; nothing was "
            "scored: mend it and run the same command again"
        )
    return Responses(
        text={name: row["response"] for name, row in found.items()},
        missing=[i.id for i in items if i.id not in rows and i.id not in failed],
        failed=failed,
        cut=[name for name, row in found.items() if row["finish_reason"] == "length"],
        unpinned=[name for name, row in found.items() if row.get("unpinned")],
    )


def _by_id(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(row.get("id", row.get("key"))): row for row in rows}


def manifest(config: EvaluateConfig, data: str, chat: Any) -> dict[str, Any]:
    """All that the answers depend on; batch size and concurrency are not meant to matter.

    chat: of the model in process; None for a server's."""
    section = config.generate
    names = ("temperature", "max_new_tokens", "system_prompt", "seed")
    settings = {"data": data} | {name: getattr(section, name) for name in names}
    if section.base_url is not None:
        request = _request(section, ())
        sent = {"seed": request.seed, "pinned": request.pinned, "extra": request.extra}
        return settings | {"model": request.model} | sent
    from iopo.model.identity import identity
    from iopo.model.load import resolve_model

    of_model = identity(resolve_model(config.model.path or ""), chat, config.model.adapter)
    return settings | of_model | {"dtype": str(placing(config.model)[1]), "chat": chat.record()}


def check_manifest(path: Path, wanted: dict[str, Any]) -> None:
    """Write the manifest, without secrets, or raise ValueError where a different one is there.

    What is served is not compared where no answer is pending: no server was asked.
    """
    wanted = redact_values(wanted)
    if not path.exists():
        write_text(path, json.dumps(wanted, indent=1, sort_keys=True, ensure_ascii=False))
        return
    found = redact_values(json.loads(path.read_text(encoding="utf-8")))
    wanted = {"served": found.get("served")} | wanted
    keys = sorted(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
    if keys:
        shown = "; ".join(f"{k}: there {found.get(k)!r}, now {wanted.get(k)!r}" for k in keys)
        raise ValueError(
            f"{path.parent}: made with other settings ({shown}); choose another folder or remove it"
        )


def _request(section: GenerateSection, messages: tuple[dict[str, str], ...]) -> Request:
    return Request(
        model=section.model or "",
        messages=messages,
        temperature=section.temperature,
        max_tokens=section.max_new_tokens,
        seed=section.seed if section.temperature > 0 else None,
        extra=section.extra,
    )


async def _served(section: GenerateSection) -> dict[str, Any] | None:
    endpoint = Endpoint(section)
    try:
        found = await endpoint.served()
    finally:
        await endpoint.close()
    if found is None:
        log.info(
            "the server's list of models does not hold %s: a change of the model behind this name "
            "would not be seen",
            section.model,
        )
    return found


async def _ask_server(
    section: GenerateSection, items: list[Item], journal: Journal
) -> dict[str, str]:
    """Ask for all, journal each answer as it arrives; returns the failures by item id."""
    endpoint = Endpoint(section)
    failures: dict[str, str] = {}
    done = itertools.count(1)
    show = progress(len(items), "answers")

    async def one(item: Item) -> None:
        try:
            reply = await endpoint.ask(_request(section, tuple(conversation(item, section))))
        except RequestFailed as error:
            failures[item.id] = str(error)
            return
        row = {**row_key(item), "response": reply.text, "finish_reason": reply.finish_reason}
        row["tokens"] = reply.completion_tokens
        journal.append(row if reply.pinned else {**row, "unpinned": True})
        show(next(done))

    try:
        await run_together([one(item) for item in items])
    finally:
        await endpoint.close()
    return failures


def _in_process(
    config: EvaluateConfig, chat: Any, items: list[Item], done: set[str], journal: Journal
) -> None:
    """Batches of similar length. They are the same whatever is done already, so a resumed run
    gives the answers that an uninterrupted one would have given."""
    from iopo.model.generate import Decoding, generate

    model, section = load_model(config.model), config.generate
    order = sorted(items, key=lambda item: -sum(len(m["content"]) for m in item.messages))
    made, show = len(done), progress(len(items), "answers", done=len(done))
    for start in range(0, len(order), section.batch_size):
        batch = order[start : start + section.batch_size]
        if all(item.id in done for item in batch):
            continue
        decoding = Decoding(
            section.max_new_tokens,
            section.temperature,
            batch_size=section.batch_size,
            seed=int(sha256_text(f"{section.seed}/{batch[0].id}")[:8], 16),
        )
        answers = generate(model, chat, [conversation(item, section) for item in batch], decoding)
        rows = [
            {**row_key(i), "response": a.text, "finish_reason": a.finish_reason, "tokens": a.tokens}
            for i, a in zip(batch, answers, strict=True)
            if i.id not in done
        ]
        journal.append(*rows)
        made += len(rows)
        show(made)


def default_out(config: EvaluateConfig) -> Path:
    """runs/evaluate/<benchmark>/<name of the model or responses file, after its folder's>."""
    if config.responses.path is not None:
        who = _named(Path(config.responses.path).with_suffix(""))
    elif config.generate.base_url is not None:
        who = (config.generate.model or "").replace("/", "_")
    else:
        who = "_".join(_named(Path(p)) for p in (config.model.path, config.model.adapter) if p)
    return Path("runs/evaluate") / config.benchmark.name / who


def _named(path: Path) -> str:
    return "_".join(part for part in path.parts[-2:] if part not in ("/", "..", "."))


def placing(section: ModelSection) -> tuple[str, Any]:
    """The device and the torch dtype that model.device and model.dtype stand for here."""
    import torch

    from iopo.model.load import compute_dtype

    device = section.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, compute_dtype(section.dtype, torch.device(device).type)


def require_model(section: ModelSection) -> None:
    """Raises ValueError, before anything is written, for a model that load_model would refuse."""
    from iopo.model.load import resolve_model
    from iopo.training.prechecks import check_model

    check_model(resolve_model(section.path or ""), section.adapter)


def load_chat(section: ModelSection, system: str | None = None) -> Any:
    """The Chat of a model, or of its adapter where that brings the template it was trained with."""
    from iopo.data.chat import Chat
    from iopo.model.load import load_tokenizer, resolve_model

    folder = resolve_model(section.path or "")
    if section.adapter and (Path(section.adapter) / "chat_template.jinja").is_file():
        folder = Path(section.adapter)
    return Chat(load_tokenizer(folder), system, section.template_options)


def load_model(section: ModelSection) -> Any:
    """The model ready to generate, the adapter on it if one is named."""
    import torch

    from iopo.model.load import dtype_line, load_causal_lm, resolve_model
    from iopo.model.lora import load_adapter

    folder = resolve_model(section.path or "")
    device, dtype = placing(section)
    log.info(dtype_line(section.dtype, torch.device(device).type))
    model = load_causal_lm(folder, dtype)
    if section.adapter is not None:
        load_adapter(model, section.adapter)  # not merged: that would round it to the dtype
    torch.nn.Module.to(model, device)
    return model.eval()
