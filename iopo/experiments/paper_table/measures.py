"""What the comparison knows of a run: measures by unit, costs and provenance, from its folder.

A comparison too long for one sitting is made of several, each a run folder of its own: its seeds
with the SFT checkpoint that they started from, on one machine. What the tables need of a sitting
is kept in one small file, and tables are drawn from any number of them.
"""

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from iopo.constraints.text import repeats
from iopo.evaluation import scoring
from iopo.evaluation.benchmarks.ifeval import CHANGES
from iopo.evaluation.items import Measures
from iopo.evaluation.quad_metrics import Answer
from iopo.experiments.paper_table.data import task_key
from iopo.files import iter_records, read_records, replacing
from iopo.jobs import costs
from iopo.training.logger import read_metrics
from iopo.training.metrics import preferences

Runs = dict[str, dict[int | None, Path]]  # method, then seed -> folder
Sitting = dict[str, Any]  # JSON: head, and runs: method -> seed ("None": none) -> what is known
# name here -> metric of the benchmark
IFEVAL = {metric: metric for metric in (
    "follows_and_answers", "prompt_strict", "prompt_loose", "instruction_strict",
    "instruction_loose", "answers")}  # fmt: skip
COUSINS = {"before_cousins": "follows_and_answers", "reliable": "reliable", "drop": "drop",
           **{name: name for name in (f"drop/{change}" for change in CHANGES)},
           "drop_strict": "drop_strict"}  # fmt: skip
# follows and answers, of the quads whose smaller output margin is below zero, and of the others:
# of each model other quads, so that only one model's two are compared
LOW, HIGH = "following_answering/margin_below_0", "following_answering/margins_above_0"
MEASURED = {  # metric -> property of an answer to a held-out quad
    "following_answering": "follows_and_answers",
    "following": "all_followed",
    "answering": "answers",
}


def sitting(run: Path, sweep: str) -> Sitting | None:
    """All that the tables need of a run folder; None if its SFT checkpoint was not measured.

    With an ablation go the runs that it is compared with: IOPO and DPO on both rows of the main
    table, and all other ablations.
    """
    runs = _find(run, sweep)
    if sweep.startswith("ablation"):
        main = _find(run, "paper_table")
        runs = {name: main[name] for name in ("output_preference", "iopo") if name in main} | runs
        for other in sorted(run.glob("ablation_*/")):
            runs |= _find(run, other.name)
    if "SFT" not in runs:
        return None
    spent, tests = costs(run), read_records(run / "data/test.jsonl")
    tasks = {row["id"]: task_key(row) for row in tests}
    known: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, folders in runs.items():
        for seed, folder in folders.items():
            cost = _cost(run, folder, spent)
            found = measures(folder, run / "sft", tasks)
            known[name][str(seed)] = {"measures": found, "cost": cost}
    return {"head": _head(run, runs), "runs": known}


def write_sittings(path: Path, sittings: list[Sitting]) -> None:
    """One gzipped line a sitting; the same sittings give the same bytes."""
    lines = "".join(json.dumps(one) + "\n" for one in sittings)
    with replacing(path) as new:
        new.write_bytes(gzip.compress(lines.encode(), mtime=0))


def read_sittings(path: Path) -> list[Sitting]:
    """The sittings of a file. Raises ValueError for another kind of file."""
    found: list[Any] = [value for _, value, _ in iter_records(path)]
    kept = (isinstance(one, dict) and one.keys() == {"head", "runs"} for one in found)
    if not found or not all(kept):
        raise ValueError(
            f"{path}: found {len(found)} rows, not all of them of a sitting; expected the kept "
            "measures of a comparison: give a SWEEP_measures.jsonl.gz that table.py wrote"
        )
    return found


def pooled(sittings: list[Sitting]) -> dict[str, dict[int | None, dict[str, Any]]]:
    """Method, then seed, of all sittings. "start" of what is known: the measures of the SFT
    checkpoint of the same sitting. Of several base and SFT models the seeds are 0, 1, ...

    Raises ValueError if two sittings have one method and seed.
    """
    out: dict[str, dict[int | None, dict[str, Any]]] = defaultdict(dict)
    for number, one in enumerate(sittings):
        start = one["runs"]["SFT"]["None"]["measures"]
        for name, of in one["runs"].items():
            for key, known in of.items():
                seed = int(key) if key != "None" else number if len(sittings) > 1 else None
                if seed in out[name]:
                    raise ValueError(f"{name}, seed {seed}, is in two sittings; leave one out")
                out[name][seed] = known | {"start": start}
    return dict(out)


def _find(run: Path, sweep: str) -> Runs:
    """base, SFT, and every method of a sweep with its seeds; only models that were measured."""
    found: Runs = {"base": {None: run / "base"}, "SFT": {None: run / "sft"}}
    for folder in sorted((run / sweep).glob("*/seed*")):
        seed = int(folder.name.removeprefix("seed"))
        found.setdefault(folder.parent.name, {})[seed] = folder
    measured = {
        name: {s: f for s, f in folders.items() if (f / "quads/scores.json").exists()}
        for name, folders in found.items()
    }
    return {name: folders for name, folders in measured.items() if folders}


