"""Flat parameters: every parameter of a run in one row of one tensor, so that an optimizer step is one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

ALIGNMENT = 16  # float32 values, 64 bytes: each parameter starts on a cache line, equally in every row


def depth_thirds(shapes: Sequence[torch.Size]) -> list[int]:
    """Third of the depth, 0 (early) to 2 (late), of each parameter of a module, given their shapes in order.

    >>> depth_thirds([torch.Size(s) for s in ([8, 4], [8], [8, 8], [8], [8, 8], [8], [2, 8], [2])])
    [0, 0, 1, 1, 1, 1, 2, 2]
    """
    matrices = sum(len(shape) >= 2 for shape in shapes)
    seen, thirds = -1, []
    for shape in shapes:
        seen += len(shape) >= 2
        thirds.append(round(2 * max(seen, 0) / max(matrices - 1, 1)))
    return thirds


class FlatLayout:
    """Places the parameters of a module side by side.

    Attributes:
        width: length P of a row, padding included.
        size: number of real parameters.
        shapes: shape of each parameter, by name.
        thirds: where the early, the middle and the late third of the weight matrices lie in a row, as slices; other
            parameters go with the matrix before them. A module of one matrix has an early third only, one of two has
            no middle.
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
        self.thirds = self._thirds()

    def _thirds(self) -> tuple[slice, slice, slice]:
        ends, depths = [*self.offsets.values()][1:] + [self.width], depth_thirds([*self.shapes.values()])
        bounds = [
            max((end for end, at in zip(ends, depths, strict=True) if at <= third), default=0) for third in (0, 1)
        ]
        return slice(0, bounds[0]), slice(bounds[0], bounds[1]), slice(bounds[1], self.width)

    def norms(self, flat: Tensor) -> Tensor:
        """L2 norm (3, N) of each third of ``flat`` (N, P)."""
        return torch.stack([flat[:, third].square().sum(1) for third in self.thirds]).sqrt()

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views (N, *shape) of each parameter in ``flat`` (N, P)."""
        runs = flat.shape[0]
        return {
            name: flat[:, self.offsets[name] : self.offsets[name] + shape.numel()].view(runs, *shape)
            for name, shape in self.shapes.items()
        }

    def mask(self, names: Sequence[str]) -> Tensor:
        """(P,) bool, True where the parameters ``names`` lie in a row."""
        inside = torch.zeros(self.width, dtype=torch.bool)
        for name in names:
            inside[self.offsets[name] : self.offsets[name] + self.shapes[name].numel()] = True
        return inside

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
