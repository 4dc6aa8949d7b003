"""What the classification families have in common: an MLP with gates, noise, scales and a recipe."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trimtab.inner_training.networks import MLP, Arrays, build_module, initial_parameters
from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.inner_training.tasks.recipe import (
    RecipeRange,
    draw_recipe,
    log_uniform,
    noisy_labels,
    rng_for,
    split_sizes,
)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, in nats.

    Args:
        outputs: (B, classes) unnormalised log probabilities.
        labels: (B,) int64 class numbers.

    Returns:
        (B,) losses, >= 0. A gather and no reduction: the form that vmap and the compiler handle best.
    """
    log_probabilities = functional.log_softmax(outputs, dim=-1)
    return -log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Variation:
    """What varies between instances besides data and recipe; ranges are inclusive.

    Attributes:
        label_noise: highest share of wrong training labels; half of the instances have none, the others a uniform
            share up to this one.
        input_scale: log-uniform factor of all inputs.
        init_scale: log-uniform factor of the initial weights (see ``initial_parameters``).
        narrowest: fewest active units per hidden layer; log-uniform up to the width of the module.
    """

    label_noise: float = 0.3
    input_scale: tuple[float, float] = (0.3, 3.0)
    init_scale: tuple[float, float] = (0.5, 2.0)
    narrowest: int = 8


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The data of one instance, before noise.

    Attributes:
        rows: (n,) int64 distinct rows of the input table, in random order.
        labels: (n,) int64 true classes in [0, classes).
        classes: number of classes, >= 2.
        features: input features in use; those after them are padding.
        traits: what was drawn.
    """

    rows: np.ndarray
    labels: np.ndarray
    classes: int
    features: int
    traits: Mapping[str, Any] = field(default_factory=dict)


class ClassificationFamily(TaskFamily):
    """Classification with noisy training labels, drawn scales and a drawn recipe; a subclass gives data and network.

    The bounded loss ends at twice the loss of guessing among all outputs, ``2 ln(outputs)``.

    Set in all subclasses:
        What `TaskFamily` lists.
        widest: most active units per gate, the upper end of a drawn width.
    Set in some:
        variation, recipe: what to draw from.
    """

    widest: int
    variation: Variation = Variation()
    recipe: RecipeRange = RecipeRange()
    score_name = "accuracy"

    @property
    def rules(self) -> tuple[str, ...]:
        """The update rules of its recipe."""
        return self.recipe.rules

    @abstractmethod
    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """Draws the data of an instance; held-out examples are never those of other instances."""

    @abstractmethod
    def initial(self, rng: np.random.Generator, width: int, scale: float, data: Examples) -> tuple[Arrays, Arrays]:
        """Draws initial parameters and buffers for ``width`` active units per gate and a scale of the weights."""

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        """Draws the instance of ``seed`` (see `TaskFamily.draw`).

        Only training labels get noise, so that validation and test losses measure what was to be learned.
        """
        rng = rng_for(self.name, seed, held_out)
        data = self.examples(rng, held_out)
        sizes = split_sizes(data.rows.size)
        noise = rng.uniform(0, self.variation.label_noise) if rng.random() < 0.5 else 0.0
        labels = data.labels.astype(np.int64)
        labels[: sizes[0]] = noisy_labels(rng, labels[: sizes[0]], data.classes, noise)
        input_scale = log_uniform(rng, *self.variation.input_scale)
        init_scale = log_uniform(rng, *self.variation.init_scale)
        width = round(log_uniform(rng, self.variation.narrowest, self.widest))
        parameters, buffers = self.initial(rng, width, init_scale, data)
        recipe = draw_recipe(rng, self.recipe, sizes[0])
        drawn = {"label_noise": noise, "input_scale": input_scale, "init_scale": init_scale, "width": width}
        return Instance(
            key=f"{self.name}/{'held-out' if held_out else 'train'}/{seed}",
            seed=int(rng.integers(2**31)),
            rows=data.rows.astype(np.int64),
            labels=labels,
            sizes=sizes,
            parameters=parameters,
            buffers=buffers,
            batch_size=recipe.batch_size,
            steps=recipe.steps,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            input_scale=input_scale,
            traits={"classes": data.classes, **data.traits, **drawn, "optimizer": recipe.kind},
        )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each example: (B, outputs) and (B,) give (B,)."""
        return cross_entropy(outputs, labels)


class MLPFamily(ClassificationFamily):
    """Classification by an `MLP`; a subclass says which examples an instance has."""

    module: MLP

    def __init__(self, name: str, doc: str, network: Mapping[str, Any], inputs: np.ndarray) -> None:
        """Sets what all subclasses need.

        Args:
            name: lower-case words with hyphens; it seeds the streams of the instances.
            doc: one line for tables.
            network: arguments of `MLP`.
            inputs: (R, features) float32 table.
        """
        self.name, self.doc = name, doc
        self.module = build_module(lambda: MLP(**network), seed=0)
        self.widest = self.module.hidden
        self.inputs = torch.from_numpy(np.ascontiguousarray(inputs))
        self.max_batch = self.recipe.batch[1]
        self.loss_cap = 2 * math.log(self.module.outputs)

    def initial(self, rng: np.random.Generator, width: int, scale: float, data: Examples) -> tuple[Arrays, Arrays]:
        """Draws initial parameters and gates (see ``initial_parameters``)."""
        return initial_parameters(self.module, rng, width, scale, data.features)
