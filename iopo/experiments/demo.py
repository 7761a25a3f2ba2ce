"""`make demo`: SFT, then IOPO, on a real small model, and what that did to its answers.

Runs `train.py` twice as a user would, scores the base model and both stages on held-out quads, and
writes summary.json, answers.jsonl and report.html. A stage that is complete is not run again.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iopo.files import write_records
from iopo.page import page
from iopo.progress import show_messages
from iopo.stats import shown

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "data" / "verified"
# What fits into twenty minutes of two cores without a matrix unit (AVX2, float32): 160 of 3400 rows
# for SFT and 96 of 1700 quads for IOPO, in small steps, and few quads and samples while training.
SMALL = ("optim.global_batch_quads=8", "evaluation.quads=8", "evaluation.samples=2")
SFT = ("optim.max_steps=20", *SMALL)
IOPO = ("data.limit_rows=96", *SMALL)
# Held-out quads. No task is one of training's; "unseen_kinds" asks for kinds of constraints that
# are not in the training set either.
HELD_OUT = {"seen": "heldout.jsonl", "unseen_kinds": "heldout_kinds.jsonl"}
SCORED = 40  # of the test's by log-prob too
SHOWN = 24  # prompts on the page
STAGES = {"base": "base", "sft": "SFT", "trained": "IOPO"}  # in summary.json, and for people
LAST = "trained"
MEASURES = {
    "follows_and_answers": "follows all and answers",
    "follows_and_answers_seen": "  kinds seen in training",
    "follows_and_answers_unseen_kinds": "  kinds not seen in training",
    "constraint_accuracy": "follows all constraints",
    "answers": "answers",
    "group_accuracy": "group accuracy",
    "x_preference": "x-preference",
    "y_preference": "y-preference",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo in one folder and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo")
    args = parser.parse_args(arguments)
    started = time.time()
    call("-c", "from iopo.experiments.demo import fetch; fetch()")
    train(args.run / "sft", "smollm2_135m_sft", *SFT)
    train(args.run / "iopo", "smollm2_135m_iopo", f"model.path={args.run}/sft/export", *IOPO)
    show_messages(sys.stdout)
    summary, answers = score(args.run)
    # of this call: a stage that was complete before it took no time in it
    summary["seconds"] = round(time.time() - started, 1)
    # of the largest process: this one, or one that it or train.py waited for
    peaks = [
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    summary["peak_rss_gb"] = round(max(peaks) * 1024 / 1e9, 2)
    (args.run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    rows = [{"stage": stage} | asdict(a) for stage in STAGES for a in answers[stage]]
    write_records(args.run / "answers.jsonl", rows)
    write_page(args.run, summary, answers)
    print_table(summary)
    print(f"{args.run}: summary.json, answers.jsonl, report.html, iopo/report.html (curves)")


def fetch() -> None:
    """Download and convert the demo model, unless it is in the cache."""
    from iopo.model.load import resolve_model

    show_messages(sys.stdout)
    resolve_model("demo")


def call(*arguments: str) -> None:
    """A Python process of its own, whose memory is gone when it ends; exits with its code."""
    code = subprocess.run([sys.executable, *arguments], check=False).returncode
    if code != 0:
        sys.exit(code)


def train(run: Path, experiment: str, *overrides: str) -> None:
    """One stage through train.py, in a process of its own; exits with its code if it fails."""
    if (run / "COMPLETE").exists():
        print(f"{run} is complete; delete it to train again", flush=True)
        return
    command = ["train.py", f"+experiment={experiment}", f"run={run.absolute()}", *overrides]
    print("$ python " + " ".join(command), flush=True)
    call(str(REPOSITORY / command[0]), *command[1:])


def halves() -> tuple[list[Any], list[Any]]:
    """The test and the validation rows, (quad, key of HELD_OUT): every other task is in each.

    The options above were chosen on the validation rows (docs/reproduction.md).
    """
    from iopo.evaluation.benchmarks import quads
    from iopo.evaluation.quad_metrics import bare

    rows = [(q, split) for split, name in HELD_OUT.items() for q, _ in quads.read(DATA / name)]
    validation = set(sorted({bare(quad.x1) for quad, _ in rows})[1::2])
    parts: tuple[list[Any], list[Any]] = ([], [])
    for row in rows:
        parts[bare(row[0].x1) in validation].append(row)
    return parts


def score(run: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The three models on the same held-out quads: summary by stage with gains, and all answers."""
    # torch loads only now, so that this process holds next to nothing while the stages train
    from iopo.evaluation import quad_metrics as heldout
    from iopo.evaluation.benchmarks import quads
    from iopo.evaluation.config import (
        BenchmarkSection,
        EvaluateConfig,
        GenerateSection,
        ModelSection,
    )
    from iopo.model.host_memory import tune_malloc
    from iopo.model.load import resolve_model

    tune_malloc()
    rows, _ = halves()
    folders = (resolve_model("demo"), run / "sft/export", run / "iopo/export")
    summary: dict[str, Any] = {}
    answers: dict[str, list[Any]] = {}
    for stage, path in zip(STAGES, folders, strict=True):
        print(f"scoring {stage} on {len(rows)} held-out quads", flush=True)
        config = EvaluateConfig(
            BenchmarkSection("quads", scored=SCORED, base="demo", controls=stage == LAST),
            model=ModelSection(str(path)),
            generate=GenerateSection(max_new_tokens=128, batch_size=len(rows)),
        )
        summary[stage], answers[stage] = quads.score_model(config, rows)
    summary["gain"] = {
        stage: heldout.gain(answers["base"], answers[stage]) for stage in list(STAGES)[1:]
    }
    summary["gain"]["iopo_over_sft"] = heldout.gain(answers["sft"], answers["trained"])
    return summary, answers


