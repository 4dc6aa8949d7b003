"""The update itself: one step of any mix of update rules on flat parameters (see ``update_rules``)."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.orthogonal import orthogonalised
from trimtab.inner_training.update_rules import Coefficients, Needs

# Words in the names of matrices that Muon leaves to AdamW.
APART = frozenset(("embed", "embedding", "embeddings", "wte", "wpe", "place", "position", "positions", "head"))


def muon_matrices(layout: FlatLayout) -> tuple[str, ...]:
    """Names of the parameters that Muon orthogonalises: matrices, but for embeddings and output heads.

    Those are told by ``APART`` in their names; their rows are looked up or read out one by one, so that no direction
    is worth more for being common to all (Jordan et al., 2024).
    """
    return tuple(
        name
        for name, shape in layout.shapes.items()
        if len(shape) == 2 and APART.isdisjoint(re.split(r"[._]", name.lower()))
    )


def update(
    parameters: Tensor,
    gradients: Tensor,
    moments: tuple[Tensor, Tensor],
    by: Coefficients,
    layout: FlatLayout,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step on (N, P) tensors with coefficients (N, 1); returns new parameters, first and second moments.

    Args:
        parameters, gradients: (N, P).
        moments: first and second, (N, P); the second is left alone when no rule needs it.
        by: of one step.
        layout: where the matrices are.
        needs: of the rules present; what they do not need must be null in ``by``.
    """
    first, second = moments
    gradients = gradients + by.coupled * parameters
    used, denominator = gradients, None
    if needs.squares:
        second = by.keep_square * second + (1 - by.keep_square) * gradients * gradients
        denominator = by.root * torch.sqrt(second) + by.floor
    if needs.early and denominator is not None:
        early = by.early > 0
        used = gradients / torch.where(early, denominator, 1.0)
        denominator = torch.where(early, 1.0, denominator)
    before, first = first, by.keep * first + by.gain * used
    direction = by.ahead * used + by.along * first
    if needs.signed:
        mixed = direction + by.behind * before
        # The sign of NaN is 0, and would hide from the guard that the moment is lost.
        voted = torch.where(mixed.isfinite(), mixed.sign(), torch.nan)
        direction = torch.where(by.signed > 0, voted, direction)
    if denominator is not None:
        direction = direction / denominator
    moved = by.size * direction
    if needs.matrices:
        moved = _with_matrices(moved, by.gain * gradients + by.keep * first, by, layout)
    return by.shrink * parameters - moved, first, second


def _with_matrices(moved: Tensor, nesterov: Tensor, by: Coefficients, layout: FlatLayout) -> Tensor:
    """``moved`` (N, P) with what Muon takes off its matrices in their place."""
    parts, sources = layout.views(moved), layout.views(nesterov)
    rate = by.matrix[:, :, None]
    for name in muon_matrices(layout):
        scale = 0.2 * max(layout.shapes[name]) ** 0.5
        parts[name] = torch.where(rate > 0, rate * scale * orthogonalised(sources[name]), parts[name])
    return layout.flatten(parts)
