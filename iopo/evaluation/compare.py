"""Two runs, item by item: `python -m iopo.evaluation.compare A B [--out DIR]`.

A and B are output folders of evaluate.py, or folders that hold several (one a benchmark). Prints
B minus A with 95% intervals and McNemar's test; writes compare.json, compare.html and compare.png.
"""

import argparse
import html
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iopo.evaluation import pictures, scoring
from iopo.evaluation.scoring import Difference
from iopo.files import read_records

RESAMPLES = 10_000


def runs(folder: Path) -> dict[str, Path]:
    """Output folders by benchmark: the folder itself, or those inside it.

    Raises ValueError without any, or with two of one benchmark.
    """
    files = [folder / "scores.json"] if (folder / "scores.json").is_file() else []
    found: dict[str, Path] = {}
    for file in files or sorted(folder.glob("**/scores.json")):
        if not (file.parent / "measures.jsonl").is_file():  # of quads or judge_check
            continue
        name = json.loads(file.read_text(encoding="utf-8"))["benchmark"]
        if name in found:
            raise ValueError(
                f"{folder}: both {found[name]} and {file.parent} hold {name}; name one"
            )
        found[name] = file.parent
    if not found:
        raise ValueError(
            f"{folder}: no scores.json with a measures.jsonl beside it; expected an output folder "
            "of evaluate.py (quads have theirs, and are compared by the comparison's table)"
        )
    return found


def compare_folders(a: Path, b: Path, *, resamples: int, seed: int) -> dict[str, list[Difference]]:
    """Differences of the headline metrics by benchmark.

    Raises ValueError if the folders share no benchmark, were made from different data files, or
    were scored by different judges.
    """
    runs_a, runs_b = runs(a), runs(b)
    shared = [name for name in runs_a if name in runs_b]
    if not shared:
        raise ValueError(
            f"{a} has {', '.join(runs_a)}, {b} has {', '.join(runs_b)}: no benchmark in common"
        )
    return {
        name: _compare(runs_a[name], runs_b[name], resamples=resamples, seed=seed)
        for name in shared
    }


def _compare(a: Path, b: Path, *, resamples: int, seed: int) -> list[Difference]:
    scores = [json.loads((f / "scores.json").read_text(encoding="utf-8")) for f in (a, b)]
    hashes = [s["data"]["sha256"] for s in scores]
    if hashes[0] != hashes[1]:
        raise ValueError(f"{a} and {b} were made from different data files; scores do not compare")
    judges = [_judge(s) for s in scores]
    if judges[0] != judges[1]:
        raise ValueError(
            f"{a} was scored by {judges[0]}, {b} by {judges[1]}; one judge's scores do not compare "
            "with another's"
        )
    tables = [scoring.from_rows(read_records(folder / "measures.jsonl")) for folder in (a, b)]
    return [
        scoring.compare(metric, *tables, resamples=resamples, seed=seed)
        for metric in scores[0]["headline"]
        if metric in tables[0] and metric in tables[1]
    ]


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


def show(found: dict[str, list[Difference]]) -> None:
    """Print the table."""
    table = Table(title="Percent (CSL: levels), the same items in A and B")
    for column in HEADER:
        table.add_column(column)
    for name, rows in found.items():
        for row in rows:
            table.add_row(*_cells(name, row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def page(found: dict[str, list[Difference]], a: Path, b: Path) -> str:
    """The table and the picture as one HTML page."""
    rows = [
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(name, row)) + "</tr>"
        for name, differences in found.items()
        for row in differences
    ]
    head = "".join(f"<th>{html.escape(h)}</th>" for h in HEADER)
    body = (
        f"<p>A: {html.escape(str(a))}<br>B: {html.escape(str(b))}</p>"
        f"<table><tr>{head}</tr>{''.join(rows)}</table>"
        "<p>Intervals: paired bootstrap over items. p: McNemar's exact test, for scores that are "
        "yes or no for each item; only A / only B: items right in one run alone.</p>"
    )
    return pictures.html_page("Two runs, the same items", body, ["compare.png"])


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
    show(found)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {name: [asdict(r) for r in rows] for name, rows in found.items()}
    content = {"a": str(args.a), "b": str(args.b), "differences": rows}
    (args.out / "compare.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    pictures.differences(found, args.out / "compare.png")
    (args.out / "compare.html").write_text(page(found, args.a, args.b), encoding="utf-8")
    print(f"written: {args.out}/compare.json, compare.html, compare.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
