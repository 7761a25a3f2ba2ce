"""One evaluation from config to report: find the data, get answers, get verdicts, total, write.

Every stage keeps its results in the output folder, so the same command goes on after a kill.
"""

import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import iopo
from iopo.data.rows import spread
from iopo.evaluation import report, responses, scoring
from iopo.evaluation.benchmarks import (
    cfbench,
    complexbench,
    followbench,
    ifbench,
    ifeval,
    infobench,
    judge_check,
    trace,
)
from iopo.evaluation.config import BenchmarkSection, EvaluateConfig, JudgeSection
from iopo.evaluation.items import Item, locate
from iopo.evaluation.judge import cost as plan
from iopo.evaluation.judge import judging
from iopo.evaluation.responses import Responses, Say, default_out
from iopo.files import sha256_file, write_records, write_text

# Scored by a language model, or by code. Each module: SOURCE, HEADLINE, load, measures; judged ones
# also MAXIMUM and questions, coded ones score.
JUDGED: dict[str, ModuleType] = {
    "trace": trace,
    "cfbench": cfbench,
    "followbench": followbench,
    "infobench": infobench,
    "complexbench": complexbench,
}
CODED: dict[str, ModuleType] = {"ifeval": ifeval, "ifbench": ifbench}


def evaluate(config: EvaluateConfig, say: Say = print) -> dict[str, Any]:
    """Run it; returns the content of scores.json.

    Raises ValueError for what the user can mend (config, data, responses), EndpointError when a
    server cannot be used. Finished answers and judgements are kept in the output folder.
    """
    name = config.benchmark.name
    if name == "quads":  # it needs the model itself, and not only its answers
        from iopo.evaluation.benchmarks import (
            quads,  # with torch, which costs other benchmarks seconds
        )

        return quads.evaluate_quads(config, say)
    if config.benchmark != BenchmarkSection(name):
        raise ValueError("benchmark.reference, scored, controls: +benchmark=quads only; remove")
    if name in CODED and config.judge != JudgeSection():
        raise ValueError(f"+benchmark={name} is scored by code and asks no judge; remove judge")
    if name == "judge_check":  # the judge is scored, not the answers
        return judge_check.check_judge(config, say)
    module = benchmark(name)
    path = locate(module.SOURCE, config.data.path)
    everything = module.load(path)
    items = spread(everything, config.limit)
    data = sha256_file(path)
    known_file = module.SOURCE.sha256 in (None, data)
    if not known_file:
        say(f"note: {path} is not the file we know (sha256 {data}); scores may not compare")
    if config.plan:
        texts = _plan_texts(config, everything, items)
        return plan.show(config, module, name in JUDGED, items, texts, say)
    if name in JUDGED:
        judging.require_judge(config.judge, name)
    out = Path(config.out or default_out(config))
    out.mkdir(parents=True, exist_ok=True)
    answers = get_responses(config, everything, items, data, out, say)
    for line in warnings(answers):
        say(f"note: {line}")
    judged: dict[str, Any] = {}
    if name in JUDGED:
        verdicts, judged = judging.judge_items(config.judge, module, items, answers.text, out, say)
    else:
        verdicts = module.score(items, answers.text)
    scores = total(config, module, items, verdicts)
    scores |= {
        "responses": answers.counts(),
        "judge": judged,
        "data": {"path": str(path), "sha256": data, "known": known_file},
        "config": report.plain(asdict(config)),
        "versions": {"iopo": iopo.__version__, "python_openai": version("openai")},
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if name == "trace":
        scores["stray_tags"] = trace.stray_tags(items)
    write(out, module, items, verdicts, answers, scores)
    report.print_scores(scores, say)
    say(f"written: {out}/scores.json, verdicts.jsonl, measures.jsonl, report.html")
    return scores


def benchmark(name: str) -> ModuleType:
    """The module of a benchmark. Raises ValueError naming those there are."""
    known = {**JUDGED, **CODED}
    if name not in known:
        raise ValueError(
            f"benchmark.name is {name!r}; expected one of {', '.join(sorted(known))} "
            "(choose it with +benchmark=NAME)"
        )
    return known[name]


def get_responses(
    config: EvaluateConfig,
    everything: list[Item],
    items: list[Item],
    data: str,
    out: Path,
    say: Say,
) -> Responses:
    """Answers from the file in the config, or made now."""
    if config.responses.path is not None:
        if (out / "responses.manifest.json").exists():
            raise ValueError(f"{out}: holds answers that were made there; choose another out=")
        if (out / "responses.jsonl").resolve() == Path(config.responses.path).resolve():
            raise ValueError(f"{out}: responses.path would be overwritten; choose another out=")
        known = {item.id for item in everything}
        return responses.read_responses(config.responses.path, items, known)
    return responses.make_responses(config, items, data, out, say)


def warnings(answers: Responses) -> list[str]:
    """What the user must know about the answers before reading the scores."""
    lines = []
    counts = answers.counts()
    if answers.missing:
        lines.append(
            f"no answer to {len(answers.missing)} items ({responses.some(answers.missing)}): "
            "scored as following nothing"
        )
    if answers.failed:
        first = next(iter(answers.failed.items()))
        lines.append(
            f"the server failed on {len(answers.failed)} items (first {first[0]}: {first[1]}): "
            "scored as following nothing; run the same command again to ask for them again"
        )
    if answers.unknown:
        lines.append(
            f"answers to {len(answers.unknown)} ids that the data lacks "
            f"({responses.some(answers.unknown)}): ignored"
        )
    if answers.repeated:
        lines.append(f"{answers.repeated} answers are there twice, word for word: counted once")
    if counts["empty"]:
        lines.append(f"{counts['empty']} empty answers: scored as following nothing")
    if answers.cut:
        lines.append(f"{answers.cut} answers ended at the token limit")
    return lines


def total(
    config: EvaluateConfig, module: ModuleType, items: list[Item], verdicts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Scores with intervals; with bounds where verdicts could not be read."""
    table = module.measures(items, verdicts)
    scores = scoring.summarise(table, resamples=config.bootstrap, seed=config.seed)
    unparsed = sum(row.get("scores", ()) is None for row in verdicts)
    if unparsed:
        lowest, highest = (
            module.measures(items, _filled(module, items, verdicts, score))
            for score in (0.0, float(module.MAXIMUM))
        )
        scores = scoring.with_bounds(scores, lowest, highest)
    return {
        "benchmark": config.benchmark.name,
        "headline": list(module.HEADLINE),
        "items": len(items),
        "unparsed": unparsed,
        "scores": scores,
    }


def _filled(
    module: ModuleType, items: list[Item], verdicts: list[dict[str, Any]], score: float
) -> list[dict[str, Any]]:
    """The verdicts, with this score for every constraint in place of each unparsed one."""
    out = []
    for item, verdict in zip(items, verdicts, strict=True):
        if verdict["scores"] is None:
            count = len(module.questions(item, "")[0].criteria)
            verdict = {**verdict, "scores": [score] * count}
        out.append(verdict)
    return out


def write(
    out: Path,
    module: ModuleType,
    items: list[Item],
    verdicts: list[dict[str, Any]],
    answers: Responses,
    scores: dict[str, Any],
) -> None:
    """verdicts.jsonl, measures.jsonl, scores.json, report.html, and responses.jsonl if read."""
    write_records(out / "verdicts.jsonl", verdicts)
    write_records(out / "measures.jsonl", scoring.to_rows(module.measures(items, verdicts)))
    if not (out / "responses.manifest.json").exists():  # read from elsewhere: keep a copy
        rows = [
            {**responses.row_key(item), "response": answers.text[item.id]}
            for item in items
            if item.id in answers.text
        ]
        write_records(out / "responses.jsonl", rows)
    best = float(getattr(module, "MAXIMUM", 1))
    write_text(out / "report.html", report.page(scores, items, verdicts, answers.text, best))
    # last: who finds it takes the evaluation for done
    write_text(out / "scores.json", json.dumps(scores, ensure_ascii=False, indent=1))


def _plan_texts(
    config: EvaluateConfig, everything: list[Item], items: list[Item]
) -> dict[str, str] | None:
    if config.responses.path is None:
        return None
    known = {item.id for item in everything}
    return responses.read_responses(config.responses.path, items, known).text
