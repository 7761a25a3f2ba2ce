"""The prompts of the TRACE pipeline: text files in `prompts/`, one a step and language.

A reader may edit them. `{name}` is a blank; `{{` and `}}` are braces. What fills a blank was
written by others: it stands between tags with a mark that it cannot know.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from iopo.constraints.text import han_characters
from iopo.construct.taxonomy import Dimension

FOLDER = Path(__file__).with_name("prompt_texts")
LANGUAGES = ("en", "zh")
OPERATIONS = ("add", "delete", "revise")
NOTHING = "NULL"  # stands for a missing input or for no constraints, as in the paper


def language_of(text: str) -> str:
    """zh if at least a quarter of the characters that are not blank are Chinese, else en."""
    letters = sum(not c.isspace() for c in text)
    return "zh" if 4 * han_characters(text) >= max(1, letters) else "en"


@lru_cache(maxsize=32)
def _template(name: str, language: str) -> str:
    return (FOLDER / f"{name}.{language}.txt").read_text(encoding="utf-8").strip()


def fill(name: str, language: str, **blanks: object) -> str:
    """The prompt with its blanks filled, and with a mark made from all of them."""
    mark = hashlib.sha256(repr((name, sorted(blanks.items()))).encode()).hexdigest()[:12]
    return _template(name, language).format(mark=mark, **blanks)


def operation(name: str, language: str) -> str:
    """What add, delete or revise means, in a sentence."""
    lines = dict(line.split(": ", 1) for line in _template("operations", language).splitlines())
    return lines[name]


def menu(dimensions: Sequence[Dimension], language: str) -> str:
    return "\n".join(dimension.line(language) for dimension in dimensions)


def numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1)) or NOTHING
