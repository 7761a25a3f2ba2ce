"""Pictures from files: TRACE's statistics, and several models side by side, as PNG and HTML.

python -m iopo.evaluation.pictures trace 202409_trace_evaluation.jsonl --out runs/pictures
python -m iopo.evaluation.pictures models base=runs/a iopo=runs/b --out runs/pictures
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from iopo.evaluation.benchmarks import trace
from iopo.evaluation.items import Item
from iopo.evaluation.report import number
from iopo.evaluation.scoring import Difference, outputs
from iopo.files import write_text
from iopo.page import page

Models = dict[str, dict[str, dict[str, Any]]]  # model -> benchmark -> content of scores.json

_BODY = page("""
{% if rows %}<table><tr><th>model<th>benchmark<th>score<th>value [95%]<th>n
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}{% endfor %}</table>
{% endif %}
{% for file in files %}<p><img src="{{ file }}" alt=""></p>{% endfor %}
""")

# Distinct in hue and in lightness, so that they survive printing in grey.
COLOURS = ("#2b5c8a", "#d9822b", "#5fa55a", "#9c3d54", "#8a7cc2", "#7f8c8d", "#c9b037", "#3aa6a6")
DPI = 160


def trace_types(items: list[Item], path: Path) -> None:
    """Bars: constraints by dimension, grouped and coloured by the five types."""
    counts = Counter(tag for item in items for tag in item.row["levels2"])
    total = sum(counts.values())
    groups = {kind: list(names) for kind, names in trace.TYPES.items()}
    groups["Other"] = [tag for tag in counts if tag not in trace.TYPE_OF]
    labels, values, colours, handles = [], [], [], []
    for (kind, names), colour in zip(groups.items(), COLOURS, strict=False):
        ranked = sorted(names, key=lambda name: -counts[name])
        share = sum(counts[name] for name in names) / total
        handles.append((f"{kind} {100 * share:.1f}%", colour))
        for name in ranked:
            # A stray tag is Chinese, which the default font cannot draw.
            labels.append(trace.ENGLISH.get(name, "not in the taxonomy"))
            values.append(counts[name])
            colours.append(colour)
    figure = Figure(figsize=(8, 0.27 * len(labels) + 1.2))
    axes = figure.subplots()
    positions = range(len(labels))
    axes.barh(positions, values, color=colours)
    for position, value in zip(positions, values, strict=True):
        axes.text(value + total * 0.002, position, str(value), va="center", fontsize=8)
    axes.set_yticks(positions, labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("constraints")
    axes.set_title(f"{total:,} constraints of {len(items):,} instructions, by dimension")
    _plain(axes)
    axes.legend(handles=[Patch(color=c, label=t) for t, c in handles], loc="lower right")
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def trace_counts(items: list[Item], path: Path) -> None:
    """Bars: instructions by their number of constraints."""
    counts = Counter(len(item.row["constraints_splits"]) for item in items)
    sizes = range(1, max(counts) + 1)
    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    colours = [COLOURS[1] if size == 1 else COLOURS[0] for size in sizes]
    axes.bar(sizes, [counts[size] for size in sizes], color=colours)
    for size in sizes:
        axes.text(size, counts[size] + 2, str(counts[size]), ha="center", fontsize=9)
    mean = sum(k * v for k, v in counts.items()) / len(items)
    axes.set_xticks(sizes)
    axes.set_xlabel("constraints in the instruction")
    axes.set_ylabel("instructions")
    single = counts[1]
    axes.set_title(
        f"IF-S: {single} instructions with one constraint, IF-M: {len(items) - single} with more; "
        f"mean {mean:.2f}",
        fontsize=11,
    )
    _plain(axes)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def models(named: Models, path: Path) -> None:
    """Grouped bars with intervals."""
    columns: list[tuple[str, str]] = []
    for runs in named.values():
        for benchmark, scores in runs.items():
            for metric in scores["headline"]:
                # CSL counts levels, not a share: it has no place on this axis.
                if (benchmark, metric) not in columns and not metric.startswith("CSL"):
                    columns.append((benchmark, metric))
    width = 0.8 / len(named)
    figure = Figure(figsize=(max(6.0, 0.55 * len(columns) * max(2, len(named) * 0.7)), 4.2))
    axes = figure.subplots()
    for place, (name, runs) in enumerate(named.items()):
        colour = COLOURS[place % len(COLOURS)]
        label: str | None = name
        for column, (benchmark, metric) in enumerate(columns):
            entry = runs.get(benchmark, {}).get("scores", {}).get(metric)
            if entry is None or entry["value"] is None:
                continue
            x = column + (place - (len(named) - 1) / 2) * width
            value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
            axes.bar(x, value, width * 0.92, color=colour, label=label)
            axes.plot([x, x], [low, high], color="#1c2430", linewidth=1)
            axes.text(x, high + 0.8, f"{value:.1f}", ha="center", fontsize=7)
            label = None
    ticks = [f"{benchmark}\n{metric.replace('_', ' ')}" for benchmark, metric in columns]
    axes.set_xticks(range(len(columns)), ticks, fontsize=8)
    axes.set_ylabel("percent, with 95% intervals")
    axes.set_ylim(0, min(105.0, axes.get_ylim()[1] * 1.05))
    _plain(axes)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(named)), frameon=False
    )
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def differences(found: dict[str, list[Difference]], path: Path) -> None:
    """Points with intervals: B minus A, one row a score; the line is no difference."""
    rows = [(name, row) for name, group in found.items() for row in group]
    rows = [(name, row) for name, row in rows if not row.metric.startswith("CSL")] or rows
    figure = Figure(figsize=(7, 0.42 * len(rows) + 1.3))
    axes = figure.subplots()
    axes.axvline(0, color="#7f8c8d", linewidth=1)
    for position, (_, row) in enumerate(rows):
        shown = row.low > 0 or row.high < 0
        colour = COLOURS[0] if row.low > 0 else COLOURS[3] if shown else "#7f8c8d"
        axes.plot([100 * row.low, 100 * row.high], [position, position], color=colour)
        axes.plot(100 * row.difference, position, "o", color=colour)
        axes.annotate(
            f"{100 * row.difference:+.1f}", (100 * row.high, position), (6, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    labels = [f"{name}: {row.metric.replace('_', ' ')}" for name, row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("B minus A, percentage points, with paired 95% intervals")
    _plain(axes)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def read_models(arguments: list[str]) -> Models:
    """The scores in the folders of NAME=FOLDER arguments. Raises ValueError."""
    named: Models = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals:
            name, folder = Path(argument).name, argument
        if name in named:
            raise ValueError(f"two models are called {name}; give names with NAME=FOLDER")
        named[name] = {key: scores for key, (_, scores) in outputs(Path(folder)).items()}
    return named


def _cells(named: Models) -> list[tuple[str, ...]]:
    return [
        (name, benchmark, metric, number(metric, entry), str(entry["n"]))
        for name, runs in named.items()
        for benchmark, scores in runs.items()
        for metric in scores["headline"]
        if (entry := scores["scores"].get(metric)) is not None
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("trace", "models"))
    parser.add_argument("inputs", nargs="+", help="trace: the data file; models: NAME=FOLDER ...")
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = []
    try:
        if args.what == "trace":
            title, files = "TRACE evaluation set", ["trace_types.png", "trace_counts.png"]
            items = trace.load(Path(args.inputs[0]))
            trace_types(items, args.out / files[0])
            trace_counts(items, args.out / files[1])
        else:
            title, files = "Models side by side", ["models.png"]
            named = read_models(args.inputs)
            models(named, args.out / files[0])
            rows = _cells(named)
    except (ValueError, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    html = _BODY.render(title=title, rows=rows, files=files)
    write_text(args.out / f"{args.what}.html", html)
    print(f"written: {', '.join(str(args.out / f) for f in [*files, args.what + '.html'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
