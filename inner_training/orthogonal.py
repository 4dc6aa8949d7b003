"""Matrices made nearly orthogonal, for Muon: every singular value is pushed to about 1."""

from __future__ import annotations

import torch
from torch import Tensor

# The quintic iteration of K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, as in
# torch.optim.Muon: it trades convergence to exactly 1 for speed, so singular values end between about 0.7 and 1.2.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
FLOOR = 1e-7  # smallest Frobenius norm that is divided by


def orthogonalised(matrices: Tensor) -> Tensor:
    """``U f(S) V'`` of each matrix ``U S V'``, with f(S) near 1, by five Newton-Schulz steps.

    ``torch.optim.Muon`` rounds to bfloat16 here. That rounding is noise in the directions where a gradient has next
    to none, which the iteration lifts to full size; float32 keeps a run the same in every population and mode.

    Args:
        matrices: (N, A, B) float32. A matrix of zeros stays zero.

    Returns:
        (N, A, B).

    >>> orthogonalised(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))[0].diagonal().sub(1).abs().lt(0.35).all().item()
    True
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.square().sum((1, 2), keepdim=True).sqrt().clamp(min=FLOOR)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=CUBIC, alpha=QUINTIC), x, beta=LINEAR)
    return x.mT if tall else x
