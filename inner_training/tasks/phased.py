"""What the families of changing tasks have in common: phases, one recipe for all of them, and an MLP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.inner_training.networks import initial_parameters
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance, Phase
from trimtab.inner_training.tasks.classification import Examples, MLPFamily, Variation
from trimtab.inner_training.tasks.recipe import RecipeRange, draw_recipe, log_uniform, rng_for


@dataclass(frozen=True, kw_only=True)
class PhaseData:
    """The data of one phase.

    Attributes:
        rows: rows of the input table in train, validation and test.
        labels: their labels.
    """

    rows: tuple[np.ndarray, np.ndarray, np.ndarray]
    labels: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Examples in train, validation and test."""
        train, validation, test = self.rows
        return len(train), len(validation), len(test)


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a run goes through.

    Attributes:
        phases: in order.
        traits: what was drawn.
        features: input features in use.
    """

    phases: Sequence[PhaseData]
    traits: Mapping[str, Any] = field(default_factory=dict)
    features: int | None = None


class PhasedFamily(MLPFamily):
    """A task that changes while a run trains, learned by an MLP; a subclass says what its phases are.

    All phases are equally long. The base schedule is constant, as in the literature of continual learning.

    Set in some:
        lengths: fewest and most steps of a phase, drawn log-uniformly in multiples of 10.
    """

    lengths: tuple[int, int] = (50, 100)
    variation = Variation(label_noise=0.0)
    recipe = RecipeRange(schedules=(), batch=(8, 32))

    @abstractmethod
    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """Draws the phases of an instance; held-out examples are never those of other instances."""

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """The first phase, as data that stays."""
        first = self.story(rng, held_out).phases[0]
        rows, labels = np.concatenate(first.rows), np.concatenate(first.labels)
        return Examples(rows=rows, labels=labels, classes=self.module.outputs, features=self.module.inputs)

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        """Draws the instance of ``seed`` (see `TaskFamily.draw`)."""
        rng = rng_for(self.name, seed, held_out)
        story = self.story(rng, held_out)
        length = 10 * round(log_uniform(rng, *self.lengths) / 10)
        input_scale = log_uniform(rng, *self.variation.input_scale)
        init_scale = log_uniform(rng, *self.variation.init_scale)
        width = round(log_uniform(rng, self.variation.narrowest, self.widest))
        parameters, buffers = initial_parameters(self.module, rng, width, init_scale, story.features)
        recipe = draw_recipe(rng, self.recipe, min(phase.sizes[0] for phase in story.phases))
        drawn = {"phases": len(story.phases), "phase_steps": length, "input_scale": input_scale}
        return Instance(
            key=f"{self.name}/{'held-out' if held_out else 'train'}/{seed}",
            seed=int(rng.integers(2**31)),
            rows=np.concatenate([part for phase in story.phases for part in phase.rows]).astype(np.int64),
            labels=np.concatenate([part for phase in story.phases for part in phase.labels]).astype(self._label_type()),
            sizes=story.phases[0].sizes,
            phases=tuple(Phase(number * length, phase.sizes) for number, phase in enumerate(story.phases)),
            parameters=parameters,
            buffers=buffers,
            batch_size=recipe.batch_size,
            steps=length * len(story.phases),
            optimizer=recipe.optimizer,
            schedule=BaseSchedule(),
            input_scale=input_scale,
            traits={**drawn, **story.traits, "init_scale": init_scale, "width": width, "optimizer": recipe.kind},
        )

    def _label_type(self) -> type[np.generic]:
        return np.float32 if self.label_dtype.is_floating_point else np.int64
