"""Tables and pictures of the comparison, from run folders alone.

`python -m iopo.experiments.paper_table.table RUN [SWEEP]` writes RUN/SWEEP.md, .json, .html, .png.
Whether a difference is a gain is printed by code: only where its interval excludes zero.
"""

import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from iopo import stats
from iopo.experiments.paper_table import measures as comparison_runs
from iopo.experiments.paper_table.measures import Runs
from iopo.experiments.paper_table.pictures import draw_differences, draw_values
from iopo.page import page as html_page
from iopo.stats import Estimate, Scores

# name -> (label, factor for printing, 1 or -1 where more is better or worse, 0: neither)
METRICS = {
    "following": ("follows all constraints, %", 100, 1),
    "following/seen": ("- kinds and values seen, %", 100, 1),
    "following/unseen_params": ("- values not seen, %", 100, 1),
    "following/unseen_kinds": ("- kinds not seen, %", 100, 1),
    "constraints": ("constraints followed, %", 100, 1),
    "prompt_strict": ("IFEval prompt strict, %", 100, 1),
    "prompt_loose": ("IFEval prompt loose, %", 100, 1),
    "instruction_strict": ("IFEval instruction strict, %", 100, 1),
    "instruction_loose": ("IFEval instruction loose, %", 100, 1),
    "group_accuracy": ("group accuracy, %", 100, 1),
    "x_preference": ("x-preference, %", 100, 1),
    "y_preference": ("y-preference, %", 100, 1),
    "logratio_matched": ("log-ratio of matched members, nats", 1, 0),
    "logratio_mismatched": ("log-ratio of mismatched members, nats", 1, 0),
    "as_sft": ("answers word for word SFT's, %", 100, 0),
    "words": ("words an answer", 1, 0),
    "empty": ("empty answers, %", 100, -1),
    "cut_off": ("cut off, %", 100, -1),
    "repetitive": ("a word 4-gram occurs twice, %", 100, -1),
    "plain_text": ("plain text, nats a token", 1, -1),
}
SECTIONS = {
    "Following, on held-out tasks": [m for m in METRICS if m.startswith(("follow", "constr"))],
    "IFEval": list(comparison_runs.IFEVAL),
    "Preferences, by log-prob": ["group_accuracy", "x_preference", "y_preference"],
    "Drift": ["logratio_matched", "logratio_mismatched", "as_sft", "words", "empty", "cut_off",
              "repetitive", "plain_text"],
}  # fmt: skip
NAMES = {
    "sft": "SFT, continued", "dpo": "DPO", "output_preference": "DPO on both rows",
    "input_preference": "input preference", "iopo_three": "IOPO, three members (Eq. 11)",
    "iopo": "IOPO", "simpo": "SimPO", "orpo": "ORPO",
}  # fmt: skip
BASELINES = ("SFT", "output_preference")
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def write(run: Path, sweep: str) -> list[str]:
    """All files of a sweep; returns the lines of the difference tables, for a terminal.

    An ablation is shown beside IOPO of the main table and against it. Raises ValueError if the SFT
    checkpoint has not been measured.
    """
    runs = comparison_runs.find(run, sweep)
    order = [name for name in ("base", "SFT", *NAMES) if name in runs]
    runs = {name: runs[name] for name in [*order, *(n for n in runs if n not in order)]}
    if "SFT" not in runs:
        raise ValueError(f"{run}: the SFT checkpoint was not measured; nothing to compare with")
    baselines = BASELINES
    if sweep != "paper_table":
        main = comparison_runs.find(run, "paper_table")
        runs = {name: main[name] for name in ("base", "SFT", "iopo") if name in main} | runs
        baselines = ("SFT", "iopo")
    found = _scores(runs, run / "sft")
    differences = {
        base: {name: _differences(found[base], found[name]) for name in found
               if name not in (base, "base")}
        for base in baselines if base in found
    }  # fmt: skip
    tables = [_values(title, metrics, found) for title, metrics in SECTIONS.items()]
    tables.append(_costs(run, runs))
    against = [_against(base, rows) for base, rows in differences.items()]
    split = _split(found) if sweep == "paper_table" else None
    tables += against + ([split] if split else [])
    tables = [table for table in tables if table[2]]
    head = _head(run, runs)
    files = [f"{sweep}_values.png", f"{sweep}_differences.png"]
    values = {_name(m): {k: stats.estimate(s) for k, s in of.items()} for m, of in found.items()}
    draw_values(values, METRICS, run / files[0])
    named = {_name(b): {_name(m): d for m, d in rows.items()} for b, rows in differences.items()}
    draw_differences(named, METRICS, run / files[1])
    title = f"The paper's comparison in small: {sweep}"
    text = [f"# {title}", "", *(f"- {line}" for line in head), *map(_markdown, tables)]
    (run / f"{sweep}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    body = "".join(f"<p>{html.escape(line)}</p>" for line in head) + "".join(map(_html, tables))
    shown_files = "".join(f"<p><img src='{file}' alt=''></p>" for file in files)
    page = html_page("{{ body | safe }}").render(title=title, body=body + shown_files)
    (run / f"{sweep}.html").write_text(page, encoding="utf-8")
    content = {"values": values, "differences": named, "provenance": head}
    (run / f"{sweep}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shown = [_markdown(table) for table in tables if table in against or table is split]
    return [*shown, f"written: {run}/{sweep}.md, .json, .html, {', '.join(files)}"]


def _scores(runs: Runs, sft: Path) -> dict[str, dict[str, Scores]]:
    """method -> metric -> scores over seeds."""
    out: dict[str, dict[str, Scores]] = {}
    for name, folders in runs.items():
        tables = {seed: comparison_runs.measures(folder, sft) for seed, folder in folders.items()}
        columns = {metric: stats.scores(metric, tables) for metric in METRICS}
        out[name] = {metric: found for metric, found in columns.items() if found is not None}
    return out


def _differences(a: dict[str, Scores], b: dict[str, Scores]) -> dict[str, Estimate]:
    return {metric: stats.difference(a[metric], b[metric]) for metric in a if metric in b}


def _values(title: str, metrics: list[str], found: dict[str, dict[str, Scores]]) -> Table:
    metrics = [m for m in metrics if any(m in of for of in found.values())]
    head = ["method", "seeds", *(METRICS[metric][0] for metric in metrics)]
    rows = []
    for name, of in found.items():
        cells = [_number(stats.estimate(of[m]), m) if m in of else "" for m in metrics]
        seeds = next((of[m].seeds for m in metrics if m in of), ())
        rows.append([_name(name), str(len(seeds) or "-"), *cells])
    return f"{title} [95 % interval]", head, rows if metrics else []


def _costs(run: Path, runs: Runs) -> Table:
    head = ["method", "steps", "tokens of members seen", "seconds", "peak GB of a process"]
    rows = []
    for name, folders in runs.items():
        cost = comparison_runs.cost(run, folders.values())
        if cost is not None:
            rows.append([
                _name(name), f"{cost['steps']:.0f}", f"{cost['tokens']:,.0f}",
                f"{cost['seconds']:.0f}", f"{cost['peak_rss_gb']:.1f}",
            ])  # fmt: skip
    return "Cost of training, mean over seeds (seconds: loading and export included)", head, rows


def _against(base: str, rows: dict[str, dict[str, Estimate]]) -> Table:
    """One row a metric, one column a method: the paired difference and what may be said of it."""
    metrics = [m for m in METRICS if any(m in row for row in rows.values())]
    head = ["", *map(_name, rows)]
    cells = [
        [METRICS[m][0], *(_difference(row[m], m) if m in row else "" for row in rows.values())]
        for m in metrics
    ]
    return f"Minus {_name(base)}, paired by item and seed", head, cells


def _split(found: dict[str, dict[str, Scores]]) -> Table | None:
    """IOPO - DPO = (DPO on both rows - DPO: other data) + (IOPO - DPO on both rows: other loss)."""
    if not {"dpo", "output_preference", "iopo"} <= found.keys():
        return None
    dpo, rows, iopo = (found[name] for name in ("dpo", "output_preference", "iopo"))
    parts = [_differences(dpo, iopo), _differences(dpo, rows), _differences(rows, iopo)]
    cells = [
        [METRICS[m][0], *(_difference(part[m], m) for part in parts)]
        for m in METRICS if METRICS[m][2] == 1 and all(m in part for part in parts)
    ]  # fmt: skip
    head = ["", "IOPO - DPO", "of which data: DPO on both rows - DPO",
            "of which loss: IOPO - DPO on both rows"]  # fmt: skip
    return "Where the gain over DPO comes from", head, cells


def _head(run: Path, runs: Runs) -> list[str]:
    facts = comparison_runs.provenance(runs)
    lines = [f"{key}: {'; '.join(values)}" for key, values in facts.items()]
    data = json.loads((run / "data/counts.json").read_text(encoding="utf-8"))
    lines.append("quads: " + ", ".join(f"{k} {v}" for k, v in data.items() if isinstance(v, int)))
    choice = json.loads((run / "choice.json").read_text(encoding="utf-8"))["chosen"]
    lines += [f"chosen for {_name(m)}: {' '.join(rates)}" for m, rates in choice.items()]
    return lines


def _name(name: str) -> str:
    return NAMES.get(name, name)


def _number(found: Estimate, metric: str) -> str:
    value, low, high = (METRICS[metric][1] * found[key] for key in ("value", "low", "high"))  # type: ignore[literal-required]
    digits = 1 if METRICS[metric][1] == 100 else 2
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _difference(found: Estimate, metric: str) -> str:
    _, factor, better = METRICS[metric]
    value, low, high = (factor * found[key] for key in ("value", "low", "high"))  # type: ignore[literal-required]
    digits = 1 if factor == 100 else 2
    interval = f"[{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{value:+.{digits}f} {interval} {stats.word(found, better)}"


def _markdown(table: Table) -> str:
    title, head, rows = table
    lines = [f"\n## {title}\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _html(table: Table) -> str:
    title, head, rows = table

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<h2>{html.escape(title)}</h2><table>{line(head, 'th')}{body}</table>"


def main(arguments: Sequence[str]) -> int:
    """Write the tables of a run folder again."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m iopo.experiments.paper_table.table RUN [SWEEP]", file=sys.stderr)
        return 2
    try:
        lines = write(Path(arguments[0]), arguments[1] if arguments[1:] else "paper_table")
    except (ValueError, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
