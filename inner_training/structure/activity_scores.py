"""Scores read from what units put out and what gradient they get: AGF, Taylor, firing, dormancy, contribution."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trimtab.inner_training.structure.arithmetic import live_mean, norm, ratio
from trimtab.inner_training.structure.draws import Source
from trimtab.inner_training.structure.evidence import Evidence


def read(name: str) -> Callable[[Evidence, Source], Tensor]:
    """The score (..., U) that is a field of the evidence as it stands."""

    def score(evidence: Evidence, source: Source) -> Tensor:
        del source
        return evidence.read(name)

    return score


def over_mean(name: str) -> Callable[[Evidence, Source], Tensor]:
    """The score (..., U) that is a field over its mean among the units that are alive; 0 where all are 0."""

    def score(evidence: Evidence, source: Source) -> Tensor:
        del source
        values = evidence.read(name)
        return ratio(values, live_mean(values, evidence.live))

    return score


def contribution(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) E|h| times the mean |w| of what reads the unit, (..., U, O): Dohare et al., Nature 632, 2024."""
    del source
    return evidence.read("mean_abs") * evidence.read("weights_out").abs().mean(-1)


def adaptable_contribution(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) standard deviation of h times the mean |w| of what reads the unit, over that of its row.

    The spread about the mean, since a constant can move into the next bias: Dohare et al., arXiv 2108.06325.
    """
    del source
    mean = evidence.read("mean")
    spread = (evidence.read("square") - mean.square()).clamp(min=0).sqrt()
    leaving = evidence.read("weights_out").abs().mean(-1)
    return ratio(spread * leaving, evidence.read("weights_in").abs().mean(-1))


def signed_utility(evidence: Evidence) -> Tensor:
    """(..., U) -E h g over the squared length of a unit's parameters.

    It is what a unit of length 1 in the same direction would take off the loss to first order: the utility E<f_i, r> of
    Kunin et al. with the residual r = -dL/dz of what the columns feed, for a unit that is homogeneous of degree 2 (linear or
    relu).
    """
    length = norm(evidence.read("weights_in")).square() + norm(evidence.read("weights_out")).square()
    if evidence.bias is not None:
        length = length + evidence.bias.square()
    return ratio(-evidence.read("signed"), length)


def kunin(evidence: Evidence, source: Source) -> Tensor:
    """(..., U) ``signed_utility``: Kunin et al., arXiv 2506.06489."""
    del source
    return signed_utility(evidence)
