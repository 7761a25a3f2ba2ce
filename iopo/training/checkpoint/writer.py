"""Save and load a run's state so that a kill at any moment costs at most the steps since a save.

A checkpoint is written into a `.partial` folder, every rank its own shard; when all ranks are done
it is renamed and its COMPLETE file written last. See checkpoint_files.py for the layout.
"""

import json
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from iopo.files import write_text
from iopo.training.checkpoint import folders as files
from iopo.training.checkpoint.resume import plain


class CheckpointError(OSError):
    """A checkpoint could not be written; those that were complete before still are."""


class Checkpoints:
    """Writes the checkpoints of one run. Every rank has one and calls its methods together.

    keep: newest complete checkpoints to keep, >= 2. best_metric: keep the best by this name in the
        metrics of `save` as well (loss: the lowest, others: the highest).
    asynchronous: `save` returns once the state is copied to host memory; a thread writes it while
        training goes on, over a process group of its own. At most one write is under way: the next
        `save`, `wait` and the end of the context wait for it and raise its error.
    """

    def __init__(
        self, run_dir: Path, *, keep: int, asynchronous: bool, best_metric: str | None = None
    ) -> None:
        if keep < 2:
            raise ValueError(f"checkpoint.keep is {keep}; expected 2 or more")
        self.run_dir, self.keep, self.best_metric = run_dir, keep, best_metric
        self.asynchronous = asynchronous
        self.last_step: int | None = None  # of the last `save`, complete or under way
        self._group = dist.new_group(backend="gloo")
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_step_aside)
        # Near half a write's processor time, for nothing: files.publish keeps SHA-256 of every file
        torch.serialization.set_crc32_options(False)
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
        )

    def save(self, step: int, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write the checkpoint of `step` (steps done so far).

        state: tensors by name, from `gather_state`. meta: config, identity and metrics, what
            `check_resume` and `best_metric` look at; written to state.json, secrets redacted.
        Raises CheckpointError on every rank if any rank could not write.
        """
        self.wait()
        self.last_step = step
        self._together(step, lambda: self._start(step, meta))
        if self.asynchronous:
            staged = self._stager.stage(state)
            self._pending = self._thread.submit(self._write, step, staged)
        else:
            self._write(step, state)

    def wait(self) -> None:
        """Return when nothing is being written any more; raises the error of that write."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.wait()
        # After an error no wait: other ranks may be gone, and this write could then not end.
        self._thread.shutdown(wait=kind is None)
        self._stager.close()

    def _start(self, step: int, meta: dict[str, Any]) -> None:
        if self._rank == 0:
            files.start_partial(self.run_dir, step)
            facts = meta | {
                "step": step,
                "world_size": self._world,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            text = json.dumps(plain(facts), indent=1)
            write_text(files.partial_of(self.run_dir, step) / files.STATE_FILE, text + "\n")

    def _write(self, step: int, state: Any) -> None:
        partial = files.partial_of(self.run_dir, step)
        described: dict[str, Any] = {}

        def write_shard() -> None:
            dcp.save(state, checkpoint_id=partial, process_group=self._group)
            mine = list(partial.glob(f"__{self._rank}_*"))
            mine += [partial / ".metadata", partial / files.STATE_FILE] if self._rank == 0 else []
            described.update({path.name: files.describe_file(path) for path in mine})

        def complete(all_described: list[dict[str, Any]]) -> None:
            if self._rank == 0:
                listed = {name: facts for some in all_described for name, facts in some.items()}
                files.publish(self.run_dir, step, listed)
                files.prune(self.run_dir, self.keep, self.best_metric)

        self._together(step, write_shard)
        gathered: list[dict[str, Any]] = [{} for _ in range(self._world)]
        dist.all_gather_object(gathered, described, group=self._group)
        self._together(step, lambda: complete(gathered))

    def _together(self, step: int, action: Any) -> None:
        """Do something on every rank; if it fails on any, raise CheckpointError on all of them."""
        problem: str | None = None
        try:
            action()
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = f"rank {self._rank}: {_cause(error)}"
        problems: list[str | None] = [None] * self._world
        dist.all_gather_object(problems, problem, group=self._group)
        first = next((p for p in problems if p is not None), None)
        if first is not None:
            raise CheckpointError(self._explain(step, first))

    def _explain(self, step: int, problem: str) -> str:
        complete, _ = files.complete_folders(self.run_dir)
        last = f"the last complete one is {complete[-1]}" if complete else "there is none yet"
        return (
            f"the checkpoint of step {step} could not be written to {self.run_dir}: {problem}; "
            f"{last}. Make room or make the folder writable, then start the run again"
        )


def _step_aside() -> None:
    """Give the calling thread the lowest priority: it writes in the time that training leaves."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _cause(error: BaseException) -> str:
    """The first rank's own error out of torch's collection of them."""
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()))[0]
        return f"{type(inner).__name__}: {inner}"
    return f"{type(error).__name__}: {error}"


def latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, by its files' sizes, and remarks on those left out."""
    complete, remarks = files.complete_folders(run_dir)
    return (complete[-1] if complete else None), remarks


def latest_intact(run_dir: Path) -> tuple[Path | None, list[str]]:
    """As `latest`, but every byte is compared with its hash; all ranks call it and share the work.

    The one to resume from: a damaged newest checkpoint costs the steps since the one before it.
    """
    shared: list[Any] = [files.complete_folders(run_dir)]
    dist.broadcast_object_list(shared, src=0)
    complete, remarks = shared[0]
    rank, world = dist.get_rank(), dist.get_world_size()
    for folder in reversed(complete):
        problem = files.find_damage(folder, sizes_only=False, part=rank, parts=world)
        problems: list[str | None] = [None] * world
        dist.all_gather_object(problems, problem)
        damage = next((p for p in problems if p is not None), None)
        if damage is None:
            return folder, remarks
        remarks.append(f"{folder} is damaged ({damage}): ignored")
    return None, remarks
