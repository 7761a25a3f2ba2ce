"""The ways to get log-probabilities from hidden states that the benchmarks compare.

Each takes (hidden_RD, weight_VD, targets_R) and returns log-probabilities, per row or their sum.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iopo.kernels.linear_logprob import linear_logprob

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "linear_logprob"
WHOLE = ("plain", "compile", "linear_cross_entropy")  # these keep R x V numbers
NEEDED = {"forward": 2, "frozen": 4, "trainable": 6}  # x RDV operations that the answer needs
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


def heads() -> dict[str, Head]:
    """Name -> head; what this PyTorch lacks is left out."""
    found: dict[str, Head] = {
        OURS: linear_logprob,
        "plain": plain,
        "chunked_checkpoint": chunked_checkpoint,
        "compile": torch.compile(plain, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13
        found["linear_cross_entropy"] = linear_cross_entropy
        found["linear_cross_entropy_chunked"] = linear_cross_entropy_chunked
    return found


def step(head: Head, pass_name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One forward pass, or one forward and backward pass, from gradients that are None."""
    hidden_RD, weight_VD, targets_R = inputs
    if pass_name == "forward":
        with torch.no_grad():
            return head(hidden_RD, weight_VD, targets_R)
    hidden_RD.grad = weight_VD.grad = None
    logp = head(hidden_RD, weight_VD, targets_R)
    logp.sum().backward()
    return logp.detach()


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


def exact(inputs: tuple[Tensor, Tensor, Tensor], *, rows: int) -> Tensor:
    """Log-probabilities of the first rows in float64."""
    hidden_RD, weight_VD, targets_R = (x.detach() for x in inputs)
    hidden_RD, targets_R = hidden_RD[:rows].double(), targets_R[:rows]
    total_R = torch.full_like(hidden_RD[:, 0], -torch.inf)
    for weight_vD in weight_VD.split(8192):
        total_R = torch.logaddexp(total_R, (hidden_RD @ weight_vD.double().t()).logsumexp(1))
    return torch.linalg.vecdot(hidden_RD, weight_VD[targets_R].double()) - total_R


def errors(
    head: Head, logp: Tensor, exact_R: Tensor, inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """Of logp, which head returned for these inputs, in nats: largest of a row, and of the mean.

    A head that returns one sum is called once more, with the rows of exact_R alone.
    """
    rows = len(exact_R)
    if logp.dim() == 0:
        hidden_RD, weight_VD, targets_R = (x.detach() for x in inputs)
        mean = head(hidden_RD[:rows], weight_VD, targets_R[:rows]).double() / rows
        return {"mean": float((mean - exact_R.mean()).abs())}
    error_R = logp[:rows].double() - exact_R
    return {
        "largest": float(error_R.abs().max()),
        "mean": float(error_R.mean().abs()),
        "above_zero": int((logp > 0).sum()),
    }