def measures(folder: Path, sft: Path, tasks: Mapping[str, str]) -> Measures:
    """metric -> unit -> (numerator, denominator) of one model; IFEval and its cousins only where
    they were run. tasks: quad id -> task, the unit: quads of one task are not independent."""
    out: Measures = defaultdict(dict)
    before = {a.id: a.text for a in _answers(sft)}
    right_in: Counter[str] = Counter()
    for a in _answers(folder):
        quad = a.id.rsplit("/", 1)[0]
        add = partial(_add, out, tasks[quad])
        right_in[quad] += a.follows_and_answers
        for metric, what in MEASURED.items():
            for name in (metric, f"{metric}/{a.split}"):
                add(name, getattr(a, what))
        add("constraints", sum(a.follows), len(a.follows))
        add("as_sft", a.text == before[a.id])
        add("words", len(a.text.split()))
        add("empty", not a.text.strip())
        add("repetitive", repeats(a.text))
        add("cut_off", a.finish_reason == "length")
    _add_logps(out, folder, sft, tasks, right_in)
    scores = json.loads((folder / "quads/scores.json").read_text(encoding="utf-8"))
    for block, nats in enumerate(scores["plain_text"]["nats_per_token"]):
        _add(out, f"{scores['plain_text']['sha256'][:8]} {block}", "plain_text", nats)
    for benchmark, metrics in (("ifeval", IFEVAL), ("cousins", COUSINS)):
        if (path := folder / benchmark / "measures.jsonl").exists():
            table = scoring.from_rows(read_records(path))
            out |= {name: table[of] for name, of in metrics.items() if of in table}
    # a prompt that was not followed by itself was not asked again; without the file all were asked
    if "reliable" in out and (folder / "cousins.jsonl").exists():
        prompts = [str(row["cousin_of"]) for row in read_records(sft.parent / "data/cousins.jsonl")]
        for name in COUSINS.keys() & out.keys():
            nothing = 0.0, float(not name.startswith("drop"))
            out[name] = dict.fromkeys(prompts, nothing) | out[name]
    return dict(out)


def _add(out: Measures, unit: str, metric: str, numerator: float, denominator: float = 1) -> None:
    top, bottom = out[metric].get(unit, (0, 0))
    out[metric][unit] = (top + numerator, bottom + denominator)


def _answers(folder: Path) -> list[Answer]:
    path = folder / "quads/verdicts.jsonl"
    rows = read_records(path)
    if any("hollow" not in row for row in rows):
        raise ValueError(
            f"{path}: does not say which answers are hollow; delete {path.parent} to measure again"
        )
    return [Answer(**row) for row in rows]


def _add_logps(
    out: Measures,
    folder: Path,
    reference: Path,
    tasks: Mapping[str, str],
    right_in: Mapping[str, int],
) -> None:
    """Preferences, and log-ratios to SFT in nats per response, of matched and mismatched members.

    right_in: how many of a quad's two answers follow all and answer. Raises ValueError if the two
    models were not scored on the same quads.
    """
    policy, sft = (
        {row["id"]: row["logps"] for row in read_records(of / "quads/logps.jsonl")}
        for of in (folder, reference)
    )
    if policy.keys() != sft.keys():
        raise ValueError("a run and the SFT checkpoint were scored on different quads")
    policy_Q4 = torch.tensor(list(policy.values()), dtype=torch.float64)
    for name, right_Q in preferences(policy_Q4).items():
        for quad, right in zip(policy, right_Q.tolist(), strict=True):
            _add(out, tasks[quad], name, float(right))
    for quad, logps in policy.items():
        add = partial(_add, out, tasks[quad])
        r11, r12, r22, r21 = (a - b for a, b in zip(logps, sft[quad], strict=True))
        smaller, larger = sorted((r11 - r12, r22 - r21))
        add("one_margin_negative", float(smaller < 0 < larger))
        for metric, counts in ((LOW, smaller < 0), (HIGH, smaller >= 0)):
            add(metric, right_in[quad] * counts, 2 * counts)
        add("smaller_margin", smaller)
        add("larger_margin", larger)
        add("logratio_matched", r11 + r22, 2)
        add("logratio_mismatched", r12 + r21, 2)
    for metric in (LOW, HIGH):  # SFT's margins are all zero
        if not any(answers for _, answers in out[metric].values()):
            del out[metric]


def _cost(run: Path, folder: Path, spent: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """Of one training run: seconds and peak GB of its process, steps, tokens of members seen, and
    the median gradient norm of each third of its steps."""
    job = spent.get(f"{folder.relative_to(run)} train")
    if job is None or not (folder / "metrics.jsonl").exists():
        return None
    steps = read_metrics(folder, "train")
    third = -(-len(steps) // 3)
    norms = {
        f"grad_norm_{n + 1}": median(row["grad_norm"] for row in steps[n * third : (n + 1) * third])
        for n in range(3) if len(steps) >= 3
    }  # fmt: skip
    tokens = sum(row["tokens_per_s"] * row["step_s"] for row in steps)
    return job | {"tokens": tokens, "steps": float(len(steps))} | norms


def _head(run: Path, runs: Runs) -> list[str]:
    """Dates, machines, versions and commits of the training runs, more than one of each where they
    differ; the sizes of the data; what the grid chose."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in (folder for folders in runs.values() for folder in folders.values()):
        path = folder / "environment.json"
        for one in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
            found["date"].add(one["time"][:10])
            kind = ", ".join(one["gpus"]) or f"{one['cpu_cores']} cores of {one['cpu']}"
            found["machine"].add(kind)
            versions = [f"{name} {one['packages'].get(name)}" for name in ("torch", "transformers")]
            found["versions"].add(", ".join([f"python {one['python']}", *versions]))
            changed = " with changes" if one["git_diff"] else ""
            found["commit"].add(str(one["git_commit"])[:12] + changed)
    lines = [f"{key}: {'; '.join(sorted(values))}" for key, values in found.items()]
    data = json.loads((run / "data/counts.json").read_text(encoding="utf-8"))
    lines.append("quads: " + ", ".join(f"{k} {v}" for k, v in data.items() if isinstance(v, int)))
    choice = json.loads((run / "choice.json").read_text(encoding="utf-8"))["chosen"]
    return [*lines, *(f"chosen for {method}: {' '.join(of)}" for method, of in choice.items())]
