"""TRACE's taxonomy of constraints, 5 types and 26 dimensions, as data that a user may edit.

TAXONOMY, a file that stands beside the benchmark, holds one row a dimension: the type, the English
name, the tag in the authors' evaluation file, a definition in each language (our wording of table
6), and how often the tag occurs in that file. The number of constraints of an instruction follows
the paper's training set.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from iopo.evaluation.benchmarks.trace import TAXONOMY
from iopo.files import given_records

# arXiv 2411.06208v3, table 5: instructions of the training set with 1, 2, ... 15 constraints
TRAINING_COUNTS = (
    991, 8003, 26421, 34155, 26327, 13858, 5882, 2185, 999, 464, 8, 20, 20, 8, 4,
)  # fmt: skip
MOST_CONSTRAINTS = len(TRAINING_COUNTS)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One row of the taxonomy."""

    type: str  # Content, Situation, Style, Format or Example
    dimension: str  # English name, unique
    tag: str  # name in the authors' file
    en: str  # definition
    zh: str
    count: int  # constraints of this dimension in the evaluation file

    def line(self, language: str) -> str:
        """Name and definition, as a prompt lists them."""
        name = self.dimension if language == "en" else f"{self.dimension}（{self.tag}）"
        return f"- {name}: {self.en if language == 'en' else self.zh}"


def read(path: Path = TAXONOMY) -> tuple[Dimension, ...]:
    """The dimensions in file order. Raises ValueError on a bad row or a repeated name."""
    found: list[Dimension] = []
    for place, row in given_records(path):
        try:
            found.append(Dimension(**row))
        except TypeError as error:
            raise ValueError(f"{place}: {error}; expected {list(Dimension.__slots__)}") from error
    names = [dimension.dimension for dimension in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(f"{path}: expected one or more dimensions, each name once; found {names}")
    return tuple(found)


def named(text: object, dimensions: tuple[Dimension, ...]) -> str | None:
    """The dimension that a model meant by `text` (its name or tag, in any case); None if none."""
    if not isinstance(text, str):
        return None
    plain = text.strip().lower()
    for dimension in dimensions:
        tag = dimension.tag.lower()
        if plain in (dimension.dimension.lower(), tag, f"{dimension.dimension.lower()}（{tag}）"):
            return dimension.dimension
    return None


def draw_number(rng: random.Random, most: int = MOST_CONSTRAINTS) -> int:
    """How many constraints an instruction gets: 1 to `most`, as in the paper's training set."""
    return rng.choices(range(1, most + 1), TRAINING_COUNTS[:most])[0]


def draw_menu(
    dimensions: tuple[Dimension, ...], number: int, rng: random.Random
) -> list[Dimension]:
    """Different dimensions to choose from, frequent ones more often: enough for `number`.

    Example and background dimensions need texts of their own, so they are drawn as rarely as
    they are in TRACE.
    """
    keyed = [(rng.random() ** (1 / d.count), d) for d in dimensions]  # weighted, no repetition
    keyed.sort(key=lambda pair: -pair[0])
    return [dimension for _, dimension in keyed[: max(6, min(len(keyed), number + 3))]]
