"""Small functions over the units that are alive, with zero denominators taken care of."""

from __future__ import annotations

import torch
from torch import Tensor


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, 0 where ``below`` is 0.

    >>> ratio(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


def live_mean(values: Tensor, live: Tensor) -> Tensor:
    """(..., 1) mean of values (..., U) over the units that are alive; 0 where none is."""
    return ratio(torch.where(live, values, 0.0).sum(-1, keepdim=True), live.sum(-1, keepdim=True).to(values.dtype))


def live_max(values: Tensor, live: Tensor) -> Tensor:
    """(..., 1) largest of values (..., U) among the units that are alive; 0 where none is."""
    largest = torch.where(live, values, -torch.inf).amax(-1, keepdim=True)
    return torch.where(live.any(-1, keepdim=True), largest, 0.0)


def norm(values: Tensor) -> Tensor:
    """(...,) L2 norm over the last axis of (..., K), without overflow of the squares."""
    return norm_of_sizes(values.abs())


def norm_of_sizes(sizes: Tensor) -> Tensor:
    """``norm`` of what has the absolute values (..., K), which are written to: large new tensors cost more than sums."""
    largest = sizes.amax(-1, keepdim=True) if sizes.shape[-1] else sizes.new_zeros((*sizes.shape[:-1], 1))
    return sizes.div_(torch.where(largest == 0, 1.0, largest)).square_().sum(-1).sqrt() * largest[..., 0]


def directions(values: Tensor) -> Tensor:
    """Rows (..., K) of length 1; a row of zeros stays one."""
    return ratio(values, norm(values)[..., None])


def ranks(values: Tensor, live: Tensor) -> Tensor:
    """(..., U) number of live units below each value, and half of the other ones that equal it.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 9.0]), torch.tensor([True, True, True, False]))
    tensor([1.5000, 0.0000, 1.5000, 3.0000])
    """
    pool = torch.where(live, values, torch.inf).sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(pool, values).float()
    up_to = torch.searchsorted(pool, values, right=True).clamp(max=live.sum(-1, keepdim=True)).float()
    return (below + torch.where(live, up_to - 1, up_to)) / 2


def top(scores: Tensor, count: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The highest scores among those allowed, best first.

    Args:
        scores: (..., M).
        count: how many, k >= 1.
        allowed: (..., M) bool.

    Returns:
        Indices (..., k) int64, -1 where fewer than k are allowed; and (..., k) bool, where one was found.

    >>> top(torch.tensor([1.0, 5.0, 3.0]), 2, torch.tensor([True, False, True]))
    (tensor([2, 0]), tensor([True, True]))
    """
    size = scores.shape[-1]
    masked = torch.where(allowed, scores, -torch.inf)
    found = masked.argsort(dim=-1, descending=True, stable=True)[..., :count]
    present = allowed.gather(-1, found)
    if count > size:
        pad = (*found.shape[:-1], count - size)
        found = torch.cat([found, found.new_zeros(pad)], -1)
        present = torch.cat([present, present.new_zeros(pad)], -1)
    return torch.where(present, found, -1), present


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """Rows of (..., U, K) at (..., k) indices: (..., k, K); zeros where an index is -1."""
    taken = torch.take_along_dim(values, index.clamp(min=0)[..., None], -2)
    return torch.where(index[..., None] >= 0, taken, 0.0)


def entries_at(values: Tensor, index: Tensor) -> Tensor:
    """Entries of (..., U) at (..., k) indices: (..., k); zeros where an index is -1."""
    return rows_at(values[..., None], index)[..., 0]
