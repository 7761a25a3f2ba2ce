"""Write the trained model for everyone else: Hugging Face safetensors, or a PEFT adapter.

A model folder appears whole or not at all, and only after stock transformers has read it back and
agreed with the model in training about a fixed text. `python train.py run=DIR export_step=N` writes
a checkpoint of a run to DIR/exported/step-0000000N.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from iopo.config import Checkpointing, ExportConfig, ModelConfig, TrainConfig
from iopo.data.chat import Chat
from iopo.data.layout import Batch, build_plain
from iopo.data.tokenize import Example
from iopo.files import replacing, write_text
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.generate import end_of_turn_ids
from iopo.model.parallel import TrainModel, language_model
from iopo.progress import progress
from iopo.training.checkpoint.folders import complete_folders, latest, step_of
from iopo.training.checkpoint.resume import load_checkpoint
from iopo.training.launch.placement import RankInfo
from iopo.training.launch.signals import Control, heartbeat
from iopo.training.logger import set_up_logging
from iopo.training.setup import Run, build_run

log = logging.getLogger(__name__)

FOLDER, MERGED, BASE = "export", "export-merged", "export-base"
PROBE = "A model that was saved must give, once it is loaded again, the same answer as before."
# mean difference of a token's log-probability, in nats, that rounding explains
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3, torch.float64: 1e-6}


class ExportError(RuntimeError):
    """An export that does not read back as what was trained; its folder was not made."""


def export(run: Run, folder: Path, model: ModelConfig, cfg: ExportConfig, ranks: RankInfo) -> None:
    """Write what `cfg` asks for into `folder`. Every rank calls it; rank 0 writes."""
    if not cfg.any:
        return
    # The adapter's base is model.path, unless the run changed or drew it: then it is written too.
    path, base = run.inputs.model_path, None
    if path is not None and model.adapter is None:
        # Others find a model by its id on the hub, or in its folder, wherever they look from.
        hub = model.path != "demo" and not Path(str(model.path)).expanduser().is_dir()
        base = str(model.path) if hub else str(path.resolve())
    with progress(None, f"exporting to {folder}"):
        write_exports(run.model, folder, cfg, run.inputs.chat, base, ranks)


def export_run(
    run: Run, folder: Path, model: ModelConfig, cfg: ExportConfig, ranks: RankInfo
) -> None:
    """As `export`, at the end of the run in `folder`; an error says how to export again."""
    try:
        export(run, folder, model, cfg, ranks)
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
    export(run, place, cfg.model, cfg.export, ranks)
    log.info(f"{folders[step]} -> {place}")


def write_exports(
    train_model: TrainModel,
    run: Path,
    cfg: ExportConfig,
    chat: Chat,
    base: str | None,
    ranks: RankInfo,
) -> None:
    """export/: the model, or with LoRA the adapter; export-merged/: with LoRA, the whole model.

    base: what the adapter names as its base model; None writes the base to export-base/ first.
    Weights are saved in the dtype that the model computes in, so the export computes the same.
    Each comes with the chat that was trained on: the template with its date and options fixed, and
    the token that ends a response among the ends of generation_config.json.
    Raises ExportError if a written model does not read back as the one in training.
    """
    ids = np.asarray(chat.tokenizer.encode(PROBE, add_special_tokens=False), dtype=np.int32)
    half = len(ids) // 2
    example = Example(id="probe", prompts=(ids[:half],), responses=((ids[half:],),))
    probe = build_plain([example]).to(ranks.device)
    expected = _score(train_model.model, probe)
    layers = lora.adapters(language_model(train_model.model))
    adapter_alone = bool(layers) and base is not None and not cfg.merged
    tensors = gather(train_model, keep=ranks.is_main, only=".lora_" if adapter_alone else "")
    if not ranks.is_main:
        return

    def write(folder: Path, weights: dict[str, Tensor], *, trained: bool = True) -> None:
        with replacing(folder) as partial:
            reloaded = _save(train_model, partial, weights)
            _save_chat(train_model, partial, chat)
            if not trained:
                return
            found = _score(LogProbs(reloaded), probe.to("cpu"))
            tolerance = TOLERANCE[train_model.dtype]
            if not abs(found - expected) <= tolerance:
                raise ExportError(
                    f"{folder}: read back, a token of the probe has a log-probability of "
                    f"{found:.6f} on average, and {expected:.6f} in training; expected within "
                    f"{tolerance:g} nats"
                )

    if not layers:
        write(run / FOLDER, tensors)
        return
    plain_weights = {n: t for n, t in tensors.items() if ".lora_" not in n}
    if cfg.model:
        if base is None:
            write(run / BASE, plain_weights, trained=False)
            base = str((run / BASE).resolve())
        with replacing(run / FOLDER) as partial:
            named = {n: t for n, t in tensors.items() if ".lora_" in n}
            config = lora.adapter_config(language_model(train_model.model), base)
            lora.write_adapter(partial, config, named)
            _save_chat(train_model, partial, chat)
    if cfg.merged:
        for name, layer in layers.items():
            weight, a, b = (tensors[f"{name}.{part}"] for part in ("weight", "lora_A", "lora_B"))
            plain_weights[f"{name}.weight"] = lora.merge(weight, a, b, layer.scaling)
        write(run / MERGED, plain_weights)


@torch.no_grad()
def gather(train_model: TrainModel, *, keep: bool, only: str = "") -> dict[str, Tensor]:
    """Whole tensors on the CPU by the language model's names; {} where not `keep`. Collective.

    only: a part of the names of those that are wanted.
    Trained weights are rounded to the dtype that computes; adapters stay fp32. Tied weights come
    once.
    """
    model = language_model(train_model.model)
    root = next(name for name, module in train_model.model.named_modules() if module is model)
    tensors = {}
    for name, parameter in train_model.model.named_parameters():
        if only not in name:
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            dtype = whole.dtype if ".lora_" in name else train_model.dtype
            short = name.removeprefix(root + ".") if root else name
            tensors[short] = whole.detach().to("cpu", dtype, copy=True)
    return tensors


def _save(train_model: TrainModel, folder: Path, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Write a model folder; returns it as stock transformers reads it.

    Raises ExportError unless that holds `tensors`.
    """
    disable_progress_bar()
    # a copy of the dict: save_pretrained empties it as it goes
    language_model(train_model.model).save_pretrained(folder, state_dict=dict(tensors))
    # transformers notes the live model's settings; a user wants those of the saved one
    file = folder / "config.json"
    settings = {"dtype": str(train_model.dtype).removeprefix("torch."), "use_cache": True}
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, attn_implementation="sdpa"
    )
    found = dict(model.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in found or not torch.equal(found[n], t)]
    wrong += [n for n in found if n not in tensors]
    if wrong:
        raise ExportError(
            f"{folder}: {len(wrong)} tensors do not read back as saved, among them {wrong[:3]}"
        )
    return model


def _save_chat(train_model: TrainModel, folder: Path, chat: Chat) -> None:
    """The tokenizer with the template as it was trained on, and where generation must stop."""
    chat.save(folder)
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
