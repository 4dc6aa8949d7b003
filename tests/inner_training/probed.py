"""Two families whose activations lie on different axes, for the tests of further measurements."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.inner_training.networks import MLP
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.recipe import RecipeRange


class Pictures(nn.Module):
    """Convolution, gelu, token-wise linear layer, tanh: units on different axes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.mix, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = functional.gelu(self.convolution(x)).flatten(2).mT
        return self.head(torch.tanh(4 * self.mix(places)).mean(1))


def pictures() -> ArrayTask:
    rng = np.random.Generator(np.random.Philox(3))
    labels = rng.integers(0, 3, 400)
    inputs = rng.normal(size=(400, 1, 5, 5)) + labels[:, None, None, None]
    recipe = RecipeRange(batch=(4, 64), kinds=("sgd-momentum", "adam"), sgd_lr=(0.01, 0.1), adam_lr=(1e-3, 1e-2))
    return ArrayTask("probed-pictures", Pictures, inputs, labels, recipe=recipe)


def wide_tanh() -> ArrayTask:
    rng = np.random.Generator(np.random.Philox(4))
    labels = rng.integers(0, 2, 300)
    inputs = 4 * rng.normal(size=(300, 5)) + labels[:, None]
    recipe = RecipeRange(batch=(4, 64), kinds=("sgd",), sgd_lr=(0.01, 0.1), schedules=())
    return ArrayTask("probed-tanh", lambda: MLP(5, 12, 2, depth=2, activation="tanh"), inputs, labels, recipe=recipe)
