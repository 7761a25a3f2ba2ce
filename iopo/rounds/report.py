"""RUN/rounds.jsonl, a row for each round, and RUN/report.html, from the files of the stages."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iopo.files import read_records, write_records
from iopo.jobs import costs
from iopo.page import embedded, page
from iopo.rounds.config import round_folder
from iopo.stats import Estimate, shown
from iopo.training.logger import read_metrics
from iopo.training.report.run import Panel, plot_panels

Row = dict[str, Any]
STAGES = ("sample", "rows", "train", "evaluate")
SPLITS = ("all", "seen", "unseen_params", "unseen_kinds")
HEADLINE = "follows_and_answers"
MATCHED, MISMATCHED = (0, 2), (1, 3)  # columns of logps.jsonl


def collect(run: Path) -> list[Row]:
    """The rows of rounds.jsonl: 0 is the start, which is only evaluated."""
    seconds = {name: cost["seconds"] for name, cost in costs(run).items()}
    rows = []
    for folder in sorted(run.glob("round-*")):
        done, counts, scores = (
            _read(folder / name)
            for name in ("sample/done.json", "rows/counts.json", "evaluate/scores.json")
        )
        row: Row = {"round": int(folder.name.removeprefix("round-"))}
        row |= {"sample": done} if done else {}
        row |= {"rows": counts} if counts else {}
        if scores:
            row["following"] = _following(scores)
            row["drift"] = _drift(run, folder, scores)
        tokens = {
            "sample": done.get("prompt_tokens", 0) + done.get("response_tokens", 0),
            "train": _trained_tokens(folder / "train"),
        }
        row["stages"] = {
            stage: {"seconds": seconds[name]}
            | ({"tokens": tokens[stage]} if stage in tokens else {})
            for stage in STAGES
            if (name := f"{folder.name} {stage}") in seconds
        }
        rows.append(row)
    return rows


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _following(scores: dict[str, Any]) -> dict[str, Estimate]:
    """The headline measure, in all and by split."""
    names = {HEADLINE: "all"} | {
        name: name.removeprefix(f"{HEADLINE}_")
        for name in scores
        if name.startswith(f"{HEADLINE}_")
    }
    return {short: scores[name] for name, short in names.items() if name in scores}


def _drift(run: Path, folder: Path, scores: dict[str, Any]) -> dict[str, float]:
    """How far the policy is from the first: log-ratios on held-out quads, in nats, and its text."""
    found = {name: scores["degeneration"][name] for name in ("words", "repetitive", "cut_off")
             if "degeneration" in scores}  # fmt: skip
    if "plain_text" in scores:
        found["perplexity"] = scores["plain_text"]["perplexity"]
    now, first = folder / "evaluate/logps.jsonl", round_folder(run, 0) / "evaluate/logps.jsonl"
    if now.exists() and first.exists():
        now_Q4, first_Q4 = (
            np.array([row["logps"] for row in read_records(path)]) for path in (now, first)
        )
        ratio_Q4 = now_Q4 - first_Q4
        found["logratio_matched"] = float(ratio_Q4[:, MATCHED].mean())
        found["logratio_mismatched"] = float(ratio_Q4[:, MISMATCHED].mean())
    return found


def _trained_tokens(train: Path) -> int:
    """Of all optimizer steps, each member's tokens once per epoch; from the steps logged."""
    rows = read_metrics(train, "train") if (train / "metrics.jsonl").exists() else []
    if not rows:
        return 0
    return round(sum(r["tokens_per_s"] * r["step_s"] for r in rows) / len(rows) * rows[-1]["step"])


def fallen(rows: Sequence[Row], drop: float | None) -> tuple[str, int] | None:
    """What fell, in words, and the last round whose policy was good; None if nothing did.

    A measure has fallen when the upper end of its interval is below (1 - drop) of the best value of
    earlier rounds. A round's acceptance is that of the policy before it.
    """
    best: dict[str, float] = {}
    for row in rows if drop is not None else ():
        for what, good in (("acceptance", row["round"] - 2), ("following", row["round"] - 1)):
            found = measure(row, what)
            if found is None:
                continue
            least = (1 - (drop or 0)) * best.get(what, 0.0)
            if found["high"] < least:
                cell = shown(found, factor=1, digits=3)
                return (
                    f"{what} fell in round {row['round']}: {cell}, below {least:.3f} "
                    f"(rounds.stop_drop={drop:g}; best so far {best[what]:.3f})",
                    max(good, 0),
                )
            best[what] = max(best.get(what, 0.0), found["value"])
    return None


def measure(row: Row, what: str) -> Estimate | None:
    """acceptance: rows per prompt; following: share of held-out answers that follow and answer."""
    if what == "acceptance":
        return row["rows"]["acceptance"] if "rows" in row else None
    return row.get("following", {}).get("all")


# --- the page ------------------------------------------------------------------------------------


def _curve(rows: Sequence[Row], *path: str) -> list[tuple[float, float]]:
    """(round, number at the path) of each row that has it."""
    points = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            points.append((row["round"], float(value)))
    return points


