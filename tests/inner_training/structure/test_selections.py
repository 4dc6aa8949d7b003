"""Normalisations, dynamic range, overlap and correlation, against loops and scipy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.inner_training.structure import tiny
from trimtab.errors import UnknownNameError, UserError
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.normalisations import NORMALISATIONS, resolve_normalisation
from trimtab.inner_training.structure.selections import (
    COLLAPSED,
    agf_usable,
    dynamic_range,
    jaccard,
    kept,
    rank_correlation,
    selection_stability,
)

scores_of = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 7.5, 300.0]), min_size=2, max_size=9)


def evidence(size: int, seed: int = 0) -> Evidence:
    rng = torch.Generator().manual_seed(seed)
    return Evidence(square_in=torch.rand(size, 3, generator=rng), square_bias=torch.rand(size, generator=rng))


@pytest.mark.parametrize("name", NORMALISATIONS)
@settings(max_examples=40, deadline=None)
@given(values=scores_of, dead=st.booleans())
def test_normalising_keeps_the_order(name: str, values: list[float], dead: bool) -> None:
    scores = torch.tensor(values) * (0.0 if dead else 1.0)
    found = NORMALISATIONS[name].apply(scores, evidence(len(values)))
    assert found.isfinite().all()
    for i in range(len(values)):
        for j in range(len(values)):
            assert (found[i] < found[j]) == (scores[i] < scores[j])


def test_normalisations_by_hand() -> None:
    scores, one = torch.tensor([0.0, 1.0, 1.0, 6.0]), evidence(4)
    alive = replace(one, alive=torch.tensor([True, True, True, False]))
    trace = float(one.read("square_in").sum() + one.read("square_bias").sum())
    for name, expected in {
        "none": [0, 1, 1, 6], "mean": [0, 0.5, 0.5, 3], "max": [0, 1 / 6, 1 / 6, 1], "rank": [0, 0.5, 0.5, 1],
        "log": [math.log(6e-12), 0, 0, math.log(6)], "fisher": [0, 1 / trace, 1 / trace, 6 / trace],
    }.items():  # fmt: skip
        torch.testing.assert_close(NORMALISATIONS[name].apply(scores, one), torch.tensor(expected).float(), msg=name)
    torch.testing.assert_close(NORMALISATIONS["mean"].apply(scores, alive), torch.tensor([0, 1.5, 1.5, 9.0]))
    torch.testing.assert_close(NORMALISATIONS["max"].apply(scores, alive), torch.tensor([0.0, 1, 1, 6]))
    torch.testing.assert_close(NORMALISATIONS["rank"].apply(scores, alive), torch.tensor([0.0, 0.75, 0.75, 1]))
    signed = torch.tensor([-3.0, 1.0, 2.0, 0.0])
    torch.testing.assert_close(NORMALISATIONS["mean"].apply(signed, one), signed / 1.5)
    with pytest.raises(UnknownNameError, match="unknown normalisation 'ranks'; did you mean 'rank'"):
        resolve_normalisation("ranks")


def test_normalising_runs_side_by_side() -> None:
    runs = [tiny.evidence_of(seed) for seed in range(3)]
    for one in NORMALISATIONS.values():
        fields = {name: torch.stack([run.read(name) for run in runs]) for name in ("agf", "square_in", "square_bias")}
        together = one.apply(fields["agf"], Evidence(**fields))
        for index, run in enumerate(runs):
            torch.testing.assert_close(together[index], one.apply(run.read("agf"), run))


@settings(max_examples=40, deadline=None)
@given(values=scores_of)
def test_dynamic_range_is_that_of_numpy(values: list[float]) -> None:
    positive = [value for value in values if value > 0]
    expected = np.percentile(positive, 95) / np.percentile(positive, 5) if positive else 1.0
    both = torch.tensor([values, [0.0] * len(values)])
    assert dynamic_range(both).tolist() == pytest.approx([expected, 1.0], rel=1e-5)


def test_dynamic_range_of_those_alive_and_of_tiny_ones() -> None:
    scores, alive = torch.tensor([1.0, 2.0, 1e9]), torch.tensor([True, True, False])
    assert dynamic_range(scores, alive).item() == pytest.approx(1.95 / 1.05)
    assert dynamic_range(torch.tensor([1e-38, 1e30] * 20)).item() == pytest.approx(1e12)


def test_agf_is_given_up_when_its_range_has_collapsed() -> None:
    first = torch.tensor([149.4, 149.4, 5.0, 5.0, 1.0])
    now = torch.tensor([21.3, 150.0, 2.5, 3.0, 1.0])
    assert agf_usable(now, first).tolist() == [False, True, False, True, True]
    assert 5**COLLAPSED == pytest.approx(2.68, abs=0.01)
    assert agf_usable(torch.tensor(2.0), torch.tensor(100.0), share=0.0).item()


def test_kept_are_the_best_of_those_alive() -> None:
    scores = torch.tensor([[5.0, 1.0, 5.0, 3.0], [5.0, 1.0, 5.0, 3.0]])
    alive = torch.tensor([[True] * 4, [False, True, True, True]])
    found = kept(scores, torch.tensor([1, 2]), alive)
    assert found.tolist() == [[True, False, False, False], [False, False, True, True]]
    assert kept(scores, 9, alive).equal(alive) and not kept(scores, 0).any()


def test_overlap_and_stability() -> None:
    a, b, c = ([True, True, False, False], [True, False, True, False], [False, False, False, False])
    assert jaccard(torch.tensor([a, c, a]), torch.tensor([b, c, c])).tolist() == pytest.approx([1 / 3, 1, 0])
    selections = [torch.tensor([one, one]) for one in (a, b, a)]
    assert selection_stability(selections).tolist() == pytest.approx([(1 / 3 + 1 + 1 / 3) / 3] * 2)
    with pytest.raises(UserError, match="stability compares selections, and got 1; give at least two"):
        selection_stability(selections[:1])


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=9), off=st.integers(0, 3))
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]], off: int) -> None:
    one, two = torch.tensor(pairs).float().unbind(-1)
    alive = torch.arange(len(pairs)) >= min(off, len(pairs) - 2)
    first, second = one[alive].numpy(), two[alive].numpy()
    expected = 0.0 if np.ptp(first) == 0 or np.ptp(second) == 0 else stats.spearmanr(first, second).statistic
    assert rank_correlation(one, two, alive).item() == pytest.approx(expected, abs=1e-5)
