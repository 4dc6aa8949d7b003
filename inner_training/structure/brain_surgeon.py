"""Optimal brain surgeon: what a removal costs when the rest makes up for it, and how the rest does so.

Both look at one layer: the loss is half the mean squared change of what a layer gives out, whose Hessian is the second
moment of the layer's inputs, the same for each of its outputs (Hassibi & Stork, NeurIPS 1992; layer by layer as Frantar &
Alistarh, arXiv 2208.11580).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.errors import out_of_range
from trimtab.inner_training.structure.draws import Source
from trimtab.inner_training.structure.evidence import Evidence

DAMPING = 0.01  # of the mean diagonal, as in the code of arXiv 2208.11580


def _held(moment: Tensor, used: Tensor, damping: float) -> Tensor:
    """Second moment (..., K, K) of what is used, damped; a row of the identity for the rest, which then drops out."""
    both = used[..., :, None] & used[..., None, :]
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    mean = torch.where(used, diagonal, 0.0).sum(-1) / used.sum(-1).clamp(min=1)
    extra = torch.where(used, damping * mean[..., None], 1.0)
    return torch.where(both, moment, 0.0) + torch.diag_embed(extra)


def _used(moment: Tensor, live: Tensor | None) -> Tensor:
    """(..., K) which inputs are alive and ever differ from 0."""
    moving = moment.diagonal(dim1=-2, dim2=-1) > 0
    return moving if live is None else moving & live


def removal_costs(moment: Tensor, used: Tensor, squares: Tensor, damping: float = DAMPING) -> Tensor:
    """Half of ``squares`` over the diagonal of the inverse second moment; 0 for inputs that are not used.

    Args:
        moment: (..., K, K) E x x' of the layer's inputs.
        used: (..., K) bool.
        squares: (..., R, K) squared weights by which R outputs read the inputs.
        damping: added to the diagonal, in units of its mean, >= 0.
    """
    inverse = torch.linalg.inv_ex(_held(moment, used, damping)).inverse
    diagonal = inverse.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(inverse.dtype).tiny)
    return torch.where(used[..., None, :], 0.5 * squares / diagonal[..., None, :], 0.0)


def obs_units(evidence: Evidence, source: Source) -> Tensor:
    del source
    moment = evidence.read("output_cov")
    squares = evidence.read("weights_out").square().sum(-1)
    return removal_costs(moment, _used(moment, evidence.live), squares[..., None, :])[..., 0, :]


def obs_weights(evidence: Evidence, source: Source) -> Tensor:
    del source
    moment = evidence.read("input_cov")
    return removal_costs(moment, _used(moment, None), evidence.read("weights_in").square())


def repair(evidence: Evidence, removed: Tensor, damping: float = DAMPING) -> Tensor:
    """Weights of the consumer after a removal, made up by least squares among the units that stay.

    All units of ``removed`` go at once; the result is that of removing them one by one with a downdate of the inverse.
    Where a unit has several weights per output (the places of a kernel), each place is made up from the same place of
    other units, as if places were independent of each other. Biases stay; ``lost_mean`` tells what they could take.

    Args:
        evidence: with ``weights_out`` and ``output_cov``.
        removed: (..., U) bool.
        damping: added to the diagonal of the second moment, in units of its mean, >= 0; it holds the change down.

    Returns:
        (..., U, O): 0 for removed units, as before for units that are not alive or never put anything out.

    Raises:
        RangeError: the damping is negative.

    >>> twins = Evidence(weights_out=torch.tensor([[1.0], [2.0]]), output_cov=torch.ones(2, 2))
    >>> repair(twins, torch.tensor([True, False]), damping=0.0)
    tensor([[0.],
            [3.]])
    """
    if damping < 0:
        raise out_of_range("damping", damping, low=0)
    moment, weights = evidence.read("output_cov"), evidence.read("weights_out")
    gone = removed & evidence.live
    kept = _used(moment, evidence.live) & ~gone
    leaving = torch.where(gone[..., None], weights, 0.0)
    wanted = torch.where(kept[..., None], moment @ leaving, 0.0)
    change = torch.linalg.solve_ex(_held(moment, kept, damping), wanted).result
    # Of a singular moment, undamped, nothing is made up.
    change = torch.nan_to_num(change, nan=0.0, posinf=0.0, neginf=0.0)
    return torch.where(removed[..., None], 0.0, weights + change)


def lost_mean(evidence: Evidence, removed: Tensor) -> Tensor:
    """(..., O) what removed units gave their consumer on average, sum_j V_j E h_j: for its bias to take over.

    Dohare et al., Nature 632, 2024, algorithm 1. Of a convolution the places of each output are to be added up.

    >>> lost_mean(Evidence(weights_out=torch.tensor([[2.0]]), mean=torch.tensor([0.5])), torch.tensor([True]))
    tensor([1.])
    """
    weights = torch.where((removed & evidence.live)[..., None], evidence.read("weights_out"), 0.0)
    return (weights * evidence.read("mean")[..., None]).sum(-2)
