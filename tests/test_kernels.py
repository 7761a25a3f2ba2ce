import torch

from iopo.kernels import definition
from iopo.kernels.linear_logprob import linear_logprob


def test_equals_definition_in_float64():
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16).double(), torch.randn(33, 16).double()
    hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(0, 33, (7,))
    upstream = torch.randn(7).double()
    ours = torch.autograd.grad(
        linear_logprob(hidden, weight, targets), (hidden, weight), grad_outputs=upstream
    )
    theirs = torch.autograd.grad(
        definition.linear_logprob(hidden, weight, targets), (hidden, weight), grad_outputs=upstream
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
