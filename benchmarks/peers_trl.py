"""DPO steps by TRL's trainer, on token ids from standard input; imports nothing of this project's.

peers.py runs it in an environment of its own. Prints one line of JSON: losses and seconds of each
step, and the peak memory of training. --fastest: without activation checkpointing, and with the
reference's log-probs computed before training. --narrow: weights in the dtype of the task.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks import common


class TokenisedDPOTrainer(DPOTrainer):
    """Takes rows that hold token ids already, so that both sides score the same tokens."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class Clock(TrainerCallback):
    """Seconds of each optimizer step, on the clock of the task."""

    def __init__(self, now):
        self.now, self.seconds = now, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.started)


def main() -> None:
    task, fastest = json.loads(sys.stdin.read()), "--fastest" in sys.argv
    torch.set_num_threads(task["threads"])
    rows = task["pairs"]
    before = common.resident_gb()
    dtype = getattr(torch, task["dtype"]) if "--narrow" in sys.argv else torch.float32
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)
    clock = Clock(getattr(time, task["clock"]))
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=0.1,
            max_length=None,
            per_device_train_batch_size=len(rows),
            max_steps=task["steps"],
            learning_rate=task["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=not fastest,
            precompute_ref_log_probs=fastest,
            bf16=task["dtype"] == "bfloat16",
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = TokenisedDPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(task["model"]),
            callbacks=[clock],
        )
        common.reset_peak()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "losses": losses,
        "seconds": clock.seconds,
        "peak_memory_gb": common.peak_gb() - before,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
