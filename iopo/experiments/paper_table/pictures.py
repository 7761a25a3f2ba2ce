"""The comparison as two pictures: values by method, and differences against the baselines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from iopo.stats import Estimate, word

Metrics = Mapping[str, tuple[str, float, int]]  # name -> label, factor, better
Rows = Mapping[str, Mapping[str, Estimate]]  # method -> metric -> estimate
SHOWN = ("following", "following/seen", "following/unseen_params", "following/unseen_kinds",
         "prompt_strict", "group_accuracy", "x_preference", "y_preference",
         "logratio_matched", "words", "repetitive", "plain_text")  # fmt: skip
COLOUR = {"gain": "#2b5c8a", "loss": "#9c3d54"}  # everything else is grey
GREY = "#7f8c8d"


def draw_values(rows: Rows, metrics: Metrics, path: Path) -> None:
    """One panel a metric, one line a method: value and 95% interval."""
    shown = [m for m in SHOWN if any(m in of for of in rows.values())]
    figure, panels = _panels(len(shown), len(rows))
    for axes, metric in zip(panels, shown, strict=False):
        label, factor, _ = metrics[metric]
        for place, of in enumerate(rows.values()):
            if metric in of:
                _interval(axes, place, of[metric], factor, COLOUR["gain"])
        axes.set_title(label, fontsize=9)
        _names(axes, list(rows))
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_differences(against: Mapping[str, Rows], metrics: Metrics, path: Path) -> None:
    """One row of panels a baseline: differences with intervals; grey where they hold zero."""
    pairs = [
        (base, m) for base, rows in against.items()
        for m in SHOWN if any(m in of for of in rows.values())
    ]  # fmt: skip
    figure, panels = _panels(len(pairs), max(map(len, against.values()), default=1))
    for axes, (base, metric) in zip(panels, pairs, strict=False):
        label, factor, better = metrics[metric]
        for place, of in enumerate(against[base].values()):
            if metric in of:
                colour = COLOUR.get(word(of[metric], better), GREY)
                _interval(axes, place, of[metric], factor, colour)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.set_title(f"{label}\nminus {base}", fontsize=9)
        _names(axes, list(against[base]))
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _panels(count: int, lines: int) -> tuple[Figure, list[Any]]:
    height = -(-count // 4)
    figure = Figure(figsize=(15, height * (1.1 + 0.22 * lines)), layout="constrained")
    axes = list(figure.subplots(height, 4, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes


def _interval(axes: Any, place: int, found: Estimate, factor: float, colour: str) -> None:
    axes.plot([factor * found["low"], factor * found["high"]], [place, place], color=colour)
    axes.plot(factor * found["value"], place, "o", color=colour, markersize=4)


def _names(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
