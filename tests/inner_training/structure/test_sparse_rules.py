"""Rules of sparse training beside their slow forms: counts to the weight, ties by place, schedules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inner_training.structure import slow_sparse as slow
from trimtab.inner_training.structure.sparse_rules import (
    ablated,
    cubic_sparsity,
    drop_fraction,
    exchanged,
    exchanged_between_units,
    highest,
    lowest,
    thinned,
)

RUNS = 3
seeds = st.integers(0, 2**31 - 1)


def layer(seed: int, *shape: int, coarse: bool) -> tuple[torch.Tensor, ...]:
    """Masks, weights and gains of some runs; coarse ones have many equal values."""
    draws = torch.Generator().manual_seed(seed)
    live = torch.rand(RUNS, *shape, generator=draws) < torch.rand(1, generator=draws)
    weights, gain = (torch.randn(RUNS, *shape, generator=draws) for _ in range(2))
    if coarse:
        weights, gain = weights.round(), gain.round()
    return live, weights * live, gain.abs(), torch.rand(RUNS, generator=draws)


@given(seed=seeds, size=st.integers(1, 30), coarse=st.booleans(), part=st.booleans())
@settings(max_examples=80, deadline=None)
def test_exchanges_are_those_of_the_loop(seed: int, size: int, coarse: bool, part: bool) -> None:
    live, weights, gain, share = layer(seed, size, coarse=coarse)
    exists = torch.ones_like(live)
    if part:
        exists = live | (torch.rand(live.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    after = exchanged(live, weights, gain, share, exists)
    assert torch.equal(after.sum(1), live.sum(1)) and not (after & ~exists).any()
    for run in range(RUNS):
        expected = slow.exchanged(live[run], weights[run], gain[run], float(share[run]), exists[run])
        assert torch.equal(after[run], expected)


@given(seed=seeds, units=st.integers(1, 7), inputs=st.integers(1, 7), coarse=st.booleans(), gamma=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_emptied_units_are_those_of_the_loop(seed: int, units: int, inputs: int, coarse: bool, gamma: float) -> None:
    live, weights, gain, share = layer(seed, units, inputs, coarse=coarse)
    exists, wanted = torch.ones_like(live), torch.full((RUNS,), gamma)
    after = exchanged_between_units(live, weights, gain, share, exists, wanted)
    assert torch.equal(after.sum((1, 2)), live.sum((1, 2)))
    assert not (after.any(2) & ~live.any(2)).any()  # units without weights stay so
    for run in range(RUNS):
        expected = slow.without_units(live[run], weights[run], gain[run], float(share[run]), float(wanted[run]))
        assert torch.equal(after[run], expected)


@given(seed=seeds, size=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_thinning_takes_the_smallest(seed: int, size: int) -> None:
    live, weights, _, share = layer(seed, size, coarse=True)
    most = (share * size).long()
    after = thinned(live, weights, most)
    assert torch.equal(after.sum(1), torch.minimum(most, live.sum(1))) and not (after & ~live).any()
    for run in range(RUNS):
        gone = live[run] & ~after[run]
        if gone.any() and after[run].any():
            assert weights[run].abs()[gone].max() <= weights[run].abs()[after[run]].min()


@pytest.mark.parametrize("choose", [lowest, highest])
def test_no_number_spoils_a_count(choose: object) -> None:
    scores = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, torch.inf, 1.0])
    for among in (torch.ones(6, dtype=torch.bool), torch.tensor([True, False, True, False, True, True])):
        for count in range(8):
            taken = choose(scores, among, torch.tensor(count))  # type: ignore[operator]
            assert int(taken.sum()) == min(count, int(among.sum())) and not (taken & ~among).any()


def test_no_gamma_ablates_nothing_and_a_full_layer_keeps_its_units() -> None:
    live, salient = torch.ones(1, 4, 3, dtype=torch.bool), torch.zeros(1, 4, 3, dtype=torch.bool)
    assert not ablated(live, salient, live, torch.zeros(1)).any()
    assert not ablated(live, salient, live, torch.ones(1)).any()  # nowhere else could the weights go
    live[:, :, 1:] = False
    assert ablated(live, salient, torch.ones_like(live), torch.ones(1)).tolist() == [[False, False, True, True]]


def test_schedules() -> None:
    steps = np.arange(0, 130, 10)
    share = drop_fraction(steps, 100.0, 0.4)
    assert share[0] == pytest.approx(0.4) and share[5] == pytest.approx(0.2) and not share[10:].any()
    assert (np.diff(share) <= 0).all()
    gone = cubic_sparsity(steps, 20.0, 100.0, 0.9)
    assert not gone[:3].any() and gone[6] == pytest.approx(0.9 * (1 - 0.5**3)) and (gone[10:] == 0.9).all()
    assert cubic_sparsity(5.0, 5.0, 5.0, 0.5) == 0 and cubic_sparsity(6.0, 5.0, 5.0, 0.5) == 0.5
