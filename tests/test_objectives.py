"""The equations, on numbers worked out by hand and on properties that must hold for any numbers."""

import math
from functools import partial

import pytest
import torch
from helpers_models import tiny_llama
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from iopo import objectives as O
from iopo.config import ObjectiveConfig
from iopo.data.batching import Batching, token_counts
from iopo.data.chat import Chat
from iopo.data.rows import Quad, rows_for
from iopo.data.tokenize import Encoder, Limits, tokenize_rows
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED
from iopo.model.load import byte_tokenizer
from iopo.model.parallel import prepare
from iopo.objectives import Options, compute
from iopo.training.loop import Job, Reference, train_steps
from iopo.training.plan.lengths import example_of

LN2 = math.log(2)
CPU = torch.device("cpu")
values = st.lists(st.floats(-20, 20), min_size=8, max_size=8)


def sigmoid(margin):
    return O.sigmoid(margin, beta=0.1)


def quad(numbers) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(numbers, dtype=torch.float64).view(2, 1, 4)
    return both[0], both[1]


def test_iopo_by_hand():
    # log-ratios 1, -2, 3, 0.5: P1 = 2 + 2 - 0.5 = 3.5, P2 = 6 - 0.5 + 2 = 7.5, (P1 + P2) / 2 = 5.5
    policy = torch.tensor([[-9.0, -12.0, -7.0, -9.5]])
    reference = torch.full((1, 4), -10.0)
    loss = O.iopo(policy, reference, link=sigmoid)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.55)), abs=1e-7)
    three = O.iopo_three(policy[:, [0, 1, 3]], reference[:, :3], link=sigmoid)
    assert three.item() == pytest.approx(math.log(1 + math.exp(-0.35)), abs=1e-7)
    # input margins 1 - 0.5 and 3 + 2; output margins 1 + 2 and 3 - 0.5
    by_input = O.input_preference(policy, reference, link=sigmoid)
    by_output = O.output_preference(policy, reference, link=sigmoid)
    expected = [
        sum(math.log(1 + math.exp(-0.1 * m)) for m in ms) / 2 for ms in [(0.5, 5), (3, 2.5)]
    ]
    assert [by_input.item(), by_output.item()] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "name", ["iopo", "iopo_three", "input_preference", "output_preference", "dpo"]
)
def test_ln2_where_policy_is_reference(name):
    logps = torch.randn(5, len(O.OBJECTIVES[name].rows.members)) * 50
    tokens = torch.full(logps.shape, 7)
    loss = compute(name, logps, logps.clone(), tokens, torch.zeros(5), Options())
    torch.testing.assert_close(loss, torch.full((5,), LN2), atol=1e-7, rtol=0)


@given(values)
def test_swapping_the_rows_of_a_quad_changes_nothing(numbers):
    policy, reference = quad(numbers)
    rows = [2, 3, 0, 1]  # (x1, y1) <-> (x2, y2): x1y1 <-> x2y2, x1y2 <-> x2y1
    for objective in (O.iopo, O.input_preference, O.output_preference):
        before = objective(policy, reference, link=sigmoid)
        after = objective(policy[:, rows], reference[:, rows], link=sigmoid)
        torch.testing.assert_close(before, after)


@given(values)
def test_swapping_the_responses_negates_the_margin(numbers):
    policy, reference = quad(numbers)
    r = policy - reference
    torch.testing.assert_close(O.iopo_margin(r[:, [1, 0, 3, 2]]), -O.iopo_margin(r))


@given(values, st.tuples(*[st.floats(-30, 30)] * 4))
def test_shifts_of_x_alone_or_y_alone_cancel(numbers, shifts):
    policy, reference = quad(numbers)
    x1, x2, y1, y2 = shifts
    shift = torch.tensor([[x1 + y1, x1 + y2, x2 + y2, x2 + y1]], dtype=torch.float64)
    before = O.iopo(policy, reference, link=sigmoid)
    torch.testing.assert_close(O.iopo(policy + shift, reference, link=sigmoid), before)


@given(values)
def test_margin_is_the_sum_of_output_and_of_input_margins(numbers):
    policy, reference = quad(numbers)
    a, b, c, d = (policy - reference).unbind(1)
    margin = O.iopo_margin(policy - reference)
    torch.testing.assert_close(margin, (a - b) + (c - d))
    torch.testing.assert_close(margin, (a - d) + (c - b))


