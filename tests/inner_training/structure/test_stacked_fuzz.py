"""Random sequences of edits, training, undoing, snapshots and resets, over all networks and update rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.inner_training.structure.populations import (
    NETWORKS,
    Picture,
    assert_held,
    differing,
    family_of,
    picture,
    stacked,
)
from trimtab.inner_training.structure.stacked_edit import StackedEdit
from trimtab.inner_training.update_rules import UPDATE_RULES

RULES, RUNS = tuple(UPDATE_RULES), 3
KINDS = ("prune", "grow", "reset", "undo", "undo", "train", "snapshot", "restore", "resume", "start")
METHODS = ("pairing", "random", "zero-out", "net2wider", "random-parked")
NAMES = tuple(NETWORKS)


class Sequence:
    """One random sequence in which every operation is checked for what it must leave alone."""

    def __init__(self, seed: int) -> None:
        self.draws = np.random.default_rng(seed)
        self.name, self.rules = NAMES[seed % len(NAMES)], tuple(self.draws.permutation(RULES)[:RUNS])
        self.structure = stacked(self.name, self.rules, RUNS, float(self.draws.choice([0.5, 1.0])))
        self.runs = self.structure.population
        self.edits: list[
            tuple[StackedEdit, Picture, bool]
        ] = []  # with what was before, and whether nothing else came since

    def mask(self) -> np.ndarray:
        return self.draws.random(RUNS) < 0.6

    def run(self, length: int) -> None:
        for _ in range(length):
            kind = str(self.draws.choice(KINDS))
            if kind not in ("prune", "grow", "reset", "undo"):
                self.edits = [(edit, before, False) for edit, before, _ in self.edits]
            getattr(self, f"do_{kind}")()
            assert_held(self.structure)
            self.check_gates()

    def check_gates(self) -> None:
        buffers = self.runs._feed.buffers
        for one in self.structure._flat:
            for name, where in one.gates.items():
                assert torch.equal((buffers[name][:, where] != 0).any(2), self.structure.active[one.name])

    def do_prune(self) -> None:
        criterion = str(self.draws.choice(["magnitude", "random", "agf"]))
        scores = self.structure.score(criterion)
        scope = str(self.draws.choice(["global", "layer"]))
        self.edit(lambda runs: self.structure.prune(self.draws.uniform(0, 0.6), scores, scope=scope, runs=runs))

    def do_grow(self) -> None:
        method, state = str(self.draws.choice(METHODS)), str(self.draws.choice(["zero", "transplant"]))
        share = self.draws.uniform(0, 0.6, RUNS)
        self.edit(lambda runs: self.structure.grow(share, method, newborn_state=state, runs=runs))

    def do_reset(self) -> None:
        def reset(runs: np.ndarray) -> StackedEdit:
            return self.structure.reset(
                {
                    name: torch.from_numpy(self.draws.random(active.shape) < 0.3) & torch.from_numpy(runs)[:, None]
                    for name, active in self.structure.active.items()
                }
            )

        self.edit(reset)

    def edit(self, make: Any) -> None:
        before, learner, runs = picture(self.structure), self.runs._learner, self.mask()
        edit = make(runs)
        assert differing(before, picture(self.structure), torch.from_numpy(~runs)) == []
        touched = edit._before.entries
        for old, new in zip(learner[:3], self.runs._learner[:3], strict=True):
            assert torch.equal(old[~touched], new[~touched])
        self.edits.append((edit, before, True))

    def do_undo(self) -> None:
        if not self.edits:
            return
        edit, before, latest = self.edits.pop()
        changed, now = edit.counts > 0, picture(self.structure)
        done = edit.undo()
        after = picture(self.structure)
        assert not (done & ~changed).any()
        assert differing(now, after, ~done) == []
        if latest:
            assert torch.equal(done, changed) and differing(before, after) == []

    def do_train(self) -> None:
        self.runs.advance(1)
        assert self.runs._learner.parameters.isfinite().all()

    def do_snapshot(self) -> None:
        mask = self.mask()
        self.runs.snapshot(mask)

    def do_restore(self) -> None:
        mask, keep, now = self.mask(), self.mask(), picture(self.structure)
        stable = self.runs._ring.stable, self.structure._ring.stable
        self.runs.restore(mask, keep=keep)
        chosen = torch.from_numpy(mask)
        for ring, present in zip(stable, (self.runs._learner, self.structure._units), strict=True):
            for then, value in zip(ring, present, strict=True):
                assert torch.equal(then[chosen], value[chosen])
        assert differing(now, picture(self.structure), ~chosen) == []

    def do_resume(self) -> None:
        self.runs.resume(self.mask())

    def do_start(self) -> None:
        mask, now = self.mask(), picture(self.structure)
        chosen, family = np.flatnonzero(mask), family_of(self.name)
        seeds = self.draws.integers(0, 1000, len(chosen))
        instances = [
            family.made(int(seed), self.rules[int(seed) % RUNS], float(self.draws.choice([0.5, 1.0]))) for seed in seeds
        ]
        self.runs.reset(chosen, instances)
        assert differing(now, picture(self.structure), torch.from_numpy(~mask)) == []


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_random_sequences(first: int) -> None:
    for seed in range(first, first + 10):
        Sequence(seed).run(8)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 100))
def test_many_random_sequences(first: int) -> None:
    for seed in range(first, first + 100):
        Sequence(seed).run(20)
