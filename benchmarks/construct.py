"""Relabelling and verifying a preference set: rows per second and core, and peak memory.

python -m benchmarks.construct [--rows 100000] [--words 90 250] [--json FILE]

Both use all cores; seconds of the processor are those of all processes.

The pairs are synthetic: sentences of a small vocabulary, some with lists, headings, questions and
marks, so that most kinds occur. Writing them is not timed. Verifying reads the quads just made.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import peak_gb, reset_peak, write_json
from iopo.construct.relabel import RelabelRecipe, relabel_file
from iopo.construct.verify import verify

_NOUNS = (
    "river garden teacher village engine letter market window kitchen mountain doctor bridge "
    "library station morning winter forest harbour painter orchestra machine student island "
    "journey question answer story colour picture voyage captain farmer valley castle"
).split()
_VERBS = "keeps finds builds paints repairs follows describes remembers opens carries".split()
_OTHERS = (
    "quiet famous ancient gentle narrow bright curious patient distant useful careful splendid "
    "modern wooden silver crowded empty honest"
).split()


def sentence(rng: random.Random) -> str:
    """Seven to twenty words that mean little."""
    parts = [f"the {rng.choice(_OTHERS)} {rng.choice(_NOUNS)} {rng.choice(_VERBS)}"]
    parts += [f"a {rng.choice(_OTHERS)} {rng.choice(_NOUNS)}" for _ in range(rng.randint(1, 3))]
    joint = rng.choice((", ", " and ", " near "))
    return joint.join(parts).capitalize() + rng.choice((".", ".", ".", "!", "?"))


def response(rng: random.Random, words: int) -> str:
    """About so many words: prose, paragraphs, a list, or highlighted prose."""
    sentences = []
    size = 0
    wanted = rng.randint(words // 2, 3 * words // 2)
    while size < wanted:
        sentences.append(sentence(rng))
        size += len(sentences[-1].split())
    form = rng.random()
    if form < 0.15:
        return "\n".join(f"- {s}" for s in sentences)
    if form < 0.3:
        return "\n".join(f"{n}. {s}" for n, s in enumerate(sentences, 1))
    if form < 0.5:
        middle = len(sentences) // 2
        return " ".join(sentences[:middle]) + "\n\n" + " ".join(sentences[middle:])
    if form < 0.6:
        return " ".join(sentences).replace("river", "**river**")
    return " ".join(sentences)


def write_pairs(path: Path, rows: int, *words: int) -> int:
    """Write the pairs, their lengths in turn; returns the bytes written."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            noun, verb = rng.choice(_NOUNS), rng.choice(_VERBS)
            row = {
                "prompt": f"Tell me what a {rng.choice(_OTHERS)} {noun} {verb}, case {number}.",
                "chosen": response(rng, words[number % len(words)]),
                "rejected": response(rng, words[number % len(words)]),
            }
            file.write(json.dumps(row) + "\n")
    return path.stat().st_size


def cpu_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def measure(rows: int, words: Sequence[int], folder: Path) -> dict[str, float | int]:
    """Wall and processor seconds of both passes, and the most memory held by all processes."""
    size = write_pairs(folder / "pairs.jsonl", rows, *words)
    reset_peak()
    recipe = RelabelRecipe(source=str(folder / "pairs.jsonl"), out=str(folder))
    start, start_cpu = time.perf_counter(), cpu_s()
    made = relabel_file(recipe)
    middle, middle_cpu = time.perf_counter(), cpu_s()
    files = [folder / f"{split}.jsonl" for split in ("train", "heldout", "heldout_kinds")]
    violations, summary = verify(files)
    end, end_cpu = time.perf_counter(), cpu_s()
    child_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest
    if violations:
        raise RuntimeError(f"verify found {len(violations)} faults, first: {violations[0]}")
    return {
        "rows": rows,
        "input_mb": round(size / 1e6, 1),
        "quads": summary.rows,
        "skipped": sum(made["dropped"].values()),
        "relabel_cpu_s": round(middle_cpu - start_cpu, 2),
        "verify_cpu_s": round(end_cpu - middle_cpu, 2),
        "wall_s": round(end - start, 2),
        "rows_per_cpu_s": round(rows / (end_cpu - start_cpu)),
        "rows_per_wall_s": round(rows / (end - start)),
        "relabel_rows_per_cpu_s": round(rows / (middle_cpu - start_cpu)),
        "verify_rows_per_cpu_s": round(summary.rows / (end_cpu - middle_cpu)),
        "peak_gb": round(peak_gb() + len(os.sched_getaffinity(0)) * child_gb, 3),
        "relabel_wall_s": round(middle - start, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="pairs")
    parser.add_argument("--words", type=int, nargs="+", default=[90], help="words in a response")
    parser.add_argument("--json", type=Path, default=None, help="file for the result")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.rows, options.words, Path(folder))
    for name, value in found.items():
        print(f"{name:<24} {value}")
    write_json(options.json, found)


if __name__ == "__main__":
    main()
