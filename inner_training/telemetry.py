"""Raw measurements of one interval of steps, on the device of the runs, and their single transfer to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

SAMPLED_STEPS = 2  # gradient statistics come from the last two steps of an interval
DEPTHS = 3  # early, middle and late third of the weight matrices


@dataclass(frozen=True)
class Telemetry:
    """Measurements of ``K`` steps of ``N`` runs, on the device; shapes are given per field.

    Every step records its loss (and its score, if asked for) and nothing more. The rest is measured on the last
    ``S = min(2, K)`` steps.

    Attributes:
        losses: (K, N) training loss of each step's batch, before the step.
        grad_norm: (S, N) L2 norm of the gradient before any clipping.
        grad_dot: (N,) inner product of the last two sampled gradients (NaN when S < 2).
        update_norm: (3, N) L2 norm of the last step's change of the parameters, by depth (``FlatLayout.thirds``).
        weight_norm: (3, N) L2 norm of the parameters before the last step, by depth.
        scores: (K, N) mean score of each step's batch, before the step; None unless asked for.
        probed: further measurements (see ``measurements``) by name, (N,) or (C, N), NaN for a run in which one was not
            taken.
    """

    losses: Tensor
    grad_norm: Tensor
    grad_dot: Tensor
    update_norm: Tensor
    weight_norm: Tensor
    scores: Tensor | None = None
    probed: Mapping[str, Tensor] = field(default_factory=dict)

    def to_host(self) -> Measured:
        """Copies everything in one transfer (the only synchronisation of an interval)."""
        parts = {
            "losses": self.losses,
            "grad_norm": self.grad_norm,
            "grad_dot": self.grad_dot[None],
            "update_norm": self.update_norm,
            "weight_norm": self.weight_norm,
            **({} if self.scores is None else {"scores": self.scores}),
            **{"probed/" + name: value.reshape(-1, value.shape[-1]) for name, value in self.probed.items()},
        }
        host = torch.cat([part.to(self.losses.dtype) for part in parts.values()]).double().cpu().numpy()
        ends = np.cumsum([len(part) for part in parts.values()])
        rows = dict(zip(parts, np.split(host, ends[:-1]), strict=True))
        return Measured(
            losses=rows["losses"],
            grad_norm=rows["grad_norm"],
            grad_dot=rows["grad_dot"][0],
            update_norm=rows["update_norm"],
            weight_norm=rows["weight_norm"],
            scores=rows.get("scores"),
            probed={name: rows["probed/" + name].reshape(value.shape) for name, value in self.probed.items()},
        )


def gathered(taken: Sequence[Mapping[str, Tensor]]) -> Telemetry:
    """Telemetry of an interval from what its steps returned (see ``stepping.make_step``), in order."""
    sampled = [result["statistics"] for result in taken if "statistics" in result]
    last = sampled[-1]
    return Telemetry(
        losses=torch.stack([result["loss"] for result in taken]),
        grad_norm=torch.stack([row[0] for row in sampled]),
        grad_dot=last[1] if len(sampled) == SAMPLED_STEPS else torch.full_like(last[1], torch.nan),
        update_norm=last[2 : 2 + DEPTHS],
        weight_norm=last[2 + DEPTHS :],
        scores=torch.stack([result["score"] for result in taken]) if "score" in taken[0] else None,
    )


@dataclass(frozen=True)
class Measured:
    """The same as ``Telemetry`` as float64 numpy arrays on the host."""

    losses: np.ndarray
    grad_norm: np.ndarray
    grad_dot: np.ndarray
    update_norm: np.ndarray
    weight_norm: np.ndarray
    scores: np.ndarray | None = None
    probed: Mapping[str, np.ndarray] = field(default_factory=dict)


def join(parts: Sequence[Measured]) -> Measured:
    """Measurements of several groups of runs as those of one row of runs; all are of the same number of steps.

    A measurement that was not taken in some group is NaN there; scores are kept only where all groups have them.
    """

    def along(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts], axis=-1)

    scored = all(part.scores is not None for part in parts)
    shapes = {name: value.shape[:-1] for part in parts for name, value in part.probed.items()}
    return Measured(
        losses=along("losses"),
        grad_norm=along("grad_norm"),
        grad_dot=along("grad_dot"),
        update_norm=along("update_norm"),
        weight_norm=along("weight_norm"),
        scores=along("scores") if scored else None,
        probed={
            name: np.concatenate(
                [part.probed.get(name, np.full((*shape, len(part.grad_dot)), np.nan)) for part in parts], axis=-1
            )
            for name, shape in shapes.items()
        },
    )


def unmeasured(steps: int, device: torch.device) -> Telemetry:
    """What is known of an interval whose gradients were never finite: that the run has diverged."""

    def unknown_rows(rows: int) -> Tensor:
        return torch.full((rows, 1), torch.nan, device=device)

    return Telemetry(
        losses=unknown_rows(steps),
        grad_norm=unknown_rows(min(steps, SAMPLED_STEPS)),
        grad_dot=unknown_rows(1)[0],
        update_norm=unknown_rows(DEPTHS),
        weight_norm=unknown_rows(DEPTHS),
    )
