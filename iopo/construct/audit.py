"""Constraints that prompts carry in their rows, and how often the sides of a pair follow them."""

import ast
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iopo import stats
from iopo.constraints import Constraint, follows, from_dict, from_function, from_id
from iopo.construct import importers, in_blocks
from iopo.data.rows import Pair
from iopo.files import iter_records, write_text

log = logging.getLogger(__name__)
OUTCOMES = ("both", "chosen only", "rejected only", "neither")
ALL = "all constraints"


COLUMNS = "ground_truth, instruction_id_list and kwargs, or constraints with kind and params"
Checks = dict[str, list[Constraint]]  # by id, function or kind; all of one entry must hold


def constraints_of(row: Mapping[str, Any]) -> Checks:
    """The constraints of a row of RLVR-IFeval, IF_multi_constraints, IFEval or our own form.

    An id that occurs twice is numbered. `ground_truth` is read as data, JSON or Python's literals,
    and never run. Raises ValueError without such columns and for what cannot be read.
    """
    found: list[tuple[str, list[Constraint]]]
    if (truth := row.get("ground_truth")) is not None:
        found = _from_truth(truth)
    elif isinstance(row.get("instruction_id_list"), list):
        found = _from_ids(row["instruction_id_list"], row.get("kwargs"))
    elif isinstance(given := row.get("constraints"), list) and all(
        isinstance(c, dict) for c in given
    ):
        found = [(str(c.get("kind")), [from_dict(c)]) for c in given]
    else:
        raise ValueError(f"no constraints that code can check: expected {COLUMNS}")
    if not found:
        raise ValueError("no constraints in it")
    checks: Checks = {}
    for name, made in found:
        same = sum(key.partition("#")[0] == name for key in checks)
        checks[f"{name}#{same + 1}" if same else name] = made
    return checks


def _from_truth(truth: Any) -> list[tuple[str, list[Constraint]]]:
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except ValueError:
            try:
                truth = ast.literal_eval(truth)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise ValueError(f"ground_truth is neither JSON nor a literal ({error})") from error
    if isinstance(truth, dict) and isinstance(truth.get("func_name"), str):
        name = truth["func_name"]
        return [(name, from_function(name, {k: v for k, v in truth.items() if k != "func_name"}))]
    entries = truth if isinstance(truth, list) else [truth]
    if not all(isinstance(entry, dict) and "instruction_id" in entry for entry in entries):
        raise ValueError("ground_truth names neither func_name nor instruction_id")
    return [pair for e in entries for pair in _from_ids(e["instruction_id"], e.get("kwargs"))]


def _from_ids(ids: Any, kwargs: Any) -> list[tuple[str, list[Constraint]]]:
    if not (isinstance(ids, list) and isinstance(kwargs, list) and len(ids) == len(kwargs)):
        raise ValueError("expected a list of ids and as many kwargs")
    return [(name, from_id(name, given)) for name, given in zip(ids, kwargs, strict=True)]


def kind_of(name: str) -> str:
    """The id without the number of its occurrence."""
    return name.partition("#")[0]


def verdicts(checks: Checks, text: str) -> dict[str, bool]:
    """Whether a text follows the constraints of each entry."""
    return {name: all(follows(made, text)) for name, made in checks.items()}


@dataclass
class AuditRecipe:
    """What may be set of the recipe `audit` (conf/recipe/audit.yaml)."""

    name: str = "audit"
    source: str | None = None  # pairs, with constraints in columns of constraints_of
    out: str = "runs/audit"


