"""`make demo`: SFT, then IOPO, on a real small model, and what that did to its answers.

Runs `train.py` twice as a user would, scores the base model and both stages on held-out quads, and
writes summary.json and report.html. A stage that is already complete is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
HELDOUT = REPOSITORY / "data" / "demo" / "heldout.jsonl"
# What fits into twenty minutes of two cores without a matrix unit (AVX2, float32): 192 of 1600 rows
# for SFT and 112 of 800 quads for IOPO, in small steps, and few quads and samples while training.
SMALL = ("optim.global_batch_quads=8", "evaluation.quads=8", "evaluation.samples=2")
SFT = ("optim.max_steps=24", *SMALL)
IOPO = ("data.limit_rows=112", "optim.lr=3e-5", *SMALL)
ANSWERED, SCORED = 80, 40  # held-out quads of 230, spread over the kinds: by answers, by log-prob
STAGES = ("base", "sft", "trained")
MEASURES = {
    "group_accuracy": "group accuracy",
    "x_preference": "x-preference",
    "y_preference": "y-preference",
    "constraint_accuracy": "follows all constraints",
    "constraint_accuracy_seen": "  seen kinds and values",
    "constraint_accuracy_unseen_params": "  unseen values",
    "constraint_accuracy_unseen_kinds": "  unseen kinds",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo in one folder and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo")
    args = parser.parse_args(arguments)
    started = time.time()
    memory = PeakMemory()
    call("-c", "from iopo.model.load import resolve_model; resolve_model('demo')")
    train(args.run / "sft", "smollm2_135m_sft", *SFT)
    train(args.run / "iopo", "smollm2_135m_iopo", f"model.path={args.run}/sft/export", *IOPO)
    summary, answers = score(args.run)
    # of this call: a stage that was complete before it took no time in it
    summary["seconds"] = round(time.time() - started, 1)
    summary["peak_rss_gb"] = round(memory.stop(), 2)
    (args.run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_page(args.run, summary, answers)
    print_table(summary)
    print(f"{args.run}/summary.json, {args.run}/report.html, {args.run}/iopo/report.html (curves)")


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
    rows = quads.read(HELDOUT, ANSWERED)
    folders = (resolve_model("demo"), run / "sft/export", run / "iopo/export")
    summary: dict[str, Any] = {}
    answers: dict[str, list[Any]] = {}
    for stage, path in zip(STAGES, folders, strict=True):
        print(f"scoring {stage} on {len(rows)} held-out quads", flush=True)
        config = EvaluateConfig(
            BenchmarkSection("quads", scored=SCORED, controls=stage == STAGES[-1]),
            model=ModelSection(str(path), device="cpu"),
            generate=GenerateSection(max_new_tokens=128, batch_size=len(rows)),
        )
        summary[stage], answers[stage] = quads.score_model(config, rows)
    summary["gain"] = {
        stage: heldout.following_gain(answers["base"], answers[stage]) for stage in STAGES[1:]
    }
    summary["gain"]["iopo_over_sft"] = heldout.following_gain(answers["sft"], answers["trained"])
    return summary, answers


def print_table(summary: dict[str, Any]) -> None:
    """The three stages side by side, per cent with 95% intervals, then the paired gains."""
    table = Table(title="Held-out tasks, % [95% interval]", title_justify="left")
    table.add_column("measure")
    for stage in STAGES:
        table.add_column(stage, justify="right")
    table.add_column("n", justify="right")
    for key, label in MEASURES.items():
        cells = [summary[stage].get(key) for stage in STAGES]
        if all(cells):
            table.add_row(label, *[percent(cell) for cell in cells], str(cells[0]["n"]))
    for control, cell in summary[STAGES[-1]]["controls"].items():
        label = f"control: group accuracy, {control.replace('_', ' ')}"
        table.add_row(label, "", "", percent(cell), str(cell["n"]))
    Console(width=110).print(table)
    gains = summary["gain"]
    for label, key in (("SFT over base", "sft"), ("IOPO over base", "trained"),
                       ("IOPO over SFT", "iopo_over_sft")):  # fmt: skip
        print(f"following, {label}: {percent(gains[key], sign='+')} points (paired, by quad)")
    print(f"this call: {summary['seconds']:.0f} s, peak memory {summary['peak_rss_gb']:.1f} GB")


def percent(cell: dict[str, Any], sign: str = "") -> str:
    """`81.3 [76.0, 85.6]` from {"value": 0.813, ...}."""
    value, low, high = (100 * cell[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


class PeakMemory:
    """The most memory this process and its descendants held together, sampled every second.

    Anonymous pages of all, and the file pages (libraries, which they share) of the largest.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while self.running:
            held = [_resident(pid) for pid in _descendants(os.getpid())]
            total = sum(anonymous for anonymous, _ in held) + max(files for _, files in held)
            self.peak = max(self.peak, total)
            time.sleep(1.0)

    def stop(self) -> float:
        """Peak in GB (10^9 bytes)."""
        self.running = False
        self.thread.join()
        return self.peak / 1e9


def _descendants(pid: int) -> list[int]:
    out = [pid]
    for parent in out:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                out += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it ended while we looked
            continue
    return out


def _resident(pid: int) -> tuple[int, int]:
    """Bytes of anonymous and of file-backed memory; (0, 0) for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {name: 1024 * int(rest.split()[0]) for name, rest in
             (line.split(":") for line in lines if line.startswith("Rss"))}  # fmt: skip
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("RssFile", 0)


PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>IOPO demo</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { border: 1px solid #ddd; padding: .35rem .6rem; text-align: left; vertical-align: top }
.answer { white-space: pre-wrap } .ok { color: #17703c } .no { color: #a02020 }
</style></head><body><h1>IOPO on SmolLM2-135M-Instruct</h1>
<p>Held-out tasks; per cent with 95% intervals. {{ seconds }} s, peak memory {{ memory }} GB.
Curves: <a href="sft/report.html">SFT</a>, <a href="iopo/report.html">IOPO</a>.</p>
<table><tr><th>measure</th>{% for s in stages %}<th>{{ s }}</th>{% endfor %}</tr>
{% for label, cells in rows %}<tr><td>{{ label }}</td>
{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<h2>Answers to held-out prompts</h2><table><tr><th>prompt</th>
{% for s in stages %}<th>{{ s }}</th>{% endfor %}</tr>
{% for group in samples %}<tr><td class="answer">{{ group[0].prompt }}</td>
{% for a in group %}<td><div class="answer">{{ a.text }}</div>
{% for text, ok in zip(a.texts, a.follows) %}<div class="{{ 'ok' if ok else 'no' }}">
{{ '✓' if ok else '✗' }} {{ text }}</div>{% endfor %}</td>{% endfor %}</tr>{% endfor %}
</table></body></html>
""")


def write_page(run: Path, summary: dict[str, Any], answers: dict[str, list[Any]]) -> None:
    """report.html: the table and 24 prompts, evenly spread, with the three stages' answers."""
    rows = [
        (label, [percent(summary[stage][key]) for stage in STAGES])
        for key, label in MEASURES.items()
        if key in summary["base"]
    ]
    step = max(1, len(answers["base"]) // 24)
    samples = list(zip(*(answers[stage][::step] for stage in STAGES), strict=True))
    page = PAGE.render(
        stages=STAGES, rows=rows, samples=samples, zip=zip,
        seconds=summary["seconds"], memory=summary["peak_rss_gb"],
    )  # fmt: skip
    (run / "report.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
