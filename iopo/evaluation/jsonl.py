"""JSON Lines files that survive a kill: whole rows in, torn last row out."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

SHOWN_ERRORS = 10  # of a bad file; the rest are counted


def read_rows(path: str | Path, *, torn_tail: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, in order; blank lines are skipped.

    torn_tail: ignore a last line without a line end, which a killed writer leaves behind. Use it
    for files this program appends to, never for a user's file.
    Raises ValueError naming the file and every bad line (not UTF-8, not JSON, not an object).
    """
    data = Path(path).read_bytes()
    lines = data.split(b"\n")
    last = lines.pop()
    if last.strip() and not torn_tail:
        lines.append(last)
    rows, errors = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {type(row).__name__}")
            rows.append(row)
        except UnicodeDecodeError as error:
            errors.append(f"{path}:{number}: not UTF-8 at byte {error.start} of the line")
        except ValueError as error:
            errors.append(f"{path}:{number}: {error}")
    if errors:
        more = len(errors) - SHOWN_ERRORS
        tail = [f"... and {more} more bad lines"] if more > 0 else []
        raise ValueError("\n".join(errors[:SHOWN_ERRORS] + tail))
    return rows


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by these rows, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: str | Path, text: str) -> None:
    """Replace a file, atomically: a reader sees the old file or the new one."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    # A lone surrogate (from an escaped "\ud800" in a reply) is not UTF-8: keep it as an escape.
    part.write_bytes(text.encode("utf-8", "backslashreplace"))
    os.replace(part, path)


class Journal:
    """A JSON Lines file that is only appended to, by one process at a time.

    Opening it reads the finished rows, cuts off a torn last line (its writer was killed) and takes
    a lock: a second process gets a ValueError instead of a file with mixed rows.
    A row reaches the operating system before `append` returns, so killing the process loses none;
    a power failure may lose the last ones.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")  # noqa: SIM115 - lives as long as the journal
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(
                f"{self.path}: another process is writing this file; wait for it, or choose "
                "another output folder"
            ) from error
        try:
            self.rows = read_rows(self.path, torn_tail=True)
            self._cut_torn_tail()
        except ValueError:
            self._file.close()
            raise

    def _cut_torn_tail(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)

    def append(self, *rows: dict[str, Any]) -> None:
        """Add rows in one write."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
