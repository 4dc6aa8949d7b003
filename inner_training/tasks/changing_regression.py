"""Slowly-changing regression: a random target network over bits, some of which flip now and then."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.networks import MLP, build_module
from trimtab.inner_training.tasks.arrays import squared_error
from trimtab.inner_training.tasks.phased import PhaseData, PhasedFamily, Story
from trimtab.inner_training.tasks.recipe import RecipeRange

BITS, SLOW = 20, 15
TARGET_UNITS, BETA = 100, 0.7
PHASES = 20
FAST = 2 ** (BITS - SLOW)


class BitsMLP(MLP):
    """An MLP that reads the binary digits of a whole number."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps numbers (B, 1) int64 to (B, outputs)."""
        place = torch.arange(self.inputs, device=x.device)
        return super().forward(((x >> place) & 1).float())


def target(rng: np.random.Generator, numbers: np.ndarray) -> np.ndarray:
    """Values (n,) float32 of a random network of linear threshold units at numbers (n,), with unit variance overall.

    Weights are +-1; a unit fires where its sum reaches ``BETA (bits + 1) - negatives`` (Dohare et al., arXiv 2306.13812,
    section on the bit-flipping problem).
    """
    weights = rng.choice((-1.0, 1.0), (TARGET_UNITS, BITS + 1))
    outgoing = rng.choice((-1.0, 1.0), TARGET_UNITS)

    def at(values: np.ndarray) -> np.ndarray:
        bits = np.concatenate([(values[:, None] >> np.arange(BITS)) & 1, np.ones((len(values), 1))], 1)
        threshold = BETA * (BITS + 1) - (weights < 0).sum(1)
        return np.asarray((bits @ weights.T >= threshold) @ outgoing)

    anywhere = at(rng.integers(2**BITS, size=2000))
    return ((at(numbers) - anywhere.mean()) / max(float(anywhere.std()), 1e-6)).astype(np.float32)


class SlowlyChangingRegression(PhasedFamily):
    """Bit-flipping regression: of 20 bits, 15 stay within a phase, and one of these flips from phase to phase.

    After Dohare et al. (arXiv 2306.13812), in the variant that flips one bit at a change, with phases of 30 to 50
    steps of a batch where theirs have 10,000 examples one by one. The last slow bit tells training instances from
    held-out ones, so 14 may flip. The five other bits take all their 32 values in each
    split: what is measured is tracking, not generalisation.
    """

    label_dtype = torch.float32
    score_name = ""
    max_phases, max_examples = PHASES, PHASES * 3 * FAST
    lengths = (30, 50)
    recipe = RecipeRange(schedules=(), batch=(4, 32), sgd_lr=(1e-5, 1e-1))

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, {"inputs": BITS, "hidden": 32, "outputs": 1}, np.zeros((1, 1), dtype=np.float32))
        self.module = build_module(lambda: BitsMLP(BITS, 32, 1), seed=0)
        self.inputs = torch.arange(2**BITS)[:, None]
        self.loss_cap = 4.0  # twice the squared error of guessing the value of another number

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """A target, and a walk of the slow bits; held-out ones have the last slow bit set, which never flips."""
        state = int(rng.integers(2 ** (SLOW - 1)))
        visited = []
        for _ in range(PHASES):
            visited.append(state + int(held_out) * 2 ** (SLOW - 1))
            state ^= 1 << int(rng.integers(SLOW - 1))
        numbers = np.array(visited)[:, None] + np.arange(FAST)[None] * 2**SLOW
        values = target(rng, numbers.reshape(-1)).reshape(numbers.shape)
        phases = []
        for row, value in zip(numbers, values, strict=True):
            orders = [rng.permutation(FAST) for _ in range(3)]
            rows, labels = [row[order] for order in orders], [value[order] for order in orders]
            phases.append(PhaseData(rows=(rows[0], rows[1], rows[2]), labels=(labels[0], labels[1], labels[2])))
        return Story(phases=phases)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Squared error of each example: (B, 1) and (B,) give (B,)."""
        return squared_error(outputs, labels)
