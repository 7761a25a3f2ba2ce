"""Which ranks this process stands for: its own, adopted from torchrun or SLURM, or ranks to spawn.

Three ways to start the same program:

- plain `python train.py`: this process spawns one worker per GPU (`Placement.adopted` is False);
- torchrun, or SLURM with one task per GPU: this process already is a rank (`adopted` is True);
- SLURM with one task per node (what Hydra's submitit launcher asks for): each task spawns the
  workers of its own node, and `first_rank` says where the node's ranks begin.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The place of one process among all: ranks count from 0, `local_` means on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def from_rank_0(ask: Callable[[], T]) -> T:
    """What `ask` returns on rank 0, on every rank, which call this together."""
    if not dist.is_initialized():
        return ask()
    told: list[Any] = [ask() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    return told[0]


@dataclass(frozen=True, slots=True)
class Placement:
    """The ranks of this machine: `first_rank .. first_rank + local_world_size - 1`.

    adopted: this process is rank `first_rank + local_rank` itself and spawns nothing.
    address, port: where rank 0's machine hosts the rendezvous; port 0 means any free port, which
        is possible only where one process spawns all the ranks.
    """

    adopted: bool
    first_rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    address: str
    port: int

    @property
    def is_main(self) -> bool:
        """True in the one process that makes the run folder: rank 0, or the parent of rank 0."""
        return self.first_rank + self.local_rank == 0

    def ranks(self, local_rank: int, backend: str) -> RankInfo:
        """One of this machine's ranks. A launcher may show each of its tasks one GPU only."""
        bound = self.adopted and torch.cuda.device_count() == 1
        gpu = torch.device("cuda", 0 if bound else local_rank)
        device = gpu if backend == "nccl" else torch.device("cpu")
        rank = self.first_rank + local_rank
        return RankInfo(rank, self.world_size, local_rank, self.local_world_size, device)


def find_placement(processes: int, environ: Mapping[str, str] = os.environ) -> Placement:
    """Read the launcher's environment variables; without them, `processes` ranks to spawn here.

    processes: workers per machine, >= 1; a launcher that made one process per rank overrides it.
    Raises ValueError when the launcher's variables are incomplete or contradict `processes`.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torchrun(environ)
    # Inside `srun`, not merely inside an allocation: only steps have both of these.
    step = "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID", "").isdigit()
    if step and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return _slurm(processes, environ)
    return Placement(False, 0, 0, processes, processes, "127.0.0.1", 0)


def _torchrun(environ: Mapping[str, str]) -> Placement:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environ]
    if missing:
        raise ValueError(
            f"RANK and WORLD_SIZE are set but {', '.join(missing)} not; start the ranks with "
            "torchrun, or unset RANK and WORLD_SIZE to let train.py spawn its workers"
        )
    rank, world, local_rank, local_world = (int(environ[name]) for name in names[:4])
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    return Placement(True, rank - local_rank, local_rank, local_world, world, address, port)


def _slurm(processes: int, environ: Mapping[str, str]) -> Placement:
    tasks, nodes = int(environ["SLURM_NTASKS"]), int(environ["SLURM_NNODES"])
    node_list = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    address = environ.get("MASTER_ADDR") or first_host(node_list)
    # Two jobs may share a node: derive the port from the job, unless it is given.
    default_port = 20000 + int(environ["SLURM_JOB_ID"]) % 20000
    port = int(environ.get("MASTER_PORT", default_port))
    if tasks == nodes:
        first, world = int(environ["SLURM_NODEID"]) * processes, nodes * processes
        return Placement(False, first, 0, processes, world, address, port)
    if tasks == nodes * processes:
        rank, local_rank = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
        return Placement(True, rank - local_rank, local_rank, processes, tasks, address, port)
    raise ValueError(
        f"SLURM started {tasks} tasks on {nodes} nodes, but parallel.processes is {processes}; "
        f"ask for one task per node (--ntasks-per-node=1) or for {processes} (one per GPU)"
    )


def first_host(node_list: str) -> str:
    """First name of a SLURM node list: `gpu[003-007,9],login1` -> `gpu003`."""
    match = re.match(r"([^,\[\]]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[\]]*))?", node_list)
    if match is None:
        raise ValueError(f"SLURM node list {node_list!r} has no host name; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())
