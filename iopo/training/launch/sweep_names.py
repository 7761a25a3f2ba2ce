"""Folders of a sweep's jobs: named after what is swept, and nothing else.

Hydra knows what is swept before it makes the jobs, and not in a job; the callback passes it on, by
an override of Hydra's own, so that any launcher's jobs have it.
"""

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from iopo.files import sha256_text

MOST_CHARS = 120  # of a name; file systems take 255 bytes


class SweepNames(Callback):
    """Keeps out of the jobs' names what the command or the sweep's config fixes for all of them."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Runs once, before the jobs are made."""
        params = config.hydra.sweeper.get("params") or {}
        given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        parsed = OverridesParser.create().parse_overrides(given)
        swept = {override.key_or_group: override.is_sweep_override() for override in parsed}
        fixed = ",".join(key for key, varies in swept.items() if not varies)
        excluded = f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"
        config.hydra.overrides.hydra.append(excluded)


def folder_name(overrides: str) -> str:
    """The overrides as the name of one folder.

    Signs that a path could not hold are replaced and long names cut; a hash keeps those apart.

    >>> folder_name("objective.beta=0.1,seed=2"), folder_name("data.train=/a/b.jsonl")
    ('objective.beta=0.1,seed=2', 'data.train=_a_b.jsonl-fe98f43f')
    """
    whole = overrides or "job"
    name = re.sub(r"[^\w.,=+-]", "_", whole, flags=re.ASCII)[:MOST_CHARS]
    return name if name == whole else f"{name}-{sha256_text(whole)[:8]}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
