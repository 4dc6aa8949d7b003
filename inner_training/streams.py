"""Counter-based random streams of a run: a hash of (seed, stream, counter), the same on every device and in every order."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = 32  # ways to walk through the training examples of a run


def mix(word: Tensor) -> Tensor:
    """Hashes 32-bit words held in int64, elementwise (the `lowbias32` constants of C. Wellons' hash-prospector).

    Products stay below 2**63, so no signed overflow is relied upon.
    """
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & WORD
    return word ^ (word >> 16)


def draw_words(seed: Tensor, counter: Tensor) -> Tensor:
    """Uniform 32-bit words in int64 from seeds and counters of the same (broadcast) shape, both in [0, 2**31)."""
    return mix((mix(seed ^ 0x9E3779B9) + counter * 0x85EBCA6B) & WORD)


@lru_cache(maxsize=4096)
def _coprimes(size: int) -> np.ndarray:
    candidates = np.arange(1, max(size, 2))
    return candidates[np.gcd(candidates, size) == 1]


def walk_multipliers(size: int, rng: np.random.Generator) -> np.ndarray:
    """(MULTIPLIERS,) int64 numbers coprime to ``size``: each gives one full walk ``(a * i + c) mod size``."""
    return rng.choice(_coprimes(size), MULTIPLIERS).astype(np.int64)


def batch_positions(seed: Tensor, step: Tensor, batch: Tensor, size: Tensor, walks: Tensor, slots: int) -> Tensor:
    """Positions of a step's examples inside the training split, without replacement inside an epoch.

    The rows of a run are in random order already, so any single epoch is a uniformly random permutation of the
    training examples; an affine walk with a multiplier and an offset of its own makes each epoch's order new at no
    cost in memory (epochs are not independent of each other, as shuffles would be).

    Args:
        seed, step, batch, size: (N,) int64: stream seed, steps done, examples per step, training examples.
        walks: (N, MULTIPLIERS) int64 from ``walk_multipliers``.
        slots: batch slots B; slots at or above a run's ``batch`` repeat examples and get weight 0.

    Returns:
        (N, B) int64 in [0, size).
    """
    slot = torch.arange(slots, device=seed.device)
    serial = step[:, None] * batch[:, None] + torch.minimum(slot[None], batch[:, None] - 1)
    epoch, place = serial // size[:, None], serial % size[:, None]
    word = draw_words(seed[:, None].expand_as(epoch), epoch)
    multiplier = walks.gather(1, word % MULTIPLIERS)
    return (multiplier * place + (word >> 8)) % size[:, None]
