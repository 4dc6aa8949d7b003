"""Densities of layers: those of the source's loop, exact in all, and the same for any number of runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inner_training.structure import slow_sparse as slow
from trimtab.errors import UnknownNameError
from trimtab.inner_training.structure.densities import DISTRIBUTIONS, layer_shares, live_counts

SHAPES = st.lists(
    st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(*[st.integers(1, 6)] * 4)),
    min_size=1,
    max_size=5,
)


def ones(shapes: list[tuple[int, ...]], runs: int) -> dict[str, torch.Tensor]:
    return {str(place): torch.ones(runs, *shape, dtype=torch.bool) for place, shape in enumerate(shapes)}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@given(shapes=SHAPES, wanted=st.lists(st.floats(0.01, 1), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_loop(kind: str, shapes: list[tuple[int, ...]], wanted: list[float]) -> None:
    found = live_counts(ones(shapes, len(wanted)), torch.tensor(wanted), kind)
    for run, density in enumerate(wanted):
        shares = slow.densities(shapes, density, kind)
        for (_, counts), share, shape in zip(found.items(), shares, shapes, strict=True):
            exact = share * math.prod(shape)
            assert abs(int(counts[run]) - max(exact, 1)) <= 0.5 + 1e-3
            assert 1 <= int(counts[run]) <= math.prod(shape)


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6), density=st.floats(0.01, 1), seed=st.integers(0, 99)
)
@settings(max_examples=80, deadline=None)
def test_shares_make_up_the_density(sizes: list[int], density: float, seed: int) -> None:
    weights = torch.tensor(sizes).float()
    raw = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)) + 1e-3
    shares = layer_shares(weights, raw, torch.tensor(density))
    assert ((shares >= 0) & (shares <= 1)).all()
    assert float((shares * weights).sum()) == pytest.approx(density * sum(sizes), rel=1e-4)
    free = shares < 1
    assert torch.allclose((shares / raw)[free], (shares / raw)[free][:1].expand(int(free.sum())), rtol=1e-4)


def test_weights_of_inactive_units_do_not_count() -> None:
    exists = ones([(8, 6), (4, 8)], 2)
    exists["0"][1, 4:], exists["1"][1, :, 4:] = False, False
    found = live_counts(exists, torch.tensor([0.3, 0.3]), "erk")
    small = live_counts(ones([(4, 6), (4, 4)], 1), torch.tensor([0.3]), "erk")
    assert [int(one[1]) for one in found.values()] == [int(one[0]) for one in small.values()]


def test_unknown_distribution() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'erk'"):
        live_counts(ones([(2, 2)], 1), torch.tensor([0.5]), "erkk")
