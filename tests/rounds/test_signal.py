"""How often samples teach anything, on answers whose verdicts are known."""

import json
import random

import pytest

from iopo.constraints import follows, make
from iopo.construct.proposals import draw, sensible
from iopo.construct.tasks import Task
from iopo.rounds import signal
from iopo.rounds.signal import COUNTS, METHODS, MOST, SIZES, Answer, Asked

# One kind of answer each: prose that answers, without and with an exclamation mark.
CALM = "Bees make honey from the nectar that they find in flowers, and they store it for winter."
LOUD = "What a wonder it is that bees make honey from the nectar of all the flowers that they find!"
ASKED = Asked(
    Task("Explain how bees make honey."),
    (make("exclamations", relation="exactly", number=0),),
    (make("exclamations", relation="exactly", number=1),),
)
TWO = Asked(ASKED.task, (*ASKED.c1, make("commas", relation="exactly", number=0)), None)


def answers(asked: Asked, texts: list[str], side: int = 0) -> list[Answer]:
    constraints = (asked.c1, asked.c2 or ())[side]
    return [
        Answer(t, tuple(follows(constraints, t)), () if len(t.split()) > 3 else ("too_short",), 10)
        for t in texts
    ]


def shares(asked: Asked, ones: list[str], twos: list[str] = []) -> dict:  # noqa: B006
    first, second = answers(asked, ones), answers(asked, twos, 1)
    cells, _ = signal.of_instruction(asked, first, second, 0)
    return {(method, size): share for (method, size), (share, _) in cells.items()}


def test_one_right_answer_of_sixteen():
    """It teaches its own group, whatever the size: an eighth of the pairs, all of the sixteen."""
    found = shares(ASKED, [LOUD, CALM, *[LOUD] * 14], [CALM] * 8)
    for method in ("grpo_all", "grpo_share", "best_worst"):
        assert [found[method, size] for size in SIZES] == [1 / 8, 1 / 4, 1 / 2, 1]
    assert [found["follow", size] for size in SIZES] == [
        0,
        0,
        0,
        0,
    ]  # calm is wrong for the opposite
    assert [found["relabel", size] for size in SIZES] == [1 / 8, 1 / 4, 1 / 2, 1]


def test_the_share_of_constraints_tells_wrong_answers_apart():
    """Two constraints that no answer follows together, but some follow one."""
    commas = "Look, what a wonder it is that bees make honey from the nectar of the flowers!"
    found = shares(TWO, [LOUD, commas] * 8)
    assert found["grpo_all", 16] == found["best_worst", 16] == found["follow", 16] == 0
    assert found["grpo_share", 2] == 1


def test_quads_by_follow_need_an_answer_to_each_instruction():
    found = shares(ASKED, [CALM] * MOST, [CALM] * 6 + [LOUD] * 2)
    assert [found["follow", size] for size in SIZES] == [2 / 8, 1 / 4, 1 / 2, 1]
    assert found["grpo_all", 16] == found["relabel", 16] == 0  # of equal answers
    assert shares(TWO, [CALM] * MOST)["follow", 16] == 0


def test_a_hollow_answer_fails_and_makes_no_quad():
    """Short ones follow the constraint, and would win otherwise."""
    found = shares(ASKED, [LOUD, "Yes."] * 8, [LOUD] * 8)
    assert {found[method, 16] for method in METHODS} == {0}


def test_judged_reads_thinking_the_end_and_the_tokens():
    rows = {key: {"text": CALM, "finish_reason": "stop"} for key in ASKED.jobs()}
    first, *_ = rows
    rows[first] = {"text": f"<think>Hm.</think>{CALM}", "finish_reason": "length"}
    ones, twos = signal.judged(ASKED, rows, len)
    assert (len(ones), len(twos)) == (MOST, MOST // 2)
    assert ones[0].text == CALM and ones[0].hollow and ones[0].tokens > ones[1].tokens
    assert ones[1].right and not twos[0].right and ones[0].share == 0


def test_instructions_grow_by_one_constraint_and_the_opposite_excludes_it():
    found = signal.draw_asked(12, 1)
    assert [len(asked.c1) for asked in found] == [*COUNTS] * 12
    opposites = 0
    for asked, longer in zip(found, found[1:], strict=False):
        if asked.task == longer.task:
            assert longer.c1[:-1] == asked.c1
        if asked.c2 is not None:
            opposites += 1
            differing = [pair for pair in zip(asked.c1, asked.c2, strict=True) if len({*pair}) > 1]
            ((one, other),) = differing
            assert type(one) is type(other) and sensible(asked.c2)
    assert opposites > 40


def test_drawn_constraints_stand_beside_one_another():
    for seed in range(50):
        assert sensible(draw(5, random.Random(seed)))


def test_a_run_from_the_command_goes_on_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    calls = []

    def sampler(prompts, seed):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt  # a kill between two chunks
        rng = random.Random(seed)
        return [(rng.choice([CALM, LOUD, "Yes."]), "stop") for _ in prompts]

    monkeypatch.setattr(signal.IfSeedsRecipe, "sampler", lambda self: sampler)
    monkeypatch.setattr(signal, "token_counter", lambda model: len)
    command = ["--run", str(tmp_path / "run"), "--prompts", "2"]
    with pytest.raises(KeyboardInterrupt):
        signal.main(command)
    before = (tmp_path / "run" / "responses.jsonl").read_text()
    assert signal.main(command) == 0
    responses = (tmp_path / "run" / "responses.jsonl").read_text()
    assert responses.startswith(before) and before.count("\n") == 100
    assert "n = 5" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "signal.json").read_text())["signal"]
    assert result["1"]["relabel"]["16"]["share"]["n"] == 2
    assert (tmp_path / "run" / "signal.png").stat().st_size > 10_000
    assert signal.main([*command, "--seed", "1"]) == 2
    assert "other settings" in capsys.readouterr().err
