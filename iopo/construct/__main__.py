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
RECIPES = ("relabel", "trace", "verified")


def make(name: str | None, given: DictConfig | None) -> None:
    """Run a recipe. Raises on an unknown name, on unknown keys and on wrong values."""

    def settings(schema: type) -> Any:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))

    if name == "relabel":
        relabel_file(settings(RelabelRecipe))
    elif name == "verified":
        recipe = settings(VerifiedRecipe)
        print(build_verified(recipe, recipe.sampler()))
    elif name == "trace":  # needs the extra `eval`, other recipes do not
        from iopo.construct.trace.config import TraceRecipe
        from iopo.construct.trace.pipeline import run

        run(settings(TraceRecipe))
    else:
        raise ValueError(
            f"the recipe is {name!r}; expected one of {list(RECIPES)}, as in "
            "`python -m iopo.construct +recipe=relabel recipe.source=FILE.jsonl`"
        )


@hydra.main(version_base=None, config_path=str(CONF), config_name="construct")
def main(cfg: DictConfig) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("iopo").setLevel(logging.INFO)
    try:
        make(cfg.recipe.name if "recipe" in cfg else None, cfg.get("recipe"))
    except (ValueError, OmegaConfBaseException, RuntimeError, OSError) as error:
        sys.exit(f"construct: {error}")


if __name__ == "__main__":
    main()
