"""A family of regressions so small that whole episodes take milliseconds, and that can be driven to divergence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.envs.scenario import Scenario
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily


class Tiny(TaskFamily):
    """Noisy sine of one of four inputs through six tanh units; budgets of 10 to 30 steps."""

    name, doc = "tiny", "a regression for tests"
    max_examples, max_batch, label_dtype = 120, 4, torch.float32
    loss_floor, loss_cap = 1e-3, 50.0

    def __init__(self, hidden: int = 6) -> None:
        rng = np.random.default_rng(0)
        self.hidden = hidden
        self.inputs = torch.tensor(rng.normal(size=(400, 4)), dtype=torch.float32)
        self.module = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs[..., 0] - labels).square()

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        rng = np.random.default_rng([seed, held_out])
        rows = rng.permutation(200)[:120] + 200 * held_out
        shapes = {name: tuple(parameter.shape) for name, parameter in self.module.named_parameters()}
        return Instance(
            key=f"tiny-{self.hidden}/{'held-out' if held_out else 'train'}/{seed}",
            seed=int(rng.integers(2**31)),
            rows=rows,
            labels=np.sin(self.inputs.numpy()[rows, rng.integers(4)]) + rng.normal(0, 0.1, 120),
            sizes=(64, 32, 24),
            parameters={name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()},
            buffers={},
            batch_size=int(rng.integers(2, 5)),
            steps=int(rng.integers(10, 31)),
            optimizer=OptimizerSettings(
                rule=["sgd", "adam"][rng.integers(2)],
                lr=float(rng.uniform(0.005, 0.02)),
                momentum=0.5,
                weight_decay=1e-3,
            ),
            schedule=BaseSchedule(kind=["constant", "cosine"][rng.integers(2)]),
        )


class AlwaysSGD(Tiny):
    """The same with plain gradient descent, which a high enough learning rate always breaks."""

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        instance = super().draw(seed, held_out=held_out)
        object.__setattr__(instance, "optimizer", OptimizerSettings(rule="sgd", lr=0.1, momentum=0.0))
        object.__setattr__(instance, "steps", 60)
        return instance


def tiny() -> TaskFamily:
    return Tiny()


def wide() -> TaskFamily:
    return Tiny(hidden=9)


def sgd() -> TaskFamily:
    return AlwaysSGD()


def scenario(*families: str, **changes: Any) -> Scenario:
    """A scenario of the families above by function name, three steps per decision."""
    names = [f"{__name__}:{family}" for family in families or ("tiny",)]
    return Scenario.of({"id": "tiny", "families": names, "interval": 3, "val_examples": 64, **changes})
