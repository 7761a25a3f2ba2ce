"""Sampled responses to the bank's tasks, kept in a JSONL cache that a killed run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from iopo.construct.tasks import Task
from iopo.files import read_records

# What is asked after the bare task, so that answers are short and of unequal length. It is a means
# of sampling: instructions of quads do not contain it.
HINTS = (
    "Answer in one or two short sentences.",
    "Answer in three short sentences.",
    "Answer in about four sentences.",
    "Keep the answer under fifty words.",
)
SEEDS_APART = 1_000_003  # chunks of different seeds share no seed of their own below this many jobs
CHUNK = 50  # jobs that are generated, and appended to the cache, together


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to answer. `key` names it in the cache and is unique."""

    key: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Response:
    key: str
    prompt: str
    text: str
    finish_reason: str


# A sampler takes prompts and a seed and returns (text, finish_reason) for each.
Sampler = Callable[[Sequence[str], int], list[tuple[str, str]]]


def bare_jobs(tasks: Sequence[Task], samples_per_task: int) -> list[Job]:
    """The bare tasks, each `samples_per_task` times, with the hints in turn."""
    return [
        Job(f"{task.digest}-{n}", f"{task.description} {HINTS[n % len(HINTS)]}{_input_lines(task)}")
        for n in range(samples_per_task)
        for task in tasks
    ]


def _input_lines(task: Task) -> str:
    return "" if task.input is None else f"\n# Inputs:\n{task.input}"


def sample_all(
    jobs: Sequence[Job],
    cache: Path,
    sampler: Sampler,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Response]:
    """Answer every job, reading answered ones from `cache` and appending the others to it.

    Jobs are answered in fixed chunks, each with a seed of its own that depends on (seed, chunk), so
    a run that was killed and continued writes what an unbroken run writes. Returns key -> response.
    Raises ValueError if the cache answers another prompt under a job's key.
    """
    done = read_cache(cache)
    for job in jobs:
        if job.key in done and done[job.key].prompt != job.prompt:
            raise ValueError(
                f"{cache}: response {job.key!r} answers {done[job.key].prompt!r}, expected "
                f"{job.prompt!r}; the tasks changed, so start a new cache file"
            )
    jobs = list({job.key: job for job in jobs}.values())
    for start in range(0, len(jobs), CHUNK):
        chunk = jobs[start : start + CHUNK]
        if all(job.key in done for job in chunk):
            continue
        answers = sampler([job.prompt for job in chunk], seed * SEEDS_APART + start)
        rows = [
            Response(job.key, job.prompt, text, reason)
            for job, (text, reason) in zip(chunk, answers, strict=True)
        ]
        append_cache(cache, [row for row in rows if row.key not in done])
        done.update((row.key, row) for row in rows if row.key not in done)
        if on_progress is not None:
            on_progress(min(start + CHUNK, len(jobs)), len(jobs))
    return {job.key: done[job.key] for job in jobs}


def read_cache(path: Path) -> dict[str, Response]:
    """Responses by key. A last line without its line break is what a kill leaves: it is ignored."""
    if not path.exists():
        return {}
    rows = [Response(**row) for row in read_records(path, torn_tail=True)]
    return {row.key: row for row in rows}


def append_cache(path: Path, rows: Sequence[Response]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):  # cut the torn line off before appending
            os.truncate(path, content.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def transformers_sampler(
    path: str, *, max_new_tokens: int, temperature: float, top_p: float
) -> Sampler:
    """A sampler over a causal LM in process: a folder, a hub id or `demo` (resolve_model).

    torch is imported here and not above: with a full cache nothing needs it.
    """
    import torch

    from iopo.data.chat import Chat
    from iopo.model.generate import Decoding, generate
    from iopo.model.load import default_dtype, load_causal_lm, load_tokenizer, resolve_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve_model(path)
    model = load_causal_lm(folder, default_dtype(device))
    torch.nn.Module.to(model, device)
    chat = Chat(load_tokenizer(folder))

    def sampler(prompts: Sequence[str], seed: int) -> list[tuple[str, str]]:
        decoding = Decoding(max_new_tokens, temperature, top_p, batch_size=CHUNK, seed=seed)
        answers = generate(model, chat, [chat.messages(prompt) for prompt in prompts], decoding)
        return [(answer.text.strip(), answer.finish_reason) for answer in answers]

    return sampler