def test_one_scalar_gradient_per_quad():
    policy = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, 4, dtype=torch.float64)
    O.iopo(policy, reference, link=sigmoid).sum().backward()
    g = policy.grad[:, :1]
    assert (g < 0).all()
    torch.testing.assert_close(policy.grad, g * torch.tensor([1.0, -1.0, 1.0, -1.0]))


def test_at_the_start_both_rows_and_input_preference_point_where_iopo_points():
    """Where policy is reference the three differ by a factor only, which Adam divides out."""
    grads = []
    for objective in (O.iopo, O.output_preference, O.input_preference):
        policy = torch.full((3, 4), -20.0, dtype=torch.float64, requires_grad=True)
        objective(policy, policy.detach(), link=sigmoid).sum().backward()
        grads.append(policy.grad)
    torch.testing.assert_close(grads[1], grads[0] / 2)
    torch.testing.assert_close(grads[2], grads[0] / 2)


def test_where_both_margins_are_equal_iopo_is_both_rows_at_twice_the_beta():
    policy = torch.tensor([[-9.0, -12.0, -20.0, -23.0]], dtype=torch.float64)
    reference = torch.full_like(policy, -15.0)
    values = [
        objective(policy, reference, link=partial(O.sigmoid, beta=beta))
        for objective, beta in ((O.iopo, 0.5), (O.output_preference, 1.0))
    ]
    torch.testing.assert_close(*values)


OFF_POLICY = Options(clip=0.2, kl_weight=0.3)
OPTIONS = [
    ("iopo", Options(link="sigmoid", label_smoothing=0.1, sft_weight=0.3)),
    ("iopo", Options(link="ipo")),
    ("iopo", Options(link="robust", label_smoothing=0.2)),
    ("iopo", Options(link="exo", label_smoothing=0.01, margin_per_constraint=0.5)),
    ("iopo_three", Options(sft_weight=0.1)),
    ("input_preference", Options()),
    ("output_preference", Options()),
    ("dpo", Options(beta=0.5)),
    ("simpo", Options(beta=2.0, gamma=1.0)),
    ("orpo", Options()),
    ("sft", Options()),
    ("grpo", OFF_POLICY),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_gradients_match_finite_differences(name, options):
    members = sum(O.OBJECTIVES[name].rows.responses)
    torch.manual_seed(0)
    policy = (-20 * torch.rand(3, members, dtype=torch.float64) - 1).requires_grad_()
    reference = -20 * torch.rand(3, members, dtype=torch.float64) - 1
    tokens = torch.randint(3, 9, (3, members))
    facts = torch.rand(3, members) if name == "grpo" else torch.tensor([1, 2, 0])
    assert gradcheck(
        lambda p: compute(name, p, reference, tokens, facts, options), (policy,), atol=1e-8
    )


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_direction_is_that_of_the_gradient(name, options):
    """A long quad is back-propagated with these signs before its scalar is known."""
    if O.OBJECTIVES[name].direction is None or options.sft_weight:
        return
    direction = torch.tensor(O.OBJECTIVES[name].direction, dtype=torch.float64)
    torch.manual_seed(0)
    policy = (-20 * torch.rand(3, len(direction), dtype=torch.float64)).requires_grad_()
    reference = -20 * torch.rand(3, len(direction), dtype=torch.float64)
    loss = compute(name, policy, reference, torch.ones(3, 1), torch.tensor([1, 2, 0]), options)
    loss.sum().backward()
    scalar = policy.grad[:, :1] / direction[0]
    assert (scalar != 0).all()
    torch.testing.assert_close(policy.grad, scalar * direction)


group_values = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.floats(-30, -1), min_size=size, max_size=size), min_size=3,
                          max_size=3)
)  # fmt: skip


def group(numbers) -> tuple[torch.Tensor, ...]:
    """policy (a leaf), reference, tokens and rewards [1, G] of three lists of numbers."""
    policy, reference, rewards = torch.tensor(numbers, dtype=torch.float64)[:, None].unbind()
    tokens = torch.arange(2, 2 + policy.shape[1])[None]
    return policy.clone().requires_grad_(), reference, tokens, rewards


def grpo_gradient(policy, reference, tokens, rewards, options=Options()):  # noqa: B008
    loss = compute("grpo", policy, reference, tokens, rewards, options)
    loss.sum().backward()
    return loss.detach(), policy.grad


