"""Runs side by side, from their output folders.

    python -m iopo.evaluation.compare A B [--out DIR]
    python -m iopo.evaluation.compare --bars SFT=A DPO=B IOPO=C [--out DIR]

A folder is an output folder of evaluate.py, or holds several (one a benchmark). Two runs, item by
item: prints B minus A with 95% intervals and McNemar's test; writes compare.json and compare.png.
--bars: prints the scores of any number of runs; writes bars.png.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from iopo.evaluation import scoring
from iopo.evaluation.report import better, number, scale_of
from iopo.evaluation.run import find
from iopo.evaluation.scoring import Difference
from iopo.files import read_records, write_text
from iopo.stats import RESAMPLES, shown, word

# Distinct in hue and in lightness, so that they survive printing in grey.
COLOURS = ("#2b5c8a", "#d9822b", "#5fa55a", "#9c3d54", "#8a7cc2", "#7f8c8d", "#c9b037", "#3aa6a6")
GREY = "#7f8c8d"
DPI = 160

Runs = dict[str, dict[str, dict[str, Any]]]  # run -> benchmark -> content of scores.json


def compare_folders(a: Path, b: Path, *, resamples: int, seed: int) -> dict[str, list[Difference]]:
    """Differences of the headline metrics by benchmark.

    Raises ValueError if the folders share no benchmark, were made from different data files, or
    were scored by different judges.
    """
    runs_a, runs_b = scoring.outputs(a), scoring.outputs(b)
    shared = [name for name in runs_a if name in runs_b]
    if not shared:
        raise ValueError(
            f"{a} has {', '.join(runs_a)}, {b} has {', '.join(runs_b)}: no benchmark in common"
        )
    found = {}
    for name in shared:
        (folder_a, scores_a), (folder_b, scores_b) = runs_a[name], runs_b[name]
        if scores_a["data"]["sha256"] != scores_b["data"]["sha256"]:
            raise ValueError(f"{folder_a} and {folder_b} were made from different data files")
        if _judge(scores_a) != _judge(scores_b):
            raise ValueError(
                f"{folder_a} was scored by {_judge(scores_a)}, {folder_b} by {_judge(scores_b)}; "
                "one judge's scores do not compare with another's"
            )
        tables = [
            scoring.from_rows(read_records(folder / "measures.jsonl"))
            for folder in (folder_a, folder_b)
        ]
        cluster = find(name).BENCHMARK.cluster
        found[name] = [
            scoring.compare(metric, *tables, resamples=resamples, seed=seed, cluster=cluster)
            for metric in scores_a["headline"]
            if metric in tables[0] and metric in tables[1]
        ]
    return found


def _judge(scores: dict[str, Any]) -> str:
    """Model, style and version of the prompt; "code" without a judge."""
    judge = scores.get("judge") or {}
    named = (str(judge.get(key)) for key in ("model", "style", "prompt_version"))
    return ", ".join(named) if judge else "code"


def _difference_cells(name: str, row: Difference) -> list[str]:
    scale, digits = scale_of(row.metric)
    a, b = (f"{scale * value:.{digits}f}" for value in (row.a, row.b))
    gain = row.estimate()
    test = "" if row.p is None else f"{row.only_a} / {row.only_b}, p = {row.p:.3g}"
    gained = word(gain, better(row.metric))
    verdict = {"gain": "B is better", "loss": "A is better", "not shown": "no difference shown"}
    cells = [name, row.metric, str(row.units), a, b, shown(gain, scale, digits, "+")]
    return [*cells, test, verdict.get(gained, gained)]


def draw_differences(found: dict[str, list[Difference]], path: Path) -> None:
    """Points with intervals: B minus A, one row a score; the line is no difference."""
    rows = [(name, row) for name, group in found.items() for row in group]
    rows = [(name, row) for name, row in rows if not row.metric.startswith("CSL")] or rows
    figure = Figure(figsize=(7, 0.42 * len(rows) + 1.3))
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    for position, (_, row) in enumerate(rows):
        gained = word(row.estimate(), better(row.metric))
        colour = {"gain": COLOURS[0], "loss": COLOURS[3]}.get(gained, GREY)
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
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def read_runs(arguments: list[str]) -> Runs:
    """The scores in the folders of NAME=FOLDER arguments. Raises ValueError."""
    named: Runs = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals:
            name, folder = Path(argument).name, argument
        if name in named:
            raise ValueError(f"two runs are called {name}; give names with NAME=FOLDER")
        named[name] = {key: scores for key, (_, scores) in scoring.outputs(Path(folder)).items()}
    return named


def draw_bars(named: Runs, path: Path) -> None:
    """Grouped bars with intervals: one group a headline score, one bar a run."""
    pairs = (
        (benchmark, metric)
        for runs in named.values()
        for benchmark, scores in runs.items()
        for metric in scores["headline"]
        if not metric.startswith("CSL")  # counts levels, not a share: it has no place on this axis
    )
    columns = list(dict.fromkeys(pairs))
    width = 0.8 / len(named)
    figure = Figure(figsize=(max(6.0, 0.55 * len(columns) * max(2, len(named) * 0.7)), 4.2))
    axes = figure.subplots()
    for place, (name, runs) in enumerate(named.items()):
        label: str | None = name
        for column, (benchmark, metric) in enumerate(columns):
            entry = runs.get(benchmark, {}).get("scores", {}).get(metric)
            if entry is None or entry["value"] is None:
                continue
            x = column + (place - (len(named) - 1) / 2) * width
            value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
            axes.bar(x, value, width * 0.92, color=COLOURS[place % len(COLOURS)], label=label)
            axes.plot([x, x], [low, high], color="#1c2430", linewidth=1)
            axes.text(x, high + 0.8, f"{value:.1f}", ha="center", fontsize=7)
            label = None  # one entry a run in the legend
    ticks = [f"{benchmark}\n{metric.replace('_', ' ')}" for benchmark, metric in columns]
    axes.set_xticks(range(len(columns)), ticks, fontsize=8)
    axes.set_ylabel("percent, with 95% intervals")
    axes.set_ylim(0, min(105.0, axes.get_ylim()[1] * 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(named)), frameon=False
    )
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    table = Table(*head, title="Percent (CSL: levels) with 95% intervals")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("--bars", action="store_true", help="scores side by side, no differences")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder to write to")
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if not args.bars and len(args.runs) != 2:
        parser.error(f"{len(args.runs)} folders; expected A and B, or --bars for any number")
    try:
        if args.bars:
            named = read_runs(args.runs)
        else:
            a, b = map(Path, args.runs)
            found = compare_folders(a, b, resamples=args.resamples, seed=args.seed)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if args.bars:
        rows = [
            [name, benchmark, metric, number(metric, entry), str(entry["n"])]
            for name, runs in named.items()
            for benchmark, scores in runs.items()
            for metric in scores["headline"]
            if (entry := scores["scores"].get(metric)) is not None
        ]
        _print_table(["run", "benchmark", "score", "value", "n"], rows)
        draw_bars(named, args.out / "bars.png")
        print(f"written: {args.out}/bars.png")
        return 0
    rows = [_difference_cells(name, row) for name, group in found.items() for row in group]
    head = ["benchmark", "score", "items", "A", "B", "B - A", "only A / only B", ""]
    _print_table(head, rows)
    differences = {name: [asdict(row) for row in group] for name, group in found.items()}
    content = {"a": str(a), "b": str(b), "differences": differences}
    write_text(args.out / "compare.json", json.dumps(content, indent=1))
    draw_differences(found, args.out / "compare.png")
    print(f"written: {args.out}/compare.json, compare.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
