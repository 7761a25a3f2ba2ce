"""Make data: quads, pairs and rows for SFT, and the programs that check, show and export them."""

from typing import Any


def require(recipe: Any, name: str, ok: bool, expected: str) -> None:
    """Raise ValueError with the key, its value and what is expected, unless ok."""
    if not ok:
        raise ValueError(f"recipe.{name} is {getattr(recipe, name)!r}; expected {expected}")
