"""Tasks that change many times: random labels on a fixed small set, permuted pixels, and one where nothing changes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.networks.plastic_mlp import PlasticMLP, initial_plastic_parameters
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance, OptimizerSettings, Phase, TaskFamily
from trimtab.inner_training.tasks.classification import cross_entropy
from trimtab.inner_training.tasks.digits import CLASSES, PIXELS, digit_images
from trimtab.inner_training.tasks.recipe import rng_for

BATCH = 16
ORDERS = 48  # pixel orders in the table, of which each seed draws its phases


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a run goes through.

    Attributes:
        images: training images of a run.
        doc: what changes from one phase to the next.
    """

    images: int
    doc: str


TASKS = {
    "random-labels": Task(images=40, doc="40 digits get new random labels"),
    "permuted": Task(images=320, doc="320 digits get a new order of their pixels"),
    "steady": Task(images=320, doc="nothing: 320 digits as they are; the control"),
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A perceptron of two hidden layers.

    Attributes:
        hidden: outputs of each hidden layer.
        activation, norm: see ``PlasticMLP``.
    """

    hidden: int = 40
    activation: str = "relu"
    norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one run is trained.

    Attributes:
        task: a name of ``TASKS``.
        seed: of its data, order of batches, and initial weights.
        lr: constant.
        rule: of the optimizer.
        weight_decay: of weights and biases, as a term of the gradient.
        width: active units of each hidden layer; None for all.
    """

    task: str
    seed: int
    lr: float
    rule: str = "adam"
    weight_decay: float = 0.0
    width: int | None = None


class Continual(TaskFamily):
    """Digits in phases; the accuracy of each batch before its step is the online accuracy.

    Args:
        phases: how many there are.
        steps: of a phase.
        network: that learns.
    """

    doc = "digits in phases"
    name = "continual-digits"
    max_batch = BATCH
    loss_cap = 2 * float(np.log(CLASSES))
    score_name = "accuracy"

    def __init__(self, phases: int, steps: int, network: Network) -> None:
        if phases > ORDERS:
            raise UserError(f"there are {phases} phases; there are orders of pixels for at most {ORDERS}")
        self.max_phases, self.steps = phases, steps
        self.module = PlasticMLP(
            PIXELS, network.hidden, CLASSES, depth=2, activation=network.activation, norm=network.norm
        )
        images, self._labels = digit_images()
        rng = rng_for("plasticity-orders", 0, held_out=False)
        orders = [np.arange(PIXELS), *(rng.permutation(PIXELS) for _ in range(ORDERS - 1))]
        self.inputs = torch.from_numpy(np.concatenate([images[:, order] for order in orders]))
        self.max_examples = phases * (max(task.images for task in TASKS.values()) + 2)

    @property
    def rules(self) -> tuple[str, ...]:
        """Those of recipes."""
        return "sgd", "adam"

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        """A run of the first task at a usual rate."""
        return self.instance(Recipe(task=next(iter(TASKS)), seed=seed, lr=1e-3))

    def instance(self, recipe: Recipe) -> Instance:
        """The run of a recipe. Its data and initial weights depend on task, seed and width alone."""
        count, phases, every = TASKS[recipe.task].images, self.max_phases, len(self._labels)
        rng = rng_for(f"plasticity-{recipe.task}", recipe.seed, held_out=False)
        images = rng.permutation(every)[:count]
        orders = np.zeros(phases, dtype=np.int64)
        labels = np.broadcast_to(self._labels[images], (phases, count))
        if recipe.task == "permuted":
            orders = rng.permutation(ORDERS)[:phases]
        if recipe.task == "random-labels":
            labels = rng.integers(CLASSES, size=(phases, count))
        # Validation and test have one example each, as nobody asks for them.
        place, sizes = np.r_[np.arange(count), 0, 0], (count, 1, 1)
        width = self.module.units if recipe.width is None else recipe.width
        parameters, buffers = initial_plastic_parameters(self.module, rng, width, 1.0)
        return Instance(
            key=f"{recipe.task}/{recipe.seed}",
            seed=int(rng_for("plasticity-batches", recipe.seed, held_out=False).integers(2**31)),
            rows=(orders[:, None] * every + images[None])[:, place].reshape(-1),
            labels=labels[:, place].reshape(-1).astype(np.int64),
            sizes=sizes,
            phases=tuple(Phase(number * self.steps, sizes) for number in range(phases)),
            parameters=parameters,
            buffers=buffers,
            batch_size=BATCH,
            steps=self.steps * phases,
            optimizer=OptimizerSettings(
                rule=recipe.rule,
                lr=recipe.lr,
                momentum=0.9 if recipe.rule == "adam" else 0.0,
                weight_decay=recipe.weight_decay,
            ),
            schedule=BaseSchedule(),
        )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each example."""
        return cross_entropy(outputs, labels)

    def last_inputs(self, instance: Instance, count: int) -> np.ndarray:
        """(count, pixels) training images of the last phase, from the first on again where there are fewer."""
        rows = instance.rows[instance.split("train", self.max_phases - 1)]
        return self.inputs.numpy()[np.resize(rows, count)]
