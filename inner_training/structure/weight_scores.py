"""Scores read from weights, and from the sizes of their inputs: magnitude, LAMP, Wanda, RIA, SynFlow."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.inner_training.structure.arithmetic import norm, ratio
from trimtab.inner_training.structure.draws import Draws, Source
from trimtab.inner_training.structure.evidence import Evidence

RIA_POWER = 0.5  # Zhang et al., ICLR 2024: the power of the size of an input


def random_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) uniform in (0, 1), whatever the evidence: the control of every comparison."""
    batch = tuple(evidence.shape[:-1])
    return Draws(source, batch, evidence.device).uniform(evidence.shape[-1])


def random_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) uniform in (0, 1): the control among weights."""
    weights = evidence.read("weights_in")
    return Draws(source, tuple(weights.shape[:-2]), weights.device).uniform(*weights.shape[-2:])


def magnitude_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) L2 norm of each row (..., U, I): Han et al., arXiv 1506.02626."""
    del source
    return norm(evidence.read("weights_in"))


def mean_magnitude_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) mean |w| of each row (..., U, I): Lillo & Cheney, arXiv 2605.15435, eq. 24."""
    del source
    return evidence.read("weights_in").abs().mean(-1)


def magnitude_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) |w|: Han et al., arXiv 1506.02626."""
    del source
    return evidence.read("weights_in").abs()


def lamp(squares: Tensor) -> Tensor:
    """Each of (..., M) squares over the sum of those that are not smaller; equal ones share one sum. In [0, 1].

    >>> lamp(torch.tensor([1.0, 4.0, 3.0, 0.0]))
    tensor([0.1250, 1.0000, 0.4286, 0.0000])
    """
    squares = ratio(squares, squares.amax(-1, keepdim=True)).contiguous()  # the sum cannot overflow
    ascending = squares.sort(-1).values.contiguous()
    remaining = ascending.flip(-1).cumsum(-1).flip(-1)
    places = torch.searchsorted(ascending, squares).clamp(max=squares.shape[-1] - 1)  # NaN lies behind all
    return ratio(squares, remaining.gather(-1, places))


def lamp_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) ``lamp`` of the squared norms of the live rows; units after Lee et al., arXiv 2010.07611."""
    lengths = magnitude_units(evidence, source) * evidence.live
    return lamp(ratio(lengths, lengths.amax(-1, keepdim=True)).square())


def lamp_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) ``lamp`` of the squared weights of the whole layer: Lee et al., arXiv 2010.07611."""
    del source
    weights = evidence.read("weights_in").abs() * evidence.live[..., None]
    flat = weights.flatten(-2)
    return lamp(ratio(flat, flat.amax(-1, keepdim=True)).square()).reshape(weights.shape)


def wanda_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) |w| times the root mean square (..., I) of its input: Sun et al., arXiv 2306.11695."""
    del source
    return evidence.read("weights_in").abs() * evidence.read("input_norm")[..., None, :]


def wanda_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) sum of ``wanda_weights`` over each row; ours, as the source scores weights only."""
    return wanda_weights(evidence, source).sum(-1)


def ria_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) |w| over the sums of its row and of its input, times the input's size to a power: Zhang et al., ICLR 2024."""
    del source
    weights = evidence.read("weights_in").abs()
    of_unit = weights.sum(-1, keepdim=True)
    of_input = (weights * evidence.live[..., None]).sum(-2, keepdim=True)  # parked weights are not in use
    relative = ratio(weights, of_unit) + ratio(weights, of_input)
    return relative * evidence.read("input_norm")[..., None, :] ** RIA_POWER


def ria_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) sum of ``ria_weights`` over each row; ours, as the source scores weights only."""
    return ria_weights(evidence, source).sum(-1)


def synflow_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) |w| dR/d|w|: Tanaka et al., arXiv 2006.05467."""
    del source
    return evidence.read("weights_in").abs() * evidence.read("flow_in")


def synflow_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) sum of ``synflow_weights`` over each row."""
    return synflow_weights(evidence, source).sum(-1)
