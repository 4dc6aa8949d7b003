"""Raw measurements of one interval of steps, on the device of the runs, and their single transfer to the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SAMPLED_STEPS = 2  # gradient statistics come from the last two steps of an interval


@dataclass(frozen=True)
class Telemetry:
    """Measurements of ``K`` steps of ``N`` runs, on the device; shapes are given per field.

    Every step records its loss and nothing more. The rest is measured on the last ``S = min(2, K)`` steps.

    Attributes:
        losses: (K, N) training loss of each step's batch, before the step.
        grad_norm: (S, N) L2 norm of the gradient before any clipping.
        grad_dot: (N,) inner product of the last two sampled gradients (NaN when S < 2).
        update_norm: (N,) L2 norm of the last step's change of the parameters.
        weight_norm: (N,) L2 norm of the parameters before the last step.
    """

    losses: Tensor
    grad_norm: Tensor
    grad_dot: Tensor
    update_norm: Tensor
    weight_norm: Tensor

    def to_host(self) -> Measured:
        """Copies everything in one transfer (the only synchronisation of an interval)."""
        steps, sampled = self.losses.shape[0], self.grad_norm.shape[0]
        rows = [self.losses, self.grad_norm, self.grad_dot[None], self.update_norm[None], self.weight_norm[None]]
        host = torch.cat(rows).double().cpu().numpy()
        parts = np.split(host, [steps, steps + sampled, steps + sampled + 1, steps + sampled + 2])
        return Measured(
            losses=parts[0], grad_norm=parts[1], grad_dot=parts[2][0], update_norm=parts[3][0], weight_norm=parts[4][0]
        )


@dataclass(frozen=True)
class Measured:
    """The same as ``Telemetry`` as float64 numpy arrays on the host."""

    losses: np.ndarray
    grad_norm: np.ndarray
    grad_dot: np.ndarray
    update_norm: np.ndarray
    weight_norm: np.ndarray
