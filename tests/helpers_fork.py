"""Ranks that start at once: forked from one server process that has imported PyTorch and train.py.

A new interpreter takes seconds to import them, more than a tiny run takes. The forked process is a
rank that `launch` adopts, as if torchrun had made it; tests/launch has the ranks that are spawned.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train", "torch.distributed.checkpoint", "torch.distributed.fsdp"])


def start_ranks(
    world: int, function: Callable[..., int | None], *arguments: Any
) -> list[BaseProcess]:
    """Start `function(*arguments)`, which returns an exit code, on `world` ranks."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)  # for the server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        environ = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        text = {name: str(value) for name, value in environ.items()}
        ranks.append(_CONTEXT.Process(target=_be_rank, args=(text, function, *arguments)))
        ranks[-1].start()
    return ranks


def finish(ranks: list[BaseProcess], timeout_s: float = 120) -> list[int | None]:
    """Wait for the ranks; their exit codes, None for one that did not end."""
    for rank in ranks:
        rank.join(timeout_s)
    codes = [rank.exitcode for rank in ranks]
    kill(ranks)
    return codes


def kill(ranks: list[BaseProcess]) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()


def _be_rank(environ: dict[str, str], function: Callable[..., int | None], *arguments: Any) -> None:
    os.environ.update(environ)
    sys.exit(function(*arguments))


def run_train(arguments: list[str], cache: Path, output: Path) -> None:
    """Be `python train.py ARGUMENTS`; its output is appended to a file."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    os.chdir(ROOT)
    with open(output, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