def _panels(rows: Sequence[Row]) -> Iterator[Panel]:
    def panel(title: str, curves: dict[str, list[tuple[float, float]]]) -> Panel:
        looks = [
            (points, "o-", {"label": name, "color": f"C{i}", "linewidth": 1.1, "markersize": 4})
            for i, (name, points) in enumerate(curves.items())
            if points
        ]
        return Panel(title, looks, over="round")

    def keys(*path: str) -> list[str]:
        found: dict[str, None] = {}
        for row in rows:
            value: Any = row
            for key in path:
                value = value.get(key, {})
            found |= dict.fromkeys(value)
        return list(found)

    yield panel(
        "Held-out: follows all and answers",
        {split: _curve(rows, "following", split, "value") for split in SPLITS},
    )
    per_prompt = {
        source: [(r["round"], r["rows"]["by_source"].get(source, 0) / r["rows"]["prompts"])
                 for r in rows if "rows" in r]
        for source in keys("rows", "by_source")
    }  # fmt: skip
    yield panel("Acceptance: new rows per prompt, by source", per_prompt)
    yield panel(
        "Prompts with a row, by their constraints",
        {n: _shares(rows, "by_constraints", n, "with_rows", "prompts")
         for n in keys("rows", "by_constraints")},
    )  # fmt: skip
    yield panel(
        "Sampled responses: follow all and answer",
        {n: _shares(rows, "by_constraints", n, "follow_and_answer", "responses")
         for n in keys("rows", "by_constraints")},
    )  # fmt: skip
    yield panel(
        "Log-ratio to the first policy, held-out quads (nats)",
        {name: _curve(rows, "drift", f"logratio_{name}") for name in ("matched", "mismatched")},
    )
    yield panel("Words per held-out answer", {"words": _curve(rows, "drift", "words")})
    yield panel(
        "Share of held-out answers",
        {name: _curve(rows, "drift", name) for name in ("repetitive", "cut_off")},
    )
    yield panel("Perplexity of plain text", {"perplexity": _curve(rows, "drift", "perplexity")})
    yield panel("Seconds", {stage: _curve(rows, "stages", stage, "seconds") for stage in STAGES})


def _shares(rows: Sequence[Row], group: str, name: str, top: str, of: str) -> list[Any]:
    cells = [(row["round"], row["rows"][group].get(name)) for row in rows if "rows" in row]
    return [(n, cell.get(top, 0) / cell[of]) for n, cell in cells if cell and cell.get(of)]


PAGE = page("""
<p>{{ note }}</p>
<div class="wide"><img alt="curves over rounds" src="{{ curves }}"></div>
<p>Round 0 is the start. Acceptance is that of the policy before the round, the rest that of the
policy after it. Following: % of held-out answers that follow all constraints and answer, with 95%
intervals.</p>
{% macro table(head, rows) %}
<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endmacro %}
{{ table(head, cells) }}
<h2>Constraints</h2>
<p>Share of the sampled responses that follow a constraint of the kind, by round, and how often it
stands in new rows.</p>
{{ table(kinds_head, kinds) }}
<details><summary>What became of every draw</summary>
{% for number, outcomes in draws %}<h3>Round {{ number }}</h3>
{{ table(("outcome", "draws"), outcomes) }}{% endfor %}</details>
""")


def write(run: Path, rows: Sequence[Row], note: str) -> None:
    """rounds.jsonl and report.html of the run. note: how it stands, in a sentence."""
    write_records(run / "rounds.jsonl", rows)
    curves = plot_panels(run / "rounds.png", list(_panels(rows)), across=3, width=15)
    head = (
        "round", *(f"following: {split.replace('_', ' ')}" for split in SPLITS),
        "rows per prompt", "prompts with a row, %", "new rows", "replayed",
        "seconds: " + ", ".join(STAGES),
    )  # fmt: skip
    made = [row for row in rows if "rows" in row]
    kinds = sorted({kind for row in made for kind in row["rows"]["by_kind"]})
    text = PAGE.render(
        title=f"Rounds: {run.name}", note=note, curves=embedded(curves), head=head,
        cells=[_cells(row) for row in rows],
        kinds_head=("kind", *(f"round {row['round']}" for row in made)),
        kinds=[(kind, *(_kind(row["rows"]["by_kind"].get(kind, {})) for row in made))
               for kind in kinds],
        draws=[(row["round"], row["rows"]["outcomes"].items()) for row in made],
    )  # fmt: skip
    (run / "report.html").write_text(text, encoding="utf-8")


def _cells(row: Row) -> list[str]:
    following = row.get("following", {})
    cells = [str(row["round"])] + [
        shown(following[split]) if split in following else "" for split in SPLITS
    ]
    made = row.get("rows")
    cells += ["", "", "", ""] if made is None else [
        shown(made["acceptance"], factor=1, digits=2), shown(made["with_rows"]),
        str(made["rows_new"]), str(made["rows_replayed"]),
    ]  # fmt: skip
    stages = row["stages"]
    seconds = (f"{stages[s]['seconds']:.0f}" if s in stages else "-" for s in STAGES)
    return [*cells, ", ".join(seconds)]


def _kind(of: dict[str, int]) -> str:
    share = f"{of['followed'] / of['asked']:.0%} of {of['asked']}" if of.get("asked") else "-"
    return f"{share}; {of.get('in_rows', 0)} in rows"
