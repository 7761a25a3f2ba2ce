"""Score a model, an endpoint or existing answers: `python evaluate.py +benchmark=ifeval ...`.

    python evaluate.py +benchmark=ifeval model.path=demo
    python evaluate.py +benchmark=trace generate.base_url=http://localhost:8000/v1 \\
        generate.model=qwen2 judge.base_url=https://api.openai.com/v1 judge.model=gpt-4o
    python evaluate.py +benchmark=ifeval responses.path=answers.jsonl out=runs/mine

Keys, with units, are in conf/evaluate.yaml. Exit codes: 0 done, 1 a server failed (run the same
command again to go on), 2 config or data refused, 130 interrupted.
"""

import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from iopo import entry
from iopo.evaluation.config import EvaluateConfig
from iopo.evaluation.endpoint import EndpointError
from iopo.evaluation.run import evaluate, names
from iopo.model.host_memory import tune_malloc
from iopo.progress import show_messages
from iopo.redact import redact

ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
KEYS = entry.keys(EvaluateConfig)
FAILED, REFUSED, INTERRUPTED = 1, 2, 130


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Compose, check, run."""
    entry.check_keys(composed, KEYS)
    show_messages(sys.stdout)
    try:
        if OmegaConf.is_missing(composed.benchmark, "name"):
            known = ", ".join(names())
            raise ValueError(f"no benchmark was named; add +benchmark=NAME, one of {known}")
        config = OmegaConf.to_object(composed)
        assert isinstance(config, EvaluateConfig)
        tune_malloc()
        evaluate(config)
    except ValueError as error:
        print(f"refused: {redact(str(error))}", file=sys.stderr, flush=True)
        sys.exit(REFUSED)
    except EndpointError as error:
        print(f"stopped: {redact(str(error))}", file=sys.stderr, flush=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    entry.run(main, KEYS)
