"""Save a run's state so that a kill at any moment costs at most the steps since a save.

Every rank writes its own shard into a `.partial` folder, which is then renamed; its COMPLETE file
comes last. See folders.py for the layout.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from iopo.config import CheckpointConfig
from iopo.files import sha256_file, write_text
from iopo.progress import progress
from iopo.redact import redact_values
from iopo.training.checkpoint import folders

log = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint could not be written; those that were complete before still are."""


def _set_up_thread(device: int | None) -> None:
    """Of the writer: it takes the time that training leaves, and opens no context on another GPU.

    device: of CUDA. A new thread's is 0, in every rank.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    if device is not None:
        torch.cuda.set_device(device)


class Checkpoints:
    """Writes the checkpoints of one run. Every rank has one and calls its methods together.

    cfg.asynchronous: `save` returns once the state is copied to host memory; a thread writes it
        while training goes on, over a process group of its own. At most one write is under way: the
        next `save`, `wait` and the end of the context wait for it and raise its error.
    """

    def __init__(self, run_dir: Path, cfg: CheckpointConfig) -> None:
        self.run_dir, self.cfg = run_dir, cfg
        self._group = dist.new_group(backend="gloo")
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._pending: Future[None] | None = None
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = ThreadPoolExecutor(1, initializer=_set_up_thread, initargs=(device,))
        # Half a write's processor time, for nothing: folders.publish keeps SHA-256 of every file
        torch.serialization.set_crc32_options(False)
        cuda = torch.cuda.is_available()
        fast = {"use_pinned_memory": cuda, "use_non_blocking_copy": cuda}
        self._staging = StagingOptions(use_shared_memory=False, use_async_staging=False, **fast)

    def save(self, step: int, state: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Write the checkpoint of `step` (steps done so far).

        state: from `gather_state`. description: fingerprint and metrics, for `check_resume` and
            `best_metric`; written to state.json, secrets redacted.
        Raises CheckpointError on every rank if any rank could not write.
        """
        self.wait()
        self._collective(step, lambda: self._start(step, description))
        if self.cfg.asynchronous:
            stager = DefaultStager(self._staging)  # PyTorch 2.11 closes it after one use
            staged = stager.stage(state)
            stager.close()
            self._pending = self._thread.submit(self._write, step, staged)
        else:
            with progress(None, f"saving step {step}"):
                self._write(step, state)

    def secure(self, step: int, state: dict[str, Tensor], description: dict[str, Any]) -> None:
        """As `save`, but complete when it returns, and a failure is a warning: its part is removed,
        for what comes after needs the disk."""
        try:
            self.save(step, state, description)
            self.wait()
        except CheckpointError as error:
            log.warning(str(error))
            if self._rank == 0:
                shutil.rmtree(folders.partial_of(self.run_dir, step), ignore_errors=True)

    def wait(self) -> None:
        """Return when nothing is being written any more; raises the error of that write."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with progress(None, "waiting for the last save"):
                pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        # After an error no wait: other ranks may be gone, and this write could then not end.
        self._thread.shutdown(wait=kind is None)

    def _start(self, step: int, description: dict[str, Any]) -> None:
        """Make an empty partial folder with its state.json."""
        if self._rank != 0:
            return
        partial = folders.partial_of(self.run_dir, step)
        partial.parent.mkdir(exist_ok=True)  # no parents: a run folder that vanished is an error
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        state = description | {
            "step": step,
            "world_size": self._world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_text(partial / folders.STATE_FILE, json.dumps(redact_values(state), indent=1) + "\n")

    def _write(self, step: int, state: Any) -> None:
        partial = folders.partial_of(self.run_dir, step)
        written: dict[str, Any] = {}

        def write_shard() -> None:
            dcp.save(state, checkpoint_id=partial, process_group=self._group)
            own = list(partial.glob(f"__{self._rank}_*"))
            if self._rank == 0:
                own += [partial / ".metadata", partial / folders.STATE_FILE]
            for path in own:
                written[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

        def complete() -> None:
            if self._rank == 0:
                files = {name: entry for part in of_ranks for name, entry in part.items()}
                folders.publish(self.run_dir, step, files)
                folders.prune(self.run_dir, self.cfg.keep, self.cfg.best_metric)

        self._collective(step, write_shard)
        of_ranks: list[dict[str, Any]] = [{} for _ in range(self._world)]
        dist.all_gather_object(of_ranks, written, group=self._group)
        self._collective(step, complete)

    def _collective(self, step: int, action: Callable[[], None]) -> None:
        """Do something on every rank; if it fails on any, raise CheckpointError on all of them."""
        problem: str | None = None
        try:
            action()
        except (OSError, RuntimeError, CheckpointException) as error:
            cause: BaseException = error
            if isinstance(error, CheckpointException):  # torch's collection of the ranks' errors
                cause = next(iter(error.failures.values()))[0]
            problem = f"rank {self._rank}: {type(cause).__name__}: {cause}"
        if first := folders.first_of_ranks(problem, self._group):
            complete, _ = folders.complete_folders(self.run_dir)
            last = f"the last complete one is {complete[-1]}" if complete else "there is none yet"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.run_dir}: {first}; "
                f"{last}. Make room or make the folder writable, then start the run again"
            )
