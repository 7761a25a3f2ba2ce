"""Two runs, item by item: `python -m iopo.evaluation.compare A B [--out DIR]`.

A and B are output folders of evaluate.py, or folders that hold several (one a benchmark). Prints
B minus A with 95% intervals and McNemar's test; writes compare.json, compare.html and compare.png.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iopo.evaluation import pictures, scoring
from iopo.evaluation.scoring import Difference
from iopo.files import read_records, write_text
from iopo.page import page
from iopo.stats import RESAMPLES

_BODY = page("""
<p>A: {{ a }}<br>B: {{ b }}</p>
<table><tr>{% for cell in header %}<th>{{ cell }}{% endfor %}
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}{% endfor %}</table>
<p>Intervals: paired bootstrap over items. p: McNemar's exact test, for scores that are yes or no
for each item; only A / only B: items right in one run alone.</p>
<p><img src="compare.png" alt=""></p>
""")


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
            raise ValueError(
                f"{folder_a} and {folder_b} were made from different data files; scores do not "
                "compare"
            )
        if _judge(scores_a) != _judge(scores_b):
            raise ValueError(
                f"{folder_a} was scored by {_judge(scores_a)}, {folder_b} by {_judge(scores_b)}; "
                "one judge's scores do not compare with another's"
            )
        tables = [
            scoring.from_rows(read_records(folder / "measures.jsonl"))
            for folder in (folder_a, folder_b)
        ]
        found[name] = [
            scoring.compare(metric, *tables, resamples=resamples, seed=seed)
            for metric in scores_a["headline"]
            if metric in tables[0] and metric in tables[1]
        ]
    return found


def _judge(scores: dict[str, Any]) -> str:
    """Model, style and version of the prompt; "code" without a judge."""
    judge = scores.get("judge") or {}
    named = (str(judge.get(key)) for key in ("model", "style", "prompt_version"))
    return ", ".join(named) if judge else "code"


def verdict(row: Difference) -> str:
    """What the interval allows one to say."""
    if row.low > 0:
        return "B is better"
    if row.high < 0:
        return "A is better"
    return "no difference shown"


def _cells(name: str, row: Difference) -> list[str]:
    scale, digits = (1.0, 2) if row.metric.startswith("CSL") else (100.0, 1)
    test = "" if row.p is None else f"{row.only_a} / {row.only_b}, p = {row.p:.3g}"
    return [
        name,
        row.metric,
        str(row.units),
        f"{scale * row.a:.{digits}f}",
        f"{scale * row.b:.{digits}f}",
        f"{scale * row.difference:+.{digits}f} "
        f"[{scale * row.low:+.{digits}f}, {scale * row.high:+.{digits}f}]",
        test,
        verdict(row),
    ]


HEADER = ["benchmark", "score", "items", "A", "B", "B - A [95%]", "only A / only B", ""]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder to write to")
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        found = compare_folders(args.a, args.b, resamples=args.resamples, seed=args.seed)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    rows = [_cells(name, row) for name, group in found.items() for row in group]
    table = Table(*HEADER, title="Percent (CSL: levels), the same items in A and B")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    differences = {name: [asdict(row) for row in group] for name, group in found.items()}
    content = {"a": str(args.a), "b": str(args.b), "differences": differences}
    write_text(args.out / "compare.json", json.dumps(content, indent=1))
    pictures.differences(found, args.out / "compare.png")
    html = _BODY.render(
        title="Two runs, the same items", a=args.a, b=args.b, header=HEADER, rows=rows
    )
    write_text(args.out / "compare.html", html)
    print(f"written: {args.out}/compare.json, compare.html, compare.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
