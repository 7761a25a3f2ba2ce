"""From a micro-batch to the log-probability of each member: the module that is trained.

This module, and not the language model inside it, is the root that FSDP shards: within its forward
the output weight is whole, so the fused operator sees a plain tensor and autograd returns the
gradient to the sharded parameter.

Letters: T packed tokens, S sequences, L padded length, R response rows, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iopo.data.layout import Batch
from iopo.kernels.linear_logprob import linear_logprob
from iopo.model.attention import forward_arguments


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
        # Gemma 2 and 3 cap their logits; in the other families the key does not exist.
        self.softcap = causal_lm.config.to_dict().get("final_logit_softcapping")

    def forward(self, batch: Batch) -> Tensor:
        """log p(response | prompt) of each member: the sum over its scored tokens.

        Returns float32 [examples, members] in nats (float64 for a float64 model); 0 for an empty
        response. Not normalised by length. Gradient flows to the model's parameters.
        """
        hidden = self._hidden(batch)
        hidden_RD = hidden.flatten(0, 1).index_select(0, batch.rows_R)
        head = self.causal_lm.get_output_embeddings()
        logp_R = linear_logprob(
            hidden_RD, head.weight, batch.targets_R, bias_V=head.bias, softcap=self.softcap
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
