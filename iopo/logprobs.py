"""From a micro-batch to the log-probability of each member: the module that is trained.

This module, and not the language model inside it, is the root that FSDP shards: within its forward
the output weight is whole, so the fused operator sees a plain tensor and autograd returns the
gradient to the sharded parameter.

Letters: T packed tokens, S sequences, L padded length, R response rows, D width, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iopo.data.layout import Batch
from iopo.kernels.linear_logprob import linear_logprob
from iopo.model.attention import forward_arguments

LARGE = 1e30  # beyond the saturation of any cap, within the range of float32


class _BodyOutput(tuple):
    """A decoder's output that holds last hidden states and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class LogProbs(nn.Module):
    """A causal language model that returns log-probabilities of responses instead of logits.

    causal_lm: a transformers causal LM whose output layer is an nn.Linear (with or without bias,
        tied or not), loaded with attn_implementation=SHARED for the shared layout.
        It stays reachable as `.causal_lm` and is not changed.
    """

    def __init__(self, causal_lm: PreTrainedModel):
        super().__init__()
        head = causal_lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"LogProbs: {type(causal_lm).__name__} has {type(head).__name__} as output layer, "
                "expected nn.Linear; use a causal language model"
            )
        self.causal_lm = causal_lm
        self.scale, self.softcap = end_of(causal_lm)

    def forward(self, batch: Batch) -> Tensor:
        """log p(response | prompt) of each member: the sum over its scored tokens.

        Returns float32 [examples, members] in nats (float64 for a float64 model); 0 for an empty
        response. Not normalised by length. Gradient flows to the model's parameters.
        """
        hidden = self._hidden(batch)
        hidden_RD = hidden.flatten(0, 1).index_select(0, batch.rows_R)
        head = self.causal_lm.get_output_embeddings()
        bias_V = head.bias
        if self.scale != 1:
            hidden_RD = hidden_RD * self.scale
            bias_V = None if bias_V is None else bias_V * self.scale
        logp_R = linear_logprob(
            hidden_RD, head.weight, batch.targets_R, bias_V=bias_V, softcap=self.softcap
        )
        # A member's rows are neighbours. A sum over each run of rows has one order, which index_add
        # on CUDA has not; unsafe skips a check of the lengths that waits for the device.
        logp_M = torch.segment_reduce(logp_R, "sum", lengths=batch.scored_M, unsafe=True)
        return logp_M.view(batch.examples, batch.members)

    def _hidden(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [1, T, D] or [S, L, D]."""
        if batch.attention is None:
            arguments = {"attention_mask": batch.padding_mask, "use_cache": False}
        else:
            device = batch.input_ids.device
            arguments = forward_arguments(self.causal_lm.config, batch.attention, device)
        body = self.causal_lm.get_decoder()
        output = body(input_ids=batch.input_ids, position_ids=batch.positions, **arguments)
        return output.last_hidden_state


@torch.no_grad()
def end_of(causal_lm: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, softcap): what the model's forward does beside its decoder and its head.

    logits = scale * z if softcap is None, else softcap * tanh(scale * z / softcap), where z is the
    head's output for the decoder's hidden state. Measured, for the keys of configs have many names:
    the model's own forward runs with its decoder and its head put aside, ones in place of hidden
    states, and 1 and a very large number in place of the head's output.
    Raises ValueError if it does anything else.
    """
    body, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    hidden = torch.ones(1, 2, head.in_features, dtype=torch.float64)
    given = torch.tensor([1.0, LARGE], dtype=torch.float64)[:, None].expand(2, head.out_features)
    received: list[Tensor] = []

    def in_place_of_head(input: Tensor) -> Tensor:
        received.append(input)
        return given[None].clone()

    def in_place_of_body(*args: Any, **kwargs: Any) -> _BodyOutput:
        return _BodyOutput([hidden])

    kept = {module: module.__dict__.get("forward") for module in (body, head)}
    try:
        body.forward, head.forward = in_place_of_body, in_place_of_head
        low_V, high_V = causal_lm(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits[0].double()
        before = received[0].flatten()[0].item()
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{type(causal_lm).__name__}: its end cannot be measured: {error}"
        ) from error
    finally:
        for module, forward in kept.items():
            del module.forward
            if forward is not None:
                module.forward = forward
    low, high = low_V[0].item(), high_V[0].item()
    capped = high < math.sqrt(LARGE)
    scale = float(f"{high * math.atanh(low / high):.6g}") if capped else low
    as_expected = low > 0 and bool((low_V == low).all() and (high_V == high).all())
    as_expected &= len(received) == 1 and torch.equal(received[0].double(), hidden * before)
    as_expected &= before == 1 or head.bias is None
    if not as_expected or not (capped or math.isclose(high, scale * LARGE, rel_tol=1e-6)):
        raise ValueError(
            f"{type(causal_lm).__name__}: between its last hidden state and its logits stands more "
            "than a scale, a linear head and a soft cap"
        )
    return before * scale, high if capped else None
