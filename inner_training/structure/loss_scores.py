"""Scores that ask what the loss does when a weight goes: Taylor expansions, SNIP, GraSP, OBD.

A unit's score sums over its row and its bias; what reads the unit belongs to the next layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.inner_training.structure.draws import Source
from trimtab.inner_training.structure.evidence import Evidence


def _with_bias(evidence: Evidence, weights: Tensor, field: str) -> Tensor:
    """Terms (..., U, I) of the rows, and the products of the bias with its ``field`` where there is a bias: (..., U, I + 1)."""
    if evidence.bias is None:
        return weights
    return torch.cat([weights, (evidence.bias * evidence.read(field))[..., None]], -1)


def _first_order(evidence: Evidence) -> Tensor:
    return evidence.read("weights_in") * evidence.read("grad_in")


def taylor_weight_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) sum of (w g)^2 over each row and its bias: Molchanov et al., arXiv 1906.10771."""
    del source
    return _with_bias(evidence, _first_order(evidence), "grad_bias").square().sum(-1)


def taylor_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) (w g)^2: Molchanov et al., arXiv 1906.10771."""
    del source
    return _first_order(evidence).square()


def second_order_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) (w^2 H / 2 - w g)^2, H the Hessian's diagonal: after Molchanov et al., arXiv 1906.10771."""
    del source
    weights = evidence.read("weights_in")
    return (0.5 * weights.square() * evidence.read("hess_in") - _first_order(evidence)).square()


def second_order_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) sum of ``second_order_weights`` over each row."""
    return second_order_weights(evidence, source).sum(-1)


def snip_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) sum of |w g| over each row and its bias: Lee et al., arXiv 1810.02340."""
    del source
    return _with_bias(evidence, _first_order(evidence), "grad_bias").abs().sum(-1)


def snip_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) |w g|: Lee et al., arXiv 1810.02340."""
    del source
    return _first_order(evidence).abs()


def _grasp_terms(evidence: Evidence) -> Tensor:
    return evidence.read("weights_in") * evidence.read("hv_in")


def grasp_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) sum of w (H g) over each row and its bias: Wang et al., arXiv 2002.07376.

    A unit that the gradient does not see at all gets the lowest score there is, not a middling 0.
    """
    del source
    terms = _with_bias(evidence, _grasp_terms(evidence), "hv_bias")
    total = terms.sum(-1)
    return torch.where((terms == 0).all(-1), total.amin(-1, keepdim=True), total)


def grasp_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) w (H g): Wang et al., arXiv 2002.07376.

    A weight that is 0, or that the gradient does not see, gets the lowest score there is.
    """
    del source
    terms = _grasp_terms(evidence)
    return torch.where(terms == 0, terms.amin((-2, -1), keepdim=True), terms)


def obd_weights(evidence: Evidence, source: Source) -> Tensor:
    """(..., U, I) w^2 F / 2, F (..., U, I) the empirical Fisher matrix's diagonal: LeCun et al., NeurIPS 1989."""
    del source
    return 0.5 * evidence.read("weights_in").square() * evidence.read("square_in")


def obd_units(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) sum of ``obd_weights`` over each row, and the same of its bias."""
    of_weights = obd_weights(evidence, source).sum(-1)
    if evidence.bias is None:
        return of_weights
    return of_weights + 0.5 * evidence.bias.square() * evidence.read("square_bias")
