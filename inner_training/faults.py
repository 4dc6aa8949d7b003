"""Faults of a step, as columns of per-run numbers beside its coefficients, and what a step does with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.streams import WORD, draw_words

ROOT_THREE = 3**0.5


class Faults(NamedTuple):
    """What happens to one step of N runs, each (N,) float32; all zero but ``input_gain`` 1 is nothing.

    Attributes:
        label_share: chance of each label to be replaced by that of another example of the batch, in [0, 1].
        input_noise: standard deviation of uniform noise added to the inputs; for integer inputs the chance of each to
            be replaced by another of the batch.
        input_shift, input_gain: float inputs become ``gain * x + shift``.
        gradient: added to every element of the gradient: 0, NaN or infinity.
        frozen: thirds of the depth whose parameters stay, as a sum of 1 (early), 2 (middle) and 4 (late).
        lost: 1 where the step changes neither parameters nor optimizer state.
    """

    label_share: Tensor
    input_noise: Tensor
    input_shift: Tensor
    input_gain: Tensor
    gradient: Tensor
    frozen: Tensor
    lost: Tensor


class FaultRows(NamedTuple):
    """What happens to K steps of N runs, on the host.

    Attributes:
        faults: (K, N, 7) float32 in the order of ``Faults``.
        lr: (K, N) factors on the learning rate.
        time: (K, N) time that each step takes, in units of a usual one.
    """

    faults: np.ndarray
    lr: np.ndarray
    time: np.ndarray

    @classmethod
    def calm(cls, steps: int, num_runs: int) -> FaultRows:
        """Rows of steps to which nothing happens."""
        rows = cls(
            faults=np.zeros((steps, num_runs, len(Faults._fields)), dtype=np.float32),
            lr=np.ones((steps, num_runs)),
            time=np.ones((steps, num_runs)),
        )
        rows.column("input_gain")[...] = 1.0
        return rows

    def column(self, name: str) -> np.ndarray:
        """A view (K, N) of ``lr``, ``time`` or one of the faults."""
        if name in ("lr", "time"):
            return self.lr if name == "lr" else self.time
        return self.faults[:, :, Faults._fields.index(name)]


def _like(column: Tensor, shape: Tensor) -> Tensor:
    return column.view(-1, *([1] * (shape.ndim - 1)))


def _uniform(seed: Tensor, step: Tensor, like: Tensor, stream: int) -> Tensor:
    """Uniform numbers in [0, 1) of the shape of ``like`` (N, ...), from each run's seed and step."""
    per_run = like[0].numel()
    counter = torch.arange(per_run, device=like.device).view(1, *like.shape[1:])
    word = draw_words((seed + stream * 0x1F123BB5) & 0x7FFFFFFF, step)
    return draw_words(_like(word & 0x7FFFFFFF, like), counter).float() / (WORD + 1)


def disturb_examples(x: Tensor, y: Tensor, by: Faults, seed: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Applies the faults of inputs (N, B, *shape) and labels (N, B, ...) to one step's examples."""
    hit = _uniform(seed, step, x, 1)
    if x.is_floating_point():
        noise = (2 * hit - 1) * ROOT_THREE
        x = x * _like(by.input_gain, x) + _like(by.input_shift, x) + noise * _like(by.input_noise, x)
    else:
        # Not the neighbour whose label comes with label noise; slots beyond a run's batch repeat its last example.
        x = torch.where(hit < _like(by.input_noise, x), x.roll(2, 1).flip(-1), x)
    wrong = _uniform(seed, step, y, 2) < _like(by.label_share, y)
    return x, torch.where(wrong, y.roll(1, 1), y)


def disturb_step(
    before: tuple[Tensor, Tensor, Tensor], after: tuple[Tensor, Tensor, Tensor], by: Faults, layout: FlatLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of a step, three tensors (N, P) each, when layers are frozen or the step is lost."""
    code = by.frozen.long()
    held = [((code >> third) & 1).bool() | (by.lost > 0) for third in range(3)]
    parts = [
        torch.where(keep[:, None], before[0][:, where], after[0][:, where])
        for keep, where in zip(held, layout.thirds, strict=True)
    ]
    lost = (by.lost > 0)[:, None]
    return torch.cat(parts, 1), torch.where(lost, before[1], after[1]), torch.where(lost, before[2], after[2])
