"""How many weights each layer of a sparse network keeps, for tensors with any leading axes of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import unknown
from trimtab.inner_training.structure.arithmetic import ratio

Sides = tuple[Tensor, ...]  # (...) float, how many positions of each axis of a layer's weights are in use


@dataclass(frozen=True)
class Distribution:
    """One way to share a density out among layers.

    Attributes:
        doc: what the density of a layer is proportional to, in one line.
        source: where it comes from.
        raw: the formula: the sides of a layer's weights (outputs, inputs, kernel ...) and their product give (...).
    """

    doc: str
    source: str
    raw: Callable[[Sides, Tensor], Tensor]


def _both(sides: Sides, product: Tensor) -> Tensor:
    return ratio(sides[0] + sides[1], sides[0] * sides[1])


def _all(sides: Sides, product: Tensor) -> Tensor:
    return ratio(torch.stack(sides).sum(0), product)


DISTRIBUTIONS = {
    "uniform": Distribution("1: all layers alike", "", lambda sides, product: torch.ones_like(product)),
    "er": Distribution(
        "(outputs + inputs) / (outputs x inputs)", "Erdos-Renyi: Mocanu et al., arXiv 1707.04780", _both
    ),
    "erk": Distribution(
        "the sum of all sides over their product, those of the kernel included", "Evci et al., arXiv 1911.11134", _all
    ),
}


def resolve_distribution(name: str) -> Distribution:
    """The distribution of a name.

    Raises:
        UnknownNameError: there is none; the message names the nearest.
    """
    if name not in DISTRIBUTIONS:
        raise unknown("distribution of densities", name, DISTRIBUTIONS)
    return DISTRIBUTIONS[name]


def layer_shares(sizes: Tensor, raw: Tensor, density: Tensor) -> Tensor:
    """Density of each layer, in [0, 1]: proportional to ``raw``, but 1 for layers that would have more than all.

    What these cannot take goes to the others, until none exceeds 1; so all together have the density asked for.

    Args:
        sizes: (..., L) float, weights of each layer.
        raw: (..., L) above 0.
        density: (...) of all layers together, in [0, 1].

    >>> layer_shares(torch.tensor([100.0, 10.0]), torch.tensor([1.0, 20.0]), torch.tensor(0.5))
    tensor([0.4500, 1.0000])
    """
    full = torch.zeros_like(sizes, dtype=torch.bool)
    wanted, scale = density * sizes.sum(-1), torch.zeros_like(density)
    for _ in range(sizes.shape[-1]):  # each round fills a layer, or nothing changes any more
        left = wanted - torch.where(full, sizes, 0.0).sum(-1)
        scale = ratio(left, torch.where(full, 0.0, sizes * raw).sum(-1))
        full = full | (scale[..., None] * raw > 1)
    return torch.where(full, 1.0, (scale[..., None] * raw).clamp(0, 1))


def live_counts(exists: Mapping[str, Tensor], density: Tensor, distribution: str) -> dict[str, Tensor]:
    """(...) int64 by layer: how many weights live; at least one where the layer has any.

    Args:
        exists: bool (..., *shape) by layer, weights that there are: not those of inactive units.
        density: (...) float in (0, 1].
        distribution: name from the table.

    >>> layer = torch.ones(1, 4, 8, dtype=torch.bool)
    >>> live_counts({"a": layer, "b": layer}, torch.tensor([0.25]), "erk")
    {'a': tensor([8]), 'b': tensor([8])}
    """
    formula, batch = resolve_distribution(distribution).raw, density.ndim
    sizes, raw = [], []
    for one in exists.values():
        axes = range(batch, one.ndim)
        used = (one.any([other for other in axes if other != axis]) for axis in axes)
        sizes.append(one.flatten(batch).sum(-1).float())
        raw.append(formula(tuple(each.sum(-1).float() for each in used), sizes[-1]))
    total = torch.stack(sizes, -1)
    counts = (layer_shares(total, torch.stack(raw, -1), density) * total).round().clamp(min=1).minimum(total)
    return dict(zip(exists, counts.long().unbind(-1), strict=True))