def written_out(policy, reference, tokens, rewards, options) -> float:
    """The loss of one group, response by response, in Python's numbers."""
    policy, reference, tokens, rewards = (
        x[0].tolist() for x in (policy, reference, tokens, rewards)
    )
    size, mean = len(rewards), sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / size)
    total = 0.0
    for p, q, n, r in zip(policy, reference, tokens, rewards, strict=True):
        advantage = (r - mean) / (std + 1e-6) if len(set(rewards)) > 1 else 0
        ratio = math.exp((p - q) / n)
        clipped = min(max(ratio, 1 - options.clip), 1 + options.clip)
        kl = 1 / ratio - 1 - math.log(1 / ratio)
        total += min(ratio * advantage, clipped * advantage) - options.kl_weight * kl
    return -total / size


@settings(deadline=None)
@given(group_values)
def test_grpo_and_its_gradient_are_those_of_the_written_out_sum(numbers):
    policy, *rest = group(numbers)
    loss, gradient = grpo_gradient(policy, *rest, OFF_POLICY)
    assert loss.item() == pytest.approx(written_out(policy, *rest, OFF_POLICY), rel=1e-9, abs=1e-9)
    for i in range(policy.shape[1]):
        step = torch.zeros_like(policy)
        step[0, i] = 1e-5
        sides = [written_out(policy.detach() + s * step, *rest, OFF_POLICY) for s in (1, 0, -1)]
        slopes = (sides[0] - sides[1]) / 1e-5, (sides[1] - sides[2]) / 1e-5
        if math.isclose(*slopes, rel_tol=1e-2, abs_tol=1e-4):  # not at an edge of the clip
            assert gradient[0, i].item() == pytest.approx(sum(slopes) / 2, rel=1e-2, abs=1e-4)


@given(group_values)
def test_advantages_sum_to_zero(numbers):
    *_, rewards = group(numbers)
    found = O.advantages(rewards)
    assert found.sum().abs() < 1e-6 and found.abs().max() <= math.sqrt(found.shape[1])
    assume(rewards.std() > 0.1)  # then neither the rewards' scale nor their offset matters
    torch.testing.assert_close(O.advantages(3 * rewards + 1), found, atol=1e-4, rtol=1e-3)


@given(group_values, st.floats(-1, 1))
def test_a_group_with_equal_rewards_has_no_gradient(numbers, reward):
    policy, reference, tokens, rewards = group(numbers)
    equal = torch.full(rewards.shape, reward, dtype=torch.float64)  # their mean is rounded
    assert not O.advantages(equal).any()
    loss, gradient = grpo_gradient(policy, reference, tokens, equal)
    assert loss.item() == 0 and not gradient.any()


@given(group_values)
def test_where_policy_is_reference_grpo_is_the_policy_gradient(numbers):
    policy, _, tokens, rewards = group(numbers)
    plain = policy.detach().clone().requires_grad_()
    (-(O.advantages(rewards) * plain / tokens).mean(1)).sum().backward()
    loss, gradient = grpo_gradient(policy, policy.detach(), tokens, rewards, OFF_POLICY)
    torch.testing.assert_close(gradient, plain.grad)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_grpo_stops_pushing_at_the_clip():
    """A ratio of e per token: the good response is far enough up, the bad one is still pushed down
    from there, and both are where they should be if each moved the other way."""
    reference, tokens = torch.full((1, 2), -20.0), torch.tensor([[4, 4]])
    for up, pushed in ((4.0, [False, True]), (-4.0, [True, False])):
        policy = (reference + up).requires_grad_()
        _, gradient = grpo_gradient(policy, reference, tokens, torch.tensor([[1.0, 0.0]]))
        assert (gradient[0] != 0).tolist() == pushed
    with pytest.raises(ValueError, match=r"\[examples, 3\]"):
        grpo_gradient(reference.clone(), reference, tokens, torch.zeros(1, 3))


def test_links_by_hand():
    m, zero = torch.tensor([3.0]), torch.tensor([0.0])
    assert O.hinge(m, beta=0.1).item() == pytest.approx(0.7)
    assert O.hinge(m, beta=1.0).item() == 0.0
    assert O.ipo(m, beta=0.1).item() == pytest.approx(4.0)  # (3 - 5)^2
    assert O.robust(zero, beta=0.1, label_smoothing=0.2).item() == pytest.approx(LN2)
    same = O.robust(m, beta=0.1, label_smoothing=0.0)
    torch.testing.assert_close(same, O.sigmoid(m, beta=0.1))
    # At margin 0 the policy's pair distribution is (1/2, 1/2): KL = ln(1/2) - ln(e(1-e))/2
    exo = 0.5 * (math.log(0.5) - math.log(0.9)) + 0.5 * (math.log(0.5) - math.log(0.1))
    assert O.exo(zero, beta=0.1, label_smoothing=0.1).item() == pytest.approx(exo, abs=1e-6)


