"""How often samples teach anything: `python -m iopo.rounds.signal --model demo --run runs/signal`.

To instructions with 1 to 5 constraints a model gives MOST answers, and to their opposites, with one
constraint replaced by one that excludes it, half as many. Code judges them. For each number of
constraints and of samples: the share of instructions that yield something to learn from, by method,
and how many do per 1,000 generated tokens. Smaller groups are parts of the MOST answers, each
answer in one of them. Only responses that answer count: a hollow one fails.

RUN has responses.jsonl, settings.json, signal.json, signal.md and signal.png; a killed run goes on.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from iopo import stats
from iopo.constraints import Constraint
from iopo.construct.ifseeds import IfSeedsRecipe
from iopo.construct.proposals import draw, sensible
from iopo.construct.quadruples import Candidate, follow, sides
from iopo.construct.relabel import Relabeller, RelabelRecipe
from iopo.construct.responses import Sampler, sample_all
from iopo.construct.tasks import Task, instruction, read_tasks
from iopo.data.rows import Pair
from iopo.files import read_records, write_text
from iopo.progress import show_messages, tracked
from iopo.rounds.rows import Labelled, label
from iopo.stats import Estimate, shown

COUNTS = (1, 2, 3, 4, 5)  # constraints an instruction
SIZES = (2, 4, 8, 16)  # samples
MOST = max(SIZES)
METHODS = {
    "grpo_all": "GRPO, all or nothing",
    "grpo_share": "GRPO, share of constraints",
    "best_worst": "DPO, best against worst",
    "follow": "quads by follow",
    "relabel": "quads by relabel",
}
Cells = dict[tuple[str, int], tuple[float, float]]  # method, samples -> share, tokens
SHARE, PER_1000, CARRIED = "share", "per_1000_tokens", "constraints_a_side"


@dataclass(frozen=True)
class Asked:
    """An instruction, and where a constraint has an opposite, the same with one replaced."""

    task: Task
    c1: tuple[Constraint, ...]
    c2: tuple[Constraint, ...] | None

    def jobs(self) -> dict[str, str]:
        """MOST samples of the instruction and half of it of the opposite, by key."""
        texts = [instruction(self.task, [c.render() for c in self.c1])]
        if self.c2 is not None:
            texts = sides(Candidate(self.task, self.c1, "", self.c2, "", "follow"))
        return {
            f"{self.task.digest}-{len(self.c1)}/{side}-{n}": text
            for side, text in enumerate(texts, 1)
            for n in range(MOST // side)
        }


@dataclass(frozen=True)
class Answer(Labelled):
    """A labelled response and its tokens."""

    tokens: int


def draw_asked(prompts: int, seed: int) -> list[Asked]:
    """So many tasks of the bank, each with the first 1 to 5 of five constraints."""
    tasks = read_tasks()
    if not 1 <= prompts <= len(tasks):
        raise ValueError(f"--prompts {prompts}: expected 1 to {len(tasks)}, the tasks of the bank")
    found = []
    for task in random.Random(seed).sample(tasks, prompts):
        rng = random.Random(f"{seed}/{task.digest}")
        drawn = tuple(draw(max(COUNTS), rng))
        for n in COUNTS:
            own = drawn[:n]
            others = [
                (*own[:place], other, *own[place + 1 :])
                for place, constraint in enumerate(own)
                for other in constraint.alternatives(rng)
            ]
            others = [side for side in others if sensible(side)]
            found.append(Asked(task, own, rng.choice(others) if others else None))
    return found


def judged(
    asked: Asked, rows: Mapping[str, Mapping[str, str]], count: Callable[[str], int]
) -> list[list[Answer]]:
    """The answers to the instruction and to its opposite. rows: by key, as in responses.jsonl."""
    found: list[list[Answer]] = [[], []]
    for key, prompt in asked.jobs().items():
        side = int(key.partition("/")[2][0]) - 1
        constraints = (asked.c1, asked.c2 or ())[side]
        said, ended = rows[key]["text"], rows[key]["finish_reason"] == "stop"
        made = label((said, ended), prompt, constraints)
        found[side].append(Answer(**vars(made), tokens=count(said)))
    return found


def pair_follows(asked: Asked, ones: Sequence[Answer], twos: Sequence[Answer]) -> bool:
    """Whether an answer to each instruction, wrong for the other one, makes a quad."""
    if asked.c2 is None:
        return False
    candidate = Candidate(asked.task, asked.c1, "", asked.c2, "", "follow")
    right = ([a.text for a in side if a.right] for side in (ones, twos))
    return any(isinstance(follow(candidate, *pair), Candidate) for pair in product(*right))


def of_instruction(
    asked: Asked, ones: Sequence[Answer], twos: Sequence[Answer], seed: int
) -> tuple[Cells, list[int]]:
    """By method and number of samples: the share of groups that teach something, and the tokens of
    a group; and the constraints of the two sides of the first quad by relabel, if there is one.

    A quad by relabel asks for as many constraints as the instruction, of answers that need not
    follow it; one by follow needs both instructions answered, each with half of the samples.
    """

    @cache
    def relabelled(i: int, j: int) -> list[int] | None:
        pair = Pair(f"{asked.task.digest}-{i}-{j}", asked.task.line, ones[i].text, ones[j].text)
        relabeller = Relabeller(RelabelRecipe(seed=seed, heldout_kinds=[]))
        row = relabeller.row(pair, asked.task, "train", len(asked.c1))
        return None if isinstance(row, str) else [len(row["c1"]), len(row["c2"])]

    def first_quad(group: range) -> list[int] | None:
        texts = {ones[i].text: i for i in group if not ones[i].hollow}
        found = (relabelled(i, j) for i, j in combinations(texts.values(), 2))
        return next((quad for quad in found if quad is not None), None)

    cells: Cells = {}
    for size in SIZES:
        taught: dict[str, list[bool]] = {method: [] for method in METHODS}
        tokens: dict[str, list[int]] = {method: [] for method in METHODS}
        for start in range(0, MOST, size):
            group = ones[start : start + size]
            right = [a.right for a in group]
            half = slice(start // 2, (start + size) // 2)
            two_sides = [*ones[half], *twos[half]]
            taught["grpo_all"].append(len(set(right)) > 1)
            taught["grpo_share"].append(len({a.share for a in group}) > 1)
            wrong = any(a.text for a in group if not a.right)  # a pair's answer is not empty
            taught["best_worst"].append(any(right) and wrong)
            taught["follow"].append(pair_follows(asked, ones[half], twos[half]))
            taught["relabel"].append(first_quad(range(start, start + size)) is not None)
            for method in METHODS:
                used = two_sides if method == "follow" else group
                tokens[method].append(sum(a.tokens for a in used))
        for method in METHODS:
            cells[method, size] = (float(np.mean(taught[method])), float(np.mean(tokens[method])))
    return cells, first_quad(range(MOST)) or []


def measure(
    found: Sequence[Asked],
    rows: Mapping[str, Mapping[str, str]],
    count: Callable[[str], int],
    seed: int,
) -> dict[str, Any]:
    """signal.json: by number of constraints, method and samples; intervals are over instructions.

    count: tokens of a text. per_1000_tokens: groups that teach something, by generated tokens.
    """
    of_count: dict[int, list[tuple[Cells, list[int]]]] = {n: [] for n in COUNTS}
    for asked in tracked(found, "instructions judged"):
        ones, twos = judged(asked, rows, count)
        of_count[len(asked.c1)].append(of_instruction(asked, ones, twos, seed))
    result: dict[str, Any] = {}
    for n, made in of_count.items():
        result[str(n)] = {
            method: {
                str(size): _cell(np.array([cells[method, size] for cells, _ in made]))
                for size in SIZES
            }
            for method in METHODS
        }
        if carried := [np.mean(numbers) for _, numbers in made if numbers]:
            result[str(n)]["relabel"][CARRIED] = stats.bootstrap(carried)
    return result


def _cell(values_N2: np.ndarray) -> dict[str, Estimate]:
    taught_N, tokens_N = values_N2.T
    n, total, per_1000 = len(taught_N), float(taught_N.sum()), 1000 / float(tokens_N.mean())
    if not 0 < total < n:  # all alike: nothing to resample
        share = stats.wilson(int(total), n)
        low, value, high = (per_1000 * share[end] for end in ("low", "value", "high"))
        return {SHARE: share, PER_1000: {"value": value, "low": low, "high": high, "n": n}}
    ratios_R = stats.resample(
        n, lambda index: 1000 * stats.ratios(taught_N, tokens_N, index), seed=0,
        resamples=stats.RESAMPLES,
    )  # fmt: skip
    per_1000 *= total / n
    return {SHARE: stats.bootstrap(taught_N), PER_1000: stats.interval(per_1000, ratios_R, n)}


def tables(result: Mapping[str, Any]) -> str:
    """signal.md."""
    titles = {
        SHARE: "Instructions that yield something to learn from, %",
        PER_1000: "Instructions that yield something, per 1,000 generated tokens",
    }
    lines = [f"{result['1']['relabel']['2'][SHARE]['n']} instructions for each n; 95 % intervals."]
    for what, title in titles.items():
        lines += ["", f"## {title}", ""]
        lines += ["| method | samples | " + " | ".join(f"n = {n}" for n in COUNTS) + " |"]
        lines += ["|---" * (2 + len(COUNTS)) + "|"]
        factor, digits = (100, 0) if what == SHARE else (1, 2)
        for method, name in METHODS.items():
            for size in SIZES:
                of_sizes = [result[str(n)][method][str(size)][what] for n in COUNTS]
                cells = " | ".join(shown(found, factor, digits) for found in of_sizes)
                lines.append(f"| {name} | {size} | {cells} |")
    carried = [result[str(n)]["relabel"].get(CARRIED) for n in COUNTS]
    cells = " | ".join("none" if found is None else shown(found, 1, 2) for found in carried)
    lines += ["", "## Constraints a side of a quad by relabel", ""]
    lines += ["| " + " | ".join(f"n = {n} wanted" for n in COUNTS) + " |", "|---" * 5 + "|"]
    return "\n".join([*lines, f"| {cells} |", ""])


def draw_picture(result: Mapping[str, Any], path: Path) -> None:
    """signal.png: a column of panels for each number of constraints, samples along each."""
    from matplotlib.figure import Figure  # here: a start would wait for it

    figure = Figure(figsize=(14, 6))
    panels = figure.subplots(2, len(COUNTS), sharex=True, sharey="row")
    for column, n in enumerate(COUNTS):
        for axes, (what, factor) in zip(
            panels[:, column], ((SHARE, 100), (PER_1000, 1)), strict=True
        ):
            for number, (method, name) in enumerate(METHODS.items()):
                found = [result[str(n)][method][str(size)][what] for size in SIZES]
                low, value, high = (
                    factor * np.array([cell[key] for cell in found])  # type: ignore[literal-required]
                    for key in ("low", "value", "high")
                )
                at = np.array(SIZES) * 2 ** (0.06 * (number - 2))  # bars side by side
                style = "--" if method == "best_worst" else "-"
                errors = np.maximum(0, [value - low, high - value])
                axes.errorbar(
                    at, value, errors, fmt=f"o{style}", label=name, capsize=2, ms=4, lw=1.2
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(SIZES, [str(size) for size in SIZES])
            axes.spines[["top", "right"]].set_visible(False)
        panels[0, column].set_title(f"{n} constraint{'s' * (n > 1)}", fontsize=10)
        panels[1, column].set_xlabel("samples an instruction", fontsize=9)
    for axes in panels[:, 0]:  # once all is drawn: it ends the search for the top
        axes.set_ylim(bottom=0)
    panels[0, 0].set_ylabel("yield something, %", fontsize=9)
    panels[1, 0].set_ylabel("per 1,000 generated tokens", fontsize=9)
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=len(METHODS), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def run(
    folder: Path, settings: Mapping[str, Any], sampler: Sampler, count: Callable[[str], int]
) -> str:
    """Sample what is missing, judge, and write everything into the folder; returns the tables.

    settings: prompts and seed, and whatever else changes the answers. Raises ValueError if the
    folder holds answers of other settings.
    """
    kept, text = folder / "settings.json", json.dumps(settings, indent=1) + "\n"
    if kept.exists() and kept.read_text() != text:
        raise ValueError(
            f"{kept}: the answers in {folder} were made with other settings: "
            f"{kept.read_text().strip()}; expected {text.strip()}; choose another --run"
        )
    found = draw_asked(settings["prompts"], settings["seed"])
    stats.scipy_stats()
    jobs = {key: prompt for asked in found for key, prompt in asked.jobs().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(kept, text)
    responses = folder / "responses.jsonl"
    sample_all(jobs, responses, sampler, settings["seed"])
    rows = {row["key"]: row for row in read_records(responses)}
    result = measure(found, rows, count, settings["seed"])
    write_text(folder / "signal.json", json.dumps({**settings, "signal": result}, indent=1) + "\n")
    write_text(folder / "signal.md", tables(result))
    draw_picture(result, folder / "signal.png")
    return tables(result)


def token_counter(model: str) -> Callable[[str], int]:
    """Tokens of an answer, its end of turn included, by the model's tokenizer."""
    from iopo.model.load import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model(model))
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="model folder, hub id or demo")
    parser.add_argument("--run", type=Path, default=Path("runs/signal"), help="folder to write to")
    parser.add_argument("--prompts", type=int, default=48, help="tasks, each asked with 1 to 5")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    show_messages(sys.stdout)
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    try:
        recipe = IfSeedsRecipe(
            model_path=args.model, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, top_p=args.top_p,
        )  # fmt: skip
        print(run(args.run, settings, recipe.sampler(), token_counter(args.model)))
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.run}/signal.json, signal.md, signal.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
