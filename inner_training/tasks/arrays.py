"""A family made of the user's own arrays and any module."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError, UserError, out_of_range, unknown
from trimtab.inner_training.networks import build_module, module_parameters, seeded_rng
from trimtab.inner_training.stacking import check_parameters
from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.inner_training.tasks.classification import cross_entropy
from trimtab.inner_training.tasks.recipe import RecipeRange, draw_recipe, halves, rng_for, split_sizes


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each example: outputs (B,) or (B, 1) and labels (B,) give (B,)."""
    return (outputs.reshape(labels.shape) - labels).square()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": cross_entropy, "mse": squared_error}
FEWEST = 40  # examples: 20 in each half, of which 12 train, 3 validate and 5 test at the least


class ArrayTask(TaskFamily):
    """Runs of one module on one's own data, for training or judging policies on a problem like one's own.

    The examples are split once into two halves, of training and of held-out instances. An instance is a random
    50 to 100 % of its half, at least 20 examples, split into train, validation and test (60/15/25), with the module's
    own initialisation for a new seed and a recipe drawn from ``recipe``.

    Attributes:
        loss_cap: end of the bounded loss: by default twice the loss of guessing, ``2 ln(outputs)`` for cross-entropy
            and twice the variance of the labels for the squared error.

    >>> rng = np.random.default_rng(0)
    >>> inputs = rng.normal(size=(200, 4)).astype(np.float32)
    >>> labels = (inputs[:, 0] > 0).astype(np.int64)
    >>> family = ArrayTask("sign", lambda: nn.Linear(4, 2), inputs, labels)
    >>> instance = family.draw(0, held_out=False)
    >>> instance.key, sum(instance.sizes) == instance.rows.size, instance.parameters["weight"].shape
    ('sign/train/0', True, (2, 4))
    """

    def __init__(
        self,
        name: str,
        module_factory: Callable[[], nn.Module],
        inputs: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        *,
        loss: str = "cross-entropy",
        recipe: RecipeRange | None = None,
        loss_cap: float | None = None,
        doc: str = "arrays of the user's own",
    ) -> None:
        """Checks that the parts fit.

        Args:
            name: lower-case words with hyphens; it seeds the streams of the instances.
            module_factory: makes the network on the CPU; its initialisation draws from torch's default generator only.
            inputs: (R, *shape) finite numbers, R >= 40.
            labels: (R,) class numbers from 0 for ``cross-entropy``, finite numbers for ``mse``.
            loss: ``cross-entropy`` or ``mse``.
            recipe: what to draw recipes from; ``recipe.batch`` also limits the batch. None is the default.
            loss_cap: end of the bounded loss, above ``loss_floor``; None computes it.
            doc: one line for tables.

        Raises:
            UserError: when the arrays, the module and the loss do not fit; the message says which.
        """
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES)
        self.name, self.doc = name, doc
        self.recipe = recipe or RecipeRange()
        self.max_batch = self.recipe.batch[1]
        self.label_dtype = torch.int64 if loss == "cross-entropy" else torch.float32
        self.score_name = "accuracy" if loss == "cross-entropy" else ""
        self._factory, self._loss = module_factory, LOSSES[loss]
        table, self._labels = _checked_arrays(_host(inputs), _host(labels), loss)
        self.inputs = torch.from_numpy(table)
        self._halves = halves(name, len(table))
        self.max_examples = max(half.size for half in self._halves)
        self.module = self._template()
        outputs = self._checked_module(loss)
        if loss_cap is None:
            loss_cap = 2 * math.log(outputs) if loss == "cross-entropy" else 2 * float(self._labels.var())
        if not self.loss_floor < loss_cap < math.inf:
            raise UserError(
                f"loss_cap is {loss_cap:g}; give a finite number above {self.loss_floor:g} (labels that are all alike "
                "cannot be learned)"
            )
        self.loss_cap = loss_cap

    @property
    def rules(self) -> tuple[str, ...]:
        """The update rules of its recipe."""
        return self.recipe.rules

    def _template(self) -> nn.Module:
        if isinstance(self._factory, nn.Module) or not callable(self._factory):
            raise UserError(
                f"the module factory of task {self.name!r} is a {type(self._factory).__name__}; "
                "give a function that makes a new module at each call"
            )
        module: object = build_module(self._factory, seed=0)
        if not isinstance(module, nn.Module):
            raise UserError(
                f"the module factory of task {self.name!r} made a {type(module).__name__}; make an nn.Module"
            )
        check_parameters(self.name, module)
        return module

    def _checked_module(self, loss: str) -> int:
        """Number of outputs of the module, once it is known to fit the arrays and to be made by its seed alone."""
        first, again = (module_parameters(self._factory, seed=0)[0] for _ in range(2))
        if any(not np.array_equal(first[name], again[name], equal_nan=True) for name in first):
            raise UserError(
                f"the module of task {self.name!r} starts differently each time; let its initialisation draw from "
                "torch's default generator only"
            )
        shape = tuple(self._probe().shape)
        if loss == "cross-entropy":
            needed = max(int(self._labels.max()) + 1, 2)
            fits = len(shape) == 2 and shape[1] >= needed
        else:
            needed = 1
            fits = shape in ((2,), (2, 1))
        if not fits:
            raise MismatchError(
                f"the module of task {self.name!r} maps two examples to shape {shape}; "
                f"with {loss} and these labels it must be (2, {needed})"
            )
        return shape[-1]

    def _probe(self) -> Tensor:
        """Outputs for two examples."""
        try:
            # A forward pass may draw random numbers too, and may change buffers: a fork, and a module to throw away.
            with seeded_rng(0), torch.no_grad():
                outputs = self._factory()(self.inputs[:2].clone())
        except Exception as error:  # a user's module may fail in any way
            raise MismatchError(
                f"the module of task {self.name!r} fails on two examples of shape {tuple(self.inputs[:2].shape)} "
                f"({type(error).__name__}: {error}); make the module and the inputs fit"
            ) from error
        if not isinstance(outputs, Tensor):
            raise MismatchError(
                f"the module of task {self.name!r} returns a {type(outputs).__name__}; return one tensor"
            )
        return outputs

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        """Draws the instance of ``seed`` (see `TaskFamily.draw`)."""
        rng = rng_for(self.name, seed, held_out)
        half = self._halves[int(held_out)]
        count = int(rng.integers(max(half.size // 2, FEWEST // 2), half.size + 1))
        rows = rng.permutation(half)[:count].astype(np.int64)
        sizes = split_sizes(count)
        parameters, buffers = module_parameters(self._factory, seed=int(rng.integers(2**63)))
        recipe = draw_recipe(rng, self.recipe, sizes[0])
        return Instance(
            key=f"{self.name}/{'held-out' if held_out else 'train'}/{seed}",
            seed=int(rng.integers(2**31)),
            rows=rows,
            labels=self._labels[rows],
            sizes=sizes,
            parameters=parameters,
            buffers=buffers,
            batch_size=recipe.batch_size,
            steps=recipe.steps,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            traits={"examples": count, "optimizer": recipe.kind},
        )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each example: (B, outputs) and (B,) give (B,)."""
        return self._loss(outputs, labels)


def _host(values: np.ndarray | Tensor) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype != bool and not np.issubdtype(array.dtype, np.number):
        raise UserError(f"inputs or labels are of type {array.dtype}; give numbers")
    return array


def _checked_arrays(inputs: np.ndarray, labels: np.ndarray, loss: str) -> tuple[np.ndarray, np.ndarray]:
    """The arrays in the types that runs use, float32 inputs and int64 or float32 labels."""
    if inputs.ndim < 2 or labels.shape != inputs.shape[:1]:
        raise MismatchError(
            f"inputs have shape {inputs.shape} and labels {labels.shape}; give inputs (R, ...) and labels (R,)"
        )
    if len(inputs) < FEWEST:
        raise out_of_range("the number of examples", len(inputs), low=FEWEST, remedy="both halves are split in three")
    if not np.isfinite(inputs).all() or not np.isfinite(labels).all():
        raise UserError("inputs or labels hold NaN or infinity; remove or fill in those examples")
    if loss == "mse":
        return inputs.astype(np.float32), labels.astype(np.float32)
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(
            f"labels are {labels.dtype} from {labels.min()}; cross-entropy needs integers from 0, mse any number"
        )
    return inputs.astype(np.float32), labels.astype(np.int64)
