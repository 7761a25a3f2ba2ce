"""Learning rates as functions of the step, and AdamW against its definition."""

import math

import pytest
import torch
from torch import nn

from iopo.config import OptimConfig, Schedule
from iopo.training.optim import lr_at, make_optimizer


def rates(schedule, steps, warmup_ratio):
    cfg = OptimConfig(lr=2.0, schedule=schedule, warmup_ratio=warmup_ratio)
    return [lr_at(step, steps, cfg) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5, 0.99])
def test_climbs_to_the_peak_and_never_rises_after(schedule, steps, warmup_ratio):
    found = rates(schedule, steps, warmup_ratio)
    warmup = math.ceil(warmup_ratio * steps)
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[max(warmup, 1) - 1] == 2.0
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


def test_values_by_hand():
    assert rates(Schedule.linear, 5, 0.2) == pytest.approx([2.0, 2.0, 1.5, 1.0, 0.5])
    half = math.cos(math.pi / 4)
    expected = [2.0, 2.0, 1 + half, 1.0, 1 - half]
    assert rates(Schedule.cosine, 5, 0.2) == pytest.approx(expected)
    assert rates(Schedule.constant, 4, 0.5) == [1.0, 2.0, 2.0, 2.0]


def test_adamw_equals_its_definition_and_spares_vectors_from_decay():
    cfg = OptimConfig(lr=0.1, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6)
    matrix, vector = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))
    optimizer = make_optimizer({"m": matrix, "v": vector}, cfg)
    for parameter, decay in ((matrix, 0.5), (vector, 0.0)):
        value = parameter.detach().double()
        first = second = torch.zeros_like(value)
        for step in (1, 2, 3):
            grad = torch.sin(value + step)
            parameter.grad = torch.sin(parameter.detach() + step)
            first = 0.8 * first + 0.2 * grad
            second = 0.9 * second + 0.1 * grad**2
            value = value * (1 - 0.1 * decay)
            value -= 0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
            optimizer.step()
            parameter.grad = None
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)
