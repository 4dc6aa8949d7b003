"""Rules of sparse training: which weights live, as pure functions of tensors with any leading axes of runs.

M weights of a layer lie in one axis, or in two (units U and inputs I) where units are told apart. Counts are met exactly:
among equal scores the weight that comes first is taken first.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.structure.arithmetic import ratio


def drop_fraction(step: np.ndarray | float, end: np.ndarray | float, alpha: np.ndarray | float) -> np.ndarray:
    """Share of the live weights that an update of RigL exchanges: alpha / 2 (1 + cos(pi step / end)), and 0 from ``end`` on.

    Evci et al., arXiv 1911.11134.

    Args:
        step: of the run, >= 0.
        end: step at which updates stop, > 0.
        alpha: share at step 0, in [0, 1].

    >>> drop_fraction(np.array([0, 50, 100, 200]), 100, 0.3).round(3).tolist()
    [0.3, 0.15, 0.0, 0.0]
    """
    passed = np.minimum(np.asarray(step, dtype=np.float64) / end, 1.0)
    found: np.ndarray = np.where(passed < 1, alpha / 2 * (1 + np.cos(math.pi * passed)), 0.0)
    return found


def cubic_sparsity(
    step: np.ndarray | float, begin: np.ndarray | float, end: np.ndarray | float, final: np.ndarray | float
) -> np.ndarray:
    """Share of weights that is gone at a step: final (1 - (1 - p)^3), with p from 0 at ``begin`` to 1 at ``end``.

    Zhu & Gupta, arXiv 1710.01878.

    >>> cubic_sparsity(np.array([0, 10, 55, 100, 300]), 10, 100, 0.8).round(3).tolist()
    [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    passed = np.clip((np.asarray(step, dtype=np.float64) - begin) / np.maximum(np.subtract(end, begin), 1e-9), 0, 1)
    found: np.ndarray = final * (1 - (1 - passed) ** 3)
    return found


def lowest(scores: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """(..., M) bool: the ``counts`` lowest of the scores.

    Args:
        scores: (..., M).
        among: (..., M) bool, which may be taken; where fewer than wanted may, all of them are.
        counts: (...) int64.

    >>> lowest(torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, True, False]), torch.tensor(1))
    tensor([False,  True, False, False])
    """
    order = scores.argsort(dim=-1, stable=True)
    order = order.gather(-1, (~among).gather(-1, order).to(torch.int8).argsort(dim=-1, stable=True))
    first = torch.arange(scores.shape[-1], device=scores.device) < counts[..., None]
    return torch.zeros_like(among).scatter(-1, order, first) & among


def highest(scores: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` highest of the scores; see ``lowest``."""
    return lowest(-scores, among, counts)


def thinned(live: Tensor, weights: Tensor, most: Tensor) -> Tensor:
    """(..., M) bool: the live weights without the smallest, so that at most ``most`` (...) int64 are left."""
    return live & ~lowest(weights.abs(), live, (live.sum(-1) - most).clamp(min=0))


def exchanged(live: Tensor, weights: Tensor, gain: Tensor, share: Tensor, exists: Tensor) -> Tensor:
    """(..., M) bool: as many live weights as before, the smallest exchanged for those of the highest gain.

    Weights that have just been dropped may come back; they then have not changed. With the size of the dense gradient as gain
    this is RigL (Evci et al., arXiv 1911.11134), with random numbers SET (Mocanu et al., arXiv 1707.04780).

    Args:
        live: (..., M) bool.
        weights, gain: (..., M).
        share: (...) of the live weights that is dropped, rounded down to weights.
        exists: (..., M) bool, which may live.

    >>> live = torch.tensor([True, True, False, False])
    >>> exchanged(live, torch.tensor([0.1, 2.0, 0.0, 0.0]), torch.arange(4.0), torch.tensor(0.5), live | ~live)
    tensor([False,  True, False,  True])
    """
    count = _dropped(live, share)
    kept = live & ~lowest(weights.abs(), live, count)
    return kept | highest(gain, exists & ~kept, count)


def _dropped(live: Tensor, share: Tensor) -> Tensor:
    return (live.sum(-1) * share).floor().long()


def ablated(live: Tensor, salient: Tensor, exists: Tensor, gamma: Tensor) -> Tensor:
    """(..., U) bool: units with fewer salient weights than ``gamma`` times the mean number of weights of a live unit.

    Lasby et al., *Dynamic Sparse Training with Structured Sparsity*, arXiv 2305.02299. The units with the most salient weights
    stay in any case, as many as are needed to hold all live weights.

    Args:
        live, salient: (..., U, I) bool.
        exists: (..., U, I) bool, which may live.
        gamma: (...) in [0, 1]; 0 ablates none.
    """
    used = live.any(-1)
    mean = ratio(live.sum((-1, -2)).float(), used.sum(-1).float())
    found = salient.sum(-1)
    order = torch.where(used, found, -1).argsort(dim=-1, descending=True, stable=True)
    room = torch.where(used, exists.sum(-1), 0).gather(-1, order)
    spare = (room.cumsum(-1) - room) >= live.sum((-1, -2))[..., None]  # the units before it can hold everything
    weak = used & (found < (gamma * mean)[..., None])
    return weak & torch.zeros_like(used).scatter(-1, order, spare)


def exchanged_between_units(
    live: Tensor, weights: Tensor, gain: Tensor, share: Tensor, exists: Tensor, gamma: Tensor
) -> Tensor:
    """(..., U, I) bool: as ``exchanged``, but without units that have too few salient weights (see ``ablated``).

    A weight is salient that is not dropped, or that would be grown. What ablated units held goes to the others by gain, so the
    layer keeps its number of live weights. Units without any live weight stay so.
    """
    shape, flat = live.shape, live.flatten(-2)
    scores, alive = gain.flatten(-2), exists & live.any(-1, keepdim=True)
    count = _dropped(flat, share)
    kept = flat & ~lowest(weights.flatten(-2).abs(), flat, count)
    grown = highest(scores, alive.flatten(-2) & ~kept, count)
    gone = ablated(live, (kept | grown).view(shape), exists, gamma)[..., None]
    kept = (kept.view(shape) & ~gone).flatten(-2)
    room = (alive & ~gone).flatten(-2) & ~kept
    return (kept | highest(scores, room, flat.sum(-1) - kept.sum(-1))).view(shape)
