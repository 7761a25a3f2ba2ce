"""One stage of a round, in a process of its own: `python -m iopo.rounds.stage sample|rows FOLDER`.

FOLDER is a round's, whose round.json says what to do; the driver writes it and starts the stages.
sample/   prompts.jsonl, responses.jsonl (appended to, so that a killed stage goes on), done.json
rows/     new.jsonl, train.jsonl (with those replayed), counts.json
"""

import json
import logging
import signal
import sys
import time
from pathlib import Path

from iopo.construct.responses import Sampler, endpoint_sampler, model_sampler, sample_all
from iopo.evaluation.config import EndpointSection
from iopo.evaluation.endpoint import EndpointError, RequestFailed
from iopo.files import read_records, write_records, write_text
from iopo.progress import show_messages
from iopo.redact import redact
from iopo.rounds.config import Round, round_folder
from iopo.rounds.prompts import (
    jobs_of,
    opposed,
    prompts_of,
    read_drawn,
    read_held,
    read_prompts,
    write_prompts,
)
from iopo.rounds.rows import make_rows, read_said, replayed
from iopo.rounds.server import ServerFailed, serving

SAMPLED, LABELLED = "done.json", "counts.json"  # the markers, written last
RETRIES = 2  # of one request to a server of our own: it is up, or it is not

log = logging.getLogger(__name__)


def sample(of: Round) -> None:
    """Draw the prompts and sample the responses to them, in process or from a server."""
    from iopo.model.load import load_tokenizer, resolve_model  # here: labels need no torch

    out = of.path("sample")
    out.mkdir(exist_ok=True)
    held = read_held(of.rounds, of.path().parent)
    found, dropped = read_prompts(of.rounds.prompts, held)
    seeds = prompts_of(found, held, of)
    write_prompts(out / "prompts.jsonl", seeds)
    jobs = {k: x for seed in seeds for k, x in jobs_of(seed, opposed(seed, held, of), of).items()}
    responses = out / "responses.jsonl"
    asked = (of.rounds.max_new_tokens, of.rounds.temperature)
    number = of.seed * 1000 + of.number  # rounds share no seed
    if of.rounds.command is None:
        sampler = model_sampler(of.policy, *asked, of.rounds.top_p, of.system)
        sample_all(jobs, responses, sampler, number)
    else:
        folder = str(resolve_model(of.policy.path or "").resolve())
        with serving(of.rounds.command, folder, out, of.rounds.serve_timeout_s) as (url, name):
            sample_all(jobs, responses, _of_server(of, url, name), number)
    rows = read_records(responses, torn_tail=True)
    tokenizer = load_tokenizer(resolve_model(of.policy.path or ""))
    sizes = [
        sum(len(tokenizer(row[key], add_special_tokens=False)["input_ids"]) for row in rows)
        for key in ("prompt", "text")
    ]
    done = {"prompts": len(seeds), "responses": len(rows), "prompt_tokens": sizes[0],
            "response_tokens": sizes[1], "prompts_left_out": dict(dropped)}  # fmt: skip
    write_text(out / SAMPLED, json.dumps(done, indent=1) + "\n")


def _of_server(of: Round, url: str, name: str) -> Sampler:
    extra: dict = {"top_p": of.rounds.top_p}
    if of.policy.template_options:
        extra["chat_template_kwargs"] = of.policy.template_options
    section = EndpointSection(
        url, name, timeout_s=of.rounds.serve_timeout_s, max_retries=RETRIES, extra=extra
    )
    return endpoint_sampler(section, of.rounds.max_new_tokens, of.rounds.temperature, of.system)


def rows(of: Round) -> None:
    """Label the responses and write the rows that the round trains on."""
    started = time.perf_counter()
    out, run = of.path("rows"), of.path().parent
    out.mkdir(exist_ok=True)
    seeds = read_drawn(of.path("sample", "prompts.jsonl"))
    said = read_said(read_records(of.path("sample", "responses.jsonl")))
    made, counts = make_rows(seeds, said, read_held(of.rounds, run), of)
    earlier = [
        row
        for number in range(1, of.number)
        for row in read_records(round_folder(run, number) / "rows" / "new.jsonl")
    ]
    again = replayed(made, earlier, of)
    write_records(out / "new.jsonl", made)
    write_records(out / "train.jsonl", [*made, *again])
    counts |= {"rows_replayed": len(again), "label_s": round(time.perf_counter() - started, 3)}
    write_text(out / LABELLED, json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
    log.info("%d new rows from %d prompts, %d replayed", len(made), len(seeds), len(again))


def main(arguments: list[str]) -> int:
    """The command, given a stage and the folder of its round; returns its exit code."""
    show_messages(sys.stdout)
    name, folder = arguments
    try:
        {"sample": sample, "rows": rows}[name](Round.read(Path(folder)))
    except (ValueError, OSError, EndpointError, RequestFailed, ServerFailed) as error:
        print(f"{name}: {redact(str(error))}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the server
    sys.exit(main(sys.argv[1:]))
