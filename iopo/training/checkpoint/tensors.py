"""The tensors of a checkpoint, and reading them without running code from the file.

`torch.distributed.checkpoint` writes one shard per rank and an index, and reads them back into any
number of ranks. The index is a pickle, so it is read here with a list of allowed classes; all that
is saved is tensors, so nothing else is unpickled.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from iopo.training.checkpoint.folders import read_state
from iopo.training.seeds import rng_state, set_rng_state

# Keys are kind/.../name; a parameter's name comes last because it may hold any character.
_PARAMETERS, _OPTIMIZER, _RNG = "parameters", "optimizer", "rng"


def gather_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int
) -> dict[str, Tensor]:
    """Everything a step changes, as a flat dict of tensors (DTensors stay sharded): parameters,
    moments, generators. Hyper-parameters are in the config."""
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
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Fill parameters, optimizer and, on the same number of ranks, the generators.

    Every rank calls it. Raises ValueError if the parameters are not those that were saved.
    """
    rank, same_world = dist.get_rank(), read_state(folder)["world_size"] == dist.get_world_size()
    reader = _Reader(folder)
    saved = reader.read_metadata().state_dict_metadata
    _check_parameters(folder, saved, parameters)
    state: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    generators: dict[str, Tensor] = {}
    for key, entry in saved.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{folder}: {key} is no tensor; refused")
        kind, rest = key.split("/", 1)
        if kind == _PARAMETERS:
            state[key] = parameters[rest].detach()
        elif kind == _OPTIMIZER:
            what, name = rest.split("/", 1)
            state[key] = moments[name][what] = _empty(entry, parameters[name])
        elif kind == _RNG and same_world and rest.startswith(f"{rank}/"):
            state[key] = generators[rest.split("/", 1)[1]] = _empty(entry)
    dcp.load(state, storage_reader=reader)
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    filled = {index: moments[name] for index, name in enumerate(ordered) if moments[name]}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": filled})
    if same_world:
        set_rng_state(generators)


def _check_parameters(folder: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    prefix = _PARAMETERS + "/"
    shapes = {k[len(prefix) :]: tuple(v.size) for k, v in saved.items() if k.startswith(prefix)}
    present = {name: tuple(parameter.shape) for name, parameter in expected.items()}
    if shapes != present:
        differing = sorted(set(shapes.items()) ^ set(present.items()))
        raise ValueError(
            f"{folder} holds {len(shapes)} parameters, the model trains {len(present)}; the first "
            f"that differ: {differing[:4]}. Was it saved with another model or LoRA setting?"
        )


def _empty(entry: TensorStorageMetadata, parameter: nn.Parameter | None = None) -> Tensor:
    """Memory to read a tensor into: laid out as its parameter, if it has one of its shape."""
    if parameter is not None and tuple(entry.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=entry.properties.dtype)
    return torch.zeros(entry.size, dtype=entry.properties.dtype)


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
