"""Sampled responses to prompts, kept in a JSONL cache that a killed run continues."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from iopo.evaluation.config import EndpointSection, ModelSection
from iopo.evaluation.endpoint import Endpoint, Request, run_together
from iopo.evaluation.responses import load_chat, load_model
from iopo.files import HALF_PAIR, Journal, read_records
from iopo.progress import progress

log = logging.getLogger(__name__)
SEEDS_APART = 1_000_003  # chunks of different seeds share no seed of their own below this many jobs
CHUNK = 50  # jobs that are generated, and appended to the cache, together


# A sampler takes prompts and a seed and returns (text, finish_reason) for each.
Sampler = Callable[[Sequence[str], int], list[tuple[str, str]]]


def sample_all(
    jobs: Mapping[str, str], file: Path, sampler: Sampler, seed: int = 0
) -> dict[str, tuple[str, bool]]:
    """Answer every job (key -> prompt), from the cache `file` or by appending to it.

    Jobs are answered in fixed chunks, each with a seed of its own that depends on (seed, chunk), so
    a run that was killed and continued writes what an unbroken run writes. Returns key -> response,
    and whether it ended by itself: at the token limit it is cut off. Whether the same model and
    settings made the file is the caller's to check. Raises ValueError if the file answers another
    prompt under a job's key.
    """
    # a last line without its line break is what a kill leaves
    cached = read_records(file, torn_tail=True) if file.exists() else []
    done = {row["key"]: row for row in cached}
    for key, prompt in jobs.items():
        if key in done and done[key]["prompt"] != prompt:
            raise ValueError(
                f"{file}: response {key!r} answers {done[key]['prompt']!r}, expected {prompt!r}; "
                "the tasks changed, so start a new cache file"
            )
    if missing := len(jobs.keys() - done.keys()):  # a complete cache is only read
        log.info("%d of %d responses to sample, %d at a time", missing, len(jobs), CHUNK)
        with Journal(file) as journal:
            for start in range(0, len(jobs), CHUNK):
                chunk = list(jobs)[start : start + CHUNK]
                if all(key in done for key in chunk):
                    continue
                answers = sampler([jobs[key] for key in chunk], seed * SEEDS_APART + start)
                rows = [
                    {"key": key, "prompt": jobs[key], "text": text, "finish_reason": reason}
                    for key, (text, reason) in zip(chunk, answers, strict=True)
                    if key not in done
                ]
                journal.append(*rows)
                done.update((row["key"], row) for row in rows)
                log.info("sampled %d of %d", min(start + CHUNK, len(jobs)), len(jobs))
    return {key: (done[key]["text"], done[key].get("finish_reason") == "stop") for key in jobs}


def model_sampler(
    section: ModelSection,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    system: str | None = None,
) -> Sampler:
    """A sampler over a causal LM in process.

    The model, and torch with it, is loaded at the first prompt: with a full cache none is needed.
    """

    @cache
    def loaded() -> tuple[Any, Any]:
        return load_model(section), load_chat(section, system)

    def sampler(prompts: Sequence[str], seed: int) -> list[tuple[str, str]]:
        if section.path is None:
            raise ValueError(
                f"the cache lacks responses to {prompts[0]!r} and others; name a model that "
                "writes them: recipe.model_path=demo"
            )
        from iopo.model.generate import Decoding, generate

        model, chat = loaded()
        decoding = Decoding(max_new_tokens, temperature, top_p, batch_size=CHUNK, seed=seed)
        asked = [chat.messages(prompt) for prompt in prompts]
        with progress(len(prompts), "responses") as show:
            answers = generate(model, chat, asked, decoding, lambda done, _: show(done))
        return [(answer.text.strip(), answer.finish_reason) for answer in answers]

    return sampler


def endpoint_sampler(
    section: EndpointSection, max_tokens: int, temperature: float, system: str | None = None
) -> Sampler:
    """A sampler over an OpenAI-compatible server (extra `eval`).

    It raises EndpointError and RequestFailed; what was sampled before is kept, so the same command
    goes on from there.
    """
    first = () if system is None else ({"role": "system", "content": system},)

    def sampler(prompts: Sequence[str], seed: int) -> list[tuple[str, str]]:
        async def ask_all() -> list[tuple[str, str]]:
            endpoint = Endpoint(section)
            found: dict[int, tuple[str, str]] = {}

            async def ask(n: int, prompt: str) -> None:
                messages = (*first, {"role": "user", "content": prompt})
                asked = Request(
                    endpoint.model, messages, temperature, max_tokens, seed + n, section.extra
                )
                reply = await endpoint.ask(asked)
                text = HALF_PAIR.sub("\ufffd", reply.text)  # else rows of it would have no hash
                found[n] = (text.strip(), reply.finish_reason)

            try:
                await run_together([ask(n, prompt) for n, prompt in enumerate(prompts)])
            finally:
                await endpoint.close()
            return [found[n] for n in range(len(prompts))]

        return asyncio.run(ask_all())

    return sampler
