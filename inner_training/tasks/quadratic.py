"""Least squares with a chosen spectrum: a family whose curvature and optimum are known exactly."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.inner_training.networks import build_module
from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.inner_training.tasks.recipe import (
    RecipeRange,
    draw_recipe,
    halves,
    log_uniform,
    rng_for,
    split_sizes,
)

DIMENSIONS = 32
LEAST_DIMENSIONS = 16
ROWS = 1024
FEWEST, MOST = 200, 500


class MixedLinear(nn.Module):
    """A linear map without bias of inputs that a buffer ``mixing`` (inputs, inputs) transforms first.

    >>> MixedLinear(3)(torch.ones(5, 3)).shape
    torch.Size([5, 1])
    """

    mixing: Tensor

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 1, bias=False)
        self.register_buffer("mixing", torch.eye(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs) to (B, 1)."""
        return self.linear(x @ self.mixing)


@cache
def _table() -> np.ndarray:
    return rng_for("quadratic-inputs", 0, held_out=False).standard_normal((ROWS, DIMENSIONS), dtype=np.float32)


class Quadratic(TaskFamily):
    """Examples (a, y) with ``y = a . theta* + noise``, learned by a linear map with the loss ``(a . theta - y)^2 / 2``.

    The mean loss over the training split is a quadratic whose Hessian, the second moment of ``a`` there, has a chosen
    spectrum in random directions: 16 to 32 eigenvalues, the largest log-uniform from 1 to 30, the condition number
    log-uniform from 1 to 1,000, the others log-uniform between (compare the noisy quadratic model, Zhang et al., arXiv
    1907.04164). True targets have mean square 1 over the training split, so a map of zeros costs 1/2. Half of the
    instances have noise on their training targets, of a standard deviation log-uniform from 0.03 to 0.5.

    The optimum is drawn with coordinates ``normal x eigenvalue^-p``, p uniform from 0 to 1/2: at 1/2 every direction
    holds an equal share of the loss, so that the slow ones matter. The exact quantities of an instance are functions:
    ``hessian``, ``optimum``, ``largest_eigenvalue``, ``least_loss``.
    """

    max_examples = MOST
    label_dtype = torch.float32
    loss_floor, loss_cap = 1e-6, 1.0
    recipe: RecipeRange = RecipeRange()

    def __init__(self, name: str, doc: str) -> None:
        self.name, self.doc = name, doc
        self.module = build_module(lambda: MixedLinear(DIMENSIONS), seed=0)
        self.inputs = torch.from_numpy(_table())
        self.max_batch = self.recipe.batch[1]
        self._halves = halves("quadratic-inputs", ROWS)

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        """Draws the instance of ``seed`` (see `TaskFamily.draw`)."""
        rng = rng_for(self.name, seed, held_out)
        rows = rng.permutation(self._halves[int(held_out)])[: int(rng.integers(FEWEST, MOST + 1))]
        sizes = split_sizes(rows.size)
        size = int(rng.integers(LEAST_DIMENSIONS, DIMENSIONS + 1))
        eigenvalues, condition = _spectrum(rng, size)
        directions = _rotation(rng, size)
        mixing = np.zeros((DIMENSIONS, DIMENSIONS), dtype=np.float32)
        mixing[:size, :size] = _mixing(_table()[rows[: sizes[0]], :size], eigenvalues, directions)
        slowness = rng.uniform(0, 0.5)
        theta = np.zeros(DIMENSIONS)
        theta[:size] = _of_length(rng.standard_normal(size) * eigenvalues**-slowness, eigenvalues) @ directions
        start = np.zeros(DIMENSIONS)
        init_scale = rng.uniform(0, 0.5)
        start[:size] = init_scale * _of_length(rng.standard_normal(size), eigenvalues) @ directions
        noise = log_uniform(rng, 0.03, 0.5) if rng.random() < 0.5 else 0.0
        targets = _table()[rows].astype(np.float64) @ mixing @ theta
        targets[: sizes[0]] += noise * rng.standard_normal(sizes[0])
        recipe = draw_recipe(rng, self.recipe, sizes[0])
        return Instance(
            key=f"{self.name}/{'held-out' if held_out else 'train'}/{seed}",
            seed=int(rng.integers(2**31)),
            rows=rows,
            labels=targets.astype(np.float32),
            sizes=sizes,
            parameters={"linear.weight": start.astype(np.float32)[None]},
            buffers={"mixing": mixing},
            batch_size=recipe.batch_size,
            steps=recipe.steps,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            traits={
                "examples": rows.size,
                "dimensions": size,
                "largest_eigenvalue": float(eigenvalues[0]),
                "condition_number": condition,
                "slowness": slowness,
                "target_noise": noise,
                "init_scale": init_scale,
                "optimizer": recipe.kind,
            },
        )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Half the squared error of each example: (B, 1) and (B,) give (B,)."""
        return (outputs.reshape(labels.shape) - labels).square() / 2


def _spectrum(rng: np.random.Generator, size: int) -> tuple[np.ndarray, float]:
    """Eigenvalues (size,), from the largest to the smallest, and their condition number."""
    largest, condition = log_uniform(rng, 1.0, 30.0), log_uniform(rng, 1.0, 1000.0)
    between = np.sort(rng.uniform(0, 1, size - 2))
    return largest * condition ** -np.concatenate([[0.0], between, [1.0]]), condition


def _rotation(rng: np.random.Generator, size: int) -> np.ndarray:
    """An orthogonal matrix (size, size), uniform (Mezzadri, arXiv math-ph/0609050); its rows are the eigenvectors."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    rotation: np.ndarray = q * np.sign(np.diag(r))
    return rotation


def _mixing(inputs: np.ndarray, eigenvalues: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """What turns inputs (n, d) into examples with exactly these second moments over the n."""
    moments = inputs.T.astype(np.float64) @ inputs / len(inputs)
    spread, basis = np.linalg.eigh(moments)
    whitening = basis / np.sqrt(spread) @ basis.T
    mixing: np.ndarray = whitening * np.sqrt(eigenvalues) @ directions
    return mixing


def _of_length(coordinates: np.ndarray, eigenvalues: np.ndarray) -> np.ndarray:
    """Coordinates along the eigenvectors, scaled so that the targets that they give have mean square 1."""
    scaled: np.ndarray = coordinates / np.sqrt((eigenvalues * coordinates**2).sum())
    return scaled


def points(instance: Instance, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """What a run of the instance sees: a (n, 32) and y (n,) of a split, float64; unused dimensions are zero."""
    where = instance.split(split)
    inputs = _table()[instance.rows[where]].astype(np.float64)
    return inputs @ instance.buffers["mixing"], instance.labels[where].astype(np.float64)


def hessian(instance: Instance, split: str = "train") -> np.ndarray:
    """Hessian (32, 32) of the mean loss over a split, the same everywhere; unused dimensions are rows of zeros."""
    a, _ = points(instance, split)
    second_moments: np.ndarray = a.T @ a / len(a)
    return second_moments


def largest_eigenvalue(instance: Instance) -> float:
    """Largest eigenvalue L of the training loss's Hessian: gradient descent on it is stable below the rate 2 / L."""
    return float(np.linalg.eigvalsh(hessian(instance))[-1])


def optimum(instance: Instance) -> np.ndarray:
    """Parameters (32,) of the least training loss; unused dimensions are zero."""
    solution: np.ndarray = np.linalg.lstsq(*points(instance), rcond=1e-9)[0]
    return solution


def least_loss(instance: Instance) -> float:
    """The training loss at the optimum."""
    a, y = points(instance)
    return float(((a @ optimum(instance) - y) ** 2).mean() / 2)
