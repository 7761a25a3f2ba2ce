"""The figure of README: what each step from SFT on adds, with 95 % intervals.

`python -m iopo.experiments.paper_table.gains COMPARISON.json ROUNDS.json OUT.png`: the JSON files
are those that table.py writes for the sweeps paper_table and rounds.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from iopo.experiments.paper_table.table import METRICS, NAMES, panel
from iopo.stats import Estimate

Results = Mapping[str, Any]
SHOWN = ("following_answering", "follows_and_answers")


def steps(comparison: Results, rounds: Results) -> dict[str, dict[str, Estimate]]:
    """What each step adds to the one before, by metric, from the top; each of all seeds that its
    two methods share."""
    to_start = comparison["differences"]["SFT"]
    to_sft, to_rows = (comparison["differences"][NAMES[n]] for n in ("sft", "output_preference"))
    to_own = rounds["differences"][NAMES["iopo_rounds"]]
    return {
        "more SFT: as many steps,\nnot none": to_start[NAMES["sft"]],
        "preference: DPO on pairs,\nnot SFT alone": to_sft[NAMES["dpo"]],
        "data: both rows of quads,\nnot pairs": _reversed(to_rows[NAMES["dpo"]]),
        "loss: IOPO,\nnot DPO on both rows": to_rows[NAMES["iopo"]],
        "rounds: IOPO in rounds,\nnot one pass": _reversed(to_own[NAMES["iopo_offline"]]),
        "reward: GRPO in rounds,\nnot IOPO in rounds": to_own[NAMES["grpo_rounds"]],
    }


def _reversed(differences: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """b - a from a - b."""
    return {
        metric: {"value": -of["value"], "low": -of["high"], "high": -of["low"], "n": of["n"]}
        for metric, of in differences.items()
    }


def draw(found: Mapping[str, Mapping[str, Estimate]], path: Path) -> None:
    """One panel a metric, one line a step."""
    metrics = [m for m in SHOWN if any(m in of for of in found.values())]
    figure = Figure(figsize=(1.5 + 3.2 * len(metrics), 3.0), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        panel(axes, metric, found, METRICS[metric][0].replace(", %", ", points"))
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    comparison, rounds, out = map(Path, arguments)
    try:
        draw(steps(*(json.loads(path.read_text("utf-8")) for path in (comparison, rounds))), out)
    except (KeyError, ValueError, OSError) as error:
        print(f"refused: {error!r}: expected the JSON files of both sweeps", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
