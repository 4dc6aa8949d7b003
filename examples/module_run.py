"""Steer a training run of your own as an environment: a byte-level language model of Python's standard library.

Run: python examples/module_run.py [--policy RULE|default|BUNDLE] [--size small|10m] [--steps N] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import trimtab
from trimtab.envs.module_env import ModuleFamily, Parts, module_env
from trimtab.envs.scenario import Scenario
from trimtab.inner_training.networks.transformer import LanguageModel
from trimtab.inner_training.tasks.language import library_folder, library_parts

BYTES = 256


@dataclass(frozen=True)
class Size:
    """A model, its batches and its budget."""

    width: int
    depth: int
    heads: int
    context: int
    batch: int
    steps: int
    lr: float


SIZES = {
    "small": Size(width=64, depth=2, heads=4, context=64, batch=16, steps=300, lr=3e-3),
    "10m": Size(width=320, depth=8, heads=5, context=256, batch=32, steps=2000, lr=1e-3),
}


def source_code(*, held_out: bool) -> Tensor:
    """Modules of the standard library one after another, as bytes; held-out ones are others."""
    parts = library_parts(library_folder())
    text = b"".join(part.data for part in parts if part.held_out == held_out)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Windows:
    """Batches of random windows of ``context`` + 1 bytes, drawn from torch's own generator, which is the run's."""

    def __init__(self, text: Tensor, size: Size, device: str, batches: int) -> None:
        self.text, self.size, self.device, self.batches = text, size, device, batches

    def __iter__(self) -> Iterator[Tensor]:
        span = torch.arange(self.size.context + 1)
        for _ in range(self.batches):
            starts = torch.randint(len(self.text) - len(span) + 1, (self.size.batch, 1))
            yield self.text[starts + span].to(self.device, non_blocking=True).long()


def next_byte_loss(module: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each next byte, in nats."""
    with torch.autocast(windows.device.type, dtype=torch.bfloat16, enabled=windows.is_cuda):
        logits = module(windows[:, :-1])
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def family(size: Size, steps: int, device: str) -> ModuleFamily:
    """Runs of one size; ``make(seed)`` builds a fresh one, its random numbers being those of the seed."""
    train, others = source_code(held_out=False), source_code(held_out=True)
    validation, test = others.chunk(2)

    def make(seed: int) -> Parts:
        del seed
        model = LanguageModel(context=size.context, width=size.width, depth=size.depth, heads=size.heads).to(device)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return Parts(
            module=model,
            optimizer=torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95), weight_decay=0.1),
            train=Windows(train, size, device, batches=1000),
            loss=next_byte_loss,
            total_steps=steps,
            validation=Windows(validation, size, device, batches=8),
            test=Windows(test, size, device, batches=32),
        )

    return ModuleFamily(name="standard-library", make=make, loss_cap=2 * math.log(BYTES))


def train(policy_name: str, size: Size, steps: int, device: str) -> float:
    """Trains one run under a policy and returns the test loss in bits per byte."""
    policy = trimtab.load_policy(policy_name)
    scenario = Scenario.of(
        {
            "id": "standard-library",
            "families": ["digits-mlp"],  # gives way to the run
            "interval": max(steps // 30, 1),
            "signals": list(policy.signals) or ["started"],
            "missing": {"progress": 0, "validation": 0, "validation_every_max": 1},
        }
    )
    episodes = module_env(family(size, steps, device), scenario=scenario).episodes
    episodes.reset(np.ones(1, dtype=bool), np.zeros(1, dtype=np.int64))
    reading = episodes.populations.reading(None, np.full(1, np.nan))
    print(f"{int(reading.parameters[0]):,} parameters, {steps} steps under {policy.name}")
    state, ended = policy.init(1), False
    while not ended:
        actions, state = policy.act(episodes.observations[:, : len(policy.signals)], state)
        result = episodes.step(actions, policy.levers)
        ended = bool(result.terminated[0])
        levers = dict(zip(episodes.action_levers, result.multipliers[0].round(3).tolist(), strict=True))
        bits = math.exp(result.log_val_loss[0]) / math.log(2)
        print(f"step {result.step[0]:5d}   validation {bits:.3f} bits per byte   multipliers {levers}")
    return float(episodes.test_loss()[0]) / math.log(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints how the run went."""
    parser = argparse.ArgumentParser(description="Steer the training of a language model of Python's standard library.")
    parser.add_argument("--policy", default="warmup-cosine", help="a rule, 'default', or the path of a bundle")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, help="optimizer steps; each size has its own default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    size = SIZES[given.size]
    bits = train(given.policy, size, given.steps or size.steps, given.device)
    print(f"test loss: {bits:.3f} bits per byte under {given.policy} (8 is guessing)")


if __name__ == "__main__":
    main()
