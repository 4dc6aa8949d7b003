"""Steer a Hugging Face training: a tiny GPT-2 that learns to count, and a learning rate that was chosen badly.

Run: python examples/attach_huggingface.py [POLICY]        POLICY: a rule, "default", or the path of a bundle
Needs: pip install "trimtab[huggingface]"
"""

from __future__ import annotations

import math
import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from trimtab.policies.hosts.huggingface import TrimtabCallback

STEPS, LENGTH, NUMBERS = 200, 12, 20


def train(policy: str | None) -> float:
    """Trains with or without a controller and returns the perplexity on unseen counts (1 is perfect)."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(NUMBERS, (1700,), generator=generator)
    counts = (starts[:, None] + torch.arange(LENGTH)) % NUMBERS
    rows = [{"input_ids": row, "labels": row} for row in counts]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                n_layer=1, n_head=2, n_embd=16, vocab_size=NUMBERS, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
            )
        )
    callbacks = [TrimtabCallback(policy)] if policy else []
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            learning_rate=3e-4,
            per_device_train_batch_size=8,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows[:1600], eval_dataset=rows[1600:], callbacks=callbacks
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    for callback in callbacks:
        print(callback.controller.summary())
    return math.exp(loss)


def main(policy: str) -> None:
    """Prints the perplexity without and with the controller."""
    alone, steered = train(None), train(policy)
    print(f"perplexity: {alone:.2f} alone, {steered:.2f} with {policy}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "default")
