"""A page about data: `python -m iopo.construct.report QUADS... [--counts FILE] --out report.html`.

Constraint types and counts per instruction stand beside TRACE's; lengths, acceptance and samples
follow. One page, no other file needed.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iopo.constraints import KINDS
from iopo.construct.summary import JUDGED, Tally
from iopo.construct.trace import taxonomy
from iopo.data.columns import read_prompt, text_of
from iopo.files import iter_records, write_text
from iopo.page import page

SAMPLES = 12
OTHER = "not in the taxonomy"

_PAGE = page(
    """<style>
td.b { width: 14rem } .bar { display: block; height: .5rem; background: #2b5c8a }
.trace { background: #d9822b } pre { white-space: pre-wrap; overflow-wrap: anywhere }
</style>
<p class="note">{{ files }}</p>
{% for heading, note, rows in tables %}
{% if heading %}<h2>{{ heading }}</h2>{% endif %}
{% if note %}<p class="note">{{ note }}</p>{% endif %}
<table>
{% for name, n, share, other in rows %}
<tr><td>{{ name }}<td class="n">{{ "{:,}".format(n) }}<td class="n">{{ "{:.1%}".format(share) }}
{% if other is not none %}<td class="n">{{ "{:.1%}".format(other) }}{% endif %}
<td class="b"><span class="bar" style="width:{{ "%.2f" % (100 * share) }}%"></span>
{% if other is not none %}
<span class="bar trace" style="width:{{ "%.2f" % (100 * other) }}%"></span>
{% endif %}
{% endfor %}
</table>
{% endfor %}
{% if acceptance %}<h2>Acceptance</h2><pre>{{ acceptance }}</pre>{% endif %}
<h2>Samples</h2>
{% for row in samples %}
<pre>{% for key in ("x1", "y1", "x2", "y2") %}[{{ key }}]
{{ row[key] }}

{% endfor %}</pre>
{% endfor %}"""
)
Row = tuple[str, int, float, float | None]  # name, count, share, TRACE's share


@dataclass
class Counts(Tally):
    """What the page shows, counted over all rows."""

    dimensions: Counter[str] = field(default_factory=Counter)
    # classes of characters, by the power of two that their number does not reach
    x_chars: Counter[int] = field(default_factory=Counter)
    y_chars: Counter[int] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any], rng: random.Random) -> None:
        row = row | {key: text_of(read_prompt(row[key]) or row[key]) for key in ("x1", "x2")}
        c1, c2 = row.get("c1") or [], row.get("c2") or []
        self.count(row, [c["kind"] for c in c1], [c["kind"] for c in c2])
        self.dimensions.update(map(_dimension, (*c1, *c2)))
        self.x_chars.update(1 << len(row[x]).bit_length() for x in ("x1", "x2"))
        self.y_chars.update(1 << len(row[y]).bit_length() for y in ("y1", "y2"))
        if len(self.samples) < SAMPLES:  # each row is as likely as another to be shown
            self.samples.append(row)
        elif (place := rng.randrange(self.rows)) < SAMPLES:
            self.samples[place] = row


def _dimension(constraint: dict[str, Any]) -> str:
    if constraint["kind"] == JUDGED:
        return constraint["params"].get("type") or OTHER
    cls = KINDS.get(constraint["kind"])
    return OTHER if cls is None else cls.dimension


def count(files: Sequence[Path]) -> Counts:
    """Counts over the rows of files of quads. Raises ValueError on a line that is no quad."""
    counts, rng = Counts(), random.Random(0)
    for path in files:
        for place, row, fault in iter_records(path):
            try:
                if fault is not None:
                    raise ValueError(fault)
                counts.add(row, rng)  # type: ignore[arg-type]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{place}: no quad that can be counted ({error}); run "
                    "`python -m iopo.construct.verify` on the file first"
                ) from error
    return counts


def write(path: Path, files: Sequence[Path], acceptance: str = "") -> Counts:
    """Write the page. acceptance: text that is shown as it is."""
    counts = count(files)
    text = _PAGE.render(
        title=f"{counts.rows:,} quads",
        files=", ".join(str(file) for file in files),
        tables=_tables(counts),
        acceptance=acceptance,
        samples=counts.samples,
    )
    write_text(path, text)
    return counts


def _tables(counts: Counts) -> list[tuple[str, str, list[Row]]]:
    """(heading, note, rows) of each table."""
    published = Counter({d.dimension: d.count for d in taxonomy.read()})
    training = Counter(dict(enumerate(taxonomy.TRAINING_COUNTS, 1)))
    by_type = _beside(_types(counts.dimensions), _types(published))
    file_note = "second share and orange: TRACE's evaluation file, 5,085 constraints"
    rows_note = "second share and orange: TRACE's 119,345 training rows"
    return [
        ("Types of constraints", file_note, by_type),
        ("Dimensions", "", _beside(counts.dimensions, published)),
        ("Constraints per instruction", rows_note, _beside(counts.constraints, training)),
        ("Kinds", "", _alone(counts.kinds.most_common())),
        ("Sources and splits", "", _alone(counts.sources.most_common())),
        ("", "", _alone(counts.splits.most_common())),
        ("Characters of instructions", "", _alone(_classes(counts.x_chars))),
        ("Characters of responses", "", _alone(_classes(counts.y_chars))),
    ]


def _types(dimensions: Counter[str]) -> Counter[str]:
    """The same counts by the type of each dimension."""
    type_of = {d.dimension: d.type for d in taxonomy.read()}
    found: Counter[str] = Counter()
    for dimension, n in dimensions.items():
        found[type_of.get(dimension, OTHER)] += n
    return found


def _classes(classes: Counter[int]) -> list[tuple[str, int]]:
    return [(f"{size // 2:,} to {size - 1:,}", classes[size]) for size in sorted(classes)]


def _beside(ours: Counter[Any], theirs: Counter[Any]) -> list[Row]:
    """Shares of both, in the order of theirs; names that only ours has come last."""
    names = [*theirs, *sorted(set(ours) - set(theirs), key=str)]
    total, of = max(1, ours.total()), max(1, theirs.total())
    return [(str(name), ours[name], ours[name] / total, theirs[name] / of) for name in names]


def _alone(items: Sequence[tuple[str, int]]) -> list[Row]:
    total = max(1, sum(n for _, n in items))
    return [(name, n, n / total, None) for name, n in items]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m iopo.construct.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="quads")
    parser.add_argument("--counts", type=Path, default=None, help="counts.json of the construction")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    options = parser.parse_args(arguments)
    try:
        acceptance = "" if options.counts is None else options.counts.read_text(encoding="utf-8")
        counts = write(options.out, options.files, acceptance)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {counts.rows} quads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
