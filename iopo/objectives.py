"""The objectives: log-probabilities in, one loss per example out. Nothing else happens here.

Letters: Q quads, P pairs, E examples (either), G responses of a group, 4 the members of a quad,
always in the order
    x1y1, x1y2, x2y2, x2y1        (columns 0, 1, 2, 3)
`policy` and `reference` hold log pi(y|x) in nats, summed over the response's tokens, end-of-turn
included. r = policy - reference is the log-ratio; only `policy` receives gradient. Every function
returns one float32 value per example and never averages: the training loop divides by the number of
examples in the whole step, so that results do not depend on micro-batches or ranks.

OBJECTIVES, at the end, describes each objective once; what the program does for one (rows, options,
metrics, held-out loss, memory plan) it reads there. A new objective is a function and a line in it.

Equations are those of arXiv 2411.06208v3 (IOPO, ACL 2025) unless a function says otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

MEMBERS = ("x1y1", "x1y2", "x2y2", "x2y1")
X1Y1, X1Y2, X2Y2, X2Y1 = range(4)

LinkFunction = Callable[[Tensor], Tensor]


# --- margins: what each objective wants to be large (nats) --------------------------------------


def log_ratio(policy: Tensor, reference: Tensor, members: int) -> Tensor:
    """r = policy - reference, [E, members]; checks shapes and dtypes for every objective.

    Raises ValueError below float32: a bf16 log-probability of -300 nats is only known to 2 nats.
    """
    narrow = min(policy.dtype.itemsize, reference.dtype.itemsize) < 4
    if narrow or policy.shape != reference.shape or policy.shape[1:] != (members,):
        raise ValueError(
            f"policy and reference must be float32 or float64 [examples, {members}], found "
            f"{policy.dtype} {list(policy.shape)} and {reference.dtype} {list(reference.shape)}"
        )
    return policy - reference.detach()


def iopo_margin(r_Q4: Tensor) -> Tensor:
    """(P1 + P2) / 2, the argument of Eq. 9, from the two sums of Eq. 8. Shape [Q].

    P1 = 2 r[x1y1] - r[x1y2] - r[x2y1]      x1y1 against the two mismatched members
    P2 = 2 r[x2y2] - r[x2y1] - r[x1y2]      x2y2 against the same two

    (P1 + P2) / 2 = r[x1y1] - r[x1y2] + r[x2y2] - r[x2y1]: the sum of the two output margins
    (same x, other y) and, equally, of the two input margins (same y, other x). Anything that
    depends on x alone or on y alone cancels.
    """
    P1 = 2 * r_Q4[:, X1Y1] - r_Q4[:, X1Y2] - r_Q4[:, X2Y1]
    P2 = 2 * r_Q4[:, X2Y2] - r_Q4[:, X2Y1] - r_Q4[:, X1Y2]
    return (P1 + P2) / 2


# --- link functions: margin in, loss out ---------------------------------------------------------


def sigmoid(margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), e = label_smoothing in [0, 0.5).

    Bradley-Terry likelihood (Eq. 5, 9); e > 0 is conservative DPO (Mitchell, 2023).
    """
    logit = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def hinge(margin: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta m) (SLiC, arXiv 2305.10425)."""
    return F.relu(1 - beta * margin)


def ipo(margin: Tensor, *, beta: float) -> Tensor:
    """(m - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, Eq. 17); log-ratios are summed, not averaged."""
    return (margin - 1 / (2 * beta)) ** 2


def robust(margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Unbiased under label flips of rate e: sigmoid losses weighted (1 - e), -e, over 1 - 2e.

    rDPO, arXiv 2403.00409, Eq. 7.
    """
    logit, e = beta * margin, label_smoothing
    return (-(1 - e) * F.logsigmoid(logit) + e * F.logsigmoid(-logit)) / (1 - 2 * e)


