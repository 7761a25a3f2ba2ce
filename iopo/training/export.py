"""Write the trained model for everyone else: Hugging Face safetensors, or a PEFT adapter.

A model folder appears whole or not at all, and only after stock transformers has read it back and
agreed with the model in training about a fixed text. `python train.py run=DIR export_step=N` writes
a checkpoint of a run to DIR/exported/step-0000000N.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, get_token
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from iopo.config import Checkpointing, Dtype, ExportConfig, ModelConfig, TrainConfig
from iopo.data.chat import Chat
from iopo.data.layout import Batch, build_plain
from iopo.data.tokenize import Example
from iopo.files import replacing, write_text
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.generate import end_of_turn_ids
from iopo.model.load import DTYPES, load_tokenizer, read_config
from iopo.model.parallel import TrainModel, language_model
from iopo.model.portable import save_tokenizer, write_older_keys
from iopo.progress import progress
from iopo.redact import redact
from iopo.training.checkpoint.folders import complete_folders, latest, step_of
from iopo.training.checkpoint.resume import load_checkpoint
from iopo.training.launch.placement import RankInfo
from iopo.training.launch.signals import Control, heartbeat, stop_clock
from iopo.training.logger import set_up_logging
from iopo.training.model_card import ADAPTER, BASE, FULL, MERGED, Facts, card, hub_id
from iopo.training.setup import Run, build_run

log = logging.getLogger(__name__)

FOLDER, MERGED_FOLDER, BASE_FOLDER = "export", "export-merged", "export-base"
PROBE = "A model that was saved must give, once it is loaded again, the same answer as before."
# mean difference of a token's log-probability, in nats, that rounding explains
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class Origin:
    """What an export says of where it comes from.

    base: what an adapter names as its base model; None writes the base to export-base/ first.
    dtype: of the saved weights, adapters excepted; None: the one that the model computes in.
    describe: the text of README.md for a kind of export (model_card.py).
    """

    base: str | None = None
    dtype: torch.dtype | None = None
    describe: Callable[[str], str] | None = None


class ExportError(RuntimeError):
    """An export that does not read back as what was trained; its folder was not made."""


def export(run: Run, folder: Path, facts: Facts, ranks: RankInfo) -> None:
    """Write what the config asks for into `folder`. Every rank calls it; rank 0 writes."""
    cfg, model, path = facts.cfg.export, facts.cfg.model, run.inputs.model_path
    base: str | None = None
    dtype: torch.dtype | None = None
    if not cfg.any:
        return
    # The adapter's base is model.path, unless the run changed or drew it: then it is written too.
    if path is not None and model.adapter is None:
        # Others find a model by its id on the hub, or in its folder, wherever they look from.
        hub = None if model.path == "demo" else hub_id(model.path)
        base = hub or str(path.resolve())
    if cfg.dtype is not Dtype.auto:
        dtype = DTYPES[cfg.dtype]
    elif path is not None:
        found = read_config(path).dtype
        dtype = found if isinstance(found, torch.dtype) else None
    origin = Origin(base, dtype, partial(card, facts))
    with progress(None, f"exporting to {folder}"):
        write_exports(run.model, folder, cfg, run.inputs.chat, origin, ranks)
    if ranks.is_main and cfg.push_to_hub is not None:
        push(folder / (FOLDER if cfg.model else MERGED_FOLDER), cfg.push_to_hub)


def check_push(cfg: ExportConfig, model: ModelConfig) -> None:
    """Raises ValueError, before any training, for an export that could not be pushed or used."""
    if cfg.push_to_hub is None:
        return
    if not get_token():
        raise ValueError(
            "export.push_to_hub: no token; set HF_TOKEN to one that may write, or run hf auth login"
        )
    adapter = model.lora.rank > 0 and cfg.model
    if adapter and (model.path == "demo" or not hub_id(model.path) or model.adapter):
        raise ValueError(
            "export.push_to_hub: others could not load the adapter, as its base is on this machine "
            "alone; set export.merged=true export.model=false"
        )


def push(folder: Path, name: str) -> None:
    """Upload a folder to ORG/NAME on the hub; a repository that is new is private.

    Raises ExportError, which names the folder and the command that pushes it again.
    """
    log.info(f"pushing {folder} to {name}")
    try:
        hub = HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of iopo")
    except Exception as error:  # the hub's, the network's, its client's
        raise ExportError(
            f"{folder} is complete, but was not pushed to {name}: {redact(str(error))}\n"
            f"Push it by hand: hf upload {name} {folder}"
        ) from error


def export_run(run: Run, folder: Path, facts: Facts, ranks: RankInfo) -> None:
    """As `export`, at the end of the run in `folder`; an error says how to export again."""
    try:
        export(run, folder, facts, ranks)
    except Exception as error:
        newest, _ = latest(folder)
        why = f"the export failed: {type(error).__name__}: {error}"
        if newest is None or (step := step_of(newest)) < run.job.steps:
            raise ExportError(f"{why}\nNo checkpoint of the last step could be written") from error
        raise ExportError(
            f"{why}\nThe trained weights are in {newest}. To export them, without training again: "
            f"the same command, or python train.py run={folder} export_step={step}"
        ) from error


def export_step(cfg: TrainConfig, scratch: Path, ranks: RankInfo, control: Control) -> None:
    """Export the checkpoint of cfg.export_step; a worker for `launch`, whose scratch takes errors.

    Raises ValueError if the run has no complete checkpoint of that step.
    """
    set_up_logging(main=ranks.is_main)
    folder, step = Path(cfg.run), cfg.export_step
    folders = {step_of(folder): folder for folder in complete_folders(folder)[0]}
    if step not in folders:
        raise ValueError(
            f"export_step: {folder} has no complete checkpoint of step {step}, expected one of "
            f"{sorted(folders)}"
        )
    cfg.parallel.checkpointing = Checkpointing.none  # there is no backward
    cfg.export.model = True
    run = build_run(cfg, ranks, with_reference=False)
    load_checkpoint(folders[step], run.model, run.optimizer)
    heartbeat()
    place = folder / "exported" / folders[step].name
    if ranks.is_main:
        place.mkdir(parents=True, exist_ok=True)
    export(run, place, Facts(cfg, run.inputs, step), ranks)
    log.info(f"{folders[step]} -> {place}")


def write_exports(
    train_model: TrainModel,
    run: Path,
    cfg: ExportConfig,
    chat: Chat,
    origin: Origin,
    ranks: RankInfo,
) -> None:
    """export/: the model, or with LoRA the adapter; export-merged/: with LoRA, the whole model.

    Each comes with the chat that was trained on: the template with its date and options fixed, and
    the token that ends a response among the ends of generation_config.json.
    Raises ExportError if a written model does not read back as the one in training.
    """
    ids = np.asarray(chat.tokenizer.encode(PROBE, add_special_tokens=False), dtype=np.int32)
    half = len(ids) // 2
    example = Example(id="probe", prompts=(ids[:half],), responses=((ids[half:],),))
    probe = build_plain([example]).to(ranks.device)
    expected = _score(train_model.model, probe)
    dtype, base = origin.dtype or train_model.dtype, origin.base
    layers = lora.adapters(language_model(train_model.model))
    of_base = expected
    if layers and base is None and cfg.model:
        with lora.adapter_off(train_model.model):
            of_base = _score(train_model.model, probe)
    only = ".lora_" if layers and base is not None and not cfg.merged else ""
    tensors = gather(train_model, dtype, keep=ranks.is_main, only=only)
    if not ranks.is_main:
        return
    stop_clock()  # a large model or a slow disk or hub takes what it takes; nobody waits for it

    def finish(new: Path, kind: str) -> None:
        _save_chat(train_model, new, chat)
        if origin.describe is not None:
            (new / "README.md").write_text(origin.describe(kind), encoding="utf-8")

    def write(folder: Path, weights: dict[str, Tensor], kind: str) -> None:
        with replacing(folder) as new:
            reloaded = _save(train_model, new, weights, dtype)
            finish(new, kind)
            wanted = of_base if kind == BASE else expected
            # in the dtype of training, whose rounding grows with the logits; buffers stay as read
            for parameter in reloaded.parameters():
                parameter.data = parameter.data.to(train_model.dtype)
            found = _score(LogProbs(reloaded), probe.to("cpu"))
            tolerance = max(TOLERANCE.get(each, 0.1) for each in (dtype, train_model.dtype))
            if not abs(found - wanted) <= tolerance:
                raise ExportError(
                    f"{folder}: read back, a token of the probe has a log-probability of "
                    f"{found:.6f} on average, and {wanted:.6f} in training; expected within "
                    f"{tolerance:g} nats"
                )

    if not layers:
        write(run / FOLDER, tensors, FULL)
        return
    plain_weights = {n: t for n, t in tensors.items() if ".lora_" not in n}
    if cfg.model:
        if base is None:
            write(run / BASE_FOLDER, plain_weights, BASE)
            base = str((run / BASE_FOLDER).resolve())
        with replacing(run / FOLDER) as new:
            named = {n: t for n, t in tensors.items() if ".lora_" in n}
            config = lora.adapter_config(language_model(train_model.model), base)
            lora.write_adapter(new, config, named)
            finish(new, ADAPTER)
    if cfg.merged:
        for name, layer in layers.items():
            weight, a, b = (tensors[f"{name}.{part}"] for part in ("weight", "lora_A", "lora_B"))
            plain_weights[f"{name}.weight"] = lora.merge(weight, a, b, layer.scaling)
        write(run / MERGED_FOLDER, plain_weights, MERGED)


@torch.no_grad()
def gather(
    train_model: TrainModel, dtype: torch.dtype, *, keep: bool, only: str = ""
) -> dict[str, Tensor]:
    """Whole tensors on the CPU by the language model's names; {} where not `keep`. Collective.

    only: a part of the names of those that are wanted. Weights are rounded to `dtype`; adapters
    stay fp32. Tied weights come once. Buffers that belong to the weights (a router's biases) come
    as they are.
    """
    model = language_model(train_model.model)
    root = next(name for name, module in train_model.model.named_modules() if module is model)
    tensors = {} if only or not keep else {n: b.cpu().clone() for n, b in _buffers(model).items()}
    for name, parameter in train_model.model.named_parameters():
        if only not in name:
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            saved = whole.dtype if ".lora_" in name else dtype
            short = name.removeprefix(root + ".") if root else name
            tensors[short] = whole.detach().to("cpu", saved, copy=True)
    return tensors


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that are part of a model's weights, by name.

    Not from state_dict(), which FSDP2 answers by dividing what is gathered, on this rank alone.
    """
    passing = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in passing}


