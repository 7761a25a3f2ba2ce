"""Low-rank adapters (LoRA, arXiv 2106.09685) in place of a model's linear layers, in PEFT's format.

    y = base(x) + (alpha / rank) * dropout(x) A^T B^T        A [rank, in], B [out, rank]

A starts as PEFT's does (kaiming-uniform with a = sqrt 5), B at zero, so the adapted model starts
as the base, bit for bit. The base is frozen in the dtype it was loaded in. A and B are kept in fp32
and rounded to the dtype of x for the two thin products, as under FSDP's mixed precision: their
small updates are not lost, and their products run at the speed of the base's.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

PREFIX = "base_model.model."  # of every tensor name in PEFT's files
# What PEFT may write, with the only value that this module implements, PEFT's default.
FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
}
# Keys that change no number here, whatever they hold; the tensors name the adapted layers.
NO_EFFECT = (
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
    "lora_dropout",  # an adapter that is loaded is merged or only evaluated
)
# How A and B began does not matter once they are trained, unless the base was changed with them.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank adapter; `weight` and `bias` keep their names.

    active: False gives the base layer's output (see adapter_off).
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        # on the meta device nothing is allocated or drawn: the weights are the base's own
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout, self.active = rank, alpha, dropout, True
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, self.weight, self.bias)
        if not self.active:
            return out
        kept = F.dropout(input, self.dropout, self.training) if self.dropout else input
        low = F.linear(kept, self.lora_A.to(input.dtype)).flatten(0, -2)
        wide = self.lora_B.to(input.dtype).t()
        # one kernel, and one rounding, for the product and the sum
        return torch.addmm(out.flatten(0, -2), low, wide, alpha=self.scaling).view_as(out)


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """weight + scaling * B A, computed in fp32 and rounded once to the weight's dtype."""
    delta = scaling * (lora_B.float() @ lora_A.float())
    return (weight.float() + delta).to(weight.dtype)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Adapted layers by module name, in the model's order; empty for a model without LoRA."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str,
    generator: torch.Generator,
) -> None:
    """Replace linear layers by LoRALinear, in place, and freeze everything else.

    targets: `all-linear` (every nn.Linear but the output layer), or names of layers such as
        `q_proj` or `mlp.down_proj`, with commas between them: a layer is adapted if its full name
        is one of them or ends in a dot and one of them.
    generator: a CPU generator; A is drawn on the CPU in the model's order, so that all ranks and
        devices start alike.
    Raises ValueError if a name fits no layer.
    """
    assert not adapters(model)
    chosen = choose(model, targets)
    model.requires_grad_(False)
    for name in chosen:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = LoRALinear(base, rank, alpha, dropout)
        drawn = torch.empty(layer.lora_A.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        layer.lora_A.data.copy_(drawn)
        model.set_submodule(name, layer)


def choose(model: PreTrainedModel, targets: str) -> list[str]:
    """Names of the linear layers that `targets` means. Raises ValueError if it means none."""
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if not linear:
        raise ValueError(
            f"model.lora.rank: the layers of model type '{model.config.model_type}' are no "
            "nn.Linear (GPT-2's are Conv1D), and nothing else is adapted; train all weights "
            "(model.lora.rank=0)"
        )
    if targets == "all-linear":
        return linear
    wanted = [target.strip() for target in targets.split(",")]
    fits = {t: [n for n in linear if n == t or n.endswith("." + t)] for t in wanted}
    missing = [t for t, names in fits.items() if not names]
    if missing:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in linear})
        raise ValueError(
            f"model.lora.targets: {', '.join(missing)} fits no linear layer; expected all-linear "
            f"or some of {', '.join(leaves)}"
        )
    return [n for n in linear if any(n in names for names in fits.values())]


