"""How a failure is written down: a traceback per rank, one FAILED file, one message printed."""

import signal
import sys
import time
import traceback
from pathlib import Path

from iopo.files import write_text
from iopo.redact import redact
from iopo.training.launch.run_folder import FAILED_FILE

TIME = "%Y-%m-%d %H:%M:%S"


def error_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "errors" / f"rank-{rank}.txt"


def stacks_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "errors" / f"rank-{rank}.stacks.txt"


def record_error(run_dir: Path, rank: int, error: BaseException) -> bool:
    """Write the traceback to errors/rank-N.txt and, if this is the first failure, the FAILED file.

    Returns True for the first rank: its error is the cause, those of the others mostly its
    consequence (a connection closed by a rank that is gone). Secrets are redacted. If the folder
    cannot be written (disk full, vanished), the traceback goes to stderr.
    """
    path = error_path(run_dir, rank)
    details = redact("".join(traceback.format_exception(error)))
    summary = f"rank {rank}: {type(error).__name__}: {error}"
    if not isinstance(error, (ValueError, OSError)):  # not the user's doing: show where it happened
        summary += "\n" + "".join(traceback.format_tb(error.__traceback__))
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(details)
        with open(run_dir / FAILED_FILE, "x") as file:
            now = time.strftime(TIME)
            file.write(f"{now} {redact(summary).rstrip()}\ntraceback: {path}\n")
    except FileExistsError:
        return False
    except OSError as unwritable:
        _print(f"{details}(not written to {path}: {unwritable})\n")
    return True


def record_death(run_dir: Path, rank: int, exit_code: int) -> None:
    """Write the FAILED file for a rank that ended silently, over what other ranks wrote: they
    failed because this one was gone."""
    how = f"exited with code {exit_code}"
    if exit_code < 0:
        how = f"was ended by {signal.Signals(-exit_code).name}"
    if exit_code == -signal.SIGKILL:
        how += " (by hand, by the scheduler, or by the system when memory ran out)"
    stacks = stacks_path(run_dir, rank)
    if stacks.exists() and stacks.stat().st_size:
        how += f"; stacks of its threads: {stacks}"
        if "Timeout (" in stacks.read_text():
            how = f"made no progress within the time limit (parallel.timeout_s) and {how}"
    text = f"{time.strftime(TIME)} rank {rank} {how}\n"
    try:
        write_text(run_dir / FAILED_FILE, text)
    except OSError as unwritable:
        _print(f"{text}(not written to {run_dir}: {unwritable})\n")


def print_failure(run_dir: Path) -> None:
    """Print the FAILED file, the one message of a failed run, to stderr."""
    if (run_dir / FAILED_FILE).exists():  # else the folder was unwritable, and stderr has it all
        _print(f"FAILED {run_dir}\n{(run_dir / FAILED_FILE).read_text()}")


def _print(text: str) -> None:
    print(text, file=sys.stderr, end="", flush=True)
