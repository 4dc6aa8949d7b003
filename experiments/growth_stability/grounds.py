"""The networks and data of the study: sprites under a trunk and a head, and digits under a perceptron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

from trimtab.inner_training.networks import MLP, Arrays, build_module, initial_parameters
from trimtab.inner_training.networks.conv_head import initial_conv_head
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily
from trimtab.inner_training.tasks import sprites
from trimtab.inner_training.tasks.digits import DigitsMLP
from trimtab.inner_training.tasks.images import SpritesHead

BATCH, MOMENTUM = 16, 0.9
SHARES = (0.7, 0.1)  # of the examples in the training and the validation split
HEAD_UNITS, PERCEPTRON_UNITS = 96, 128
GAIN = 6**0.5  # on the values that torch draws, uniform in +-1/sqrt(fan_in): those of He et al., arXiv 1502.01852


@dataclass(frozen=True)
class Ground:
    """What runs of the study learn: all of them the same examples, from initial values and in an order of their own.

    Attributes:
        family: of the population.
        sizes: inputs, units and outputs of the gated layers.
        rows, labels: the examples, in one random order.
        initial: draws parameters and gates at full width.
    """

    family: TaskFamily
    sizes: tuple[int, int, int]
    rows: np.ndarray
    labels: np.ndarray
    initial: Callable[[np.random.Generator], tuple[Arrays, Arrays]]

    def instance(self, seed: int, rate: float, steps: int) -> Instance:
        """A run by SGD with momentum and a cosine from ``rate`` to 0."""
        parameters, buffers = self.initial(np.random.default_rng([seed, 1]))
        train, validation = (round(share * len(self.rows)) for share in SHARES)
        return Instance(
            key=f"{self.family.name}/train/{seed}",
            seed=seed,
            rows=self.rows,
            labels=self.labels,
            sizes=(train, validation, len(self.rows) - train - validation),
            parameters=parameters,
            buffers=buffers,
            batch_size=BATCH,
            steps=steps,
            optimizer=OptimizerSettings(rule="sgd", lr=rate, momentum=MOMENTUM),
            schedule=BaseSchedule(kind="cosine"),
        )


def _shuffled(count: int) -> np.ndarray:
    return np.random.default_rng(20260515).permutation(count)


class _Sprites(SpritesHead):
    max_examples = 3 * sprites.CLASSES * sprites.COPIES


class _Digits(DigitsMLP):
    max_examples = 1797

    def __init__(self, units: int) -> None:
        super().__init__("growth-perceptron", "", depth=2)
        self.module = build_module(lambda: MLP(self.module.inputs, units, self.module.outputs, depth=2), seed=0)


def head(activation: str = "relu", units: int = HEAD_UNITS) -> Ground:
    """All 4,800 sprites of the training role, 16 classes in three levels of noise."""
    family = _Sprites("growth-head", "", units, activation)
    family.max_batch = BATCH
    order = _shuffled(family.max_examples)
    labels = sprites.sprite_table()[1][order].astype(np.int64)
    net = family.module
    sizes = (net.dense.inputs, units, net.dense.outputs)
    return Ground(family, sizes, order, labels, lambda rng: initial_conv_head(net, rng, units, GAIN))


def perceptron(units: int = PERCEPTRON_UNITS) -> Ground:
    """All 1,797 digits."""
    family = _Digits(units)
    family.max_batch = BATCH
    order, net = _shuffled(family.max_examples), family.module
    sizes = (net.inputs, units, net.outputs)
    labels = load_digits().target[order].astype(np.int64)
    return Ground(family, sizes, order, labels, lambda rng: initial_parameters(net, rng, units, GAIN))
