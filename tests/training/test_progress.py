"""Progress: what a person sees of long work, and that all long work goes through the one helper."""

import ast
import io
import logging
import sys
import threading
import time
from pathlib import Path

import pytest

from iopo import progress as module
from iopo.progress import progress, tracked

ROOT = Path(__file__).resolve().parents[2]
# What may take longer than three seconds -> the calls, in words, that show it.
SHOWN = {
    "iopo/data/tokenize.py": ["rows of {} tokenised"],
    "iopo/training/inputs.py": ["hashing the data", "reading {}", "reading {}"],
    "iopo/files.py": ["hashing {}"],
    "iopo/model/demo_model.py": ["demo model: downloading {}, 90 MB", "demo model: unpacking"],
    "iopo/model/load.py": ["downloading {}", "loading the weights of {}"],
    "iopo/agreement.py": ["comparing log-probs"],
    "iopo/training/plan/auto.py": ["planning the memory"],
    "iopo/training/reference/cache.py": ["looking for the data's", "batches of the reference"],
    "iopo/training/reference/sources.py": ["scoring some cached rows again"],
    "iopo/training/loop.py": ["scoring the first micro-batch", "batches of held-out quads"],
    "iopo/training/logger.py": ["steps"],
    "iopo/training/replay.py": ["steps"],
    "iopo/training/samples.py": ["sample answers"],
    "iopo/training/checkpoint/writer.py": ["saving step {}", "waiting for the last save"],
    "iopo/training/checkpoint/resume.py": ["checking the checkpoints of {}", "loading {}"],
    "iopo/training/export.py": ["exporting to {}"],
    "iopo/evaluation/quad_metrics.py": [
        *("batches of quads scored", "answers", "blocks of plain text"),
    ],
    "iopo/evaluation/on_task.py": ["groups of tasks"],
    "iopo/evaluation/responses.py": ["answers", "answers"],
    "iopo/evaluation/judge/engine.py": ["judged"],
    "iopo/construct/responses.py": ["responses"],
    "iopo/construct/relabel.py": ["relabelling {}"],
    "iopo/construct/verify.py": ["verifying"],
    "iopo/construct/cousins/__main__.py": ["prompts read"],
    "iopo/rounds/server.py": ["waiting for the server of {}"],
    "iopo/rounds/signal.py": ["instructions judged"],
    "iopo/experiments/paper_table/table.py": ["intervals of all tables"],
}


def calls(path: Path) -> list[str]:
    """What `progress` and `tracked` are told in a file, in order, values as {}."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        name = (
            node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        )
        if name in ("progress", "tracked"):
            what = node.args[1]
            parts = what.values if isinstance(what, ast.JoinedStr) else [what]
            said = [str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts]
            found.append((node.lineno, "".join(said)))
    return [what for _, what in sorted(found)]


def test_all_long_work_is_shown_by_the_one_helper():
    found = {
        str(path.relative_to(ROOT)): said
        for path in sorted((ROOT / "iopo").rglob("*.py"))
        if path.name != "progress.py" and (said := calls(path))
    }
    assert found.keys() == SHOWN.keys()
    for file, expected in SHOWN.items():
        assert len(found[file]) == len(expected), file
        assert all(a.startswith(b) for a, b in zip(found[file], expected, strict=True)), file


@pytest.mark.parametrize("library", ["rich.progress", "tqdm", "rich.status", "rich.live"])
def test_no_other_file_draws_progress(library):
    users = [p for p in (ROOT / "iopo").rglob("*.py") if library in p.read_text()]
    assert users == ([ROOT / "iopo/progress.py"] if library == "rich.progress" else [])


@pytest.fixture
def quick(monkeypatch, caplog):
    """Seconds become hundredths; the package speaks."""
    for name in ("FIRST_S", "EVERY_S", "SAME_S"):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)
    caplog.set_level(logging.INFO, logger="iopo")
    return caplog


def wait_for_lines(caplog, count: int) -> list[str]:
    end = time.monotonic() + 20
    while len(caplog.messages) < count and time.monotonic() < end:
        time.sleep(0.005)
    return caplog.messages


def test_work_that_never_calls_is_shown_all_the_same(quick):
    with progress(None, "loading m"):
        assert wait_for_lines(quick, 2)[0] == "loading m: 0 s so far"
    shown = len(quick.messages)
    time.sleep(0.3)
    assert len(quick.messages) == shown


def test_of_nested_work_the_innermost_is_shown(quick):
    with progress(9, "steps"), progress(None, "saving"):
        assert set(wait_for_lines(quick, 3)) == {"saving: 0 s so far"}
    assert module._open == []


def test_counted_work_says_how_much_time_is_left(quick, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.threading.Thread, "start", lambda self: None)
    show = progress(4000, "answers", 1000)
    for seconds, done in ((0.05, 1500), (300, 2000), (300.05, 2100), (600, 4000)):
        now[0] = 1000 + seconds
        show(done)
    assert quick.messages == [
        "2,000 of 4,000 answers, 10 min left",  # 1000 took 300 s, 2000 are left
        "4,000 of 4,000 answers, 0 s left",
    ]


def test_short_work_is_silent_and_long_work_has_a_last_line(quick, monkeypatch):
    with monkeypatch.context() as slower:
        slower.setattr(module, "FIRST_S", 1e6)
        slower.setattr(module, "EVERY_S", 1e6)
        assert list(tracked([1, 2], "quick ones")) == [1, 2]
    assert quick.messages == []
    for _ in tracked([1, 2], "slow ones"):
        wait_for_lines(quick, len(quick.messages) + 1)
    assert quick.messages[-1] == "2 of 2 slow ones, 0 s left"


def test_an_error_ends_it(quick):
    with pytest.raises(ZeroDivisionError):
        for _ in tracked([1, 2], "units"):
            raise ZeroDivisionError
    before = threading.active_count()
    show = progress(2, "dropped")
    show(1)
    del show
    time.sleep(0.3)
    assert threading.active_count() <= before
    assert len(quick.messages) <= 1


def test_a_quiet_process_shows_nothing_and_starts_no_thread(caplog):
    caplog.set_level(logging.WARNING, logger="iopo")
    before = threading.active_count()
    with progress(2, "units") as show:
        assert threading.active_count() == before
        show(2)
    assert caplog.messages == []


def test_on_a_terminal_there_is_one_block_of_bars(quick, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress(5, "steps", at_once=True) as show:
        show(1, "loss 0.69")
        for _ in tracked(
            [1, 2], "held-out quads"
        ):  # inside a step: a second bar, not a second block
            module._bars.refresh()
        assert len(module._bars.tasks) == 1
    assert module._bars is None
    assert "loss 0.69" in screen.getvalue() and "held-out quads" in screen.getvalue()