def describe(model: PreTrainedModel, targets: str, rank: int) -> str:
    """What adapters of this rank would train, and the matrices beside them that stay as they are,
    such as experts that are one tensor and no nn.Linear."""
    chosen = choose(model, targets)
    layers = [model.get_submodule(name) for name in chosen]
    trained = sum(
        rank * (m.in_features + m.out_features) for m in layers if isinstance(m, nn.Linear)
    )
    apart = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    apart |= {id(p) for m in layers for p in m.parameters()}
    apart |= {id(p) for p in model.get_output_embeddings().parameters()}
    frozen = Counter(
        re.sub(r"\d+", "*", name)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in apart
    )
    text = f"LoRA: {trained:,} parameters in {len(chosen)} layers train"
    if frozen:
        names = ", ".join(f"{name} ({count})" for name, count in frozen.items())
        text += f"; NOT adapted, and frozen: {names}"
    return text


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as its base: the reference, if the base is the reference."""
    layers = adapters(model).values()
    assert layers, "without adapters this would change nothing"
    try:
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer in layers:
            layer.active = True


def merge_lora(model: nn.Module, only: nn.Module | None = None) -> None:
    """Replace every LoRALinear, or this one alone, by the nn.Linear that it amounts to, rounded to
    its dtype, in place; no way back."""
    for name, layer in adapters(model).items():
        if only is not None and layer is not only:
            continue
        merged = nn.Linear(layer.in_features, layer.out_features, device="meta")
        weight = merge(layer.weight, layer.lora_A, layer.lora_B, layer.scaling).detach()
        merged.weight = nn.Parameter(weight, requires_grad=False)
        merged.bias = layer.bias
        model.set_submodule(name, merged)


def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """The contents of PEFT's adapter_config.json; base: path or hub id of the base model.

    Keys at PEFT's defaults are left out: versions that do not know one of them refuse the file.
    """
    layers = adapters(model)
    ((rank, alpha, dropout),) = {(m.rank, m.alpha, m.dropout) for m in layers.values()}
    # the last parts of the names (`q_proj`) if they single out the adapted layers
    leaves = {name.rsplit(".", 1)[-1] for name in layers}
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    fitting = {name for name in linear if name.rsplit(".", 1)[-1] in leaves}
    return {
        "peft_type": FIXED["peft_type"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(leaves if fitting == set(layers) else layers),
    }


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write PEFT's two files from tensors named `<layer>.lora_A` and `<layer>.lora_B`."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{PREFIX}{name}.weight": t.detach().contiguous() for name, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Put the adapters of a PEFT folder on a model without any, and freeze everything else.

    Raises ValueError for what LoRALinear does not compute (DoRA, rsLoRA, biases, per-layer ranks,
    further trained modules), for pickled adapters and for layers that do not fit.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, which = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        layers.setdefault(name, {})[which] = tensor
    known = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    bad = [n for n, t in layers.items() if set(t) != {"lora_A", "lora_B"} or n not in known]
    if bad:
        raise ValueError(
            f"{folder}: adapters for {', '.join(bad[:3])} do not fit this model; was the adapter "
            "trained on another one?"
        )
    model.requires_grad_(False)
    for name, values in layers.items():
        layer = LoRALinear(known[name], config["r"], config["lora_alpha"], config["lora_dropout"])
        for which, value in values.items():
            parameter = layer.get_parameter(which)
            if parameter.shape != value.shape:
                raise ValueError(
                    f"{folder}: {name}.{which} has shape {tuple(value.shape)}, expected "
                    f"{tuple(parameter.shape)}"
                )
            parameter.data.copy_(value)
        model.set_submodule(name, layer)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder}: no adapter_model.safetensors (a pickled adapter_model.bin is not loaded; "
            "save it again with a recent peft)"
        )
    config = json.loads((folder / "adapter_config.json").read_text())
    start = config.pop("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{folder}: not supported in adapter_config.json: init_lora_weights={start!r}, which "
            "changes the base model too; save it as plain LoRA, with peft's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    # null and {} both mean "none" in files of different PEFT versions
    known = ("r", "lora_alpha", *NO_EFFECT)
    odd = {
        k: v for k, v in config.items() if k not in known and (v or None) != (FIXED.get(k) or None)
    }
    if odd:
        raise ValueError(
            f"{folder}: not supported in adapter_config.json: {odd}; merge the adapter into its "
            "base with peft's merge_and_unload(), and give the merged model"
        )
    return config
