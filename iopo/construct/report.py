"""A page about data: `python -m iopo.construct.report QUADS... [--counts FILE] --out report.html`.

Constraint types and counts per instruction stand beside TRACE's; lengths, acceptance and samples
follow. One page, no other file needed. Rows are streamed.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iopo.construct import taxonomy

SAMPLES = 12
OTHER = "not in the taxonomy"

# Where the kinds that code checks belong in TRACE's taxonomy: our reading, none is published.
_DIMENSIONS = {
    "Numerical": "words sentences lines paragraphs han_characters commas questions exclamations "
    "word_frequency letter_frequency placeholders punkt_sentences keyword_frequency "
    "divided_paragraphs",
    "Inclusion": "include_words keywords start_phrase end_phrase first_word last_word "
    "nth_paragraph_first_word repeat_prompt constrained_response",
    "Exclusion": "forbid_words forbidden_words",
    "Numbering and list": "bullets numbered_items",
    "Text pattern": "case highlights wrapped capital_words capital_tokens english_case",
    "Hierarchical structure": "first_line_title sections titles title",
    "Output format": "layout json_format",
    "Template": "closing_note postscript two_responses",
    "Multilingual": "language response_language",
}
DIMENSION_OF = {kind: name for name, kinds in _DIMENSIONS.items() for kind in kinds.split()}

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2430; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } .note { color: #5a6573; }
table { border-collapse: collapse; } td, th { padding: .15rem .6rem; text-align: left;
  border-bottom: 1px solid #e4e8ee; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: block; height: .5rem; background: #2b5c8a; } .trace { background: #d9822b; }
td.b { width: 14rem; } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7fa;
  padding: .6rem; border-radius: 4px; font-size: 13px; }
"""


@dataclass
class Counts:
    """What the page shows, counted over all rows."""

    rows: int = 0
    types: Counter[str] = field(default_factory=Counter)
    dimensions: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    numbers: Counter[int] = field(default_factory=Counter)  # constraints of an instruction
    x_chars: Counter[int] = field(default_factory=Counter)  # in classes, see `_class`
    y_chars: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any], rng: random.Random, types: Mapping[str, str]) -> None:
        self.rows += 1
        self.sources[str(row.get("source", "-"))] += 1
        self.splits[str(row.get("split", "-"))] += 1
        for key in ("c1", "c2"):
            constraints = row.get(key) or []
            self.numbers[len(constraints)] += 1
            for constraint in constraints:
                dimension = _dimension(constraint)
                self.kinds[constraint["kind"]] += 1
                self.dimensions[dimension] += 1
                self.types[types.get(dimension, OTHER)] += 1
        self.x_chars.update(_class(row[x]) for x in ("x1", "x2"))
        self.y_chars.update(_class(row[y]) for y in ("y1", "y2"))
        if len(self.samples) < SAMPLES:  # each row is as likely as another to be shown
            self.samples.append(row)
        elif (place := rng.randrange(self.rows)) < SAMPLES:
            self.samples[place] = row


def _dimension(constraint: dict[str, Any]) -> str:
    if constraint["kind"] == "judged":
        return constraint["params"].get("type") or OTHER
    return DIMENSION_OF.get(constraint["kind"], OTHER)


def _class(text: str) -> int:
    """The power of two that the number of characters does not reach."""
    return 1 << len(text).bit_length()


def count(files: Sequence[Path]) -> Counts:
    """Counts over the rows of files of quads. Raises ValueError on a line that is no quad."""
    counts, rng = Counts(), random.Random(0)
    types = {d.dimension: d.type for d in taxonomy.read()}
    for path in files:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    counts.add(json.loads(line), rng, types)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{path}:{number}: no quad that can be counted ({error!r}); run "
                        "`python -m iopo.construct.verify` on the file first"
                    ) from error
    return counts


