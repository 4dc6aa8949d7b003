"""Growth by waking: inactive units are chosen by what they would do with their parked weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.inner_training.structure.activity_scores import signed_utility
from trimtab.inner_training.structure.arithmetic import norm, top
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.newborns import Newborns, parked

Propose = Callable[[Evidence, Tensor, Draws], Newborns]


def choosing(score: Callable[[Evidence, Draws], Tensor]) -> Propose:
    """The method that wakes the inactive units of the highest score."""

    def propose(evidence: Evidence, wanted: Tensor, draws: Draws) -> Newborns:
        scores = torch.nan_to_num(score(evidence, draws))
        chosen, found = top(scores, wanted.shape[-1], ~evidence.live)
        return parked(evidence, chosen, found & wanted)

    return propose


def by_chance(evidence: Evidence, draws: Draws) -> Tensor:
    return draws.uniform(evidence.shape[-1])


def by_frequency(evidence: Evidence, draws: Draws) -> Tensor:
    del draws
    return evidence.read("active")


def by_gradient(evidence: Evidence, draws: Draws) -> Tensor:
    """Norm of the gradient of all of a unit's weights."""
    del draws
    parts = [norm(evidence.read("grad_in")), norm(evidence.read("grad_out"))]
    if evidence.grad_bias is not None:
        parts.append(evidence.grad_bias)
    return norm(torch.stack(parts, -1))


def by_utility(evidence: Evidence, draws: Draws) -> Tensor:
    """What each unit would take off the loss at length 1."""
    del draws
    return signed_utility(evidence)
