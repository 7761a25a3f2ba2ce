"""Make data: `python -m iopo.construct +recipe=NAME`; the recipes stand in conf/recipe/."""

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iopo.construct.relabel import RelabelRecipe, relabel_file
from iopo.construct.verified import VerifiedRecipe, build_verified

CONF = Path(__file__).resolve().parents[2] / "conf"


def make_trace(cfg: DictConfig) -> None:
    # needs the extra `eval`, other recipes do not
    from iopo.construct.trace.config import TraceRecipe
    from iopo.construct.trace.pipeline import run

    run(settings(TraceRecipe, cfg))


def make_relabelled(cfg: DictConfig) -> None:
    relabel_file(settings(RelabelRecipe, cfg))


def make_verified(cfg: DictConfig) -> None:
    print(build_verified(settings(VerifiedRecipe, cfg)))


RECIPES = {"relabel": make_relabelled, "trace": make_trace, "verified": make_verified}


def settings(schema: type, cfg: DictConfig) -> Any:
    """cfg.recipe as an object of the schema. Raises on unknown keys and on wrong values."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg.recipe))


@hydra.main(version_base=None, config_path=str(CONF), config_name="construct")
def main(cfg: DictConfig) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("iopo").setLevel(logging.INFO)
    try:
        name = cfg.recipe.name if "recipe" in cfg else None
        if name not in RECIPES:
            raise ValueError(
                f"the recipe is {name!r}; expected one of {list(RECIPES)}, as in "
                "`python -m iopo.construct +recipe=relabel recipe.source=FILE.jsonl`"
            )
        RECIPES[name](cfg)
    except (ValueError, OmegaConfBaseException, RuntimeError, OSError) as error:
        sys.exit(f"construct: {error}")


if __name__ == "__main__":
    main()
