"""Many runs side by side: a table, a CSV and a page with overlaid curves, from their folders."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from iopo.page import embedded, page
from iopo.training.checkpoint.resume import flatten
from iopo.training.launch.run_folder import COMPLETE_FILE, FAILED_FILE
from iopo.training.logger import read_metrics
from iopo.training.report.run import Panel, plot_panels, points_of, text_of

MEASURES = ("group_accuracy", "x_preference", "y_preference", "loss", "margin")
OVERLAID = (("train", "loss"), ("train", "margin"), ("train", "accuracy"),
            ("heldout", "group_accuracy"))  # fmt: skip


def collect(sweep: Path) -> list[dict[str, Any]]:
    """One row per run folder: "run", "state" (complete | failed | unfinished), the config keys that
    differ, then MEASURES and "seconds", which are missing for runs that did not end."""
    # at any depth: hydra.sweep.subdir may be set to a nested name. wandb has a config.yaml too
    files = sweep.rglob("config.yaml")
    folders = sorted(f.parent for f in files if (f.parent / "environment.json").exists())
    configs = [flatten(yaml.safe_load(text_of(f / "config.yaml"))) for f in folders]
    keys = sorted({key for config in configs for key in config} - {"run"})
    differing = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    rows = []
    for folder, config in zip(folders, configs, strict=True):
        ends = {COMPLETE_FILE: "complete", FAILED_FILE: "failed"}
        state = next((end for file, end in ends.items() if (folder / file).exists()), "unfinished")
        row: dict[str, Any] = {"run": str(folder.relative_to(sweep)), "state": state}
        row |= {key: config.get(key) for key in differing}
        if text := text_of(folder / "summary.json"):
            summary = json.loads(text)
            last = summary["heldout"][1] if summary["heldout"] else summary["train"]
            row |= {k: last[k] for k in MEASURES if k in last} | {"seconds": summary["seconds"]}
        rows.append(row)
    return rows


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


def plot(sweep: Path, rows: list[dict[str, Any]]) -> Path:
    """SWEEP/sweep.png: curves of all runs overlaid, the best one highlighted."""
    top = best(rows)
    panels = []
    for split, name in OVERLAID:
        curves = []
        for row in rows:
            if (sweep / row["run"] / "metrics.jsonl").exists():
                points = points_of(read_metrics(sweep / row["run"]), split, name)
                bold = {"color": "C1", "linewidth": 2, "zorder": 3}
                curves.append((points, "-", bold if row is top else {"color": "C0", "alpha": 0.5}))
        panels.append(Panel(f"{split}: {name}", curves))
    return plot_panels(sweep / "sweep.png", panels, across=4, width=15)


PAGE = page("""<p>{{ rows | length }} runs; the highlighted one has the highest held-out group
accuracy.</p><table><tr>{% for k in keys %}<th>{{ k }}</th>{% endfor %}</tr>
{% for row in rows %}<tr{% if row is sameas top %} class="best"{% endif %}>
{% for k in keys %}<td>{{ cell(row.get(k)) }}</td>{% endfor %}</tr>{% endfor %}</table>
<img alt="curves of all runs" src="{{ image }}">
""")


def write_page(sweep: Path) -> Path:
    """SWEEP/sweep.html with sweep.csv and sweep.png; raises ValueError without run folders."""
    rows = collect(sweep)
    if not rows:
        raise ValueError(f"{sweep}: no run folders (with config.yaml and environment.json) in it")
    keys = columns(rows)
    with open(sweep / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    image = embedded(plot(sweep, rows))
    text = PAGE.render(
        title=sweep.name, rows=rows, keys=keys, cell=_cell, top=best(rows), image=image
    )
    path = sweep / "sweep.html"
    path.write_text(text, encoding="utf-8")
    return path