def exo(margin: Tensor, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """KL(policy's pair distribution || (1 - e, e)), e > 0 (EXO, arXiv 2402.00856, Eq. 16)."""
    logit, e = beta * margin, label_smoothing
    win, lose = F.logsigmoid(logit), F.logsigmoid(-logit)
    return win.exp() * (win - math.log(1 - e)) + lose.exp() * (lose - math.log(e))


Link = StrEnum("Link", ["sigmoid", "hinge", "ipo", "robust", "exo"])
LINKS = dict(zip(Link, (sigmoid, hinge, ipo, robust, exo), strict=True))
SMOOTHED_LINKS = (Link.sigmoid, Link.robust, Link.exo)


# --- objectives on quads -------------------------------------------------------------------------


def iopo(policy_Q4: Tensor, reference_Q4: Tensor, link: LinkFunction) -> Tensor:
    """Prefer the matched members to the mismatched ones, jointly: link((P1 + P2) / 2). Eq. 9.

    policy_Q4, reference_Q4: float32 [Q, 4]. With link = sigmoid(., beta) this is
        loss = -log sigmoid(beta (P1 + P2) / 2),
    equal to ln 2 where policy == reference. dloss/dpolicy = g * (+1, -1, +1, -1) with a single
    scalar g per quad, which the exact split of a quad into smaller backward passes relies on.
    Returns loss_Q. Raises ValueError on wrong shapes. No length normalisation.
    """
    return link(iopo_margin(log_ratio(policy_Q4, reference_Q4, 4)))


def iopo_three(policy_Q3: Tensor, reference_Q3: Tensor, link: LinkFunction) -> Tensor:
    """The memory-saving form with three members x1y1, x1y2, x2y1: link(P1). Eq. 11.

    P1 = 2 r[x1y1] - r[x1y2] - r[x2y1], without the 1/2 of Eq. 9, as printed. The partition
    functions do not cancel here (beta (log Z(x1) - log Z(x2)) is left), so it is a heuristic.
    """
    r_Q3 = log_ratio(policy_Q3, reference_Q3, 3)
    return link(2 * r_Q3[:, 0] - r_Q3[:, 1] - r_Q3[:, 2])


def input_preference(policy_Q4: Tensor, reference_Q4: Tensor, link: LinkFunction) -> Tensor:
    """Each response prefers its own instruction: "w/o Output Pref" of section 6.2.

    ( link(r[x1y1] - r[x2y1]) + link(r[x2y2] - r[x1y2]) ) / 2: two separate logistic terms, averaged
    so that a quad counts once and the loss starts at ln 2 like every other objective here.
    """
    r_Q4 = log_ratio(policy_Q4, reference_Q4, 4)
    return (link(r_Q4[:, X1Y1] - r_Q4[:, X2Y1]) + link(r_Q4[:, X2Y2] - r_Q4[:, X1Y2])) / 2


def output_preference(policy_Q4: Tensor, reference_Q4: Tensor, link: LinkFunction) -> Tensor:
    """DPO on both rows of a quad: "w/o Input Pref" of section 6.2.

    ( link(r[x1y1] - r[x1y2]) + link(r[x2y2] - r[x2y1]) ) / 2. It differs from `iopo` only in where
    the link stands: around each output margin here, around their sum there.
    """
    r_Q4 = log_ratio(policy_Q4, reference_Q4, 4)
    return (link(r_Q4[:, X1Y1] - r_Q4[:, X1Y2]) + link(r_Q4[:, X2Y2] - r_Q4[:, X2Y1])) / 2


# --- objectives on pairs (column 0 chosen, column 1 rejected) and on single sequences -------------


def dpo(policy_P2: Tensor, reference_P2: Tensor, link: LinkFunction) -> Tensor:
    """link(r[chosen] - r[rejected]), one value per pair (DPO, arXiv 2305.18290, Eq. 7)."""
    r_P2 = log_ratio(policy_P2, reference_P2, 2)
    return link(r_P2[:, 0] - r_P2[:, 1])


def simpo(policy_P2: Tensor, tokens_P2: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (mean logp[chosen] - mean logp[rejected]) - gamma). No reference.

    SimPO, arXiv 2405.14734, Eq. 6; the mean is over response tokens (tokens_P2, integer [P, 2]),
    gamma >= 0 is the target reward margin, on the scale of beta.
    """
    mean_P2 = policy_P2 / tokens_P2
    return -F.logsigmoid(beta * (mean_P2[:, 0] - mean_P2[:, 1]) - gamma)


def orpo(policy_P2: Tensor, tokens_P2: Tensor, *, weight: float) -> Tensor:
    """-mean logp[chosen] - weight log sigmoid(log odds[chosen] - log odds[rejected]). No reference.

    ORPO, arXiv 2403.07691, Eq. 6-7: odds = p / (1 - p) with p = exp(mean logp per token).
    """
    mean_P2 = policy_P2 / tokens_P2
    # expm1 keeps log(1 - p) finite as p -> 1; a logp of exactly 0 would still be -inf.
    log_odds_P2 = mean_P2 - (-(mean_P2.clamp(max=-1e-7)).expm1()).log()
    return -mean_P2[:, 0] - weight * F.logsigmoid(log_odds_P2[:, 0] - log_odds_P2[:, 1])


def sft(policy_E1: Tensor, tokens_E1: Tensor) -> Tensor:
    """Mean negative log-likelihood per response token, one value per example, [E].

    Every example weighs the same whatever its length, unlike a mean over all tokens of a batch.
    """
    return -(policy_E1 / tokens_E1)[:, 0]


def sft_anchor(policy_Q4: Tensor, tokens_Q4: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of the matched members, averaged over the two. [Q].

    The released code's `pref_ftx` term; keeps the likelihood of right answers from sliding while
    their margin grows. Also takes [P, 2] pairs and [Q, 3] members, whose first column is matched.
    """
    matched = [X1Y1, X2Y2] if policy_Q4.shape[1] == 4 else [0]
    return -(policy_Q4[:, matched] / tokens_Q4[:, matched]).mean(1)


# --- objectives on groups: a prompt, G responses that the reference sampled, and their rewards ----

SMALLEST_STD = 1e-6  # added to a group's deviation: rewards that differ by rounding teach nothing


def advantages(rewards_EG: Tensor) -> Tensor:
    """A_i = (reward_i - mean) / (std + SMALLEST_STD) in each group, float64 [E, G], no gradient.

    GRPO, arXiv 2402.03300, section 4.1.2; std is the root of the mean square over the G rewards.
    They add up to 0, and are exactly 0 in a group whose rewards are equal: it teaches nothing.
    """
    rewards_EG = rewards_EG.detach().double()
    centred_EG = rewards_EG - rewards_EG.mean(1, keepdim=True)
    std_E1 = centred_EG.square().mean(1, keepdim=True).sqrt()
    equal_E1 = rewards_EG.amax(1, keepdim=True) == rewards_EG.amin(1, keepdim=True)
    return (centred_EG / (std_E1 + SMALLEST_STD)).masked_fill(equal_E1, 0)


def grpo(
    policy_EG: Tensor,
    reference_EG: Tensor,
    tokens_EG: Tensor,
    rewards_EG: Tensor,
    *,
    clip: float,
    kl_weight: float = 0.0,
) -> Tensor:
    """- mean_i [ min(s_i A_i, clamp(s_i, 1 - clip, 1 + clip) A_i) - kl_weight k_i ], by group. [E].

    s_i = exp(m_i), m_i = (policy_i - reference_i) / tokens_i: the ratio of a whole response, as a
        mean over its tokens (GSPO, arXiv 2507.18071, Eq. 5-7), so that summed log-probs suffice.
    A_i = `advantages` of rewards_EG, float [E, G] (GRPO, arXiv 2402.03300).
    k_i = exp(-m_i) - 1 + m_i >= 0: the estimator of GRPO's Eq. 4, of the mean instead of token by
        token, which makes it a lower bound of theirs.

    The reference has to be the policy that sampled the responses: where the policy equals it, s = 1
    and the gradient is - mean_i A_i grad (mean log-prob of response i), GRPO's on-policy one. clip
    > 0 is on the scale of a log-prob per token. What GRPO is blamed for stays (Dr. GRPO, arXiv
    2503.20783): the std weights groups that nearly all pass or fail more, the mean long responses
    less.
    """
    A_EG = advantages(rewards_EG).to(policy_EG.dtype)
    m_EG = log_ratio(policy_EG, reference_EG, rewards_EG.shape[1]) / tokens_EG
    s_EG = m_EG.exp()
    surrogate_EG = torch.minimum(s_EG * A_EG, s_EG.clamp(1 - clip, 1 + clip) * A_EG)
    if kl_weight:
        surrogate_EG = surrogate_EG - kl_weight * ((-m_EG).expm1() + m_EG)
    return -surrogate_EG.mean(1)


# --- the table ------------------------------------------------------------------------------------


@dataclass
class Options:
    """Numbers of an objective, as in conf/objective/*.yaml (checked in iopo/config.py)."""

    beta: float = 0.1
    link: Link = Link.sigmoid
    label_smoothing: float = 0.0
    gamma: float = 0.0  # SimPO: target reward margin
    odds_weight: float = 0.1  # ORPO
    sft_weight: float = 0.0
    margin_per_constraint: float = 0.0
    clip: float = 0.02  # GRPO: of a response's ratio to the reference, mean over its tokens
    kl_weight: float = 0.0  # GRPO


def _quad_margins(r_Q4: Tensor) -> dict[str, Tensor]:
    a, b, c, d = r_Q4.unbind(1)
    return {
        "margin": (a - b) + (c - d),
        "margin/out_x1": a - b,
        "margin/out_x2": c - d,
        "margin/in_y1": a - d,
        "margin/in_y2": c - b,
    }


@dataclass(frozen=True)
class Rows:
    """What an example of an objective is made of.

    kind: of the data's rows: quad | pair | sft | group.
    members: names, in the order of the columns; one name for all members of a group.
    responses: how many under each prompt; (2, 1) are two under the first and one under the second.
        Groups have as many as the data says; these are those of a group that a quad holds.
    columns: of a quad's four log-probs, those that make the examples that a quad holds, one after
        the other: a quad is one quad, two pairs, two sft rows or two groups.
    rewards: where the loss reads rewards, those of the members of an example that a quad holds.
    margins: log-ratios [E, members] -> what is reported of them, in nats, by name, `margin` first.
    """

    kind: str
    members: tuple[str, ...]
    responses: tuple[int, ...]
    columns: tuple[int, ...]
    margins: Callable[[Tensor], dict[str, Tensor]] = lambda r_EM: {}
    rewards: tuple[float, ...] = ()

    def of_quads(self, values_Q4: Tensor) -> Tensor:
        """Numbers of the members of quads as those of the examples in them, [E, responses]."""
        return values_Q4[:, list(self.columns)].reshape(-1, sum(self.responses))


QUAD = Rows("quad", MEMBERS, (2, 2), (X1Y1, X1Y2, X2Y2, X2Y1), _quad_margins)
THREE = Rows(
    "quad", ("x1y1", "x1y2", "x2y1"), (2, 1), (X1Y1, X1Y2, X2Y1),
    lambda r_Q3: {"margin": 2 * r_Q3[:, 0] - r_Q3[:, 1] - r_Q3[:, 2]},
)  # fmt: skip
PAIR = Rows(
    "pair", ("chosen", "rejected"), (2,), (X1Y1, X1Y2, X2Y2, X2Y1),
    lambda r_P2: {"margin": r_P2[:, 0] - r_P2[:, 1]},
)  # fmt: skip
SINGLE = Rows("sft", ("y",), (1,), (X1Y1, X2Y2))
GROUP = Rows("group", ("y",), (2,), (X1Y1, X1Y2, X2Y2, X2Y1), rewards=(1.0, 0.0))


@dataclass(frozen=True)
class Objective:
    """An objective and everything that the program must know of it.

    loss: -> loss_E, of (policy_EM, reference_EM, link) if the objective compares the policy with a
        reference, else of (policy_EM, tokens_EM, options); on groups of (policy_EM, reference_EM,
        tokens_EM, rewards_EM, options).
    reads: the options that change it; another one that is set is refused.
    reference: whether it compares the policy with a reference.
    direction: dloss/dpolicy of an example is one scalar times this, whatever the log-probs are;
        None where there is more than one scalar to it.
    """

    rows: Rows
    loss: Callable[..., Tensor]
    reads: tuple[str, ...]
    reference: bool = False
    direction: tuple[int, ...] | None = None


LINKED = ("beta", "link", "label_smoothing", "sft_weight")
ON_QUADS = (*LINKED, "margin_per_constraint")
OBJECTIVES = {
    "iopo": Objective(QUAD, iopo, ON_QUADS, True, (1, -1, 1, -1)),
    "input_preference": Objective(QUAD, input_preference, ON_QUADS, True),
    "output_preference": Objective(QUAD, output_preference, ON_QUADS, True),
    "iopo_three": Objective(THREE, iopo_three, ON_QUADS, True, (2, -1, -1)),
    "dpo": Objective(PAIR, dpo, LINKED, True),
    "simpo": Objective(
        PAIR,
        lambda policy, tokens, o: simpo(policy, tokens, beta=o.beta, gamma=o.gamma),
        ("beta", "gamma", "sft_weight"),
    ),
    "orpo": Objective(
        PAIR, lambda policy, tokens, o: orpo(policy, tokens, weight=o.odds_weight), ("odds_weight",)
    ),
    "sft": Objective(SINGLE, lambda policy, tokens, o: sft(policy, tokens), ()),
    "grpo": Objective(
        GROUP,
        lambda policy, reference, tokens, rewards, o: grpo(
            policy, reference, tokens, rewards, clip=o.clip, kl_weight=o.kl_weight
        ),
        ("clip", "kl_weight"),
        True,
    ),
}


def compute(
    name: str,
    policy_EM: Tensor,
    reference_EM: Tensor | None,
    tokens_EM: Tensor,
    facts: Tensor,
    options: Options,
) -> Tensor:
    """Loss per example [E] of the objective called `name`, float32.

    policy_EM, reference_EM: [E, members] as in OBJECTIVES; reference None where not needed.
    tokens_EM: response tokens scored per member, integer. facts: what the rows say; of groups the
    rewards [E, members], of others the constraints in which x1 and x2 differ, [E]: with
    margin_per_constraint = g the argument of the sigmoid is beta m - g differing, a margin that
    grows with the distance of the instructions (RPO, arXiv 2505.22172).
    """
    smoothed = options.link in SMOOTHED_LINKS
    smoothing = {"label_smoothing": options.label_smoothing} if smoothed else {}

    def link(margin_E: Tensor) -> Tensor:
        offset_E = options.margin_per_constraint * facts / options.beta
        return LINKS[options.link](margin_E - offset_E, beta=options.beta, **smoothing)

    objective = OBJECTIVES[name]
    if objective.rows.rewards:
        loss_E = objective.loss(policy_EM, reference_EM, tokens_EM, facts, options)
    elif objective.reference:
        loss_E = objective.loss(policy_EM, reference_EM, link)
    else:
        loss_E = objective.loss(policy_EM, tokens_EM, options)
    if options.sft_weight:
        loss_E = loss_E + options.sft_weight * sft_anchor(policy_EM, tokens_EM)
    return loss_E
