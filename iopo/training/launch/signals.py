"""What reaches a running rank from outside: requests to stop, and the clock that ends a hang.

SIGTERM (schedulers) and SIGUSR1 (SLURM's warning before the time limit) ask for a save and exit
with code 75, on which a scheduler may requeue. SIGINT (Ctrl-C) asks for the same with code 130; a
second SIGINT stops at once. SIGUSR2 to a rank writes every thread's stack to its stacks file and
changes nothing else.
"""

import faulthandler
import os
import signal
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch
import torch.distributed as dist

OK = 0
FAILED = 1
SAVED_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_clock: tuple[float, TextIO] | None = None  # time limit and stacks file, while a Control listens


def heartbeat() -> None:
    """Restart this process's hang clock, if it has a `Control`: called in between by work that
    takes long for good reason (an evaluation)."""
    if _clock is not None:
        timeout_s, stacks = _clock
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=stacks)


def stop_clock() -> None:
    """Stop this process's hang clock until the next `heartbeat`: called before work without end
    to foresee (an upload), in which no other rank waits for this one in a collective call."""
    faulthandler.cancel_dump_traceback_later()


class Control:
    """One rank's stop requests. Made by `launch`; the worker calls `should_stop` after each step.

    timeout_s: seconds without `heartbeat` or `should_stop` after which this rank counts as hung,
        unless `stop_clock` was called: its stacks are written to `stacks_path` and the process
        exits with code 1.
    """

    def __init__(self, stacks_path: Path, timeout_s: float) -> None:
        global _clock
        self.exit_code = OK  # what all ranks have agreed on
        self._asked = OK  # what this rank was asked for
        self._interrupts = 0
        self._stacks_path = stacks_path
        self._stacks = open(stacks_path, "a")
        faulthandler.enable(self._stacks)  # SIGSEGV, SIGABRT (NCCL's watchdog) and the like
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        # `launch` starts workers with these blocked, so that none is lost or kills a half-made rank
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        _clock = (timeout_s, self._stacks)
        heartbeat()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        interrupt = number == signal.SIGINT
        self._interrupts += interrupt
        if self._interrupts == 2:
            os._exit(INTERRUPTED)
        self._asked = max(self._asked, INTERRUPTED if interrupt else SAVED_REQUEUE)

    def should_stop(self) -> bool:
        """True on every rank at the same step, once any was asked to stop. All ranks call it."""
        heartbeat()
        # A signal that comes while the ranks agree must wait for the next call: hence two variables
        code = torch.tensor(self._asked)  # on the CPU: through gloo
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(code, op=dist.ReduceOp.MAX)
        self.exit_code = int(code)
        return self.exit_code != OK

    def close(self) -> None:
        """Stop listening: the process is about to end. Removes the stacks file if it is empty."""
        global _clock
        _clock = None
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.disable()
        # Too late to stop: SIGTERM must not turn a finished rank into a killed one.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._stacks.close()
        if self._stacks_path.stat().st_size == 0:
            self._stacks_path.unlink()
