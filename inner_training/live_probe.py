"""Gradient and update statistics of a live run, on the sampled steps of an interval; the same ones as ``Telemetry``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from trimtab.inner_training.live_sample import Sample, kind_of, packed, wide
from trimtab.inner_training.telemetry import DEPTHS, SAMPLED_STEPS


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all tensors together, float32 scalar on the first one's device; half precision cannot overflow it.

    >>> float(total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]))
    5.0
    """
    return get_total_norm([wide(tensor) for tensor in packed(tensors)]).float()


def may_exceed(norm: Tensor, clip: float) -> bool:
    """Whether gradients of this norm have to be scaled; always True but on a CPU, where looking waits for nothing.

    On plain float32 numbers, because the same operations on tensors take ten times as long.
    """
    if norm.device.type != "cpu":
        return True
    return not float(np.float32(norm.item()) + np.float32(1e-6)) <= clip  # what is no number is not below it


def inner_product(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor | None:
    """Inner product of two lists of tensors of the same shapes (float32 scalar); None counts as zero."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    parts = [torch.dot(wide(a).reshape(-1), wide(b).reshape(-1)).float() for a, b in pairs]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def depth_norms(tensors: Sequence[Tensor], thirds: Sequence[int]) -> Tensor:
    """L2 norms (3,) of tensors by the third of the depth that each belongs to (see ``Sample.thirds``)."""
    parts = [[one for one, at in zip(tensors, thirds, strict=True) if at == third] for third in range(DEPTHS)]
    nothing = torch.zeros((), device=tensors[0].device)
    return torch.stack([total_norm(part).to(nothing.device) if part else nothing for part in parts])


def copied(sources: Sequence[Tensor], room: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors, in the memory of ``room`` where that has their shapes: getting memory anew costs more than copying.

    >>> first = copied([torch.ones(2)], [])
    >>> copied([torch.zeros(2)], first)[0] is first[0]
    True
    """
    spare = room if len(room) == len(sources) else [None] * len(sources)
    return [
        old.copy_(new)
        if old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        else new.detach().clone()
        for new, old in zip(sources, spare, strict=True)
    ]


class LiveProbe:
    """Measures the last ``min(2, interval)`` steps of each interval; nothing synchronises with the device.

    It holds copies of the sampled parameters and gradients for it, whose memory it keeps; in a model of more than 131,072
    parameters that is a small part of them (see ``Sample``).

    Args:
        interval: steps per interval, >= 1.

    Attributes:
        grad_norms: norm of the gradient before any clipping, by position of the step in the interval.
        grad_dot: inner product of the last two sampled gradients.
        update_norm, weight_norm: (3,) by depth, as in ``Telemetry``; None until the interval's last step.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._sample = Sample(())
        self._weight_room, self._gradient_room = list[Tensor](), list[Tensor]()
        self.clear()

    def clear(self) -> None:
        """Starts a new interval."""
        self.grad_norms: dict[int, Tensor] = {}
        self.grad_dot: Tensor | None = None
        self.update_norm: Tensor | None = None
        self.weight_norm: Tensor | None = None
        self._earlier: tuple[Sample, list[Tensor | None]] | None = None
        self._weights: list[Tensor] | None = None

    @property
    def complete(self) -> bool:
        """Whether everything that an interval needs was measured."""
        return bool(self.grad_norms) and self.update_norm is not None and self.weight_norm is not None

    def before(self, parameters: Sequence[Tensor], position: int, scale: Tensor | None) -> Tensor | None:
        """Measures the gradients before the step at ``position``; calling again for the same step measures anew.

        Args:
            parameters: every trained parameter.
            position: steps done in this interval.
            scale: factor that the gradients carry (a gradient scaler's), or None for 1.

        Returns:
            The gradient norm where the whole of it was measured; else None.
        """
        if not self.samples(position):
            return None
        sample = self._sample_of(parameters)
        gradients = sample.read([parameter.grad for parameter in parameters])
        present = [gradient for gradient in gradients if gradient is not None]
        norm = total_norm(present) if present else torch.zeros((), device=parameters[0].device)
        shrink = 1.0 if scale is None else 1.0 / scale.to(norm.device)
        norm = self.grad_norms[position] = norm * shrink
        if position == self.interval - 1:
            if self._earlier is not None and self._earlier[0] is sample:
                dot = inner_product(self._earlier[1], gradients)
                self.grad_dot = torch.zeros_like(norm) if dot is None else dot * shrink
            self._weights = self._weight_room = copied(sample.read(parameters), self._weight_room)
            self.weight_norm = depth_norms(self._weights, sample.thirds)
        else:
            held = iter(self._room_for(present, None if scale is None else shrink))
            self._earlier = (sample, [None if one is None else next(held) for one in gradients])
        return norm if sample.stride == 1 else None

    def samples(self, position: int) -> bool:
        """Whether the step at this position of its interval is sampled."""
        return self.interval - SAMPLED_STEPS <= position < self.interval

    @property
    def pending(self) -> bool:
        """Whether a step has been sampled whose update is still to be measured."""
        return self._weights is not None

    def _sample_of(self, parameters: Sequence[Tensor]) -> Sample:
        shapes = tuple(one.shape for one in parameters)
        if shapes != self._sample.shapes:  # layers may be frozen and thawed under way
            self._sample = Sample(shapes, [kind_of(one) for one in parameters])
        return self._sample

    def _room_for(self, gradients: Sequence[Tensor], shrink: Tensor | float | None) -> list[Tensor]:
        self._gradient_room = copied(gradients, self._gradient_room)
        return [one if shrink is None else one.mul_(shrink) for one in self._gradient_room]

    def after(self, parameters: Sequence[Tensor]) -> None:
        """Finishes the update norm after the interval's last step."""
        if self._weights is not None:
            now = self._sample.read(parameters)
            moved = [old.sub_(new) for new, old in zip(now, self._weights, strict=True)]
            self.update_norm = depth_norms(moved, self._sample.thirds)
            self._weights, self._earlier = None, None

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far as plain numbers; sampled gradients themselves are left out."""
        held = {name: getattr(self, name) for name in ("grad_dot", "update_norm", "weight_norm")}
        return {
            "grad_norms": {str(position): float(norm) for position, norm in self.grad_norms.items()},
            **{name: None if value is None else value.tolist() for name, value in held.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores what ``state_dict`` gave; saved between the two samples, the inner product stays unknown."""
        self.clear()
        self.grad_norms = {int(key): torch.tensor(norm, device=device) for key, norm in state["grad_norms"].items()}
        for name in ("grad_dot", "update_norm", "weight_norm"):
            value = state[name]
            setattr(self, name, None if value is None else torch.tensor(value, device=device))
