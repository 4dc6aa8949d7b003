"""Families under test: the built-in ones and two of a user's arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.inner_training.tasks import FAMILIES
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.recipe import RecipeRange

# What other tests registered in this process is theirs.
BUILT_IN = [name for name, entry in FAMILIES.items() if entry.factory.__module__ == "trimtab.inner_training.tasks"]


class Convolution(nn.Module):
    """A small ConvNet with dropout and batch normalisation, as users have them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(3 * 2 * 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def images_task() -> ArrayTask:
    """Three classes of 4 x 4 images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    inputs = rng.normal(size=(120, 1, 4, 4)) + labels[:, None, None, None]
    return ArrayTask("images", Convolution, inputs, labels)


def line_task() -> ArrayTask:
    """Regression on a line."""
    inputs = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    labels = inputs @ torch.tensor([1.0, -2.0, 0.5])
    return ArrayTask("line", lambda: nn.Linear(3, 1), inputs, labels, loss="mse", recipe=RecipeRange(batch=(4, 8)))


MAKERS: dict[str, Callable[[], TaskFamily]] = {
    **{name: FAMILIES[name].factory for name in BUILT_IN},
    "images": images_task,
    "line": line_task,
}
CACHE: dict[str, TaskFamily] = {}
each_family = pytest.mark.parametrize("name", MAKERS)
each_built_in = pytest.mark.parametrize("name", BUILT_IN)
each_mlp = pytest.mark.parametrize("name", [name for name in BUILT_IN if "-mlp" in name])


def fingerprints() -> dict[str, list[str]]:
    """Fingerprints of a few instances of every family."""
    return {
        name: [
            family_of(name).draw(seed, held_out=held_out).fingerprint() for held_out in (False, True) for seed in (0, 7)
        ]
        for name in reversed(MAKERS)
    }


def family_of(name: str) -> TaskFamily:
    if name not in CACHE:
        CACHE[name] = MAKERS[name]()
    return CACHE[name]


def draws(name: str, count: int, *, held_out: bool) -> list[Instance]:
    return [family_of(name).draw(seed, held_out=held_out) for seed in range(count)]


def different(name: str) -> int:
    """How many different examples the table of inputs has, whatever the order of their pixels or how corrupted."""
    rows = len(family_of(name).inputs)
    return 1797 if "digits" in name else rows // 2 if name == "language" else rows


def examples(name: str, instance: Instance) -> np.ndarray:
    """Which of the different examples the rows stand for."""
    return instance.rows % different(name)


def answer_shape(family: TaskFamily) -> tuple[int, ...]:
    """Shape of the module's outputs for one example."""
    inputs = family.inputs[:2]
    x, _ = family.present(inputs if inputs.is_floating_point() else inputs.long(), torch.zeros(2))
    return tuple(family.module.eval()(x).shape[1:])
