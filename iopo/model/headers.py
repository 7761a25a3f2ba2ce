"""The weight files of a model folder, known by their headers: no value is read."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
FLOATS = {"F64", "F32", "F16", "BF16"}


def read_headers(folder: Path) -> dict[str, list[int]]:
    """Shapes of the tensors by name, in the files that transformers reads from a folder.

    Raises ValueError, with all files in one message: missing, truncated, or a git-lfs pointer; and
    for quantised weights.
    """
    shapes: dict[str, list[int]] = {}
    quantised, faults = [], []
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:  # compares the offsets with the size
                for name in opened.keys():
                    tensor = opened.get_slice(name)
                    shapes[name] = tensor.get_shape()
                    if name.endswith("weight") and tensor.get_dtype() not in FLOATS:
                        quantised.append(f"{name} ({tensor.get_dtype()})")
        except (SafetensorError, OSError) as error:
            faults.append(f"{file.name}: {_fault(file, error)}")
    if faults:
        raise ValueError(f"{folder}: weights that cannot be read:\n  " + "\n  ".join(faults))
    if quantised:
        raise ValueError(
            f"{folder}: {len(quantised)} weights are quantised, among them {quantised[0]}; use the "
            "bf16 or fp32 original"
        )
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that the index names. Raises ValueError without either."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        names = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
        raise ValueError(f"{folder}: found {names}, expected {SINGLE} or {INDEX} with its files")
    return [folder / name for name in sorted(set(_index(folder / INDEX).values()))]


def _index(file: Path) -> dict[str, str]:
    try:
        return json.loads(file.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not an index of weights ({type(error).__name__})") from error


def _fault(file: Path, error: Exception) -> str:
    if not file.exists():
        return f"missing, but {INDEX} names it: download it again"
    size = file.stat().st_size
    with open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            return f"{size} bytes, a git-lfs pointer: run git lfs pull"
    return f"{size} bytes, truncated or damaged ({error}): download it again"
