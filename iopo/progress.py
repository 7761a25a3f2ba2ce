"""How far a piece of work is: a bar on a terminal, else a plain line now and then.

Whatever may take longer than FIRST_S is shown by `progress`, or by `tracked` if it is a loop. Only
a process whose package logs at INFO shows anything: rank 0.
"""

import logging
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterator
from typing import Self, TextIO, TypeVar

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

FIRST_S, EVERY_S, SAME_S = 3.0, 10.0, 60.0  # the first line, the next ones, those without news

T = TypeVar("T")
log = logging.getLogger(__name__)
_bars: Progress | None = None  # the terminal's, while any work is shown
_open: list["weakref.ref[progress]"] = []  # work with lines, the innermost last


def show_messages(to: TextIO) -> None:
    """Let a command show the package's messages, and with them its progress."""
    logging.basicConfig(format="%(message)s", stream=to)
    logging.getLogger("iopo").setLevel(logging.INFO)


class progress:  # noqa: N801 - used as a function
    """Shows work until `close`, the end of its block, or the last unit; call it with units done.

    total: units; None where only time can be shown. what: the units ("answers"), or the work that
    has none ("loading model"). done: units that were done before. at_once: the first and the last
    call are shown, however short the work.
    """

    def __init__(self, total: int | None, what: str, done: int = 0, *, at_once: bool = False):
        self.total, self.what, self.done, self.before = total, what, done, done
        self.text = ""
        self.started = self.shown = time.monotonic()
        self.at_once, self.lines = at_once, 0
        self._over, self._bar = threading.Event(), None
        if not log.isEnabledFor(logging.INFO):
            self._over.set()
        elif sys.stdout.isatty():
            self._bar = _add_bar(total, what, done)
        else:
            _open.append(of := weakref.ref(self))
            threading.Thread(target=_tick, args=(of, self._over), daemon=True).start()

    def __call__(self, done: int, text: str = "") -> None:
        """So many units are done, those of before included. text: of a training step."""
        self.done, self.text = done, text
        if self._over.is_set():
            return
        last, now = done == self.total, time.monotonic()
        if self._bar is not None and _bars is not None:
            _bars.update(self._bar, completed=done, description=text or self.what)
        elif (
            now - self.shown >= EVERY_S
            or (self.at_once and not self.lines)
            or (last and (self.at_once or now - self.started > FIRST_S))
        ):
            self.show()
        if last:
            self.close()

    def show(self) -> None:
        """Log how far it is."""
        self.lines, self.shown = self.lines + 1, time.monotonic()
        passed = self.shown - self.started
        if self.total is None:
            log.info(f"{self.what}: {_time(passed)} so far")
            return
        made, left = self.done - self.before, self.total - self.done
        when = f"{_time(passed / made * left)} left" if made > 0 else f"{_time(passed)} so far"
        if self.text:
            log.info(f"step {self.done}/{self.total}  {self.text}  {when}")
        else:
            log.info(f"{self.done:,} of {self.total:,} {self.what}, {when}")

    def close(self) -> None:
        self._over.set()
        _open[:] = [of for of in _open if of() not in (None, self)]
        if self._bar is not None:
            _remove_bar(self._bar)
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """The items, one unit of `progress` each."""
    with progress(len(items), what) as show:
        for done, item in enumerate(items, 1):
            yield item
            show(done)


def _tick(of: "weakref.ref[progress]", over: threading.Event) -> None:
    """Show work that does not call, unless it waits for work inside it, which is shown."""
    wait = FIRST_S
    while not over.wait(wait):
        if (work := of()) is None:
            return
        if _open[-1:] == [of] and time.monotonic() - work.shown >= wait - 0.1:
            work.show()
            wait = min(SAME_S, max(EVERY_S, 2 * wait))
        del work


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _add_bar(total: int | None, what: str, done: int) -> TaskID:
    global _bars
    if _bars is None:
        count = TextColumn("{task.completed}/{task.total}")
        named = TextColumn("{task.description}", markup=False)
        _bars = Progress(BarColumn(20), count, named, TimeRemainingColumn(), transient=True)
        _bars.start()
    return _bars.add_task(what, total=total, completed=done)


def _remove_bar(task: TaskID) -> None:
    global _bars
    if _bars is not None:
        _bars.remove_task(task)
        if not _bars.tasks:
            _bars.stop()
            _bars = None
