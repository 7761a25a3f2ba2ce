"""On-policy rounds: `python -m iopo.rounds +experiment=NAME run=FOLDER [key=value ...]`.

Each round samples responses from the policy, labels them by code, makes the rows that the
experiment's objective trains on, trains from the policy and scores the new one on held-out quads.
Keys that begin with `rounds.` are those of conf/rounds.yaml; all others go to each train.py. Every
stage is a process with a folder under RUN/round-NN, and is not repeated once it is done: stop at
any time (SIGTERM saves a training stage), or kill it, and start again to go on. plan=true prints
what the first round's training needs and stops. Exit codes: 0 done, 1 a stage failed, 2 refused,
3 stopped because acceptance or following fell, 75 stopped by a signal.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from iopo import entry
from iopo.config import TrainConfig
from iopo.jobs import REPOSITORY, Runner
from iopo.redact import redact
from iopo.rounds.config import RoundsConfig
from iopo.rounds.driver import OK, REFUSED, Rounds

PREFIX = "rounds."
CONF = REPOSITORY / "conf"
KEYS = [*entry.keys(TrainConfig), *entry.keys(RoundsConfig, PREFIX)]
ConfigStore.instance().store(name="base_config", node=TrainConfig)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return OK
    try:
        rounds = build(arguments)
        if rounds.cfg.plan:
            print(rounds.plan())
            return OK
        rounds.prepare()
    except (ValueError, OSError) as error:
        print(f"refused: {redact(str(error))}", file=sys.stderr, flush=True)
        return REFUSED
    runner = Runner(rounds.folder, 1, cwd=Path.cwd())
    signal.signal(signal.SIGTERM, runner.stop)
    signal.signal(signal.SIGINT, runner.stop)
    return rounds.run(runner)


def build(arguments: Sequence[str]) -> Rounds:
    """Compose both configs and check them. Raises ValueError, and as Hydra does; exits with 2 on a
    key that nothing reads."""
    ours = [word for word in arguments if word.lstrip("+").startswith(PREFIX)]
    theirs = [word for word in arguments if word not in ours]
    if flags := [word for word in theirs if word.startswith("-")]:
        raise ValueError(f"{flags[0]}: rounds take key=value only, and no sweeps")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose("config", overrides=theirs)
    entry.check_keys(composed, KEYS)
    given = OmegaConf.from_dotlist([word.lstrip("+").removeprefix(PREFIX) for word in ours])
    entry.check_keys(OmegaConf.create({"rounds": given}), KEYS)
    file = OmegaConf.load(CONF / "rounds.yaml")
    cfg = OmegaConf.to_object(composed)
    own = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RoundsConfig), file, given))
    assert isinstance(cfg, TrainConfig) and isinstance(own, RoundsConfig)
    named = any(word.startswith("run=") for word in theirs)
    folder = Path(cfg.run if named else f"{cfg.run}_rounds").absolute()
    rounds = Rounds(cfg, own, theirs, folder)
    rounds.check()
    return rounds


if __name__ == "__main__":
    entry.run(lambda: sys.exit(main(sys.argv[1:])), KEYS)
