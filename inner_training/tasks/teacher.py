"""Synthetic classification: a random teacher network labels normal inputs."""

from __future__ import annotations

import numpy as np

from trimtab.inner_training.tasks.classification import Examples, MLPFamily
from trimtab.inner_training.tasks.recipe import log_uniform, rng_for

ROWS, FEATURES, CLASSES, HIDDEN = 4096, 32, 8, 64
FEWEST, MOST = 200, 1000
GAIN = 0.7  # of the teacher's hidden layers; a steeper teacher takes more examples than there are to be learned
RAREST = 0.5  # least share of a class, relative to a fair one


def teacher_outputs(rng: np.random.Generator, inputs: np.ndarray, outputs: int) -> tuple[np.ndarray, dict[str, object]]:
    """Outputs of a random MLP: 1 or 2 hidden layers of 8 to 32 units, relu or tanh, looking at 4 to 16 features.

    The student has to find which features matter.

    Args:
        rng: source of the teacher.
        inputs: (n, features) standard normal.
        outputs: how many.

    Returns:
        (n, outputs), each output with mean 0 and standard deviation 1 over the inputs, and what was drawn.
    """
    depth, units = int(rng.integers(1, 3)), int(rng.integers(8, 33))
    used = round(log_uniform(rng, 4, 16))
    activation = ("relu", "tanh")[int(rng.integers(2))]
    values = inputs[:, rng.permutation(inputs.shape[1])[:used]]
    for _ in range(depth):
        weights = rng.standard_normal((values.shape[1], units)) * (GAIN / np.sqrt(values.shape[1]))
        values = values @ weights + GAIN / 2 * rng.standard_normal(units)
        values = np.maximum(values, 0) if activation == "relu" else np.tanh(values)
    values = values @ rng.standard_normal((units, outputs))
    deviation = np.maximum(values.std(0), 1e-12)
    traits = {"depth": depth, "units": units, "activation": activation, "features_used": used}
    return (values - values.mean(0)) / deviation, {f"teacher_{name}": value for name, value in traits.items()}


def balanced_classes(outputs: np.ndarray) -> np.ndarray:
    """Classes (n,) of standardised outputs (n, k): the largest, or equal bins of the first output.

    The bins serve where the largest output would leave some class with less than half of its fair share.
    """
    count, classes = outputs.shape
    labels = outputs.argmax(1)
    if np.bincount(labels, minlength=classes).min() < RAREST * count / classes:
        ranks = outputs[:, 0].argsort(kind="stable").argsort(kind="stable")
        labels = ranks * classes // count
    return labels


class TeacherMLP(MLPFamily):
    """Normal inputs in 32 dimensions, labelled by a new teacher for each instance, learned by an MLP.

    Training instances draw from the first half of the table of inputs, held-out ones from the second.
    """

    max_examples = MOST

    def __init__(self, name: str, doc: str) -> None:
        table = rng_for("teacher-inputs", 0, held_out=False).standard_normal((ROWS, FEATURES), dtype=np.float32)
        super().__init__(name, doc, {"inputs": FEATURES, "hidden": HIDDEN, "outputs": CLASSES}, table)
        self._table = table

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """Draws 200 to 1,000 inputs and a teacher of 2 to 8 classes."""
        count, classes = int(rng.integers(FEWEST, MOST + 1)), int(rng.integers(2, CLASSES + 1))
        rows = rng.permutation(ROWS // 2)[:count] + ROWS // 2 * int(held_out)
        outputs, traits = teacher_outputs(rng, self._table[rows], classes)
        return Examples(
            rows=rows,
            labels=balanced_classes(outputs),
            classes=classes,
            features=FEATURES,
            traits={"examples": count, **traits},
        )
