"""A rank's control: requests to stop become exit codes, silence becomes stacks and an end."""

import faulthandler
import signal
import subprocess
import sys

import pytest

from iopo.training.launch.signals import STOP_SIGNALS, Control


@pytest.fixture
def control(tmp_path):
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    control = Control(tmp_path / "stacks.txt", timeout_s=60)
    yield control
    control.close()
    for number, handler in previous.items():
        signal.signal(number, handler)
    faulthandler.enable()  # pytest's own


def test_nothing_asked_nothing_stops(control):
    assert not control.should_stop()
    assert control.exit_code == 0


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGUSR1], 75),
        ([signal.SIGINT], 130),
        ([signal.SIGTERM, signal.SIGTERM], 75),  # impatient schedulers repeat themselves
        ([signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGTERM, signal.SIGINT], 130),
    ],
)
def test_signals_ask_for_a_stop(control, numbers, code):
    for number in numbers:
        signal.raise_signal(number)
    assert control.should_stop()
    assert control.exit_code == code


def test_user_signal_2_shows_stacks_and_changes_nothing(control, tmp_path):
    signal.raise_signal(signal.SIGUSR2)
    assert "test_user_signal_2" in (tmp_path / "stacks.txt").read_text()
    assert not control.should_stop()


def run_python(tmp_path, body: str) -> subprocess.CompletedProcess:
    program = (
        "import signal, sys, time; from pathlib import Path\n"
        "from iopo.training.launch.signals import Control, heartbeat\n"
        f"control = Control(Path({str(tmp_path / 'stacks.txt')!r}), timeout_s=0.5)\n{body}"
    )
    return subprocess.run([sys.executable, "-c", program], timeout=60)


def test_silence_beyond_the_limit_ends_the_process_with_stacks(tmp_path):
    assert run_python(tmp_path, "def hang():\n time.sleep(99)\nhang()").returncode == 1
    text = (tmp_path / "stacks.txt").read_text()
    assert "Timeout" in text and "in hang" in text


def test_signs_of_life_keep_it_going_and_an_empty_stacks_file_goes(tmp_path):
    body = "for _ in range(10):\n time.sleep(0.1); heartbeat()\ncontrol.close()"
    assert run_python(tmp_path, body).returncode == 0
    assert not (tmp_path / "stacks.txt").exists()


def test_a_second_interrupt_ends_the_process_at_once(tmp_path):
    # raised in the main thread: a process-wide signal may land in a library's thread, and the
    # second of a kind is then merged into the first, which Python has not yet handled
    body = "for _ in range(2): signal.raise_signal(signal.SIGINT)\nsys.exit(3)"
    assert run_python(tmp_path, body).returncode == 130
