"""Low-rank adapters (LoRA, arXiv 2106.09685) in place of a model's linear layers, in PEFT's format.

    y = base(x) + (alpha / rank) * dropout(x) A^T B^T        A [rank, in], B [out, rank]

A starts as PEFT's does (kaiming-uniform with a = sqrt 5), B at zero, so the adapted model starts
as the base, bit for bit. The base is frozen in the dtype it was loaded in. A and B are kept in fp32
and rounded to the dtype of x for the two thin products, as under FSDP's mixed precision: their
small updates are not lost, and their products run at the speed of the base's.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

PREFIX = "base_model.model."  # of every tensor name in PEFT's files
# What PEFT writes, with the only value that this module implements.
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


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank adapter; `weight` and `bias` keep their names and are frozen.

    active: False gives the base layer's output (see adapter_off).
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        # on the meta device nothing is allocated or drawn: the weights are the base's own
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
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
    targets: str | Sequence[str],
    generator: torch.Generator,
) -> None:
    """Replace linear layers by LoRALinear, in place, and freeze everything else.

    targets: `all-linear` (every nn.Linear but the output layer), or names of layers such as
        `q_proj` or `mlp.down_proj` (a sequence, or one string with commas): a layer is adapted if
        its full name is one of them or ends in a dot and one of them.
    generator: a CPU generator; A is drawn on the CPU in the model's order, so that all ranks and
        devices start alike.
    Raises ValueError if a name fits no layer, or the model has adapters already.
    """
    if adapters(model):
        raise ValueError("add_lora: the model has adapters already; merge or load them instead")
    if rank < 1:
        raise ValueError(f"add_lora: model.lora.rank is {rank}, expected 1 or more")
    chosen = _choose(model, targets)
    model.requires_grad_(False)
    for name in chosen:
        layer = LoRALinear(_linear(model, name), rank, alpha, dropout)
        drawn = torch.empty(layer.lora_A.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        layer.lora_A.data.copy_(drawn)
        model.set_submodule(name, layer)


def _choose(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if targets == "all-linear":
        return linear
    wanted = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else list(targets)
    fits = {t: [n for n in linear if n == t or n.endswith("." + t)] for t in wanted}
    missing = [t for t, names in fits.items() if not names]
    if missing or not wanted:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in linear})
        raise ValueError(
            f"model.lora.targets: {', '.join(missing) or 'nothing'} fits no linear layer; "
            f"expected all-linear or some of {', '.join(leaves)}"
        )
    return [n for n in linear if any(n in names for names in fits.values())]


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def starts_at_zero(model: nn.Module) -> bool:
    """Whether there are adapters and all of them add exactly nothing (every B is zero)."""
    layers = adapters(model).values()
    return bool(layers) and not any(bool(layer.lora_B.any()) for layer in layers)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as its base: the reference, if the base is the reference.

    Raises ValueError on a model without adapters, where it would change nothing.
    """
    layers = list(adapters(model).values())
    if not layers:
        raise ValueError("adapter_off: the model has no adapters; use another reference")
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def merge_lora(model: nn.Module) -> None:
    """Replace every LoRALinear by the nn.Linear that it amounts to, in place; no way back."""
    for name, layer in adapters(model).items():
        merged = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        weight = merge(layer.weight, layer.lora_A, layer.lora_B, layer.scaling).detach()
        merged.weight = nn.Parameter(weight, requires_grad=False)
        merged.bias = layer.bias
        model.set_submodule(name, merged)


def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """The contents of PEFT's adapter_config.json; base: path or hub id of the base model."""
    layers = adapters(model)
    settings = {(m.rank, m.alpha, m.dropout) for m in layers.values()}
    if len(settings) != 1:
        raise ValueError(f"expected adapters of one rank, alpha and dropout, found {settings}")
    rank, alpha, dropout = settings.pop()
    return FIXED | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _target_names(model, set(layers)),
    }


def _target_names(model: nn.Module, chosen: set[str]) -> list[str]:
    """Last parts of the names (`q_proj`) if they single out the chosen layers, else full names."""
    leaves = {name.rsplit(".", 1)[-1] for name in chosen}
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    fitting = {name for name in linear if name.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves if fitting == chosen else chosen)


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write PEFT's two files from tensors named `<layer>.lora_A` and `<layer>.lora_B`."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{PREFIX}{name}.weight": t.detach().contiguous() for name, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Put the adapters of a PEFT folder on the model, in place, and freeze everything else.

    A model that has adapters already must have the same ones; their values are replaced.
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
    known = dict(model.named_modules())
    bad = [n for n, t in layers.items() if set(t) != {"lora_A", "lora_B"} or n not in known]
    present = adapters(model)
    if bad or (present and set(present) != set(layers)):
        raise ValueError(
            f"{folder}: adapters for {', '.join(bad[:3]) or 'other layers'} do not fit this model; "
            "was the adapter trained on another one?"
        )
    if not present:
        model.requires_grad_(False)
    for name, values in layers.items():
        _load_layer(model, name, values, config, where=str(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder}: no adapter_model.safetensors (a pickled adapter_model.bin is not loaded; "
            "save it again with a recent peft)"
        )
    config = json.loads((folder / "adapter_config.json").read_text())
    # null and {} both mean "none" in files of different PEFT versions
    odd = {k: config[k] for k in FIXED if k in config and (config[k] or None) != (FIXED[k] or None)}
    if odd:
        raise ValueError(f"{folder}: not supported in adapter_config.json: {odd}")
    return config


def _load_layer(
    model: nn.Module, name: str, values: dict[str, Tensor], config: dict[str, Any], *, where: str
) -> None:
    layer = _linear(model, name)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer, config["r"], config["lora_alpha"], config["lora_dropout"])
    for which, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        if parameter.shape != values[which].shape:
            raise ValueError(
                f"{where}: {name}.{which} has shape {tuple(values[which].shape)}, expected "
                f"{tuple(parameter.shape)}"
            )
        parameter.data.copy_(values[which])
    layer.alpha = config["lora_alpha"]
    model.set_submodule(name, layer)
