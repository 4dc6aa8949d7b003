"""Splitting matrices: how the loss bends when a unit becomes two that part in opposite directions.

Wu, Wang & Liu, *Splitting Steepest Descent for Growing Neural Architectures*, arXiv 1910.02366.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.inner_training.structure.arithmetic import directions

RELU_BETA = 3.0  # relu does not bend; the authors' code takes softplus of this sharpness in its stead


def second_derivative(activation: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """act''(z) at every element of z; of a relu, that of softplus with beta 3.

    >>> second_derivative(torch.square, torch.tensor([0.5, -2.0]))
    tensor([2., 2.])
    >>> second_derivative(torch.relu, torch.tensor([0.0, 20.0])).round(decimals=4)
    tensor([0.7500, 0.0000])
    """
    with torch.enable_grad():
        at = values.detach().requires_grad_()
        probe = activation(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], device=values.device))
        if torch.equal(probe, probe.new_tensor([0.0, 0.0, 0.0, 1.0, 2.0])):
            output = functional.softplus(at, beta=RELU_BETA)
        else:
            output = activation(at)
        (slope,) = torch.autograd.grad(output.sum(), at, create_graph=True)
        if not slope.requires_grad:  # a straight line
            return torch.zeros_like(values)
        (bend,) = torch.autograd.grad(slope.sum(), at, allow_unused=True)
    return torch.zeros_like(values) if bend is None else bend.detach()


def split_matrices(gradients: Tensor, bends: Tensor, inputs: Tensor) -> Tensor:
    """The splitting matrices of a layer's units: E_b sum_s g act''(z) x x', for ``Evidence.split``.

    Args:
        gradients: (..., B, U, S) g = dL_b/dh, with respect to what units put out.
        bends: (..., B, U, S) ``second_derivative`` of their activation function.
        inputs: (..., B, I, S) what their rows see at each place.

    Returns:
        (..., U, I, I), symmetric.
    """
    weight = gradients * bends / gradients.shape[-3]
    return torch.einsum("...bus,...bis,...bjs->...uij", weight, inputs, inputs)


def steepest_splits(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest eigenvalue and its eigenvector of each splitting matrix.

    Args:
        matrices: (..., U, I, I), symmetric; what is not finite counts as 0.

    Returns:
        Values (..., U) and vectors (..., U, I) of length 1, their largest entry above 0. An eigenvalue below 0 promises
        that splitting along its vector lowers the loss.

    >>> steepest_splits(torch.diag(torch.tensor([1.0, -2.0])))
    (tensor(-2.), tensor([0., 1.]))
    """
    values, vectors = torch.linalg.eigh(torch.nan_to_num(matrices, nan=0.0, posinf=0.0, neginf=0.0))
    return values[..., 0], faced(directions(vectors[..., 0]))


def faced(vectors: Tensor) -> Tensor:
    """(..., K) each vector or its opposite, so that the entry of the largest size is above 0."""
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)
