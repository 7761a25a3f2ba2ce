"""A rank's control: requests to stop become exit codes, silence becomes stacks and an end."""

import faulthandler
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers_fork import finish, start_ranks

from iopo.training.launch.signals import STOP_SIGNALS, Control, heartbeat, stop_clock


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


def test_a_signal_while_the_ranks_agree_is_heard_at_the_next_call(control, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda code, op: signal.raise_signal(signal.SIGTERM))
    assert not control.should_stop()
    assert control.should_stop()


def test_user_signal_2_shows_stacks_and_changes_nothing(control, tmp_path):
    signal.raise_signal(signal.SIGUSR2)
    assert "test_user_signal_2" in (tmp_path / "stacks.txt").read_text()
    assert not control.should_stop()


def hang(control: Control) -> None:
    time.sleep(99)


def show_life(control: Control) -> None:
    for _ in range(10):
        time.sleep(0.1)
        heartbeat()
    control.close()


def stop_the_clock_then_hang(control: Control) -> None:
    stop_clock()
    time.sleep(1)
    heartbeat()
    hang(control)


def interrupt_twice(control: Control) -> int:
    # raised in the main thread: a process-wide signal may land in a library's thread, and the
    # second of a kind is then merged into the first, which Python has not yet handled
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
    return 3


def run_with_control(body: Callable[[Control], int | None], stacks: Path) -> int | None:
    return body(Control(stacks, timeout_s=0.5))


def exit_code_of(body: Callable[[Control], int | None], tmp_path: Path) -> int | None:
    (code,) = finish(start_ranks(1, run_with_control, body, tmp_path / "stacks.txt"))
    return code


def test_silence_beyond_the_limit_ends_the_process_with_stacks(tmp_path):
    assert exit_code_of(hang, tmp_path) == 1
    text = (tmp_path / "stacks.txt").read_text()
    assert "Timeout" in text and "in hang" in text


def test_signs_of_life_keep_it_going_and_an_empty_stacks_file_goes(tmp_path):
    assert exit_code_of(show_life, tmp_path) == 0
    assert not (tmp_path / "stacks.txt").exists()


def test_a_stopped_clock_waits_until_the_next_sign_of_life(tmp_path):
    assert exit_code_of(stop_the_clock_then_hang, tmp_path) == 1
    assert "in hang" in (tmp_path / "stacks.txt").read_text()


def test_a_second_interrupt_ends_the_process_at_once(tmp_path):
    assert exit_code_of(interrupt_twice, tmp_path) == 130