def audit(recipe: AuditRecipe) -> str:
    """Check both sides of every row; write audit.json and audit.png; returns the table.

    Raises ValueError on a source that is not set or holds no row with checkable constraints.
    """
    if recipe.source is None:
        raise ValueError("recipe.source is not set; expected pairs whose rows carry constraints")
    counts: dict[str, Counter[str]] = {ALL: Counter()}
    skipped: Counter[str] = Counter()
    for block in in_blocks(_audit_block, _rows(recipe.source)):
        for found in block:
            if isinstance(found, str):
                skipped[found] += 1
                continue
            for name, outcome in found:
                counts.setdefault(name, Counter())[outcome] += 1
    n = counts[ALL].total()
    if not n:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in skipped.most_common(3))
        raise ValueError(f"{recipe.source}: no row can be audited ({reasons})")
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    named = {ALL: counts.pop(ALL)} | dict(sorted(counts.items(), key=lambda kv: -kv[1].total()))
    result = {
        "source": recipe.source,
        "rows": n,
        "skipped": dict(skipped.most_common()),
        "kinds": {name: _shares(found) for name, found in named.items()},
    }
    write_text(out / "audit.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    draw(out / "audit.png", named)
    log.info("written: %s/audit.json, audit.png", out)
    return _table(named, skipped)


def _rows(source: str) -> Iterator[Any]:
    """The rows of a source, None for each that cannot be read, which is named."""
    for place, row, fault in iter_records(source):
        if fault is not None:
            log.warning("%s: skipped: %s", place, fault)
        yield row if fault is None else None


def _audit_block(_: int, rows: list[Any]) -> list[list[tuple[str, str]] | str]:
    return [_audited(row) for row in rows]


def _audited(row: Any) -> list[tuple[str, str]] | str:
    """(kind, outcome) of every constraint of a row and of all together, or why there are none."""
    if not isinstance(row, dict):
        return "cannot be read"
    pair = importers.pair_of(row)
    if not isinstance(pair, Pair):
        return pair
    try:
        checks = constraints_of(row)
    except ValueError as error:
        return str(error).partition(": bad arguments")[0][:200]
    sides = [verdicts(checks, text) for text in (pair.chosen, pair.rejected)]
    found = [(kind_of(name), _outcome(*(side[name] for side in sides))) for name in checks]
    return [(ALL, _outcome(*(all(side.values()) for side in sides))), *found]


def _outcome(chosen: bool, rejected: bool) -> str:
    return OUTCOMES[2 * (not chosen) + (not rejected)]


def _shares(found: Counter[str]) -> dict[str, Any]:
    n = found.total()
    chosen = found["both"] + found["chosen only"]
    rejected = found["both"] + found["rejected only"]
    shares = {outcome: found[outcome] / n for outcome in OUTCOMES}
    sides = {"chosen": stats.wilson(chosen, n), "rejected": stats.wilson(rejected, n)}
    return {"n": n, **shares, **sides}


def _table(named: dict[str, Counter[str]], skipped: Counter[str]) -> str:
    lines = [
        f"| constraints | n | chosen follows | rejected follows | {' | '.join(OUTCOMES)} |",
        "|---|---|---|---|" + "---|" * len(OUTCOMES),
    ]
    for name, found in named.items():
        shares = _shares(found)
        sides = [
            "{:.1%} [{:.1%}, {:.1%}]".format(*(shares[side][k] for k in ("value", "low", "high")))
            for side in ("chosen", "rejected")
        ]
        cells = [f"{shares[outcome]:.1%}" for outcome in OUTCOMES]
        lines.append(f"| {' | '.join([name, str(shares['n']), *sides, *cells])} |")
    lines += [f"skipped, {reason}: {count}" for reason, count in skipped.most_common()]
    return "\n".join(lines)


def draw(path: Path, named: dict[str, Counter[str]]) -> None:
    """A bar for each kind, parted by outcome."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.35 * len(named) + 1.5), layout="constrained")
    axes = figure.subplots()
    colours = ("#2e7d32", "#90c695", "#e0a458", "#b23a48")
    places = range(len(named))
    left = [0.0] * len(named)
    for outcome, colour in zip(OUTCOMES, colours, strict=True):
        widths = [100 * found[outcome] / found.total() for found in named.values()]
        axes.barh(places, widths, left=left, color=colour, label=outcome)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    labels = [f"{name} ({found.total()})" for name, found in named.items()]
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of rows whose answers follow their constraints")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8)
    figure.savefig(path, dpi=120)
