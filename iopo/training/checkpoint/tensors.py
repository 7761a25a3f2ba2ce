"""The tensors of a checkpoint, and reading them without running code from the file.

`torch.distributed.checkpoint` writes one shard per rank and an index, and can read them back into
another number of ranks. Its index is a pickle, so it is read here with a list of allowed classes;
everything this project saves is a tensor, so nothing else is unpickled.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from iopo.training.seeds import rng_state, set_rng_state

# Keys are kind/.../name; a parameter's name comes last because it may hold any character.
_PARAMETERS, _OPTIMIZER, _RNG = "parameters", "optimizer", "rng"


def gather_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int
) -> dict[str, Tensor]:
    """Everything a step changes, as a flat dict of tensors (DTensors stay sharded).

    Hyper-parameters of the optimizer are not in it: the config says them, and the learning rate is
    a function of the step.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state[f"{_PARAMETERS}/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"optimizer state {key} is no tensor"
            state[f"{_OPTIMIZER}/{key}/{name}"] = value
    for key, value in rng_state().items():
        state[f"{_RNG}/{rank}/{key}"] = value
    return state


def load_state(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    same_world: bool,
) -> None:
    """Fill parameters, optimizer and, if `same_world`, this rank's generators from a checkpoint.

    Every rank calls it. Raises ValueError if the parameters are not those that were saved.
    """
    reader = _Reader(folder)
    saved = reader.read_metadata().state_dict_metadata
    _check_parameters(folder, saved, parameters)
    state: dict[str, Any] = {}
    for key, facts in saved.items():
        if not isinstance(facts, TensorStorageMetadata):
            raise ValueError(f"{folder}: {key} is no tensor; refused")
        kind, rest = key.split("/", 1)
        if kind == _PARAMETERS:
            state[key] = parameters[rest].detach()
        elif kind == _OPTIMIZER:
            _, name = rest.split("/", 1)
            state[key] = _empty(facts, parameters[name])
        elif kind == _RNG and same_world and rest.startswith(f"{rank}/"):
            state[key] = torch.empty(facts.size, dtype=torch.uint8)
    dcp.load(state, storage_reader=reader)
    _fill_optimizer(optimizer, parameters, state)
    if same_world:
        prefix = f"{_RNG}/{rank}/"
        set_rng_state({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, unsharded, in this process alone: for tools and comparisons."""
    reader = _Reader(folder)
    state: dict[str, Any] = {}
    for key, facts in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata)
        state[key] = torch.empty(facts.size, dtype=facts.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs without a process group: as asked
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def _check_parameters(
    folder: Path, saved: dict[str, Any], parameters: dict[str, nn.Parameter]
) -> None:
    prefix = _PARAMETERS + "/"
    shapes = {k[len(prefix) :]: tuple(v.size) for k, v in saved.items() if k.startswith(prefix)}
    present = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != present:
        differing = sorted(set(shapes.items()) ^ set(present.items()))
        raise ValueError(
            f"{folder} holds {len(shapes)} parameters, the model trains {len(present)}; the first "
            f"that differ: {differing[:4]}. Was it saved with another model or LoRA setting?"
        )


def _empty(facts: TensorStorageMetadata, parameter: nn.Parameter) -> Tensor:
    """Room for one piece of optimizer state: laid out like its parameter, or a scalar."""
    if tuple(facts.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=facts.properties.dtype)
    return torch.zeros(facts.size, dtype=facts.properties.dtype)


def _fill_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], state: dict[str, Any]
) -> None:
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = optimizer.state_dict()["param_groups"]
    by_index: dict[int, dict[str, Tensor]] = {}
    for group, packed in zip(optimizer.param_groups, groups, strict=True):
        for parameter, index in zip(group["params"], packed["params"], strict=True):
            ending = "/" + names[id(parameter)]
            by_index[index] = {
                key.split("/", 2)[1]: value
                for key, value in state.items()
                if key.startswith(_OPTIMIZER + "/") and "/" + key.split("/", 2)[2] == ending
            }
    filled = {index: values for index, values in by_index.items() if values}
    optimizer.load_state_dict({"state": filled, "param_groups": groups})


class _IndexUnpickler(pickle.Unpickler):
    """Allows what an index is made of: torch's own metadata classes, sizes, dtypes, paths."""

    _ALLOWED = {
        "torch": {"Size", "device"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"Path", "PosixPath", "PurePosixPath"},
        "collections": {"OrderedDict"},
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
            *("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    }

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if name in self._ALLOWED.get(module, ()) or isinstance(found, torch.dtype):
            return super().find_class(module, name)
        raise ValueError(
            f"the checkpoint's .metadata refers to {module}.{name}, which no checkpoint of this "
            "project does; refused, because reading it could run code"
        )


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _IndexUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
