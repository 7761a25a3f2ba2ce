"""The ways to get log-probabilities from hidden states that the benchmarks compare.

Each takes (hidden_RD, weight_VD, targets_R) and returns log-probabilities, per row or their sum.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iopo.kernels.linear_logprob import linear_logprob, linear_logprob_sums

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = ("linear_logprob", "linear_logprob_sums")
CHUNK_ROWS = {"cpu": 512, "cuda": 2048}


def plain(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    """What trainers do: all logits, in the dtype of the inputs, then a float32 log-softmax."""
    logits_RV = F.linear(hidden_RD, weight_VD).float()
    return logits_RV.log_softmax(-1).gather(1, targets_R[:, None]).squeeze(1)


def chunked_checkpoint(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    """`plain` for some rows at a time, each chunk's logits computed again in the backward pass."""
    size = CHUNK_ROWS[hidden_RD.device.type]
    chunks = zip(hidden_RD.split(size), targets_R.split(size), strict=True)
    return torch.cat(
        [checkpoint(plain, hidden, weight_VD, t, use_reentrant=False) for hidden, t in chunks]
    )


def linear_cross_entropy(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden_RD, weight_VD, targets_R, reduction="none")


def linear_cross_entropy_chunked(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    """Chunked only with a sum over all rows: one upstream gradient for the whole batch."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(
        hidden_RD, weight_VD, targets_R, reduction="sum", options=options
    )


def one_member(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    member_R = torch.zeros_like(targets_R)
    return linear_logprob_sums(hidden_RD, weight_VD, targets_R, member_R, 1)


def heads(*, trainable: bool) -> dict[str, Head]:
    """Name -> head, for a trainable or a frozen weight; what this PyTorch lacks is left out."""
    found: dict[str, Head] = {"linear_logprob": linear_logprob}
    if not trainable:
        found["linear_logprob_sums"] = one_member
    found |= {
        "plain": plain,
        "chunked_checkpoint": chunked_checkpoint,
        "compile": torch.compile(plain, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13
        found["linear_cross_entropy"] = linear_cross_entropy
        found["linear_cross_entropy_chunked"] = linear_cross_entropy_chunked
    return found


def step(head: Head, pass_name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """One forward pass, or one forward and backward pass, from gradients that are None."""
    hidden_RD, weight_VD, targets_R = inputs
    if pass_name == "forward":
        with torch.no_grad():
            head(hidden_RD, weight_VD, targets_R)
        return
    hidden_RD.grad = weight_VD.grad = None
    head(hidden_RD, weight_VD, targets_R).sum().backward()


def make_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, pass_name: str, *, device: str, std: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Random (hidden_RD, weight_VD, targets_R) for shape (R, D, V); leaves that want gradients.

    The logits have standard deviation `std`.
    """
    rows, width, words = shape
    random = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=random, device=device).mul_(std).to(dtype)
    weight = torch.empty(words, width, dtype=dtype, device=device)
    for part in weight.split(8192):
        part.copy_(torch.randn(part.shape, generator=random, device=device).mul_(width**-0.5))
    targets = torch.randint(0, words, (rows,), generator=random, device=device)
    hidden.requires_grad_(pass_name != "forward")
    weight.requires_grad_(pass_name == "trainable")
    return hidden, weight, targets


def errors(head: Head, inputs: tuple[Tensor, Tensor, Tensor], *, rows: int) -> dict[str, float]:
    """Against float64 on the first rows, in nats: error of the sum per row, largest of a row."""
    hidden_RD, weight_VD, targets_R = (x.detach() for x in inputs)
    hidden_RD, targets_R = hidden_RD[:rows], targets_R[:rows]
    exact_R = torch.full(
        (len(hidden_RD),), -torch.inf, dtype=torch.float64, device=hidden_RD.device
    )
    target_R = torch.linalg.vecdot(hidden_RD.double(), weight_VD[targets_R].double())
    for weight_vD in weight_VD.split(8192):
        logits_Rv = hidden_RD.double() @ weight_vD.double().t()
        exact_R = torch.logaddexp(exact_R, logits_Rv.logsumexp(1))
    exact_R = target_R - exact_R
    with torch.no_grad():
        logp = head(hidden_RD, weight_VD, targets_R).double()
    found = {"sum_per_row": float((logp.sum() - exact_R.sum()).abs() / len(exact_R))}
    if logp.shape == exact_R.shape:
        found["largest"] = float((logp - exact_R).abs().max())
        found["above_zero"] = int((logp > 0).sum())
    return found
