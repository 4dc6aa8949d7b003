"""How units do: dormant share, effective rank, and whether newborns have caught up with incumbents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.inner_training.structure.collect import Request, gather
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.second_order import Loss

DORMANT = 0.025  # of the mean output of the active units: Sokar et al., arXiv 2302.12902, the threshold of their code


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """How the units of one group do on one batch.

    Newborns are the units of the group's latest growth or reset, incumbents all other active units. Parity is the mean of
    newborns over that of incumbents (Lillo & Cheney, arXiv 2605.15435): 1 means that they have caught up.

    Attributes:
        dormant: share of the active units whose mean |h| is at most 0.025 of the active units' mean, in [0, 1].
        effective_rank: exp of the entropy of the normalised singular values of the active units' outputs over examples and
            places (Roy & Vetterli, EUSIPCO 2007), in [0, active units]; 0 where there is no output.
        activation_parity: of the share of outputs above 0.05; NaN without newborns or incumbents.
        gradient_parity: of E|dL/dz|; NaN without newborns or incumbents.
        ages: int64 (units,) optimizer steps since a unit became active or was reset, -1 for inactive units.
    """

    dormant: float
    effective_rank: float
    activation_parity: float
    gradient_parity: float
    ages: Tensor


def diagnose(gates: Gates, batch: Any, loss_fn: Loss) -> dict[str, Diagnosis]:
    """The diagnosis of every group; of values that are not finite the numbers are NaN.

    Raises:
        UserError: the loss is no scalar, or activations of a group cannot be seen.
    """
    if not gates.groups:
        return {}
    needs = frozenset(("mean_abs", "active", "pre_grad", "output_cov"))
    request = Request(needs=needs, names=tuple(gates.groups), example=None, why="diagnostics", draws=torch.Generator())
    found = {}
    for name, evidence in gather(gates, request, [batch], loss_fn).items():
        alive = gates.active[name].to(evidence.device)
        outputs = evidence.read("mean_abs")[alive]
        born = gates.born[name].to(evidence.device)
        newborn = alive & (born == born[alive].max()) & (born >= 0)
        found[name] = Diagnosis(
            dormant=float((outputs <= DORMANT * outputs.mean()).float().mean()),
            effective_rank=effective_rank(evidence.read("output_cov")[alive][:, alive]),
            activation_parity=_parity(evidence.read("active"), newborn, alive & ~newborn),
            gradient_parity=_parity(evidence.read("pre_grad"), newborn, alive & ~newborn),
            ages=gates.ages(name),
        )
    return found


def _parity(values: Tensor, newborn: Tensor, incumbent: Tensor) -> float:
    if not newborn.any() or not incumbent.any():
        return float("nan")
    return float(values[newborn].mean() / values[incumbent].mean().clamp(min=1e-12))


def effective_rank(moment: Tensor) -> float:
    """exp of the entropy of the normalised singular values of outputs, from their second moment (U, U).

    >>> round(effective_rank(torch.eye(3)), 4), effective_rank(torch.zeros(3, 3))
    (3.0, 0.0)
    """
    if not moment.isfinite().all():
        return float("nan")
    values = torch.linalg.eigvalsh(moment.double()).clamp(min=0).sqrt()
    values = values[values > 1e-7 * values.max()]
    if not len(values) or not values.max() > 0:
        return 0.0
    shares = values / values.sum()
    return float((-(shares * shares.log()).sum()).exp())
