"""What a round asks, and the rows that responses become, by the kind of row."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_judge import Answer, StubServer

from iopo.constraints import follows, from_dict, make
from iopo.construct.ifseeds import Seed
from iopo.construct.quadruples import MATCH, four_cells, sides
from iopo.construct.responses import endpoint_sampler, sample_all
from iopo.construct.tasks import Task, instruction
from iopo.construct.verified import split_of
from iopo.construct.verify import verify
from iopo.data.rows import read_rows
from iopo.evaluation.config import EndpointSection, ModelSection
from iopo.files import read_records, write_records
from iopo.rounds import prompts
from iopo.rounds.config import Round, RoundsConfig
from iopo.rounds.rows import label, make_rows, replayed

DATA = Path(__file__).resolve().parents[2] / "data/verified"
SETS = Path(__file__).resolve().parents[1] / "fixtures/sets"
# Answers, each with the constraints that it follows by itself
PLAIN = "The town is small and the people like it. You will find that the sea is cold."
QUIET = "It is a good day for you and for all of us. We will see the garden in the morning"
LONG = "We have been to the house, and it was old. They were in the garden, for it was warm."


def a_round(kind: str, **options) -> Round:
    section = RoundsConfig(**{"prompts_per_round": 6, "samples": 4} | options)
    return Round("unused", 1, kind, 0, ModelSection("unused"), None, section)


def a_seed(*constraints, name="r1-00000") -> Seed:
    task = Task("Tell me about the town by the sea.")
    text = instruction(task, [c.render() for c in constraints])
    return Seed(name, text, {c.kind: [c] for c in constraints}, task)


def said(seed: Seed, *texts: str, ended=True):
    return {f"{seed.id}/1-{n}": (text, ended) for n, text in enumerate(texts)}


NO_COMMAS = make("commas", relation="exactly", number=0)
TWO = make("sentences", relation="exactly", number=2)


def test_a_pair_is_a_right_response_over_the_one_that_follows_least():
    seed = a_seed(NO_COMMAS, TWO)
    one = LONG.replace(". They", "; they")  # neither
    rows, counts = make_rows(
        [seed], said(seed, LONG, PLAIN, one, PLAIN), prompts.Held(), a_round("pair")
    )
    assert [(r["x"], r["chosen"], r["rejected"]) for r in rows] == [(seed.prompt, PLAIN, one)]
    assert (counts["follow_and_answer"], counts["responses"], counts["rows_new"]) == (2, 4, 1)
    for texts, why in (([PLAIN] * 4, "are 1"), ([LONG] * 4, "are 0"), ([""] * 4, "are 0")):
        rows, counts = make_rows([seed], said(seed, *texts), prompts.Held(), a_round("pair"))
        assert rows == [] and counts["outcomes"] == {f"pair: all rewards {why}": 1}
    none_right = said(seed, one, LONG, "Town, sea.", one)
    assert not make_rows([seed], none_right, prompts.Held(), a_round("pair"))[0]
    rows, _ = make_rows([seed], none_right, prompts.Held(), a_round("pair", reward="share"))
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(LONG, one)]


def test_a_hollow_response_counts_as_failing():
    seed = a_seed(NO_COMMAS)
    hollow = "Town. Sea."  # follows, and says nothing
    assert label((hollow, True), seed.prompt, [NO_COMMAS]).follows == (True,)
    texts = said(seed, hollow, PLAIN, hollow, LONG)
    (row,), counts = make_rows([seed], texts, prompts.Held(), a_round("group"))
    assert row["rewards"] == [0.0, 1.0, 0.0, 0.0] and row["responses"][0] == hollow
    assert (counts["follow"], counts["answer"], counts["follow_and_answer"]) == (3, 2, 1)
    rows, _ = make_rows([seed], said(seed, *[hollow] * 4), prompts.Held(), a_round("sft"))
    assert rows == []
    cut = make_rows([seed], said(seed, *[PLAIN] * 4, ended=False), prompts.Held(), a_round("sft"))
    assert cut[0] == [], "a response that was cut off is hollow"


def test_the_reward_is_all_or_the_share_of_constraints():
    seed = a_seed(NO_COMMAS, TWO)
    texts = said(seed, PLAIN, LONG, LONG, PLAIN)
    for reward, expected in (("all", [1, 0, 0, 1]), ("share", [1, 0.5, 0.5, 1])):
        (row,), _ = make_rows([seed], texts, prompts.Held(), a_round("group", reward=reward))
        assert row["rewards"] == expected
    rows, counts = make_rows([seed], said(seed, *[LONG] * 4), prompts.Held(), a_round("group"))
    assert rows == [] and counts["outcomes"] == {"group: all rewards are 0": 1}


def test_sft_takes_each_right_response_once():
    seed = a_seed(NO_COMMAS)
    rows, counts = make_rows(
        [seed], said(seed, PLAIN, PLAIN, QUIET, LONG), prompts.Held(), a_round("sft")
    )
    assert [row["y"] for row in rows] == [PLAIN, QUIET] and len({row["id"] for row in rows}) == 2
    assert counts["by_kind"]["commas"] == {"asked": 4, "followed": 3}
    assert counts["by_constraints"]["1"]["with_rows"] == 1


@pytest.mark.parametrize("kind", ["pair", "sft", "quad"])
def test_half_of_a_surrogate_pair_from_a_server_is_replaced(kind, tmp_path):
    """It is not valid text: a row of it would have no id."""
    seed, of = a_seed(NO_COMMAS), a_round(kind)
    pair = prompts.opposed(seed, prompts.Held(), of)
    jobs = prompts.jobs_of(seed, pair, of)
    texts = [f"{LONG} \ud83d", f"{QUIET} \ud83d", f"{PLAIN} \ud83d", PLAIN]
    with StubServer(lambda body, _: Answer(texts[body["seed"] % 4])) as server:
        sampler = endpoint_sampler(EndpointSection(server.base_url, "m", max_retries=0), 64, 1.0)
        found = sample_all(jobs, tmp_path / "responses.jsonl", sampler)
    assert {text for text, _ in found.values()} == {t.replace("\ud83d", "\ufffd") for t in texts}
    rows, _ = make_rows([seed], found, prompts.Held(), of)
    assert any("\ufffd" in str(row) for row in rows)


def test_quads_come_from_followed_answers_first_and_from_the_others_by_measuring(tmp_path):
    of = a_round("quad")
    seed = a_seed(NO_COMMAS)
    pair = prompts.opposed(seed, prompts.Held(), of)
    assert pair is not None and pair.c2[0].kind == "commas"
    (other,) = pair.c2
    comma = next(t for t in (LONG, LONG + " It is warm, cold, and blue.") if other.check(t))
    texts = {f"{seed.id}/1-{n}": (text, True) for n, text in enumerate((PLAIN, QUIET + "."))}
    texts |= {f"{seed.id}/2-{n}": (text, True) for n, text in enumerate((comma, "Sea."))}
    rows, counts = make_rows([seed], texts, prompts.Held(), of)
    assert counts["by_source"]["follow"] == 1 and counts["outcomes"]["follow: accepted"] == 1
    follow = next(row for row in rows if row["source"] == "follow")
    assert {follow["y1"], follow["y2"]} == {PLAIN, comma} and follow["x1"] == sides(pair)[0]
    # of the rest only one answers, and a quad needs two
    assert counts["outcomes"]["relabel: fewer than two answers"] == 1
    # where nothing was followed, two answers are measured
    texts = {
        key: (text, True)
        for key, text in zip(texts, (LONG, PLAIN, "Sea.", QUIET + "."), strict=True)
    }
    texts[f"{seed.id}/1-1"] = ("Sea.", True)
    rows, counts = make_rows([seed], texts, prompts.Held(), of)
    assert [row["source"] for row in rows] == ["relabel"]
    for row in rows:
        c1, c2 = ([from_dict(c) for c in row[c]] for c in ("c1", "c2"))
        assert four_cells(c1, row["y1"], c2, row["y2"]) == MATCH
        assert row["round"] == 1 and row["prompt_id"] == seed.id
    write_records(tmp_path / "new.jsonl", rows)
    assert verify([tmp_path / "new.jsonl"])[0] == []
    assert len(read_rows(tmp_path / "new.jsonl")) == 1


def test_no_quad_asks_for_what_is_held_out():
    of, seed = a_round("quad"), a_seed(NO_COMMAS)
    texts = {f"{seed.id}/{s}-{n}": (t, True) for s, n, t in
             ((1, 0, LONG), (1, 1, PLAIN), (2, 0, QUIET + "."), (2, 1, "Sea."))}  # fmt: skip
    rows, _ = make_rows([seed], texts, prompts.Held(), of)
    kinds = {c["kind"] for row in rows for c in prompts.asked(row)}
    values = frozenset(prompts.value_of(c) for row in rows for c in prompts.asked(row))
    assert rows and kinds
    again, counts = make_rows([seed], texts, prompts.Held(values=values), of)
    assert not {prompts.value_of(c) for row in again for c in prompts.asked(row)} & values
    assert any("held-out" in why for why in counts["outcomes"])


def test_parameters_that_are_null_ask_for_nothing(tmp_path):
    """A column of Parquet has those of all kinds in every row."""
    rows = read_records(DATA / "heldout.jsonl")
    names = {name for row in rows for c in prompts.asked(row) for name in c["params"]}
    for row in rows:
        for c in prompts.asked(row):
            c["params"] = dict.fromkeys(names) | c["params"]
    write_records(tmp_path / "heldout.jsonl", rows)
    held, given = (
        (prompts.held_of(rounds, of), [row["split"] for row in of])
        for source in (DATA, tmp_path)
        for rounds in [RoundsConfig(heldout=[str(source / "heldout.jsonl")],
                                    seen=str(DATA / "train.jsonl"))]
        for of in [prompts.heldout_rows(rounds)]
    )  # fmt: skip
    assert held == given and held[0].values


def test_tasks_of_the_training_part_draw_constraints_that_are_not_held_out(tmp_path):
    heldout = [str(DATA / name) for name in ("heldout.jsonl", "heldout_kinds.jsonl")]
    seen = str(DATA / "train.jsonl")
    rounds = RoundsConfig(prompts_per_round=401, heldout=heldout, seen=seen, limit=60)
    rows = prompts.heldout_rows(rounds)
    held = prompts.held_of(rounds, rows)
    assert len(rows) == 300, "what is not scored is held out all the same"
    assert {row["split"] for row in rows} == {"seen", "unseen_params", "unseen_kinds"}
    assert "numbered_items" in held.kinds and "sentences" not in held.kinds
    found, dropped = prompts.read_prompts("tasks", held)
    assert len(found) == 401 and all(split_of(task) == "train" for task in found) and not dropped
    one = Round("", 1, "quad", 0, ModelSection(""), None, rounds)
    drawn = prompts.prompts_of(found, held, one)
    assert sorted(seed.task.line for seed in drawn) == sorted(task.line for task in found)
    numbers = Counter(len(seed.constraints) for seed in drawn)
    assert numbers.keys() == {1, 2, 3, 4, 5} and min(numbers.values()) > 50
    assert not any(map(held.refuses, (c for seed in drawn for c in seed.constraints)))
    # the next round asks for something else, and a seed asks in another order
    second = prompts.prompts_of(found, held, replace(one, number=2))
    both = {s.prompt for s in drawn} & {s.prompt for s in second}
    assert len(both) < 8  # a task with one constraint has few to draw
    assert [s.task for s in drawn] != [
        s.task for s in prompts.prompts_of(found, held, replace(one, seed=1))
    ]
    prompts.write_prompts(tmp_path / "prompts.jsonl", drawn)
    assert prompts.read_drawn(tmp_path / "prompts.jsonl") == drawn


def test_prompts_of_other_sources(tmp_path):
    found, _ = prompts.read_prompts(str(SETS / "rlvr_ifeval.jsonl"), prompts.Held())
    assert all(isinstance(one, Seed) and one.constraints for one in found)
    held = prompts.Held(kinds=frozenset({found[0].constraints[0].kind}))
    left, dropped = prompts.read_prompts(str(SETS / "rlvr_ifeval.jsonl"), held)
    assert len(left) + dropped["asks for a held-out constraint"] == len(found)
    assert dropped["asks for a held-out constraint"] >= 1
    prompt = "Name a fruit. In lowercase."  # which of it is the constraint's wording is not known
    row = {"prompt": prompt, "constraints": [{"kind": "case", "params": {"style": "lower"}}]}
    write_records(tmp_path / "unknown.jsonl", [row, row | {"prompt": "Name a town. In lowercase."}])
    held = prompts.Held(tasks=frozenset({prompt}))
    left, dropped = prompts.read_prompts(str(tmp_path / "unknown.jsonl"), held)
    assert len(left) == dropped["task of a held-out quad"] == 1 and isinstance(left[0], Seed)
    (tmp_path / "seeds.txt").write_text("Name a fruit.\nDescribe a town.\n")
    plain, _ = prompts.read_prompts(str(tmp_path / "seeds.txt"), prompts.Held())
    assert plain == [Task("Name a fruit."), Task("Describe a town.")]
    (tmp_path / "seeds.jsonl").write_text(json.dumps({"instruction": "Name a fruit."}) + "\n")
    assert prompts.read_prompts(str(tmp_path / "seeds.jsonl"), prompts.Held())[0] == plain[:1]
    with pytest.raises(ValueError, match="no prompt is left: {'task of a held-out quad': 1}"):
        held = prompts.Held(tasks=frozenset({"Name a fruit."}))
        prompts.read_prompts(str(tmp_path / "seeds.jsonl"), held)


def test_both_instructions_of_a_quads_prompt_share_the_samples():
    seed, of = a_seed(NO_COMMAS), a_round("quad", samples=6)
    pair = prompts.opposed(seed, prompts.Held(), of)
    jobs = prompts.jobs_of(seed, pair, of)
    assert Counter(jobs.values()) == dict.fromkeys(sides(pair), 3)
    assert prompts.opposed(seed, prompts.Held(), a_round("group")) is None
    assert set(prompts.jobs_of(seed, None, a_round("pair", samples=6)).values()) == {seed.prompt}
    assert not follows([pair.c2[0]], PLAIN)[0] or not follows([pair.c1[0]], PLAIN)[0]


def test_replay_draws_a_share_of_all_rows_from_earlier_rounds():
    new, old = ([{"id": f"{name}{n}"} for n in range(size)] for name, size in (("a", 6), ("b", 9)))
    of = replace(a_round("quad", replay=0.25), number=2)
    again = replayed(new, old, of)
    assert len(again) == 2 and again == replayed(new, old, of) and all(r in old for r in again)
    assert replayed(new, [], of) == [] and replayed(new, new, of) == []
    assert len(replayed(new, old, replace(of, rounds=replace(of.rounds, replay=0.9)))) == 9
