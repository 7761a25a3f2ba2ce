"""AdamW over the fp32 parameters, and learning rates as pure functions of the step."""

import math

import torch
from torch import nn

from iopo.config import OptimConfig, Schedule


def make_optimizer(parameters: dict[str, nn.Parameter], cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with decay on matrices only: not on norms and biases.

    parameters: fp32, by name (TrainModel.parameters). The loop sets `lr` before every step.
    """
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
        fused=True,
    )


def lr_at(step: int, steps: int, cfg: OptimConfig) -> float:
    """Learning rate of `step` (1 .. steps): a linear climb, then the schedule.

    The climb takes ceil(warmup_ratio * steps) steps and reaches the peak at its last. Then cosine
    and linear fall to 0 one step after the last, so that no step is wasted on a rate of 0.
    """
    warmup = math.ceil(cfg.warmup_ratio * steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    if cfg.schedule is Schedule.constant:
        return cfg.lr
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    if cfg.schedule is Schedule.linear:
        return cfg.lr * (1 - progress)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))
