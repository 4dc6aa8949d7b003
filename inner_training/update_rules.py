"""Update rules with per-run hyperparameters, as pure functions on flat parameters; each equals ``torch.optim`` at one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

HYPERPARAMETERS = ("lr", "momentum", "weight_decay", "nesterov", "beta2", "eps", "decoupled", "grad_clip")
Columns = Mapping[str, Tensor]
Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Columns], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer.

    Attributes:
        name: as in ``OptimizerSettings.rule``.
        doc: one line for tables.
        adaptive: whether it divides by a second moment.
        decoupled: whether weight decay acts beside the gradient rather than through it.
        update: ``(parameters, gradients, first, second, step, columns) -> (parameters, first, second)`` where
            tensors are (N, P), ``step`` (N, 1) counts updates from 1, and ``columns`` holds each hyperparameter (N, 1).
    """

    name: str
    doc: str
    adaptive: bool
    decoupled: bool
    update: Update


def sgd(
    parameters: Tensor, gradients: Tensor, first: Tensor, second: Tensor, step: Tensor, columns: Columns
) -> tuple[Tensor, Tensor, Tensor]:
    """SGD with coupled weight decay, momentum and Nesterov momentum, as ``torch.optim.SGD`` (no dampening)."""
    del step
    gradients = gradients + columns["weight_decay"] * parameters
    momentum = columns["momentum"]
    # torch keeps no buffer at momentum 0, so one that is switched on later starts from that step's gradient.
    first = torch.where(momentum > 0, momentum * first + gradients, 0.0)
    ahead = torch.where(columns["nesterov"] > 0, gradients + momentum * first, first)
    direction = torch.where(momentum > 0, ahead, gradients)
    return parameters - columns["lr"] * direction, first, second


def adam(
    parameters: Tensor, gradients: Tensor, first: Tensor, second: Tensor, step: Tensor, columns: Columns
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam (Kingma & Ba, arXiv 1412.6980) with coupled or decoupled weight decay (AdamW, arXiv 1711.05101).

    Equals ``torch.optim.Adam`` where the column ``decoupled`` is 0 and ``torch.optim.AdamW`` where it is 1.
    """
    decay, beta1, beta2 = columns["weight_decay"], columns["momentum"], columns["beta2"]
    coupled = decay * (1 - columns["decoupled"])
    gradients = gradients + coupled * parameters
    parameters = parameters * (1 - columns["lr"] * decay * columns["decoupled"])
    first = first + (1 - beta1) * (gradients - first)
    second = beta2 * second + (1 - beta2) * gradients * gradients
    # Per-run factors are folded first, so that each element costs one square root and one division.
    root = torch.rsqrt(1 - beta2**step)
    size = columns["lr"] / (1 - beta1**step)
    return parameters - size * first / (torch.sqrt(second) * root + columns["eps"]), first, second


UPDATE_RULES: dict[str, UpdateRule] = {
    rule.name: rule
    for rule in (
        UpdateRule("sgd", "stochastic gradient descent, momentum and Nesterov", False, False, sgd),
        UpdateRule("adam", "Adam, coupled weight decay", True, False, adam),
        UpdateRule("adamw", "Adam, decoupled weight decay", True, True, adam),
    )
}


def mixed(updates: tuple[Update, ...], choice: Tensor) -> Update:
    """One update for a population whose runs use different rules.

    Every update is computed and each run keeps its own: elementwise work that a compiler fuses into one pass, and
    small beside the matrix products.

    Args:
        updates: the distinct updates present.
        choice: (N, 1) int64 index into ``updates``.
    """

    def update(
        parameters: Tensor, gradients: Tensor, first: Tensor, second: Tensor, step: Tensor, columns: Columns
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = updates[0](parameters, gradients, first, second, step, columns)
        for index, other in enumerate(updates[1:], 1):
            candidate = other(parameters, gradients, first, second, step, columns)
            mine = choice == index
            result = (
                torch.where(mine, candidate[0], result[0]),
                torch.where(mine, candidate[1], result[1]),
                torch.where(mine, candidate[2], result[2]),
            )
        return result

    return update
