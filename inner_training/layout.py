"""Flat parameters: every parameter of a run in one row of one tensor, so that an optimizer step is one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

ALIGNMENT = 16  # float32 values, 64 bytes: each parameter starts on a cache line, equally in every row


class FlatLayout:
    """Places the parameters of a module side by side.

    Attributes:
        width: length P of a row, padding included.
        size: number of real parameters.
        shapes: shape of each parameter, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self.offsets: dict[str, int] = {}
        position = 0
        for name, parameter in module.named_parameters():
            self.shapes[name], self.offsets[name] = parameter.shape, position
            position += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.width = position
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views (N, *shape) of each parameter in ``flat`` (N, P)."""
        runs = flat.shape[0]
        return {
            name: flat[:, self.offsets[name] : self.offsets[name] + shape.numel()].view(runs, *shape)
            for name, shape in self.shapes.items()
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Stacked tensors (N, *shape) by name become (N, P); the padding is zero."""
        parts: list[Tensor] = []
        for name, shape in self.shapes.items():
            part = tensors[name].reshape(tensors[name].shape[0], -1)
            parts.append(part)
            padding = -shape.numel() % ALIGNMENT
            if padding:
                parts.append(part.new_zeros(part.shape[0], padding))
        return torch.cat(parts, 1)

    def rows(self, parameters: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        """Host-side parameters of several runs become (len, P) float32."""
        flat = np.zeros((len(parameters), self.width), dtype=np.float32)
        for name, shape in self.shapes.items():
            start = self.offsets[name]
            for row, given in enumerate(parameters):
                flat[row, start : start + shape.numel()] = np.asarray(given[name]).reshape(-1)
        return flat
