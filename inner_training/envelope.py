"""Limits on the learning rate within which a bounded controller cannot make a run unstable (docs/theory.md).

They are offered to the guard as an optional envelope; nothing here decides anything.
"""

from __future__ import annotations

import numpy as np

from trimtab.errors import RangeError

LEAST_LIMIT = 4 / 3  # of rate x curvature, over SGD with any momentum below 1, Nesterov's or not


def stable_rate(curvature: float, momentum: float = 0.0, *, nesterov: bool = False) -> float:
    """Largest constant learning rate at which SGD is stable on a quadratic.

    ``2 (1 + momentum) / curvature``, and ``(2 + 2 momentum) / ((1 + 2 momentum) curvature)`` with Nesterov's momentum
    (Cohen et al., arXiv 2103.00065, appendix B).

    Args:
        curvature: the Hessian's largest eigenvalue, > 0.
        momentum: in [0, 1).
        nesterov: which kind of momentum.

    >>> stable_rate(4.0), round(stable_rate(4.0, 0.9), 3), round(stable_rate(4.0, 0.9, nesterov=True), 3)
    (0.5, 0.95, 0.339)
    """
    _check(curvature, momentum)
    return 2 * (1 + momentum) / ((1 + 2 * momentum if nesterov else 1) * curvature)


def switching_rate(curvature: float, momentum: float = 0.0) -> float:
    """Largest learning rate below which SGD is stable on a quadratic however the rate varies from step to step.

    ``2 (1 - momentum)^2 / ((1 + momentum) curvature)``: the circle criterion for a gain that varies in a sector
    (docs/theory.md). Sufficient, not necessary; without momentum it is the constant one's limit.

    Args:
        curvature: the Hessian's largest eigenvalue, > 0.
        momentum: in [0, 1), heavy ball.

    >>> switching_rate(4.0), round(switching_rate(4.0, 0.5), 4)
    (0.5, 0.0833)
    """
    _check(curvature, momentum)
    return 2 * (1 - momentum) ** 2 / ((1 + momentum) * curvature)


def _check(curvature: float, momentum: float) -> None:
    if not 0 < curvature < np.inf:
        raise RangeError(f"curvature is {curvature}; give a finite number above 0")
    if not 0 <= momentum < 1:
        raise RangeError(f"momentum is {momentum}; it must be at least 0 and below 1")


def curvature_ceiling(curvature: np.ndarray, share: float) -> np.ndarray:
    """Ceiling (N,) on the learning rate: ``share`` of 4 / 3 over the curvature; infinite where that is not above 0.

    4 / 3 is the least of ``stable_rate`` x curvature over momenta and their kinds, so it suits a controller that moves
    the momentum as well.

    >>> curvature_ceiling(np.array([2.0, -1.0, np.nan]), 0.75).tolist()
    [0.5, inf, inf]
    """
    known = np.isfinite(curvature) & (curvature > 0)
    return np.divide(share * LEAST_LIMIT, curvature, out=np.full(curvature.shape, np.inf), where=known)


def decay_ceiling(initial_lr: np.ndarray, step: np.ndarray, power: float, after: int) -> np.ndarray:
    """Ceiling (N,) on the learning rate that decays as ``initial_lr (1 + step / after)^-power``.

    A power in (1/2, 1] makes the squares of the rates summable, whatever a policy wants, and leaves their sum free to
    diverge (Robbins & Monro, Annals of Mathematical Statistics 22, 1951).

    >>> decay_ceiling(np.array([0.1]), np.array([300.0]), 1.0, 100).tolist()
    [0.025]
    """
    ceiling: np.ndarray = initial_lr * (1 + step / after) ** -power
    return ceiling
