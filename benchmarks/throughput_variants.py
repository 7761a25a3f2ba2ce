"""The rows of the throughput ladder, and a trainer that can take a step as any of them.

The first row is the trainer that the paper's code runs: four padded sequences a quad, one quad a
forward, fp32 logits at every position, a live reference, activation checkpointing. Each further row
changes one thing. All rows share one model and one optimizer, so that they can be timed in turn.

Letters: E examples, M members, S sequences, L padded length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from iopo import objectives
from iopo.data.batching import Batching, pass_micro_batches, token_counts, tokens
from iopo.data.example import Example
from iopo.data.layout import Batch, build_plain, build_shared
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.attention import SHARED
from iopo.model.parallel import BlockOptions, blocks, prepare, wrap_blocks
from iopo.objectives import OBJECTIVES
from iopo.training.split import PromptByPrompt, by_prompt

LORA_RANK = 16
TOKENS_PER_MICROBATCH = 1024  # as in conf/optim/default.yaml


@dataclass(frozen=True)
class Variant:
    """One way to take the same step.

    fused: log-probs by the fused head on response rows; otherwise the stock model's logits.
    live: the reference runs in every step; otherwise its log-probs are looked up.
    checkpoint_every: recompute every k-th block in backward; 1 all of them, 0 none.
    selective: of these blocks all but matrix products and attention.
    by_prompt: under LoRA, a quad above the token budget goes one prompt at a time.
    """

    name: str
    layout: str
    fused: bool
    live: bool
    checkpoint_every: int
    selective: bool = False
    by_prompt: bool = False
    compile: bool = False


LADDER = (
    Variant("plain", "plain", fused=False, live=True, checkpoint_every=1),
    Variant("+ fused head", "plain", fused=True, live=True, checkpoint_every=1),
    Variant("+ packed", "packed", fused=True, live=True, checkpoint_every=1),
    Variant("+ shared prompts", "shared", fused=True, live=True, checkpoint_every=1),
    Variant("+ cached reference", "shared", fused=True, live=False, checkpoint_every=1),
    Variant("+ prompt by prompt", "shared", True, False, checkpoint_every=1, by_prompt=True),
    Variant("+ selective", "shared", True, False, 1, selective=True, by_prompt=True),
    Variant("+ no checkpointing", "shared", True, False, checkpoint_every=0, by_prompt=True),
)
PLAIN, CACHED, FRUGAL, SELECTIVE, BEST = (LADDER[i] for i in (0, 4, 5, 6, 7))
COMPILED = replace(BEST, name="no checkpointing + compile", compile=True)


def unshared(example: Example) -> Example:
    """The same members, each with its own copy of its prompt: what sharing is compared with."""
    forest = zip(example.prompts, example.responses, strict=True)
    paths = [(prompt, (response,)) for prompt, responses in forest for response in responses]
    prompts, responses = zip(*paths, strict=True)
    return replace(example, prompts=prompts, responses=responses)


def build_packed(examples: Sequence[Example], *, multiple: int = 1) -> Batch:
    """The log-probs of build_shared from 4(P + R) tokens per quad."""
    return build_shared([unshared(example) for example in examples], multiple=multiple)


BUILD = {"plain": build_plain, "packed": build_packed, "shared": build_shared}


class Trainer:
    """One policy, a little off its reference, its optimizer, and steps on examples.

    causal_lm: fp32 if `full`, else of `dtype`; changed in place.
    reference_lm: a frozen copy for rows with a live reference under full fine-tuning. LoRA's
        reference is the base under the adapters.
    lr: of every step. shifted: False starts the policy at its reference.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        full: bool,
        dtype: torch.dtype,
        device: torch.device,
        reference_lm: PreTrainedModel | None = None,
        tokens_per_microbatch: int = TOKENS_PER_MICROBATCH,
        lr: float = 1e-6,
        shifted: bool = True,
    ):
        self.full, self.device, self.tokens = full, device, tokens_per_microbatch
        self.config = causal_lm.config
        if not full:
            lora.add_lora(
                causal_lm,
                rank=LORA_RANK,
                alpha=2 * LORA_RANK,
                dropout=0.0,
                targets="all-linear",
                generator=torch.Generator().manual_seed(0),
            )
        self.reference = None if reference_lm is None else LogProbs(reference_lm)
        if self.reference is not None:
            self.reference.to(device)
        policy = LogProbs(causal_lm)
        policy.train()
        self.train_model = prepare(policy, device=device, dtype=dtype, mesh=None)
        self.policy = policy
        if shifted:
            self._leave_the_reference()
        values = self.train_model.parameters.values()
        self.optimizer = torch.optim.AdamW(values, lr=lr, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def _leave_the_reference(self) -> None:
        """Shift the policy, or every loss would be ln 2 whatever a row computes."""
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.train_model.parameters.items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if name.endswith("lora_B"):
                parameter.add_(noise, alpha=2e-3)
            elif self.full:
                parameter.mul_(1 + 1e-2 * noise)
        self.train_model.refresh()

    def use(self, variant: Variant) -> None:
        """Make the model compute as the row says; has no effect on its weights."""
        for block in blocks(self.policy):
            vars(block).pop("forward", None)  # what wrap_blocks has put over the class's own
        options = BlockOptions(variant.checkpoint_every, variant.selective, variant.compile)
        wrap_blocks(self.policy, options)
        attention = "sdpa" if variant.layout == "plain" else SHARED
        self.policy.causal_lm.set_attn_implementation(attention)
        if self.reference is not None:
            self.reference.causal_lm.set_attn_implementation(attention)

    def step(
        self,
        examples: Sequence[Example],
        variant: Variant,
        *,
        objective: str = "iopo",
        cache: dict[str, list[float]] | None = None,
    ) -> Tensor:
        """One optimizer step on `examples`; `use` comes first. Returns their losses, [E].

        cache: example id -> reference log-probs [M]; needed by rows without a live reference.
        """
        losses: dict[str, Tensor] = {}
        wanted = OBJECTIVES[objective].reference
        for rows in self.micro_batches(examples, variant):
            batch = BUILD[variant.layout](rows).to(self.device)
            reference_EM = None
            if wanted and variant.live:
                reference_EM = self.reference_logps(batch, variant)
            elif wanted:
                assert cache is not None
                reference_EM = torch.tensor([cache[e.id] for e in rows], device=self.device)
            parts = (
                self.divided(rows, OBJECTIVES[objective].direction) if variant.by_prompt else None
            )
            policy_EM = parts.log_probs() if parts else logps(self.policy, batch, variant)
            loss_E = objectives.compute(
                objective,
                policy_EM,
                reference_EM,
                batch.scored_M.view(batch.examples, batch.members),
                torch.zeros(batch.examples, device=self.device),
                objectives.Options(),
            )
            (loss_E.sum() / len(examples)).backward()
            if parts:  # that reached the log-probs, not yet the model
                parts.backward(last=False)
            losses |= {e.id: loss for e, loss in zip(rows, loss_E.detach(), strict=True)}
        self.train_model.reduce_and_clip(1.0)
        self.optimizer.step()
        self.train_model.zero_grad()
        return torch.stack([losses[example.id] for example in examples]).float().cpu()

    def divided(
        self, rows: Sequence[Example], direction: tuple[int, ...] | None
    ) -> PromptByPrompt | None:
        """The micro-batch one prompt at a time, if it is one quad above the token budget."""
        if self.full or direction is None or tokens(rows[0], "shared") <= self.tokens:
            return None
        batches = [build_shared(part).to(self.device) for part in by_prompt(rows)]
        return PromptByPrompt(self.train_model, batches, direction)

    @torch.no_grad()
    def reference_logps(self, batch: Batch, variant: Variant) -> Tensor:
        """[E, M] of the starting weights."""
        if self.reference is not None:
            return logps(self.reference, batch, variant)
        with lora.adapter_off(self.policy):
            return logps(self.policy, batch, variant)

    def micro_batches(self, examples: Sequence[Example], variant: Variant) -> list[list[Example]]:
        """One example a forward in the plain layout, as in the paper's code; packed otherwise."""
        plain = variant.layout == "plain"
        batching = Batching(
            global_batch_quads=len(examples),
            ranks=1,
            seed=0,
            layout="plain" if plain else "shared",
            micro_batch_quads=1 if plain else None,
            tokens_per_microbatch=None if plain else self.tokens,
        )
        packed = variant.layout == "packed"
        counted = [unshared(example) for example in examples] if packed else examples
        counts = token_counts(counted, batching.layout)
        picked = pass_micro_batches(counts, batching, rank=0)
        return [[examples[i] for i in indices] for indices in picked if indices is not None]

    def cache(self, examples: Sequence[Example]) -> dict[str, list[float]]:
        """Reference log-probs as a cache on disk holds them."""
        self.use(CACHED)
        found: dict[str, list[float]] = {}
        for rows in self.micro_batches(examples, CACHED):
            batch = build_shared(rows).to(self.device)
            values = self.reference_logps(batch, CACHED).tolist()
            found |= {e.id: value for e, value in zip(rows, values, strict=True)}
        return found


def logps(policy: LogProbs, batch: Batch, variant: Variant) -> Tensor:
    """float32 [E, M]."""
    if variant.fused:
        return policy(batch)
    return stock_logps(policy.causal_lm, batch)


def stock_logps(causal_lm: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probs as DPO trainers compute them: fp32 logits everywhere, log-softmax, gather, mask."""
    logits_SLV = causal_lm(
        input_ids=batch.input_ids, attention_mask=batch.padding_mask, use_cache=False
    ).logits.to(torch.float32)
    scored = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    scored[batch.rows_R] = True
    scored_SL = scored.view_as(batch.input_ids)
    next_SL = F.pad(batch.input_ids[:, 1:], (0, 1))
    logp_SLV = logits_SLV.log_softmax(-1)
    logp_SL = logp_SLV.gather(2, next_SL.unsqueeze(2)).squeeze(2)
    return (logp_SL * scored_SL).sum(1).view(batch.examples, batch.members)
