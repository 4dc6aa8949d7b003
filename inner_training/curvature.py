"""Curvature of a loss by Hessian-vector products, for one run; populations take it under ``vmap``."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters], Tensor]

POWER_ROUNDS = 12  # of power iteration
TRACE_VECTORS = 4  # of Hutchinson's estimator


def inner(first: Parameters, second: Parameters) -> Tensor:
    """Inner product of two sets of tensors by name."""
    return torch.stack([(first[name] * second[name]).sum() for name in first]).sum()


def hessian_times(loss: Loss, at: Parameters, vector: Parameters) -> Parameters:
    """Product of the Hessian of ``loss`` at ``at`` with a vector: forward over reverse mode, about two gradients.

    >>> at = {"x": torch.tensor([1.0, 2.0])}
    >>> hessian_times(lambda p: (p["x"] ** 3).sum(), at, {"x": torch.tensor([1.0, 1.0])})["x"].tolist()
    [6.0, 12.0]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forward mode imports a deprecated part of torch
        product: Parameters = jvp(grad(loss), (at,), (vector,))[1]
    return product


def largest_curvature(loss: Loss, at: Parameters, signs: Parameters, rounds: int = POWER_ROUNDS) -> Tensor:
    """The Hessian's eigenvalue of the largest magnitude, by power iteration; its Rayleigh quotient.

    Each round costs a Hessian-vector product. The error falls as (second / first eigenvalue) to the power of twice the
    rounds, and the quotient never leaves the spectrum.

    Args:
        loss, at: as above.
        signs: by name (V, *shape); the first of these vectors is the start.
        rounds: of the iteration, >= 1.
    """
    vector = {name: part[0] for name, part in signs.items()}
    value = inner(vector, vector)
    for _ in range(rounds):
        product = hessian_times(loss, at, vector)
        value = inner(vector, product) / inner(vector, vector)
        length = inner(product, product).sqrt()
        vector = {name: part / (length + 1e-30) for name, part in product.items()}
    return value


def hessian_trace(loss: Loss, at: Parameters, signs: Parameters) -> Tensor:
    """Hutchinson's estimate of the Hessian's trace: the mean of z' H z over V vectors of random signs.

    Hutchinson, Communications in Statistics 19, 1990. Its variance is 2 (|H|^2 - |diag H|^2) / V.

    Args:
        loss, at: as above.
        signs: by name (V, *shape).
    """
    count = len(next(iter(signs.values())))
    vectors = [{name: part[index] for name, part in signs.items()} for index in range(count)]
    return torch.stack([inner(vector, hessian_times(loss, at, vector)) for vector in vectors]).mean()