def table_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """(measure, one cell a stage, number of quads or answers)."""
    rows = [
        (label, *(shown(summary[stage][key]) for stage in STAGES), str(summary["base"][key]["n"]))
        for key, label in MEASURES.items()
    ]
    for name, cell in summary[LAST]["controls"].items():
        label = f"control: group accuracy, {name.replace('_', ' ')}"
        rows.append((label, "", "", shown(cell), str(cell["n"])))
    return rows


def gain_lines(summary: dict[str, Any]) -> list[str]:
    """Differences of the stages, in points with intervals."""
    pairs = {"SFT over base": "sft", "IOPO over base": LAST, "IOPO over SFT": "iopo_over_sft"}
    return [
        f"{label}, points, paired by quad: "
        + ", ".join(f"{MEASURES[m]} {shown(g, sign='+')}" for m, g in summary["gain"][key].items())
        for label, key in pairs.items()
    ]


def print_table(summary: dict[str, Any]) -> None:
    """The three stages side by side, per cent with 95% intervals, then the paired gains."""
    table = Table("measure", title="Held-out tasks, % [95% interval]", title_justify="left")
    for name in (*STAGES.values(), "n"):
        table.add_column(name, justify="right")
    for row in table_rows(summary):
        table.add_row(*row)
    Console(width=110).print(table)
    for line in gain_lines(summary):
        print(line)
    print(f"this call: {summary['seconds']:.0f} s, largest process {summary['peak_rss_gb']:.1f} GB")


PAGE = page("""
<p><b>Of the trained model's answers to held-out prompts, {{ trained }} % follow all constraints and
answer; of the base model's, {{ base }} %.</b></p>
<p>Held-out tasks; per cent with 95% intervals. {{ seconds }} s, largest process {{ memory }} GB.
Curves: <a href="sft/report.html">SFT</a>, <a href="iopo/report.html">IOPO</a>.</p>
{% macro numbers(rows) %}
<table><tr><th>measure</th>{% for s in stages %}<th>{{ s }}</th>{% endfor %}<th>n</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
{% endmacro %}
{{ numbers(rows[:5]) }}
{% for line in gains %}<p>{{ line }}</p>{% endfor %}
<details><summary>By log-prob</summary>{{ numbers(rows[5:]) }}</details>
<h2>Answers to held-out prompts</h2>
<p>Drawn by seed: {{ shown[0] }} of the {{ of[0] }} answers that follow all constraints and answer
after training, {{ shown[1] }} of the other {{ of[1] }}.</p>
<table class="answers"><tr><th>prompt</th>{% for s in stages %}<th>{{ s }}</th>{% endfor %}</tr>
{% for group in samples %}<tr><td class="answer">{{ group[0].prompt }}</td>
{% for s, a in zip(stages, group) %}
<td data-who="{{ s }}">{{ answer(a.text, zip(a.texts, a.follows), a.hollow) }}</td>
{% endfor %}</tr>{% endfor %}
</table>""")


def write_page(run: Path, summary: dict[str, Any], answers: dict[str, list[Any]]) -> None:
    """report.html: the table and SHOWN prompts with the three stages' answers, half of them won."""
    groups = list(zip(*(answers[stage] for stage in STAGES), strict=True))
    wins, others = (
        [g for g in groups if g[-1].follows_and_answers == won] for won in (True, False)
    )
    rng = random.Random(0)
    drawn = [rng.sample(some, min(SHOWN // 2, len(some))) for some in (wins, others)]
    base, trained = (shown(summary[stage]["follows_and_answers"]) for stage in ("base", "trained"))
    text = PAGE.render(
        title="IOPO on SmolLM2-135M-Instruct", base=base, trained=trained, stages=STAGES.values(),
        rows=table_rows(summary), gains=gain_lines(summary), zip=zip,
        samples=rng.sample(sum(drawn, []), sum(map(len, drawn))),
        shown=list(map(len, drawn)), of=(len(wins), len(others)), seconds=summary["seconds"],
        memory=summary["peak_rss_gb"],
    )  # fmt: skip
    (run / "report.html").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
