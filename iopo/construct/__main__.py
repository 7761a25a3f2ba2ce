"""Make data: `python -m iopo.construct +recipe=NAME`; the recipes stand in conf/recipe/."""

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iopo import entry
from iopo.construct.audit import AuditRecipe, audit
from iopo.construct.ifseeds import IfSeedsRecipe
from iopo.construct.ifseeds import build as build_ifseeds
from iopo.construct.relabel import RelabelRecipe, relabel_file
from iopo.construct.trace.config import TraceRecipe
from iopo.construct.verified import VerifiedRecipe, build_verified
from iopo.progress import show_messages
from iopo.redact import redact

CONF = Path(__file__).resolve().parents[2] / "conf"
SCHEMAS: dict[str, Any] = {
    "audit": AuditRecipe,
    "ifseeds": IfSeedsRecipe,
    "relabel": RelabelRecipe,
    "trace": TraceRecipe,
    "verified": VerifiedRecipe,
}


def make(cfg: DictConfig) -> None:
    """Run a recipe. Raises on an unknown name and on wrong values; exits on unknown keys."""
    name = cfg.recipe.name if "recipe" in cfg else None
    if name not in SCHEMAS:
        raise ValueError(
            f"the recipe is {name!r}; expected one of {list(SCHEMAS)}, as in "
            "`python -m iopo.construct +recipe=relabel recipe.source=FILE.jsonl`"
        )
    schema = SCHEMAS[name]
    entry.check_keys(cfg, entry.keys(schema, "recipe."))
    recipe: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg.recipe))
    if name == "relabel":
        relabel_file(recipe)
    elif name == "audit":
        print(audit(recipe))
    elif name == "ifseeds":
        print(build_ifseeds(recipe, recipe.sampler()))
    elif name == "verified":
        print(build_verified(recipe, recipe.sampler()))
    else:  # needs the extra `eval`, other recipes do not
        from iopo.construct.trace.pipeline import run

        run(recipe)


@hydra.main(version_base=None, config_path=str(CONF), config_name="construct")
def main(cfg: DictConfig) -> None:
    show_messages(sys.stdout)
    try:
        make(cfg)
    except (ValueError, OmegaConfBaseException, RuntimeError, OSError) as error:
        sys.exit(f"construct: {redact(str(error))}")


if __name__ == "__main__":
    entry.run(main, [key for of in SCHEMAS.values() for key in entry.keys(of, "recipe.")])
