"""Scores for people: lines on the terminal and one page that needs no other file."""

import html
import json
from typing import Any

from iopo.evaluation.items import Item

SAMPLES = 60  # items shown on the page, those with the most failures first
CHARS = 1500  # of a prompt or an answer on the page

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2430; background: #fff; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.note { color: #5a6573; } .warn { background: #fff4d6; padding: .5rem .8rem; border-radius: 4px; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #e4e8ee; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.n { text-align: right; }
svg { display: block; } details { border-bottom: 1px solid #e4e8ee; padding: .35rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7fa; padding: .6rem;
  border-radius: 4px; margin: .4rem 0; font-size: 13px; } .ok { color: #1d7a46; }
.no { color: #b3261e; } .big td { font-size: 1.05rem; }
"""


def plain(value: Any) -> Any:
    """Enums as their values, so that it can be JSON."""
    return json.loads(json.dumps(value, default=lambda member: member.value))


def percent(entry: dict[str, Any]) -> str:
    """A score as text: 12.3 [10.1, 14.9]; CSL and the like, which are no shares, likewise x 100."""
    if entry["value"] is None:
        return "not read"
    return f"{100 * entry['value']:.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def number(metric: str, entry: dict[str, Any]) -> str:
    """As `percent`, but levels (CSL) as they are."""
    if metric.startswith("CSL") and entry["value"] is not None:
        return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
    return percent(entry)


def print_scores(scores: dict[str, Any], say: Any) -> None:
    """The headline scores, one a line, with their intervals and bounds."""
    say(f"{scores['benchmark']}: {scores['items']} items; % with 95% intervals")
    for metric in scores["headline"]:
        entry = scores["scores"].get(metric)
        if entry is not None:
            say(
                f"  {metric:<22} {number(metric, entry):<22} n={entry['n']}{_bounds(metric, entry)}"
            )


def _bounds(metric: str, entry: dict[str, Any]) -> str:
    if "bounds" not in entry:
        return ""
    scale, digits = (1, 2) if metric.startswith("CSL") else (100, 1)
    low, high = (f"{scale * bound:.{digits}f}" for bound in entry["bounds"])
    return f"  (unparsed judgements: between {low} and {high})"


def page(
    scores: dict[str, Any],
    items: list[Item],
    verdicts: list[dict[str, Any]],
    texts: dict[str, str],
    best: float,
) -> str:
    """A whole HTML page. Every foreign text is escaped; there is no script in it.

    best: the highest score of one constraint.
    """
    config = scores["config"]
    who = config["responses"]["path"] or config["generate"]["model"] or config["model"]["path"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{_e(scores['benchmark'])}: {_e(who)}</title><style>{_STYLE}</style>",
        f"<h1>{_e(scores['benchmark'])}</h1>",
        f"<p class=note>{_e(who)} · {scores['items']} items · {_e(scores['made_at'])}</p>",
        *(f"<p class=warn>{_e(line)}</p>" for line in _warnings(scores)),
        _table(scores["headline"], scores["scores"], "big"),
        "<p class=note>Percent (CSL: levels), bars and brackets: 95% intervals.</p>",
    ]
    for group, names in _groups(scores).items():
        parts += [f"<h2>{_e(group)}</h2>", _table(names, scores["scores"], "")]
    parts += ["<h2>Items</h2>", *_samples(items, verdicts, texts, best)]
    parts.append("<h2>How this was made</h2>")
    rows = {"data": scores["data"], "judge": _judge_line(scores), "responses": scores["responses"]}
    parts += [f"<p><b>{_e(k)}</b> {_e(_flat(v))}</p>" for k, v in rows.items() if v]
    return "\n".join(parts)


def _warnings(scores: dict[str, Any]) -> list[str]:
    counts = scores["responses"]
    lines = [
        f"{counts[key]} answers {text}"
        for key, text in (
            ("missing", "missing: scored as following nothing"),
            ("failed", "failed at the server: scored as following nothing"),
            ("empty", "empty: scored as following nothing"),
            ("cut_at_token_limit", "ended at the token limit"),
        )
        if counts[key]
    ]
    if scores["unparsed"]:
        lines.append(f"{scores['unparsed']} judgements could not be read; bounds are given")
    if not scores["data"]["known"]:
        lines.append("the data file is not the one we know; scores may not compare")
    return lines


def _judge_line(scores: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in scores["judge"].items() if k != "unparsed"}


def _groups(scores: dict[str, Any]) -> dict[str, list[str]]:
    """Metrics that are not headlines, by the part of their name before the first slash."""
    groups: dict[str, list[str]] = {}
    for metric in scores["scores"]:
        if metric not in scores["headline"]:
            head, slash, _ = metric.partition("/")
            groups.setdefault(head if slash else "other scores", []).append(metric)
    return {name: sorted(names, key=_natural) for name, names in groups.items()}


def _natural(metric: str) -> tuple[str, int, str]:
    head, _, rest = metric.partition("/")
    digits = rest.rstrip("+")
    return head, int(digits) if digits.isdigit() else 0, rest


def _table(names: list[str], scores: dict[str, dict[str, Any]], kind: str) -> str:
    rows = []
    for metric in names:
        entry = scores.get(metric)
        if entry is None:
            continue
        bar = "" if entry["value"] is None or metric.startswith("CSL") else _bar(entry)
        shown = metric if kind else metric.partition("/")[2] or metric  # the heading has the rest
        rows.append(
            f"<tr><td>{_e(shown)}<td>{bar}<td class=n>{number(metric, entry)}"
            f"<td class=n>{entry['n']}<td>{_e(_bounds(metric, entry))}"
        )
    head = "<tr><th>score<th><th class=n>value<th class=n>n<th>"
    return f"<table class='{kind}'>{head}{''.join(rows)}</table>"


def _bar(entry: dict[str, Any]) -> str:
    value, low, high = (max(0.0, min(1.0, entry[k])) * 200 for k in ("value", "low", "high"))
    return (
        "<svg width=200 height=14><rect width=200 height=14 fill='#eef1f5'/>"
        f"<rect width='{value:.1f}' height=14 fill='#7aa5d8'/>"
        f"<path d='M{low:.1f} 7H{high:.1f}M{low:.1f} 3v8M{high:.1f} 3v8' stroke='#1c2430'/></svg>"
    )


def _samples(
    items: list[Item], verdicts: list[dict[str, Any]], texts: dict[str, str], best: float
) -> list[str]:
    pairs = sorted(zip(items, verdicts, strict=True), key=lambda pair: _held(pair[1], best))
    shown = pairs[: SAMPLES // 2] + pairs[max(SAMPLES // 2, len(pairs) - SAMPLES // 2) :]
    out = [f"<p class=note>{len(shown)} of {len(items)}: worst and best. All: verdicts.jsonl.</p>"]
    for item, verdict in shown:
        marks = verdict.get("strict", verdict.get("scores"))
        held = _held(verdict, best)
        label = "unparsed" if marks is None else f"{100 * held:.0f}%"
        style = "ok" if held == 1 else "no"
        prompt = "\n\n".join(f"[{m['role']}] {m['content']}" for m in item.messages)
        shown_verdict = {k: v for k, v in verdict.items() if k != "replies"}
        out.append(
            f"<details><summary>{_e(item.id)} <span class={style}>{label}</span></summary>"
            f"<pre>{_e(_cut(prompt))}</pre><pre>{_e(_cut(texts.get(item.id, '')))}</pre>"
            f"<pre>{_e(_flat(shown_verdict))}</pre></details>"
        )
    return out


def _held(verdict: dict[str, Any], best: float) -> float:
    """Share of the best possible score, for sorting; -1 where nothing was read."""
    marks = verdict.get("strict", verdict.get("scores"))
    if not marks:
        return -1.0
    return sum(marks) / (best * len(marks))


def _cut(text: str) -> str:
    return text if len(text) <= CHARS else text[:CHARS] + f" ... ({len(text)} characters)"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_flat(v)}" for k, v in value.items())
    return str(value)


def _e(text: Any) -> str:
    return html.escape(str(text))
