"""Update rules with per-run hyperparameters: each is a set of coefficients of one elementwise update on flat parameters.

With a gradient g, first and second moments m and v, and parameters p, every rule here is

    g' = g + coupled p
    m  = keep m + gain g'
    v  = keep_square v + (1 - keep_square) g'^2
    p  = shrink p - size (ahead g' + along m) / (root sqrt(v) + floor)

so that a population may mix rules at the cost of one: coefficients are per run and step, computed for a whole interval
at once, and the only full-size work is a single pass that a compiler fuses. Each rule equals ``torch.optim`` at one run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HYPERPARAMETERS = ("lr", "momentum", "weight_decay", "nesterov", "beta2", "eps", "decoupled", "grad_clip")
Columns = Mapping[str, Tensor]


class Coefficients(NamedTuple):
    """Coefficients of the update in the module's docstring, each (K, N) for K steps of N runs."""

    coupled: Tensor
    keep: Tensor
    gain: Tensor
    keep_square: Tensor
    shrink: Tensor
    size: Tensor
    ahead: Tensor
    along: Tensor
    root: Tensor
    floor: Tensor


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer.

    Attributes:
        name: as in ``OptimizerSettings.rule``.
        doc: one line for tables.
        adaptive: whether it divides by a second moment.
        decoupled: whether weight decay acts beside the gradient rather than through it.
        coefficients: ``(columns, step) -> Coefficients``; ``columns`` holds each hyperparameter (K, N), and ``step``
            (K, N) float counts updates from 1.
    """

    name: str
    doc: str
    adaptive: bool
    decoupled: bool
    coefficients: Callable[[Columns, Tensor], Coefficients]


def sgd(columns: Columns, step: Tensor) -> Coefficients:
    """SGD with coupled weight decay, momentum and Nesterov momentum, as ``torch.optim.SGD`` (no dampening)."""
    del step
    momentum = columns["momentum"]
    zero, one = torch.zeros_like(momentum), torch.ones_like(momentum)
    moving, nesterov = momentum > 0, columns["nesterov"] > 0
    return Coefficients(
        coupled=columns["weight_decay"],
        keep=momentum,
        # torch keeps no buffer at momentum 0, so one that is switched on later starts from that step's gradient.
        gain=torch.where(moving, one, zero),
        keep_square=one,
        shrink=one,
        size=columns["lr"],
        ahead=torch.where(moving & ~nesterov, zero, one),
        along=torch.where(nesterov, momentum, torch.where(moving, one, zero)),
        root=zero,
        floor=one,
    )


def adam(columns: Columns, step: Tensor) -> Coefficients:
    """Adam (Kingma & Ba, arXiv 1412.6980) with coupled or decoupled weight decay (AdamW, arXiv 1711.05101).

    Equals ``torch.optim.Adam`` where the column ``decoupled`` is 0 and ``torch.optim.AdamW`` where it is 1.
    """
    decay, beta1, beta2 = columns["weight_decay"], columns["momentum"], columns["beta2"]
    zero, one = torch.zeros_like(beta1), torch.ones_like(beta1)
    return Coefficients(
        coupled=decay * (1 - columns["decoupled"]),
        keep=beta1,
        gain=1 - beta1,
        keep_square=beta2,
        shrink=1 - columns["lr"] * decay * columns["decoupled"],
        size=columns["lr"] / (1 - beta1**step),
        ahead=zero,
        along=one,
        root=torch.rsqrt(1 - beta2**step),
        floor=columns["eps"],
    )


UPDATE_RULES: dict[str, UpdateRule] = {
    rule.name: rule
    for rule in (
        UpdateRule("sgd", "stochastic gradient descent, momentum and Nesterov", False, False, sgd),
        UpdateRule("adam", "Adam, coupled weight decay", True, False, adam),
        UpdateRule("adamw", "Adam, decoupled weight decay", True, True, adam),
    )
}


def interval_coefficients(
    kinds: Sequence[Callable[[Columns, Tensor], Coefficients]], choice: Tensor, columns: Columns, step: Tensor
) -> Tensor:
    """Coefficients of an interval for a population whose runs may use different rules.

    Args:
        kinds: the distinct ``UpdateRule.coefficients`` present.
        choice: (N,) int64 index into ``kinds``.
        columns, step: as in ``UpdateRule.coefficients``.

    Returns:
        (K, N, 10), the last axis in the order of ``Coefficients``.
    """
    result = torch.stack(kinds[0](columns, step), -1)
    for index, kind in enumerate(kinds[1:], 1):
        result = torch.where((choice == index)[:, None], torch.stack(kind(columns, step), -1), result)
    return result


def update(
    parameters: Tensor, gradients: Tensor, first: Tensor, second: Tensor, by: Coefficients, *, adaptive: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """One step on (N, P) tensors with coefficients (N, 1); returns new parameters, first and second moments.

    Without ``adaptive`` every rule present has root 0 and floor 1, so the second moment is left alone.
    """
    gradients = gradients + by.coupled * parameters
    first = by.keep * first + by.gain * gradients
    direction = by.ahead * gradients + by.along * first
    if adaptive:
        second = by.keep_square * second + (1 - by.keep_square) * gradients * gradients
        direction = direction / (by.root * torch.sqrt(second) + by.floor)
    return by.shrink * parameters - by.size * direction, first, second
