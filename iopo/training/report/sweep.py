"""Many runs side by side: a table, a CSV and a page with overlaid curves, from their folders."""

import csv
import json
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.table import Table

from iopo.training.checkpoint.resume import flatten
from iopo.training.logger import read_metrics
from iopo.training.report.run import embedded

MEASURES = ("group_accuracy", "x_preference", "y_preference", "loss", "margin")
OVERLAID = (("train", "loss"), ("train", "margin"), ("train", "accuracy"),
            ("heldout", "group_accuracy"))  # fmt: skip


def collect(sweep: Path) -> list[dict[str, Any]]:
    """One row per run folder: name, state, the config keys that differ, and held-out measures.

    Keys "run", "state" (complete | failed | unfinished), then dotted config keys, then MEASURES and
    "seconds", which are missing for runs that did not end.
    """
    # at any depth: a job's folder is named after its overrides, and paths among them nest it
    folders = sorted(path.parent for path in sweep.rglob("config.yaml"))
    configs = [flatten(yaml.safe_load((f / "config.yaml").read_text())) for f in folders]
    keys = sorted({key for config in configs for key in config} - {"run"})
    differing = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    return [
        {"run": str(folder.relative_to(sweep)), "state": _state(folder)}
        | {key: config.get(key) for key in differing}
        | _measures(folder)
        for folder, config in zip(folders, configs, strict=True)
    ]


def _state(folder: Path) -> str:
    if (folder / "COMPLETE").exists():
        return "complete"
    return "failed" if (folder / "FAILED").exists() else "unfinished"


def _measures(folder: Path) -> dict[str, Any]:
    if not (folder / "summary.json").exists():
        return {}
    summary = json.loads((folder / "summary.json").read_text())
    last = summary["heldout"][1] if summary["heldout"] else summary["train"]
    return {k: last[k] for k in MEASURES if k in last} | {"seconds": summary["seconds"]}


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The complete run with the highest held-out group accuracy, ties by lower loss."""
    done = [row for row in rows if row["state"] == "complete" and "group_accuracy" in row]
    return max(done, key=lambda row: (row["group_accuracy"], -row["loss"]), default=None)


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """All keys of the rows in order, the run's long name last."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [key for key in keys if key != "run"] + ["run"]


def table(rows: list[dict[str, Any]]) -> Table:
    """For a terminal; the best run has a star."""
    out, top = Table(), best(rows)
    for key in columns(rows):
        out.add_column(key, overflow="fold")
    for row in rows:
        cells = [_cell(row.get(key)) for key in columns(rows)]
        out.add_row(*cells[:-1], ("* " if row is top else "") + cells[-1])
    return out


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(sweep: Path, rows: list[dict[str, Any]]) -> Path:
    """SWEEP/sweep.csv with every row."""
    path = sweep / "sweep.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    return path


def plot(sweep: Path, rows: list[dict[str, Any]]) -> Path:
    """SWEEP/sweep.png: curves of all runs overlaid, then the metric against each numeric key."""
    keys = [k for k in columns(rows) if "." in k or k == "seed"]
    numeric = [k for k in keys if all(isinstance(r.get(k), int | float) for r in rows)][:4]
    panels = len(OVERLAID) + len(numeric)
    from matplotlib.figure import Figure  # here: a start would wait for it

    lines = -(-panels // 4)
    figure = Figure(figsize=(15, 3.3 * lines))
    axes = figure.subplots(lines, 4)
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    top = best(rows)
    for axis, (split, name) in zip(axes.flat, OVERLAID, strict=False):
        for row in rows:
            _plot_run(axis, sweep / row["run"], split, name, bold=row is top)
        axis.set_title(f"{split}: {name}", fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
    for axis, key in zip(axes.flat[len(OVERLAID) :], numeric, strict=False):
        points = [(r[key], r["group_accuracy"]) for r in rows if "group_accuracy" in r]
        axis.plot(*zip(*points, strict=True), "o") if points else None
        axis.set_xlabel(key, fontsize=8)
        axis.set_title("held-out group accuracy", fontsize=10)
    figure.tight_layout()
    path = sweep / "sweep.png"
    figure.savefig(path, dpi=110)
    return path


def _plot_run(axis, run: Path, split: str, name: str, *, bold: bool) -> None:
    if not (run / "metrics.jsonl").exists():
        return
    points = [(r["step"], r[name]) for r in read_metrics(run, split) if name in r]
    if points:
        style = {"color": "C1", "linewidth": 2, "zorder": 3} if bold else {"color": "C0"}
        axis.plot(*zip(*points, strict=True), "-", alpha=1 if bold else 0.5, **style)


PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ sweep }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1300px; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse } .best { background: #fff3d6 }
td, th { border: 1px solid #ddd; padding: .3rem .5rem; text-align: left }
</style></head><body><h1>{{ sweep }}</h1>
<p>{{ rows | length }} runs; the highlighted one has the highest held-out group accuracy.</p>
<table><tr>{% for k in keys %}<th>{{ k }}</th>{% endfor %}</tr>
{% for row in rows %}<tr{% if row is sameas top %} class="best"{% endif %}>
{% for k in keys %}<td>{{ cell(row.get(k)) }}</td>{% endfor %}</tr>{% endfor %}</table>
<img alt="curves of all runs and metric by parameter" src="{{ image }}"></body></html>
""")


def write_page(sweep: Path) -> Path:
    """SWEEP/sweep.html with sweep.csv and sweep.png; raises ValueError without run folders."""
    rows = collect(sweep)
    if not rows:
        raise ValueError(f"{sweep}: no run folders (with a config.yaml) in it")
    write_csv(sweep, rows)
    image = embedded(plot(sweep, rows))
    page = PAGE.render(
        sweep=sweep.name, rows=rows, keys=columns(rows), cell=_cell, top=best(rows), image=image
    )
    path = sweep / "sweep.html"
    path.write_text(page, encoding="utf-8")
    return path
