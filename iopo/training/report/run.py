"""Curves and one page per run, from files in the run folder alone (no network, no weights).

`python -m iopo.training.report RUN` writes RUN/curves.png and RUN/report.html again; for a sweep's
folder it writes sweep.html, sweep.png and sweep.csv (iopo/training/sweep.py).
"""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2

from iopo.training.logger import read_metrics

PANELS = [
    ("Loss", ["loss"], None),
    ("Margin (nats)", ["margin", "margin/out_x1", "margin/out_x2", "margin/in_y1", "margin/in_y2"],
     0.0),
    ("Accuracy (margin > 0)", ["accuracy"], 0.5),
    ("Log-ratio to the reference (nats)",
     [f"logratio/{m}" for m in ("x1y1", "x1y2", "x2y2", "x2y1", "chosen", "rejected")], 0.0),
    ("Held-out preferences of the policy", ["group_accuracy", "x_preference", "y_preference"], 0.5),
    ("Gradient norm", ["grad_norm"], None),
]  # fmt: skip


def plot_curves(run: Path) -> Path:
    """Draw every panel that the run has numbers for into RUN/curves.png.

    Lines are training steps; dots joined by dashes are held-out values.
    """
    rows = read_metrics(run)
    keys = {key for row in rows for key in row}
    panels = [panel for panel in PANELS if keys & set(panel[1])]
    from matplotlib.figure import Figure  # here: a start would wait for it

    lines = -(-len(panels) // 3)
    figure = Figure(figsize=(13, 3.4 * lines))
    axes = figure.subplots(lines, 3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, names, chance) in zip(axes.flat, panels, strict=False):
        _plot_panel(axis, rows, names)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelsize=8)
        if chance is not None:
            axis.axhline(chance, color="0.7", linewidth=0.8, zorder=0)
        axis.legend(fontsize=7, framealpha=0.7, loc="best")
    figure.tight_layout()
    path = run / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def _plot_panel(axis, rows: list[dict[str, Any]], names: list[str]) -> None:
    for i, name in enumerate(names):
        label: str | None = name.split("/")[-1]
        for split, style in (("train", "-"), ("heldout", "o--")):
            points = [(r["step"], r[name]) for r in rows if r["split"] == split and name in r]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label,
                          linewidth=1.1, markersize=4)  # fmt: skip
                label = None  # one entry for both


PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ run }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
img { max-width: 100% }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { border: 1px solid #ddd; padding: .35rem .6rem; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px }
.answer { white-space: pre-wrap } .ok { color: #17703c } .no { color: #a02020 }
</style></head><body>
<h1>{{ run }}</h1>
<p>{{ headline }}</p>
{% if summary %}<table><tr><th>measure</th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for name, cells in summary %}<tr><td>{{ name }}</td>
{% for cell in cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
<h2>Curves</h2><img alt="training curves" src="{{ curves }}">
<p>Lines are training steps, dots are held-out quads. docs/curves.md says how to read them.</p>
{% if samples %}<h2>Before and after</h2>
<table><tr><th>prompt</th><th>before</th><th>after</th></tr>
{% for s in samples %}<tr><td class="answer">{{ s.prompt }}</td>
{% for side in ("before", "after") %}<td><div class="answer">{{ (s[side] or {}).text }}</div>
{% for c in (s[side] or {}).constraints %}<div class="{{ 'ok' if c.follows else 'no' }}">
{{ '✓' if c.follows else '✗' }} {{ c.text }}</div>{% endfor %}</td>{% endfor %}</tr>{% endfor %}
</table>{% endif %}
<h2>Data</h2><table>{% for name, value in data %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
<h2>Configuration</h2><pre>{{ config }}</pre>
<h2>Environment</h2><pre>{{ environment }}</pre>
</body></html>
""")


def write_report(run: Path) -> Path:
    """RUN/report.html from metrics.jsonl, config.yaml, environment.json, data.json, samples.jsonl.

    Files that the run did not write are left out of the page.
    """
    curves = embedded(plot_curves(run))
    rows = read_metrics(run)
    page = PAGE.render(
        run=run.name,
        headline=_headline(rows),
        columns=["first", "last"],
        summary=_summary(rows),
        curves=curves,
        samples=_json_lines(run / "samples.jsonl"),
        data=_data_rows(_json(run / "data.json")),
        config=_text(run / "config.yaml"),
        environment=_text(run / "environment.json"),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def embedded(image: Path) -> str:
    """A PNG as a data: address, so that a page is one file."""
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def write_summary(run: Path) -> Path:
    """RUN/summary.json: steps, metric, seconds in them, the last training row, held-out ones.

    metric is the last held-out group accuracy, which sweeps compare; null without held-out quads.
    """
    rows = read_metrics(run)
    train = [row for row in rows if row["split"] == "train"]
    heldout = [row for row in rows if row["split"] == "heldout"]
    summary = {
        "steps": train[-1]["step"] if train else 0,
        "metric": heldout[-1]["group_accuracy"] if heldout else None,
        "seconds": round(_seconds(train), 3),
        "train": train[-1] if train else None,
        "heldout": [heldout[0], heldout[-1]] if heldout else None,
    }
    path = run / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    return path


def _headline(rows: list[dict[str, Any]]) -> str:
    train = [row for row in rows if row["split"] == "train"]
    if not train:
        return "No optimizer step was taken."
    return f"{train[-1]['step']} optimizer steps, {_seconds(train):.0f} s."


def _seconds(train: list[dict[str, Any]]) -> float:
    """Of all optimizer steps, from the mean of those that were logged."""
    logged = [row["step_s"] for row in train if "step_s" in row]
    return sum(logged) / len(logged) * train[-1]["step"] if logged else 0.0


def _summary(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """First and last value of every number, training and held out."""
    out = []
    for split in ("heldout", "train"):
        mine = [row for row in rows if row["split"] == split]
        for name in mine[-1] if mine else []:
            if name in ("step", "split"):
                continue
            first, last = mine[0].get(name), mine[-1][name]
            cells = ["" if first is None else f"{first:.4g}", f"{last:.4g}"]
            out.append((f"{split}: {name}", cells))
    return out


def _data_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    out = []
    for name, report in data.items():
        for key, value in report.items():
            shown = json.dumps(value, ensure_ascii=False)
            out.append((f"{name}: {key}", shown if len(shown) < 2000 else shown[:2000] + " ..."))
    return out


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_text(path) or "{}")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(path).split("\n") if line]
