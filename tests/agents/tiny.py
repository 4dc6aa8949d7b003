"""A scenario that takes no time: least squares in three dimensions, ten to forty steps. Steep enough to diverge."""

from __future__ import annotations

import numpy as np
from torch import nn

from trimtab.envs.scenario import Scenario
from trimtab.inner_training.tasks import FAMILIES, register_task
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.recipe import RecipeRange


def least_squares() -> ArrayTask:
    """Linear regression with noise."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(120, 3)).astype(np.float32)
    labels = (inputs @ [1.0, -2.0, 0.5] + rng.normal(0, 0.3, 120)).astype(np.float32)
    recipe = RecipeRange(steps=(10, 40), steps_multiple=5, batch=(4, 8))
    return ArrayTask("tiny-regression", lambda: nn.Linear(3, 1), inputs, labels, loss="mse", recipe=recipe)


def classes() -> ArrayTask:
    """Two classes, for scenarios of two families."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(120, 2)).astype(np.float32)
    recipe = RecipeRange(steps=(10, 20), steps_multiple=5, batch=(4, 8))
    return ArrayTask("tiny-classes", lambda: nn.Linear(2, 2), inputs, (inputs[:, 0] > 0).astype(int), recipe=recipe)


for name, factory in (("tiny-regression", least_squares), ("tiny-classes", classes)):
    if name not in FAMILIES:
        register_task(name, factory)

TINY = Scenario.of(
    {"id": "tiny", "families": ["tiny-regression"], "levers": ["lr", "momentum"], "interval": 5, "val_examples": 64}
)
TWO = TINY.replace(id="tiny-two", families=[{"name": "tiny-regression", "share": 3.0}, {"name": "tiny-classes"}])
