"""Curves and one page per run, from files in the run folder alone (no network, no weights)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iopo.files import read_records
from iopo.page import embedded, page
from iopo.training.logger import read_metrics

PANELS = [
    ("Loss", ["loss"], None),
    ("Margin (nats)", ["margin", "margin/out_x1", "margin/out_x2", "margin/in_y1", "margin/in_y2"],
     0.0),
    ("Accuracy (margin > 0)", ["accuracy"], 0.5),
    ("Log-ratio to the reference (nats)",
     [f"logratio/{m}" for m in ("x1y1", "x1y2", "x2y2", "x2y1", "chosen", "rejected", "y")], 0.0),
    ("Held-out preferences of the policy", ["group_accuracy", "x_preference", "y_preference"], 0.5),
    ("Gradient norm", ["grad_norm"], None),
]  # fmt: skip


@dataclass
class Panel:
    """Curves over steps: ((step, value) points, format and further options of `Axes.plot`) each.

    chance: what a coin would reach, as a grey line. over: the name of what is counted as steps.
    """

    title: str
    curves: list[tuple[list[tuple[float, float]], str, dict[str, Any]]]
    chance: float | None = None
    over: str = "optimizer step"


def plot_panels(path: Path, panels: Sequence[Panel], *, across: int, width: float) -> Path:
    """A PNG of the panels that have points, `across` in a line; width: of it, in inches."""
    from matplotlib.figure import Figure  # here: a start would wait for it

    panels = [panel for panel in panels if any(points for points, *_ in panel.curves)]
    lines = max(1, -(-len(panels) // across))
    figure = Figure(figsize=(width, 3.4 * lines))
    axes = figure.subplots(lines, across, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for points, style, options in panel.curves:
            if points:
                axis.plot(*zip(*points, strict=True), style, **options)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.over, fontsize=8)
        axis.locator_params(axis="x", integer=True)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.tick_params(labelsize=8)
        if panel.chance is not None:
            axis.axhline(panel.chance, color="0.7", linewidth=0.8, zorder=0)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7, framealpha=0.7, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


def points_of(rows: list[dict[str, Any]], split: str, name: str) -> list[tuple[float, float]]:
    """(step, value) of each row of a split that has this number."""
    return [(r["step"], r[name]) for r in rows if r["split"] == split and name in r]


def plot_curves(run: Path) -> Path:
    """Draw every panel that the run has numbers for into RUN/curves.png.

    Lines are training steps; dots joined by dashes are held-out values.
    """
    rows = read_metrics(run)
    panels = []
    for title, names, chance in PANELS:
        curves = []
        for i, name in enumerate(names):
            train, heldout = (points_of(rows, split, name) for split in ("train", "heldout"))
            look = {"color": f"C{i}", "linewidth": 1.1, "markersize": 4}
            label = {"label": name.split("/")[-1]}
            curves.append((train, "-", look | label))
            curves.append((heldout, "o--", look if train else look | label))  # one entry for both
        panels.append(Panel(title, curves, chance))
    return plot_panels(run / "curves.png", panels, across=3, width=13)


# The numbers that say whether a run went well, those of its objective. The rest is folded.
MAIN = (
    *(f"heldout: {name}" for name in ("loss", "group_accuracy", "x_preference", "y_preference")),
    *("train: loss", "train: margin", "train: accuracy", "train: grad_norm"),
    *(f"train: logratio/{m}" for m in ("x1y1", "x2y2", "chosen", "rejected")),  # quads, pairs
)
PAGE = page("""{% macro numbers(rows) %}
<table><tr><th>measure</th><th>first</th><th>last</th></tr>
{% for name, cells in rows %}<tr><td>{{ name }}</td>
{% for cell in cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% endmacro %}
<p>{{ steps }} optimizer steps, {{ "%.0f" | format(seconds) }} s.</p>
<div class="wide"><img alt="training curves" src="{{ curves }}"></div>
<p>Lines are training steps, dots are held-out quads. docs/curves.md says how to read them.</p>
{% if main %}{{ numbers(main) }}{% endif %}
{% if rest %}<details><summary>{{ rest | length }} more numbers</summary>
{{ numbers(rest) }}</details>
{% endif %}
{% if samples %}<h2>Before and after</h2>
<table class="answers"><tr><th>prompt</th><th>before</th><th>after</th></tr>
{% for s in samples %}<tr><td class="answer">{{ s.prompt }}</td>
{% for who, a in (("before", s.before), ("after", s.after)) %}<td data-who="{{ who }}">{% if a %}
{{ answer(a.text, verdicts(a), a.hollow) }}{% endif %}</td>
{% endfor %}</tr>{% endfor %}
</table>{% endif %}
<details><summary>Data, configuration, environment</summary>
<h2>Data</h2><table>{% for file, report in data.items() %}{% for name, value in report.items() %}
<tr><td>{{ file }}: {{ name }}</td><td>{{ value | string | truncate(2000) }}</td></tr>
{% endfor %}{% endfor %}</table>
<h2>Configuration</h2><pre>{{ config }}</pre>
<h2>Environment</h2><pre>{{ environment }}</pre></details>
""")


def write_report(run: Path) -> Path:
    """RUN/report.html, from the files that the run wrote."""
    train, heldout = read_metrics(run, "train"), read_metrics(run, "heldout")
    numbers = dict(_first_and_last("heldout", heldout) + _first_and_last("train", train))
    samples = run / "samples.jsonl"
    text = PAGE.render(
        title=run.name,
        steps=train[-1]["step"] if train else 0,
        seconds=_seconds(train),
        main=[(name, numbers[name]) for name in MAIN if name in numbers],
        rest=[(name, cells) for name, cells in numbers.items() if name not in MAIN],
        curves=embedded(plot_curves(run)),
        verdicts=lambda answer: [(c["text"], c["follows"]) for c in answer["constraints"]],
        samples=read_records(samples) if samples.exists() else [],
        data=json.loads(text_of(run / "data.json") or "{}"),
        config=text_of(run / "config.yaml"),
        environment=text_of(run / "environment.json"),
    )
    path = run / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def write_summary(run: Path) -> None:
    """RUN/summary.json: steps, metric, seconds in them, the last training row, held-out ones.

    metric is the last held-out group accuracy, which sweeps compare; null without held-out quads.
    """
    train, heldout = read_metrics(run, "train"), read_metrics(run, "heldout")
    summary = {
        "steps": train[-1]["step"] if train else 0,
        "metric": heldout[-1]["group_accuracy"] if heldout else None,
        "seconds": round(_seconds(train), 3),
        "train": train[-1] if train else None,
        "heldout": [heldout[0], heldout[-1]] if heldout else None,
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def text_of(path: Path) -> str:
    """The text of a file; empty if there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _seconds(train: list[dict[str, Any]]) -> float:
    """Of all optimizer steps, from the mean of those that were logged."""
    logged = [row["step_s"] for row in train if "step_s" in row]
    return sum(logged) / len(logged) * train[-1]["step"] if logged else 0.0


def _first_and_last(split: str, rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """First and last value of every number of a split."""
    names = [name for name in (rows[-1] if rows else {}) if name not in ("step", "split")]
    ends = (rows[0], rows[-1]) if rows else ()
    return [(f"{split}: {n}", [f"{row[n]:.4g}" if n in row else "" for row in ends]) for n in names]
