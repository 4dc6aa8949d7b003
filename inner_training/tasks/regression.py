"""Regression: scikit-learn's diabetes data, and synthetic functions of uniform inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.networks import MLP, build_module, initial_parameters
from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.inner_training.tasks.arrays import squared_error
from trimtab.inner_training.tasks.classification import Variation
from trimtab.inner_training.tasks.recipe import (
    RecipeRange,
    draw_recipe,
    halves,
    log_uniform,
    rng_for,
    split_sizes,
)
from trimtab.inner_training.tasks.teacher import teacher_outputs

FEATURES, HIDDEN = 16, 64
PATIENTS, MEASURES = 442, 10  # of the diabetes data
POINTS = 2048  # synthetic inputs
FEWEST, MOST = 100, 800
NOISE = 0.5  # highest standard deviation of the noise on training targets, which are of standard deviation 1


def friedman1(x: np.ndarray) -> np.ndarray:
    """Targets (n,) of inputs (n, 5 or more) in [0, 1]; the first five count (Friedman, *Ann. Statist.* 19, 1991)."""
    return 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]


def _circuit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resistance and reactance (n,) of circuits whose four parts (n, 4 or more) span their ranges from 0 to 1."""
    resistance, frequency = 100 * x[:, 0], np.pi * (40 + 520 * x[:, 1])
    inductance, capacitance = x[:, 2], 1 + 10 * x[:, 3]
    return resistance, frequency * inductance - 1 / (frequency * capacitance)


def friedman2(x: np.ndarray) -> np.ndarray:
    """The impedance of an alternating-current circuit, (n,) of (n, 4 or more) in [0, 1] (Friedman 1991)."""
    resistance, reactance = _circuit(x)
    return np.hypot(resistance, reactance)


def friedman3(x: np.ndarray) -> np.ndarray:
    """The phase angle of the same circuit, (n,) of (n, 4 or more) in [0, 1] (Friedman 1991)."""
    resistance, reactance = _circuit(x)
    return np.arctan2(reactance, resistance)


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "friedman1": friedman1,
    "friedman2": friedman2,
    "friedman3": friedman3,
}
DATA = ("diabetes", *FUNCTIONS, "teacher")


@cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Inputs (PATIENTS + POINTS, FEATURES), each of mean 0 and standard deviation 1, and the patients' targets."""
    from sklearn.datasets import load_diabetes

    measured, targets = load_diabetes(return_X_y=True, scaled=False)
    table = np.zeros((PATIENTS + POINTS, FEATURES), dtype=np.float32)
    table[:PATIENTS, :MEASURES] = (measured - measured.mean(0)) / measured.std(0)
    uniform = rng_for("regression-inputs", 0, held_out=False).random((POINTS, FEATURES))
    table[PATIENTS:] = (uniform - 0.5) * np.sqrt(12)
    return table, targets


class RegressionMLP(TaskFamily):
    """Numbers to be predicted by an MLP of one hidden layer of at most 64 units, by the squared error.

    An instance is the diabetes data (Efron et al., *Ann. Statist.* 32, 2004), one of Friedman's three functions of
    inputs in random roles among 16, or a random teacher network (see ``teacher_outputs``). Both tables are split once into
    two halves, of training and of held-out instances. Targets have mean 0 and standard deviation 1 over the training
    split, so predicting their mean costs 1; half of the instances have noise on their training targets.
    """

    module: MLP
    max_examples = MOST
    label_dtype = torch.float32
    loss_cap = 2.0
    variation: Variation = Variation()
    recipe: RecipeRange = RecipeRange()

    def __init__(self, name: str, doc: str) -> None:
        self.name, self.doc = name, doc
        self.module = build_module(lambda: MLP(FEATURES, HIDDEN, 1), seed=0)
        self._numbers, self._targets = _table()
        self.inputs = torch.from_numpy(self._numbers)
        self.max_batch = self.recipe.batch[1]
        self._patients = halves("diabetes", PATIENTS)
        self._points = [PATIENTS + half for half in halves("regression-inputs", POINTS)]

    def examples(
        self, rng: np.random.Generator, held_out: bool
    ) -> tuple[np.ndarray, np.ndarray, int, dict[str, object]]:
        """Draws rows (n,), targets (n,) in units of their own, how many features count, and traits."""
        data = DATA[int(rng.integers(len(DATA)))]
        half = (self._patients if data == "diabetes" else self._points)[int(held_out)]
        count = int(rng.integers(FEWEST, min(MOST, half.size) + 1))
        rows = rng.permutation(half)[:count]
        if data == "diabetes":
            return rows, self._targets[rows], MEASURES, {"data_set": data, "examples": count}
        inputs = self._numbers[rows]
        traits: dict[str, object] = {}
        if data == "teacher":
            outputs, traits = teacher_outputs(rng, inputs, 1)
            targets = outputs[:, 0]
        else:
            roles = rng.permutation(FEATURES)
            targets = FUNCTIONS[data](inputs[:, roles] / np.sqrt(12) + 0.5)
            traits = {"roles": roles[:5].tolist()}
        return rows, targets, FEATURES, {"data_set": data, "examples": count, **traits}

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        """Draws the instance of ``seed`` (see `TaskFamily.draw`)."""
        rng = rng_for(self.name, seed, held_out)
        rows, targets, features, traits = self.examples(rng, held_out)
        sizes = split_sizes(rows.size)
        targets = (targets - targets[: sizes[0]].mean()) / max(float(targets[: sizes[0]].std()), 1e-12)
        noise = rng.uniform(0, NOISE) if rng.random() < 0.5 else 0.0
        targets[: sizes[0]] += noise * rng.standard_normal(sizes[0])
        input_scale = log_uniform(rng, *self.variation.input_scale)
        init_scale = log_uniform(rng, *self.variation.init_scale)
        width = round(log_uniform(rng, self.variation.narrowest, HIDDEN))
        parameters, buffers = initial_parameters(self.module, rng, width, init_scale, features)
        recipe = draw_recipe(rng, self.recipe, sizes[0])
        drawn = {"target_noise": noise, "input_scale": input_scale, "init_scale": init_scale, "width": width}
        return Instance(
            key=f"{self.name}/{'held-out' if held_out else 'train'}/{seed}",
            seed=int(rng.integers(2**31)),
            rows=rows,
            labels=targets.astype(np.float32),
            sizes=sizes,
            parameters=parameters,
            buffers=buffers,
            batch_size=recipe.batch_size,
            steps=recipe.steps,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            input_scale=input_scale,
            traits={**traits, **drawn, "optimizer": recipe.kind},
        )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Squared error of each example: (B, 1) and (B,) give (B,)."""
        return squared_error(outputs, labels)
