"""Metrics add up over micro-batches, and the documentation lists every one of them."""

from pathlib import Path

import pytest
import torch

from iopo.objectives import GROUP, PAIR, QUAD, SINGLE, THREE
from iopo.training import metrics
from iopo.training.loop import StepResult

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("rows", "reference"),
    [(QUAD, True), (THREE, True), (PAIR, True), (PAIR, False), (SINGLE, False), (GROUP, True)],
)
def test_columns_name_what_per_example_returns(rows, reference):
    policy = -torch.rand(5, sum(rows.responses)) * 10
    tokens = torch.full(policy.shape, 4)
    values = metrics.per_example(
        rows, torch.ones(5), policy, policy + 1 if reference else None, tokens,
        policy if rows.rewards else None,
    )  # fmt: skip
    assert values.shape == (5, len(metrics.columns(rows, reference)))
    assert values[:, 0].tolist() == [1.0] * 5


def test_values_by_hand():
    policy = torch.tensor([[-4.0, -9.0, -6.0, -5.0]])
    reference = torch.tensor([[-5.0, -7.0, -6.0, -6.0]])  # log-ratios 1, -2, 0, 1
    tokens = torch.tensor([[2, 3, 3, 2]])
    row = metrics.per_example(QUAD, torch.tensor([0.5]), policy, reference, tokens)[0].tolist()
    values = dict(zip(metrics.columns(QUAD, True), row, strict=True))
    assert values["logp_per_token"] == -2
    assert values["margin"] == 2  # 1 + 2 + 0 - 1
    assert values["accuracy"] == 1
    assert [values[f"margin/{m}"] for m in ("out_x1", "out_x2", "in_y1", "in_y2")] == [3, -1, 0, 2]
    assert values["logratio/x1y2"] == -2 and values["logp/x2y1"] == -5


def test_values_of_groups_by_hand():
    """The second group's rewards are equal: no margin, whatever the log-ratios."""
    policy, tokens = (
        torch.tensor([[-4.0, -9.0, -6.0], [-1.0, -2.0, -3.0]]),
        torch.tensor([[2, 3, 6]]),
    )
    r = torch.tensor([[1.0, -3.0, 6.0], [1.0, 1.0, 4.0]])
    rewards = torch.tensor([[1.0, 0.0, 0.8], [0.1, 0.1, 0.1]])
    values = metrics.per_example(GROUP, torch.zeros(2), policy, policy - r, tokens, rewards)
    names = metrics.columns(GROUP, True)
    first, second = (dict(zip(names, row, strict=True)) for row in values.tolist())
    expected = {
        "margin": 3.5 + 3, "accuracy": 1, "reward": 0.6, "signal": 1, "logp/y": -19 / 3,
        "logp_per_token": -2, "logratio/y": 4 / 3, "logratio_per_token": 2.5 / 3,
    }  # fmt: skip
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert [second[name] for name in ("margin", "accuracy", "signal")] == [0, 0, 0]


def test_preferences_by_hand():
    policy = torch.tensor([[-1.0, -2.0, -1.0, -2.0], [-1.0, -5.0, -3.0, -2.0], [-3.0, -1, -3, -1]])
    found = {k: v.tolist() for k, v in metrics.preferences(policy).items()}
    assert found == {
        "group_accuracy": [True, True, False],
        "x_preference": [True, True, False],
        "y_preference": [True, False, False],
    }


def test_documentation_lists_every_metric():
    text = (ROOT / "docs" / "curves.md").read_text()
    kinds = (QUAD, THREE, PAIR, SINGLE, GROUP)
    names = {name for rows in kinds for name in metrics.columns(rows, True)}
    names |= metrics.preferences(torch.zeros(1, 4)).keys()
    result = StepResult(1, 0.1, 1.0, 1.0, ["loss"], torch.zeros(1), examples=1, tokens=1)
    for name in names | result.reduce().keys():
        of_member = name.startswith(("logp/", "logratio/"))
        row = name.partition("/")[0] + "/MEMBER" if of_member else name
        assert f"| `{row}` | " in text, name
