"""Seeds of the episodes of N environments: the first is given, the later ones follow from it."""

from __future__ import annotations

import numpy as np

SEEDS = 2**30  # episode seeds lie in [0, SEEDS); those from 2**30 to 2**31 are kept for selecting among checkpoints


def later_seed(root: int, slot: int, episode: int) -> int:
    """Seed of an environment's ``episode`` (>= 1) after its first, in [0, 2**30).

    >>> later_seed(0, 1, 1) != later_seed(0, 2, 1)
    True
    """
    return int(np.random.SeedSequence((root, slot, episode)).generate_state(1)[0]) % SEEDS


class EpisodeSeeds:
    """Says which seed each of N environments takes next.

    Environment ``i`` of seed ``s`` takes ``s + i`` for its first episode, and ``later_seed(s, i, n)`` for the ``n``-th
    after it: no environment's episodes depend on how long those of the others are.
    """

    def __init__(self, num_envs: int, seed: int) -> None:
        self._roots = [seed] * num_envs
        self._first: list[int | None] = [seed + slot for slot in range(num_envs)]
        self._episodes = [0] * num_envs

    def restart(self, slot: int, first: int, root: int | None = None) -> None:
        """Makes ``first`` the seed of the next episode of ``slot``; later ones follow from ``root`` (or ``first``)."""
        self._first[slot], self._roots[slot], self._episodes[slot] = first, first if root is None else root, 0

    def take(self, mask: np.ndarray) -> np.ndarray:
        """The next seeds (N,) int64 of the environments in ``mask`` (bool, (N,)); 0 elsewhere."""
        seeds = np.zeros(len(mask), dtype=np.int64)
        for slot in np.flatnonzero(mask).tolist():
            first = self._first[slot]
            if first is not None:
                seeds[slot] = first % SEEDS
                self._first[slot] = None
            else:
                self._episodes[slot] += 1
                seeds[slot] = later_seed(self._roots[slot], slot, self._episodes[slot])
        return seeds