def _save(
    train_model: TrainModel, folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """Write a model folder; returns it as stock transformers reads it. dtype: of most tensors.

    Raises ExportError unless that holds `tensors`.
    """
    disable_progress_bar()
    # a copy of the dict: save_pretrained empties it as it goes
    language_model(train_model.model).save_pretrained(folder, state_dict=dict(tensors))
    # transformers notes the live model's settings; a user wants those of the saved one
    name = str(dtype).removeprefix("torch.")
    write_older_keys(folder / "config.json", dtype=name, use_cache=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, attn_implementation="sdpa"
    )
    found = {**dict(model.named_parameters()), **_buffers(model)}
    wrong = [n for n, t in tensors.items() if n not in found or not torch.equal(found[n], t)]
    wrong += [n for n in found if n not in tensors]
    saved, live = model.config, language_model(train_model.model).config
    if getattr(saved, "rope_parameters", None) != getattr(live, "rope_parameters", None):
        wrong.append("config.json: rope_parameters")
    if wrong:
        raise ExportError(
            f"{folder}: {len(wrong)} tensors do not read back as saved, among them {wrong[:3]}"
        )
    return model


def _save_chat(train_model: TrainModel, folder: Path, chat: Chat) -> None:
    """The tokenizer with the template as it was trained on, and where generation must stop.

    Raises ExportError unless stock transformers reads the prompt of training from it.
    """
    save_tokenizer(chat.tokenizer, folder, chat.saved_template())
    stock = Chat(load_tokenizer(folder), chat.system)
    expected, found = (c.prompt_ids(c.messages(PROBE)) for c in (chat, stock))
    if found != expected:
        message = (
            f"{folder}: read back, the tokenizer gives other tokens for a prompt than in training: "
            f"found {stock.tokenizer.convert_ids_to_tokens(found)}, expected "
            f"{chat.tokenizer.convert_ids_to_tokens(expected)}"
        )
        if chat.tokenizer.name_or_path:
            raise ExportError(message)
        log.warning(message)  # model.tiny: transformers knows its type with another tokenizer
    model = language_model(train_model.model)
    config = (model.generation_config or GenerationConfig()).to_diff_dict()
    config["eos_token_id"] = sorted(end_of_turn_ids(model, chat))
    write_text(folder / "generation_config.json", json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def _score(model: nn.Module, probe: Batch) -> float:
    """The mean log-prob of a response token."""
    training = model.training
    model.eval()
    logp = model(probe).sum().item()
    model.train(training)
    return logp / int(probe.scored_M.sum())
