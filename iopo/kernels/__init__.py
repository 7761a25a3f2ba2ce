"""The head: log-probabilities of target tokens without the logits ever existing.

>>> import torch
>>> from iopo.kernels.linear_logprob import linear_logprob
>>> generator = torch.Generator().manual_seed(0)
>>> hidden_RD = torch.randn(3, 8, generator=generator, requires_grad=True)
>>> weight_VD = torch.randn(50, 8, generator=generator)
>>> targets_R = torch.tensor([4, 0, 49])
>>> logp_R = linear_logprob(hidden_RD, weight_VD, targets_R)
>>> logits_RV = hidden_RD @ weight_VD.T
>>> torch.allclose(logp_R, logits_RV.log_softmax(-1)[range(3), targets_R], atol=1e-5)
True
>>> logp_R.sum().backward()
>>> hidden_RD.grad.shape
torch.Size([3, 8])
"""
