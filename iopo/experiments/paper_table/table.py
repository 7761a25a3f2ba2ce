"""Tables and pictures of the comparison, from run folders alone.

`python -m iopo.experiments.paper_table.table RUN [SWEEP [FILE ...]]` writes RUN/SWEEP.md, .json and
.png, and RUN/SWEEP_measures.jsonl.gz, which holds all measures by item: give that of another
sitting as FILE, and the tables are of both. Whether a difference is a gain is printed by code: only
where its interval excludes zero.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iopo import stats
from iopo.evaluation.benchmarks.ifeval import CHANGES
from iopo.evaluation.items import Measures
from iopo.experiments.paper_table.measures import (
    COUSINS,
    HIGH,
    IFEVAL,
    LOW,
    pooled,
    read_sittings,
    sitting,
    write_sittings,
)
from iopo.progress import progress, show_messages
from iopo.stats import Difference, Estimate, Scores

# name -> (label, factor for printing, 1 or -1 where more is better or worse, 0: neither)
METRICS = {
    "following_answering": ("follows all and answers, %", 100, 1),
    "following_answering/seen": ("- kinds and values in the training file, %", 100, 1),
    "following_answering/unseen_params": ("- values not seen, %", 100, 1),
    "following_answering/unseen_kinds": ("- kinds not seen, %", 100, 1),
    "following": ("follows all constraints, %", 100, 1),
    "answering": ("answers, %", 100, 1),
    "constraints": ("constraints followed, %", 100, 1),
    "follows_and_answers": ("IFEval follows all and answers, %", 100, 1),
    "prompt_strict": ("IFEval prompt strict, %", 100, 1),
    "prompt_loose": ("IFEval prompt loose, %", 100, 1),
    "instruction_strict": ("IFEval instruction strict, %", 100, 1),
    "instruction_loose": ("IFEval instruction loose, %", 100, 1),
    "answers": ("IFEval answers that answer, %", 100, 1),
    "before_cousins": ("IFEval prompts right before their cousins, %", 100, 1),
    "reliable": ("IFEval prompts right with all cousins, %", 100, 1),
    "drop": ("right IFEval prompts that some cousin loses, %", 100, -1),
    **{f"drop/{change}": (f"- that one {change} loses, %", 100, -1) for change in CHANGES},
    "drop_strict": ("followed IFEval prompts that some cousin loses, %", 100, -1),
    LOW: ("follows all and answers, of quads with an output margin below 0, %", 100, 1),
    HIGH: ("follows all and answers, of the other quads, %", 100, 1),
    "group_accuracy": ("group accuracy, %", 100, 1),
    "x_preference": ("x-preference, %", 100, 1),
    "y_preference": ("y-preference, %", 100, 1),
    "one_margin_negative": ("quads with one output margin below 0, %", 100, 0),
    "smaller_margin": ("smaller output margin of a quad, nats", 1, 1),
    "larger_margin": ("larger output margin of a quad, nats", 1, 0),
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
    "Following and answering, on held-out tasks": [
        m for m in METRICS
        if m.startswith(("following", "answering", "constraints")) and m not in (LOW, HIGH)
    ],
    "IFEval": list(IFEVAL),
    "IFEval's prompts with their cousins": list(COUSINS),
    "Preferences, by log-prob": ["group_accuracy", "x_preference", "y_preference",
                                 "one_margin_negative", "smaller_margin", "larger_margin", LOW,
                                 HIGH],
    "Drift": ["logratio_matched", "logratio_mismatched", "as_sft", "words", "empty", "cut_off",
              "repetitive", "plain_text"],
}  # fmt: skip
NAMES = {
    "sft": "SFT, continued", "dpo": "DPO", "output_preference": "DPO on both rows",
    "input_preference": "input preference", "iopo_three": "IOPO, three members (Eq. 11)",
    "iopo": "IOPO", "simpo": "SimPO", "orpo": "ORPO", "iopo_offline": "IOPO, one pass",
    "iopo_rounds": "IOPO, rounds", "dpo_rounds": "DPO, best against worst, rounds",
    "grpo_rounds": "GRPO, rounds",
}  # fmt: skip
DRAWN = ("following_answering", "following_answering/unseen_kinds", "following", "answering",
         "follows_and_answers", "group_accuracy", "x_preference", "y_preference",
         "logratio_matched", "words", "repetitive", "plain_text")  # fmt: skip
COLOURS = {"gain": "#2b5c8a", "loss": "#9c3d54"}
GREY = "#7f8c8d"  # neither, or the interval holds zero
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows
Estimates = Mapping[str, Mapping[str, Estimate]]  # method -> metric -> estimate
Differences = Mapping[str, Mapping[str, Difference]]


def write(run: Path, sweep: str, earlier: Sequence[Path] = ()) -> list[str]:
    """All files of a sweep; returns the lines of the difference tables, for a terminal.

    earlier: kept measures of other sittings. Raises ValueError if the SFT checkpoint has not been
    measured.
    """
    sittings = [one for path in earlier for one in read_sittings(path)]
    own = sitting(run, sweep)
    if own is None:
        raise ValueError(f"{run}: the SFT checkpoint was not measured; nothing to compare with")
    sittings.append(own)
    write_sittings(run / f"{sweep}_measures.jsonl.gz", sittings)
    runs = pooled(sittings)
    runs = {name: runs[name] for name in ("base", "SFT", *NAMES) if name in runs} | runs
    found, starts = (
        {name: _scored({seed: known[of] for seed, known in seeds.items()})
         for name, seeds in runs.items()}
        for of in ("measures", "start")
    )  # fmt: skip
    values = {
        _name(m): {k: stats.estimate(s, share=METRICS[k][1] == 100) for k, s in of.items()}
        for m, of in found.items()
    }
    others = [name for name in found if name not in ("base", "SFT")]
    # each seed minus the checkpoint that it started from
    differences = {"SFT": {_name(m): _differences(starts[m], found[m]) for m in others}}
    bases = {"rounds": ("iopo_rounds",), "paper_table": ("sft", "output_preference")}
    for base in bases.get(sweep, ("iopo",)):
        if base in found:
            differences[_name(base)] = {
                _name(m): _differences(found[base], found[m]) for m in others if m != base
            }
    questions = {name: of for name, of in _questions(found).items() if of}
    against = [
        *(_differences_table(f"Minus {base}, paired by task and seed", rows)
          for base, rows in differences.items()),
        *(_differences_table(name, of) for name, of in questions.items()),
    ]  # fmt: skip
    tables = [_values(title, metrics, found, values) for title, metrics in SECTIONS.items()]
    tables = [table for table in (*tables, _costs(runs), *against) if table[2]]
    head = list(dict.fromkeys(line for one in sittings for line in one["head"]))
    picture = f"{sweep}_differences.png"
    _draw(differences, run / picture)
    text = [f"# The paper's comparison in small: {sweep}", "", *(f"- {line}" for line in head)]
    text += [*map(_markdown, tables), f"\n![differences]({picture})"]
    (run / f"{sweep}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    content = {"values": values, "differences": differences, "questions": questions,
               "provenance": head}  # fmt: skip
    (run / f"{sweep}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [*map(_markdown, against), f"written: {run}/{sweep}.md, {sweep}.json, {picture}"]


def _scored(by_seed: dict[int | None, Measures]) -> dict[str, Scores]:
    scored = {metric: stats.scores(metric, by_seed) for metric in METRICS}
    return {metric: of for metric, of in scored.items() if of is not None}


PARTS = "Where the gain over DPO comes from, by the seeds of all three"
REGIMES = "IOPO - DPO on both rows, changed alike"
TWICE = "IOPO - DPO on both rows at twice its beta: one loss where a quad's margins are equal"


def _questions(found: Mapping[str, dict[str, Scores]]) -> dict[str, dict[str, Any]]:
    """Title -> column -> differences, of methods that answer a question together."""
    whole, data, loss = ("IOPO - DPO", "of which data: DPO on both rows - DPO",
                         "of which loss: IOPO - DPO on both rows")  # fmt: skip
    parts: dict[str, dict[str, Difference]] = {}
    three = [found[name] for name in ("dpo", "output_preference", "iopo") if name in found]
    if len(three) == 3:
        parts = {name: {} for name in (whole, data, loss)}
        for metric in (m for m in METRICS if METRICS[m][2] == 1):
            if shared := _shared(metric, *three):
                dpo, rows, iopo = shared
                parts[whole][metric] = stats.difference(dpo, iopo)
                parts[data][metric] = stats.difference(dpo, rows)
                parts[loss][metric] = stats.difference(rows, iopo)
    regimes = {}
    for name in found:
        regime = name.removeprefix("output_preference")
        if regime != name and "iopo" + regime in found:
            regimes[_changes(regime.removeprefix("-")) or "main table"] = _differences(
                found[name], found["iopo" + regime]
            )
    twice = {}
    for name in found:
        of = re.fullmatch(r"output_preference(.*beta-)([\d.]+)(.*)", name)
        if of is not None and (half := f"iopo{of[1]}{float(of[2]) / 2:g}{of[3]}") in found:
            twice[_name(half)] = _differences(found[name], found[half])
    return {PARTS: parts, REGIMES: regimes if len(regimes) > 1 else {}, TWICE: twice}


def _shared(metric: str, *methods: dict[str, Scores]) -> list[Scores]:
    """Its scores of all methods, on the seeds that they share (a model without seeds goes with
    any); none if one lacks it, or if they share no seed: sittings add one method after the other.
    """
    if metric in (LOW, HIGH) or not all(metric in of for of in methods):
        return []
    scores = [of[metric] for of in methods]
    sets = [set(one.seeds) for one in scores if one.seeds]
    seeds = sorted(set[int].intersection(*sets)) if sets else []
    return [] if sets and not seeds else [s.of_seeds(seeds) if s.seeds else s for s in scores]


def _differences(a: dict[str, Scores], b: dict[str, Scores]) -> dict[str, Difference]:
    return {m: stats.difference(*two) for m in a if (two := _shared(m, a, b))}


def _values(
    title: str, metrics: list[str], found: dict[str, dict[str, Scores]], values: Estimates
) -> Table:
    metrics = [m for m in metrics if any(m in of for of in found.values())]
    head = ["method", "seeds", *(METRICS[metric][0] for metric in metrics)]
    rows = []
    for name, of in found.items():
        seeds = next((of[m].seeds for m in metrics if m in of), ())
        cells = [_number(values[_name(name)][m], m) if m in of else "" for m in metrics]
        rows.append([_name(name), str(len(seeds) or "-"), *cells])
    return f"{title} [95 % interval]", head, rows if metrics else []


def _costs(runs: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> Table:
    head = ["method", "steps", "tokens of members seen", "seconds", "peak GB of a process",
            "gradient norm, first third of the steps", "second", "last"]  # fmt: skip
    rows = []
    for name, seeds in runs.items():
        spent = [known["cost"] for known in seeds.values() if known["cost"]]
        if spent:
            mean = {key: sum(one[key] for one in spent) / len(spent) for key in spent[0]}
            norms = [f"{mean[key]:.2f}" for key in mean if key.startswith("grad_norm")]
            rows.append([
                _name(name), f"{mean['steps']:.0f}", f"{mean['tokens']:,.0f}",
                f"{mean['seconds']:.0f}", f"{mean['peak_rss_gb']:.1f}", *norms,
            ])  # fmt: skip
    return "Training, mean over seeds (seconds: loading and export included)", head, rows


def _differences_table(
    title: str, columns: Differences, metrics: Sequence[str] = tuple(METRICS)
) -> Table:
    """One row a metric: the paired differences, what may be said of them, and whether that holds
    when all comparisons of the table are taken together."""
    metrics = [m for m in metrics if any(m in of for of in columns.values())]
    compared = [(m, name) for m in metrics for name, of in columns.items() if m in of]
    corrected = stats.holm([columns[name][m]["p"] for m, name in compared])
    holds = {cell for cell, p in zip(compared, corrected, strict=True) if p < 0.05}
    cells = [
        [METRICS[m][0]] + [
            _difference(of[m], m) + ("†" if (m, name) in holds else "") if m in of else ""
            for name, of in columns.items()
        ]
        for m in metrics
    ]  # fmt: skip
    title += f" (†: also after Holm's correction for {len(compared)} comparisons)"
    return title, ["", *columns], cells


def _name(folder: str) -> str:
    """IOPO beta=0.5, of the folder iopo-objective.beta-0.5."""
    method, _, changes = folder.partition("-")
    return f"{NAMES.get(method, method)} {_changes(changes)}".rstrip()


def _changes(of_folder: str) -> str:
    return re.sub(r"(^|-)\w+\.(\w+)-", r" \2=", of_folder).strip().removesuffix(".jsonl")


def _number(found: Estimate, metric: str, sign: str = "") -> str:
    factor = METRICS[metric][1]
    return stats.shown(found, factor, 1 if factor == 100 else 2, sign)


def _difference(found: Estimate, metric: str) -> str:
    return f"{_number(found, metric, '+')} {stats.word(found, METRICS[metric][2])}"


def _markdown(table: Table) -> str:
    title, head, rows = table
    lines = [f"\n## {title}\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _draw(against: Mapping[str, Estimates], path: Path) -> None:
    """One panel for each baseline and metric."""
    panels = [
        (base, metric, rows) for base, rows in against.items()
        for metric in DRAWN if any(metric in of for of in rows.values())
    ]  # fmt: skip
    height, lines = -(-len(panels) // 4), max(map(len, against.values()))
    figure = Figure(figsize=(15, height * (1.1 + 0.22 * lines)), layout="constrained")
    grid = list(figure.subplots(height, 4, squeeze=False).flat)
    for axes, (base, metric, rows) in zip(grid, panels, strict=False):
        panel(axes, metric, rows, f"{METRICS[metric][0]}\nminus {base}")
    for unused in grid[len(panels) :]:
        unused.set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def panel(axes: Axes, metric: str, rows: Estimates, title: str) -> None:
    """One line a row: difference and 95 % interval, coloured where it is a gain or a loss."""
    _, factor, better = METRICS[metric]
    for place, of in enumerate(rows.values()):
        if metric in of:
            colour = COLOURS.get(stats.word(of[metric], better), GREY)
            ends = [factor * of[metric]["low"], factor * of[metric]["high"]]
            axes.plot(ends, [place, place], color=colour)
            axes.plot(factor * of[metric]["value"], place, "o", color=colour, markersize=4)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_title(title, fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    """Write the tables of a run folder; returns the exit code."""
    run, sweep, *earlier = arguments if len(arguments) > 1 else (*arguments, "paper_table")
    show_messages(sys.stderr)
    try:
        with progress(None, "intervals of all tables"):
            lines = write(Path(run), sweep, [Path(path) for path in earlier])
    except (ValueError, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m iopo.experiments.paper_table.table RUN [SWEEP [FILE ...]]")
    sys.exit(main(sys.argv[1:]))
