"""One evaluation from config to report: find the data, get answers, get verdicts, total, write.

Every stage keeps its results in the output folder, so the same command goes on after a kill.
"""

import importlib
import json
import logging
import pkgutil
import time
from collections.abc import Container
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import iopo
from iopo import stats
from iopo.data.rows import spread
from iopo.evaluation import benchmarks, report, responses, scoring
from iopo.evaluation.config import BenchmarkSection, EvaluateConfig, JudgeSection
from iopo.evaluation.items import Benchmark, Item, Verdict, locate
from iopo.evaluation.judge import judge_items, plan, require_judge
from iopo.files import sha256_rows, write_records, write_text
from iopo.redact import redact_values

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run it; returns the content of scores.json.

    Raises ValueError for what the user can mend (config, data, responses), EndpointError when a
    server cannot be used. Finished answers and judgements are kept in the output folder.
    """
    name = config.benchmark.name
    module = find(name)
    stats.scipy_stats()  # without it the intervals would fail after all answers are made
    if name != "quads" and config.benchmark != BenchmarkSection(name):
        names = "benchmark.reference, base, scored, controls"
        raise ValueError(f"{names}: +benchmark=quads only; remove")
    if not hasattr(module, "BENCHMARK"):  # a program of its own
        return module.evaluate(config)
    benchmark: Benchmark = module.BENCHMARK
    if not benchmark.judged and config.judge != JudgeSection():
        raise ValueError(f"+benchmark={name} is scored by code and asks no judge; remove judge")
    path = locate(benchmark.source, config.data.path)
    everything = benchmark.load(path)
    groups: dict[str, list[Item]] = {}  # a prompt and its cousins are taken together
    for item in everything:
        groups.setdefault(item.group, []).append(item)
    items = [item for group in spread(list(groups.values()), config.limit) for item in group]
    answers = None
    if config.responses.path is not None:
        answers = responses.read_responses(config.responses.path, items, everything)
    if config.plan:
        return plan(config, benchmark, items, None if answers is None else answers.said)
    if benchmark.judged:
        require_judge(config.judge, name)
    if answers is None and config.generate.base_url is None:
        responses.require_model(config.model)
    out = Path(config.out or responses.default_out(config))
    data = sha256_rows(path)
    if answers is None:
        answers = responses.make_responses(config, items, data, out)
    elif (out / "responses.manifest.json").exists():
        raise ValueError(f"{out}: holds answers that were made there; choose another out=")
    elif (out / "responses.jsonl").resolve() == Path(config.responses.path or "").resolve():
        raise ValueError(f"{out}: responses.path would be overwritten; choose another out=")
    out.mkdir(parents=True, exist_ok=True)
    known_file = benchmark.source.sha256 in (None, data)
    notes = answers.notes()
    if not known_file:
        notes.append(f"{path} is not the file we know (sha256 {data}); scores may not compare")
    for line in notes:
        log.info("note: %s", line)
    judged: dict[str, Any] = {}  # what the judge was asked and used
    if benchmark.judged:
        verdicts, judged = judge_items(config.judge, benchmark, items, answers.said, out)
    else:
        verdicts = [benchmark.by_code(item, answers.said.get(item.id, "")) for item in items]
        for item, verdict in zip(items, verdicts, strict=True):
            if item.id in answers.cut:
                verdict.setdefault("hollow", []).append("cut_off")
    scores = {
        "benchmark": name,
        "headline": list(benchmark.headline),
        "items": len(items),
        "unparsed": sum(row.get("scores", ()) is None for row in verdicts),
        "scores": _total(config, benchmark, items, verdicts, answers.failed),
        "responses": answers.counts(),
        "notes": notes,
        "judge": judged,
        "data": {"path": str(path), "sha256": data, "known": known_file},
        "config": redact_values(asdict(config)),
        "versions": {"iopo": iopo.__version__, "python_openai": _openai()},
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    _write(out, benchmark, items, verdicts, answers, scores)
    report.log_scores(scores)
    log.info("written: %s/scores.json, verdicts.jsonl, measures.jsonl, report.html", out)
    return scores


def _openai() -> str | None:
    """Its version; scoring by code needs no server and no client."""
    return version("openai") if find_spec("openai") else None


def _write(
    out: Path,
    benchmark: Benchmark,
    items: list[Item],
    verdicts: list[Verdict],
    answers: responses.Responses,
    scores: dict[str, Any],
) -> None:
    """verdicts.jsonl, measures.jsonl, report.html, scores.json, and responses.jsonl if read."""
    write_records(out / "verdicts.jsonl", verdicts)
    write_records(out / "measures.jsonl", scoring.to_rows(benchmark.measures(items, verdicts)))
    if not (out / "responses.manifest.json").exists():  # read from elsewhere: keep a copy
        answered = [item for item in items if item.id in answers.text]
        rows = [{**responses.row_key(i), "response": answers.text[i.id]} for i in answered]
        for item, row in zip(answered, rows, strict=True):
            if item.id in answers.cut:
                row["finish_reason"] = "length"
        write_records(out / "responses.jsonl", rows)
    samples = report.samples(items, verdicts, answers.said, benchmark.maximum)
    write_text(out / "report.html", report.page(scores, samples))
    # last: who finds it takes the evaluation for done
    write_text(out / "scores.json", json.dumps(scores, ensure_ascii=False, indent=1))


def names() -> list[str]:
    """The benchmarks that there are: the modules in iopo/evaluation/benchmarks."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))


def find(name: str) -> ModuleType:
    """The module of a benchmark. Raises ValueError naming those there are."""
    if name not in names():
        raise ValueError(
            f"benchmark.name is {name!r}; expected one of {', '.join(names())} "
            "(choose it with +benchmark=NAME)"
        )
    return importlib.import_module(f"{benchmarks.__name__}.{name}")


def _total(
    config: EvaluateConfig,
    benchmark: Benchmark,
    items: list[Item],
    verdicts: list[Verdict],
    failed: Container[str],
) -> dict[str, dict[str, Any]]:
    """Scores with intervals; with bounds where verdicts could not be read or answers be had."""
    table = benchmark.measures(items, verdicts)
    scores = scoring.summarise(
        table, resamples=config.bootstrap, seed=config.seed, cluster=benchmark.cluster
    )
    unknown = {
        i
        for i, (item, verdict) in enumerate(zip(items, verdicts, strict=True))
        if verdict.get("scores", ()) is None or item.id in failed
    }
    if not unknown:
        return scores

    def filled(score: float) -> list[Verdict]:
        """The verdicts, with this score for every constraint in place of each unknown one."""
        out = list(verdicts)
        for i in unknown:
            if "strict" in out[i]:  # by code
                held = [score > 0] * len(out[i]["strict"])
                found = {"strict": held, "loose": held, "hollow": [] if score > 0 else ["empty"]}
            else:
                question = benchmark.question(items[i], "")
                count = len(out[i]["scores"]) if question is None else len(question.criteria)
                found = {"scores": [score] * count, "overall": score}
            out[i] = {**out[i], **found}
        return out

    lowest, highest = (
        benchmark.measures(items, filled(score)) for score in (0.0, float(benchmark.maximum))
    )
    return scoring.with_bounds(scores, lowest, highest)
