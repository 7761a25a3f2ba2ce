"""Scores for people: lines on the terminal and one page that needs no other file."""

import logging
from typing import Any

from iopo import stats
from iopo.evaluation.items import Item, Verdict
from iopo.page import page as html_page

SAMPLES = 60  # items shown on the page, those with the most failures first
CHARS = 1500  # of a prompt or an answer on the page

log = logging.getLogger(__name__)

_BODY = html_page("""
{% macro table(names) %}
<table><tr><th>score<th><th>value<th>n<th>
{% for name in names if name in scores.scores %}{% set entry = scores.scores[name] %}
<tr><td>{{ name }}<td>{% if entry.value is not none and not name.startswith("CSL") %}
<svg width="200" height="14"><rect width="200" height="14" fill="#eef1f5"/>
<rect width="{{ x(entry.value) }}" height="14" fill="#7aa5d8"/>
<path d="M{{ x(entry.low) }} 7H{{ x(entry.high) }}M{{ x(entry.low) }} 3v8M{{ x(entry.high) }} 3v8"
 stroke="#1c2430"/></svg>{% endif %}
<td class="n">{{ number(name, entry) }}<td class="n">{{ entry.n }}<td>{{ bounds(name, entry) }}
{% endfor %}</table>
{% endmacro %}
<p class="note">{{ who }} · {{ scores["items"] }} items · {{ scores.made_at }}</p>
{% for line in scores.notes %}<p class="no">{{ line }}</p>{% endfor %}
{% if scores.unparsed %}<p class="no">{{ scores.unparsed }} judgements could not be read;
bounds are given</p>{% endif %}
{{ table(scores.headline) }}
<p class="note">Percent (CSL: levels), bars and brackets: 95% intervals.</p>
{% for group, names in groups.items() %}<h2>{{ group }}</h2>{{ table(names) }}{% endfor %}
<h2>Items</h2>
<p class="note">{{ samples | length }} of {{ scores["items"] }}: worst and best.
All: verdicts.jsonl.</p>
{% for sample in samples %}
<details><summary>{{ sample.id }} <span class="{{ sample.style }}">{{ sample.label }}</span>
</summary>{% for text in sample.texts %}<pre class="answer">{{ text }}</pre>{% endfor %}</details>
{% endfor %}
<h2>How this was made</h2>
{% for key, value in made.items() if value %}<p><b>{{ key }}</b> {{ value }}</p>{% endfor %}
""")


def scale_of(metric: str) -> tuple[float, int]:
    """Factor and digits: percent; CSL, which counts levels, as it is."""
    return (1, 2) if metric.startswith("CSL") else (100, 1)


def better(metric: str) -> int:
    """1 where more is better, -1 where less is."""
    return -1 if metric.startswith("drop") else 1


def number(metric: str, entry: Any) -> str:
    """A score as text, in percent (CSL: in levels): 12.3 [10.1, 14.9]."""
    return "not read" if entry["value"] is None else stats.shown(entry, *scale_of(metric))


def _bounds(metric: str, entry: dict[str, Any]) -> str:
    if "bounds" not in entry:
        return ""
    scale, digits = scale_of(metric)
    low, high = (f"{scale * bound:.{digits}f}" for bound in entry["bounds"])
    return f"  (unread judgements and failed requests: between {low} and {high})"


def log_scores(scores: dict[str, Any]) -> None:
    """The headline scores, one a line, with their intervals and bounds."""
    log.info("%s: %d items; %% with 95%% intervals", scores["benchmark"], scores["items"])
    for metric in scores["headline"]:
        entry = scores["scores"].get(metric)
        if entry is not None:
            shown = f"{metric:<22} {number(metric, entry):<22} n={entry['n']}"
            log.info("  %s%s", shown, _bounds(metric, entry))


def page(scores: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """A whole HTML page: scores (the content of scores.json) and some items (from `samples`)."""
    config = scores["config"]
    who = config["responses"]["path"] or config["generate"]["model"] or config["model"]["path"]
    judge = {k: v for k, v in scores["judge"].items() if k != "unparsed"}
    parts = {"data": scores["data"], "judge": judge, "responses": scores["responses"]}
    return _BODY.render(
        title=f"{scores['benchmark']}: {who}",
        who=who,
        scores=scores,
        groups=_groups(scores),
        samples=samples,
        number=number,
        bounds=_bounds,
        made={name: _flat(part) for name, part in parts.items()},
        x=lambda share: f"{200 * max(0.0, min(1.0, share)):.1f}",
    )


def _groups(scores: dict[str, Any]) -> dict[str, list[str]]:
    """Metrics that are not headlines, by the part of their name before the first slash."""

    def natural(metric: str) -> tuple[str, int, str]:  # "constraints/9" before "constraints/10+"
        head, _, rest = metric.partition("/")
        digits = rest.rstrip("+")
        return head, int(digits) if digits.isdigit() else 0, rest

    groups: dict[str, list[str]] = {}
    for metric in scores["scores"]:
        if metric not in scores["headline"]:
            head, slash, _ = metric.partition("/")
            groups.setdefault(head if slash else "other scores", []).append(metric)
    return {name: sorted(names, key=natural) for name, names in groups.items()}


def samples(
    items: list[Item], verdicts: list[Verdict], texts: dict[str, str], best: float
) -> list[dict[str, Any]]:
    """The items with the lowest and the highest scores, for the page.

    texts: answers by item id. best: the highest score of one constraint.
    """

    def held_of(verdict: Verdict) -> float:
        """Share of the best possible score; -1 where nothing was read."""
        marks = verdict.get("strict", verdict.get("scores"))
        return sum(marks) / (best * len(marks)) if marks else -1.0

    pairs = sorted(zip(items, verdicts, strict=True), key=lambda pair: held_of(pair[1]))
    out = []
    for item, verdict in pairs[: SAMPLES // 2] + pairs[SAMPLES // 2 :][-SAMPLES // 2 :]:
        held = held_of(verdict)
        prompt = "\n\n".join(f"[{m['role']}] {m['content']}" for m in item.messages)
        marks = _flat({k: v for k, v in verdict.items() if k != "replies"})
        out.append(
            {
                "id": item.id,
                "style": "ok" if held == 1 else "no",
                "label": "unparsed" if held < 0 else f"{100 * held:.0f}%",
                "texts": [_cut(prompt), _cut(texts.get(item.id, "")), marks],
            }
        )
    return out


def _cut(text: str) -> str:
    return text if len(text) <= CHARS else text[:CHARS] + f" ... ({len(text)} characters)"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_flat(v)}" for k, v in value.items())
    return str(value)