def write(path: Path, files: Sequence[Path], acceptance: str = "") -> Counts:
    """Write the page. acceptance: text that is shown as it is."""
    counts = count(files)
    names = ", ".join(str(file) for file in files)
    body = "\n".join(_sections(counts, acceptance))
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Data report</title>"
        f"<style>{_STYLE}</style>\n<h1>{counts.rows:,} quads</h1><p class=note>{html.escape(names)}"
        f"</p>\n{body}\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return counts


def _sections(counts: Counts, acceptance: str) -> Iterator[str]:
    dimensions = taxonomy.read()
    published = Counter({d.dimension: d.count for d in dimensions})
    published_types: Counter[str] = Counter()
    for dimension in dimensions:
        published_types[dimension.type] += dimension.count
    training = Counter(dict(enumerate(taxonomy.TRAINING_COUNTS, 1)))
    note = "blue: these quads; orange: TRACE's evaluation file, 5,085 constraints"
    yield f"<h2>Types of constraints</h2><p class=note>{note}</p>"
    yield _beside(counts.types, published_types, list(published_types))
    yield "<h2>Dimensions</h2>" + _beside(counts.dimensions, published, list(published))
    note = "orange: TRACE's 119,345 training rows"
    yield f"<h2>Constraints per instruction</h2><p class=note>{note}</p>"
    yield _beside(counts.numbers, training, sorted(training))
    yield "<h2>Kinds</h2>" + _table(counts.kinds)
    yield "<h2>Sources and splits</h2>" + _table(counts.sources) + _table(counts.splits)
    yield "<h2>Characters of instructions</h2>" + _table(_named(counts.x_chars), ranked=False)
    yield "<h2>Characters of responses</h2>" + _table(_named(counts.y_chars), ranked=False)
    if acceptance:
        yield f"<h2>Acceptance</h2><pre>{html.escape(acceptance)}</pre>"
    yield "<h2>Samples</h2>"
    for row in counts.samples:
        texts = "\n\n".join(f"[{key}]\n{row[key]}" for key in ("x1", "y1", "x2", "y2"))
        yield f"<pre>{html.escape(texts)}</pre>"


def _named(classes: Counter[int]) -> Counter[str]:
    return Counter({f"{size // 2:,} to {size - 1:,}": classes[size] for size in sorted(classes)})


def _beside(ours: Mapping[Any, int], theirs: Mapping[Any, int], order: Sequence[Any]) -> str:
    """Shares of both, one row a name; names that only ours has come last."""
    names = [*order, *sorted(set(ours) - set(order), key=str)]
    total, of = sum(ours.values()), sum(theirs.values())
    rows = []
    for name in names:
        share, other = ours.get(name, 0) / max(1, total), theirs.get(name, 0) / max(1, of)
        bars = f"<span class=bar style='width:{100 * share:.2f}%'></span>"
        bars += f"<span class='bar trace' style='width:{100 * other:.2f}%'></span>"
        rows.append(
            f"<tr><td>{html.escape(str(name))}<td class=n>{ours.get(name, 0):,}<td class=n>"
            f"{share:.1%}<td class=n>{other:.1%}<td class=b>{bars}"
        )
    return "<table><tr><th><th>count<th>share<th>TRACE<th>\n" + "\n".join(rows) + "</table>"


def _table(counts: Mapping[str, int], *, ranked: bool = True) -> str:
    total = max(1, sum(counts.values()))
    items = sorted(counts.items(), key=lambda item: -item[1]) if ranked else list(counts.items())
    rows = [
        f"<tr><td>{html.escape(str(name))}<td class=n>{n:,}<td class=n>{n / total:.1%}"
        f"<td class=b><span class=bar style='width:{100 * n / total:.2f}%'></span>"
        for name, n in items
    ]
    return "<table>\n" + "\n".join(rows) + "</table>"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m iopo.construct.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="quads, JSON Lines")
    parser.add_argument("--counts", type=Path, default=None, help="counts.json of the construction")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    options = parser.parse_args(arguments)
    acceptance = "" if options.counts is None else options.counts.read_text(encoding="utf-8")
    try:
        counts = write(options.out, options.files, acceptance)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {counts.rows} quads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
