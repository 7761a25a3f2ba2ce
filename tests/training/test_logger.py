"""What a run records and says: all of it on rank 0, only warnings elsewhere."""

import logging

import pytest

from iopo.config import TrackerConfig
from iopo.training.logger import Crowding, Logger, read_metrics, set_up_logging


@pytest.fixture
def package():
    """The package's logger, put back as it was."""
    logger = logging.getLogger("iopo")
    before = logger.handlers, logger.propagate, logger.level
    yield logger
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def test_only_rank_0_records_and_speaks(tmp_path, capsys, package):
    heldout = dict.fromkeys(("loss", "group_accuracy", "x_preference", "y_preference"), 0.25)
    reduced = []

    def reduce() -> dict[str, float]:
        reduced.append(1)
        return {"loss": 1 / 3, "tokens_per_s": 7.0}

    for main in (False, True):
        set_up_logging(main=main)
        cfg = TrackerConfig(log_every_steps=2)
        with Logger(tmp_path, cfg, {}, main=main, steps=range(1, 4)) as logger:
            for step in (1, 2, 3):
                logger.step(step, reduce)
            logger.heldout(3, heldout)
            logger.flush()
        package.getChild("training").warning("on every rank")
    assert len(reduced) == 4  # steps 2 and 3 on both ranks: reducing is a collective call
    said = capsys.readouterr().out.splitlines()
    assert said[0] == said[-1] == "on every rank" and len(said) == 5
    assert said[1].startswith("step 2/3  loss 0.3333  tok/s 7") and said[2].startswith("step 3/3")
    assert said[3].startswith("held out, step 3: loss 0.25  group_accuracy 0.25")
    rows = [(row["step"], row["split"], row["loss"]) for row in read_metrics(tmp_path)]
    assert rows == [(2, "train", 0.33333333), (3, "train", 0.33333333), (3, "heldout", 0.25)]


@pytest.mark.parametrize(
    ("load", "speeds", "said"),
    [
        (5.0, [1] + [100] * 7 + [20] * 9, 1),  # once, though it stays slow
        (5.0, [1] + [100] * 7 + [60] * 9, 0),  # within what lengths and rounds make
        (2.0, [1] + [100] * 7 + [20] * 9, 0),  # slow, but nobody else wants the cores
        (5.0, [100] * 7 + [20] + [100] * 9, 0),  # one slow step
    ],
)
def test_a_crowded_machine_is_named_once(monkeypatch, caplog, load, speeds, said):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(logging.getLogger("iopo"), "propagate", True)
    crowding = Crowding()
    for speed in speeds:
        crowding.watch(speed)
    assert len(caplog.messages) == said
    if said:
        assert "steps are 5.0 times slower" in caplog.text and "renice" in caplog.text
