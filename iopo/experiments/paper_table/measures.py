"""What the comparison knows of a run: measures by unit, costs and provenance, from its folder."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from iopo.constraints.text import repeats
from iopo.evaluation import scoring
from iopo.evaluation.items import Measures
from iopo.evaluation.quad_metrics import Answer
from iopo.files import read_records
from iopo.jobs import costs
from iopo.training.logger import read_metrics
from iopo.training.metrics import preferences

Runs = dict[str, dict[int | None, Path]]  # method, then seed -> folder
IFEVAL = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose", "answers")
MEASURED = {  # metric -> property of an answer to a held-out quad
    "following_answering": "follows_and_answers",
    "following": "all_followed",
    "answering": "answers",
}


def find(run: Path, sweep: str) -> Runs:
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


def measures(folder: Path, sft: Path) -> Measures:
    """metric -> unit -> (numerator, denominator) of one model; IFEval only where it was run."""
    out: Measures = defaultdict(dict)
    answers, before = _answers(folder), {a.id: a.text for a in _answers(sft)}
    by_quad: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_quad[answer.id.rsplit("/", 1)[0]].append(answer)
    for quad, two in by_quad.items():
        for metric, what in MEASURED.items():
            of = (sum(getattr(a, what) for a in two), len(two))
            out[metric][quad] = out[f"{metric}/{two[0].split}"][quad] = of
        out["constraints"][quad] = (sum(sum(a.follows) for a in two),
                                    sum(len(a.follows) for a in two))  # fmt: skip
        out["as_sft"][quad] = (sum(a.text == before[a.id] for a in two), len(two))
        out["words"][quad] = (sum(len(a.text.split()) for a in two), len(two))
        out["empty"][quad] = (sum(not a.text.strip() for a in two), len(two))
        out["repetitive"][quad] = (sum(repeats(a.text) for a in two), len(two))
        out["cut_off"][quad] = (sum(a.finish_reason == "length" for a in two), len(two))
    _add_logps(out, folder, sft)
    scores = json.loads((folder / "quads/scores.json").read_text(encoding="utf-8"))
    for block, nats in enumerate(scores["plain_text"]["nats_per_token"]):
        out["plain_text"][f"{scores['plain_text']['sha256'][:8]} {block}"] = (nats, 1.0)
    if (folder / "ifeval/measures.jsonl").exists():
        table = scoring.from_rows(read_records(folder / "ifeval/measures.jsonl"))
        out |= {metric: table[metric] for metric in IFEVAL if metric in table}
    return dict(out)


def _answers(folder: Path) -> list[Answer]:
    path = folder / "quads/verdicts.jsonl"
    rows = read_records(path)
    if any("hollow" not in row for row in rows):
        raise ValueError(
            f"{path}: does not say which answers are hollow; delete {path.parent} to measure again"
        )
    return [Answer(**row) for row in rows]


def _add_logps(out: Measures, folder: Path, reference: Path) -> None:
    """Preferences, and log-ratios to SFT in nats per response, of matched and mismatched members.

    Raises ValueError if the two models were not scored on the same quads.
    """
    policy, sft = (
        {row["id"]: row["logps"] for row in read_records(of / "quads/logps.jsonl")}
        for of in (folder, reference)
    )
    if policy.keys() != sft.keys():
        raise ValueError("a run and the SFT checkpoint were scored on different quads")
    policy_Q4 = torch.tensor(list(policy.values()), dtype=torch.float64)
    for name, right_Q in preferences(policy_Q4).items():
        rights = zip(policy, right_Q.tolist(), strict=True)
        out[name] = {quad: (float(right), 1.0) for quad, right in rights}
    for quad, logps in policy.items():
        r11, r12, r22, r21 = (a - b for a, b in zip(logps, sft[quad], strict=True))
        smaller, larger = sorted((r11 - r12, r22 - r21))
        out["one_margin_negative"][quad] = (float(smaller < 0 < larger), 1.0)
        out["smaller_margin"][quad] = (smaller, 1.0)
        out["larger_margin"][quad] = (larger, 1.0)
        out["logratio_matched"][quad] = (r11 + r22, 2.0)
        out["logratio_mismatched"][quad] = (r12 + r21, 2.0)


def cost(run: Path, folders: Iterable[Path]) -> dict[str, float] | None:
    """Means over the runs: seconds and peak GB of the training process, tokens of members seen."""
    spent = costs(run)
    rows = []
    for folder in folders:
        job = spent.get(f"{folder.relative_to(run)} train")
        if job is not None and (folder / "metrics.jsonl").exists():
            steps = read_metrics(folder, "train")
            tokens = sum(row["tokens_per_s"] * row["step_s"] for row in steps)
            rows.append(job | {"tokens": tokens, "steps": float(len(steps))})
    return {key: sum(r[key] for r in rows) / len(rows) for key in rows[0]} if rows else None


def provenance(runs: Runs) -> dict[str, list[str]]:
    """Dates, machines, versions and commits of the training runs; more than one of each is said."""
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
    return {key: sorted(values) for key, values in found.items()}
