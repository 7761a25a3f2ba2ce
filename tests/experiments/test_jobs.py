"""Jobs in processes of their own: done once, stopped by a signal, waited for after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from iopo.jobs import STOPPED, Job, Runner, costs

TOUCH = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "jobs.jsonl").read_text().splitlines()]


def test_a_done_job_is_not_run_again_and_a_failed_one_is(tmp_path):
    runner = Runner(tmp_path, 1)
    good = Job("a train", ["-c", TOUCH, str(tmp_path / "done")], tmp_path / "done")
    assert runner.job(good) and runner.job(good)
    assert [row["job"] for row in rows(tmp_path)] == ["a train"]
    bad = Job("b train", ["-c", "print('why'); raise SystemExit(3)"], tmp_path / "never")
    assert not runner.job(bad) and not runner.job(bad)
    assert runner.failed == ["b train", "b train"]
    assert [row["code"] for row in rows(tmp_path)] == [0, 3, 3]
    assert (tmp_path / "logs/b_train.log").read_text() == "why\nwhy\n"


def test_a_job_that_ends_well_without_its_file_has_failed(tmp_path):
    runner = Runner(tmp_path, 1)
    assert not runner.job(Job("a", ["-c", ""], tmp_path / "never"))


def test_costs_add_up_over_attempts(tmp_path):
    hold = "import sys, time; x = bytearray(10**8); time.sleep(0.3); raise SystemExit(1)"
    runner = Runner(tmp_path, 1)
    for _ in range(2):
        runner.job(Job("a train", ["-c", hold], tmp_path / "never"))
    found = costs(tmp_path)["a train"]
    assert found["seconds"] >= 0.6
    # a new process counts what its parent held, which here may be a gigabyte of libraries
    assert 0.1 < found["peak_rss_gb"] < 5


def test_a_signal_ends_the_running_jobs_and_starts_no_others(tmp_path):
    runner = Runner(tmp_path, 2)
    wait = Job("wait", ["-c", "import time; time.sleep(60)"], tmp_path / "never")
    other = Job("other", ["-c", TOUCH, str(tmp_path / "other")], tmp_path / "other")

    def stop_soon():
        while "wait" not in runner.live:
            time.sleep(0.01)
        runner.stop()

    threading.Thread(target=stop_soon).start()
    with pytest.raises(SystemExit) as left:
        runner.all([lambda: runner.job(wait), lambda: time.sleep(1), lambda: runner.job(other)])
    assert left.value.code == STOPPED
    assert not (tmp_path / "other").exists() and runner.failed == []
    assert [(row["job"], row["code"]) for row in rows(tmp_path)] == [("wait", -signal.SIGTERM)]


def test_a_new_call_waits_for_the_jobs_of_a_killed_one(tmp_path):
    """The jobs hold the folder's lock, so that no two processes write one run folder."""
    code = (
        "import sys; from pathlib import Path\n"
        "from iopo.jobs import Job, Runner\n"
        "run = Path(sys.argv[1])\n"
        "sleep = 'import time, pathlib; time.sleep(2); pathlib.Path(%r).touch()' % str(run / 'x')\n"
        "Runner(run, 1).job(Job('sleep', ['-c', sleep], run / 'x'))\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=os.getcwd())
    while not (tmp_path / "logs").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    first.kill()
    first.wait()
    Runner(tmp_path, 1)
    assert (tmp_path / "x").exists()