def test_reference_free_objectives_by_hand():
    policy, tokens = torch.tensor([[-8.0, -6.0]]), torch.tensor([[4, 2]])
    # means -2 and -3
    simpo = O.simpo(policy, tokens, beta=2.0, gamma=0.5)
    assert simpo.item() == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-6)
    odds = math.log(math.exp(-2) / (1 - math.exp(-2))) - math.log(math.exp(-3) / (1 - math.exp(-3)))
    orpo = O.orpo(policy, tokens, weight=0.1)
    assert orpo.item() == pytest.approx(2 + 0.1 * math.log(1 + math.exp(-odds)), abs=1e-6)
    assert O.sft(policy[:, :1], tokens[:, :1]).item() == 2.0
    four, fours = torch.tensor([[-8.0, 0.0, -6.0, 0.0]]), torch.tensor([[4, 1, 2, 1]])
    assert O.sft_anchor(four, fours).item() == 2.5


def test_output_preference_is_dpo_on_both_rows():
    policy, reference = torch.randn(2, 7, 4)
    rows = O.dpo(policy.view(14, 2), reference.view(14, 2), link=sigmoid)
    both = O.output_preference(policy, reference, link=sigmoid)
    torch.testing.assert_close(rows.view(7, 2).mean(1), both)


def test_margin_grows_with_differing_constraints():
    logps = torch.zeros(3, 4)
    options = Options(beta=0.1, margin_per_constraint=0.2)
    loss = compute("iopo", logps, logps, logps.int() + 1, torch.tensor([0, 1, 3]), options)
    expected = [math.log(1 + math.exp(0.2 * g)) for g in (0, 1, 3)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30)
@given(st.sampled_from([(3, 3), (2, 4)]))
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[examples, 4\]"):
        O.iopo(torch.zeros(2, shape[0]), torch.zeros(2, shape[1]), link=sigmoid)


def test_low_precision_log_probs_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        O.iopo(torch.zeros(2, 4).bfloat16(), torch.zeros(2, 4), link=sigmoid)


def test_a_new_objective_is_one_line_of_the_table(monkeypatch):
    """Log-ratio of one matched member, on three members: nothing else knows its name."""

    def matched(policy, reference, link):
        return link(policy[:, 0] - reference[:, 0])

    toy = O.Objective(O.THREE, matched, ("beta",), reference=True, direction=(1, 0, 0))
    monkeypatch.setitem(O.OBJECTIVES, "toy", toy)
    assert ObjectiveConfig(name="toy", beta=0.5).name == "toy"
    with pytest.raises(ValueError, match="gamma=1.0 has no effect with objective.name=toy"):
        ObjectiveConfig(name="toy", gamma=1.0)

    quad_row = Quad("q", "ask 1", "tell 1", "ask 2", "tell 2", c1=[], c2=[])
    encoder = Encoder(Chat(byte_tokenizer()), Limits(99, 99), toy.rows.columns)
    (example,), _ = tokenize_rows(rows_for(toy.rows.kind, [quad_row]), encoder)
    assert tuple(len(ys) for ys in example.responses) == toy.rows.responses
    planned = example_of(toy.rows, 5, 3)
    assert tuple(map(len, planned.responses)) == toy.rows.responses

    model = tiny_llama(vocab=258, attention=SHARED)
    train_model = prepare(LogProbs(model), device=CPU, dtype=torch.float32, mesh=None)
    optimizer = torch.optim.SGD(train_model.parameters.values(), lr=0.1)
    zeros = Reference(lambda rows, batch: torch.zeros(1, 3), "cache", "", 1.0)
    (step,) = train_steps(job_of("toy", [example]), train_model, optimizer, zeros, first_step=1)
    assert set(step.reduce()) >= {"loss", "margin", "accuracy", "logratio/x2y1"}


def job_of(name, examples):
    batching = Batching(1, 1, seed=0, micro_batch_quads=1)
    return Job(
        objective=name, options=Options(), batching=batching, examples=examples, heldout=[],
        tokens_N=token_counts(examples, "shared"), steps=1, lr_at=lambda step: 0.1, clip_norm=1.0,
        rank=0, device=CPU,
    )  # fmt: skip
