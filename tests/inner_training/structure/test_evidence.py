"""Evidence: what it accepts, and averages over batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.inner_training.structure import tiny
from trimtab.errors import MismatchError, RangeError, UserError
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.evidence import NEEDS, SHAPES, Evidence, averaged, merged, of_runs, run_of


def test_every_field_has_axes_and_a_line() -> None:
    assert set(SHAPES) == NEEDS
    assert all(name in (Evidence.__doc__ or "") for name in NEEDS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"agf": torch.ones(3, dtype=torch.float64)}, "evidence 'agf' is torch.float64; it must be torch.float32"),
        ({"alive": torch.ones(3)}, "evidence 'alive' is torch.float32; it must be torch.bool"),
        ({"weights_in": torch.ones(3)}, r"evidence 'weights_in' has shape \(3,\); it needs the axes \['U', 'I'\]"),
        (
            {"agf": torch.ones(3), "mean": torch.ones(4)},
            "evidence 'agf' has 3 along U, but 'mean' has 4; they must agree",
        ),
        ({"output_cov": torch.ones(3, 4)}, "evidence 'output_cov' has 4 along U, but 'output_cov' has 3"),
        (
            {"bypass": torch.ones(4, 2), "weights_in": torch.ones(5, 3)},
            "evidence 'bypass' has 2 along I, but 'weights_in' has 3; they must agree",
        ),
        (
            {"weights_in": torch.ones(2, 5, 3), "agf": torch.ones(3, 5)},
            r"evidence 'agf' has the batch axes \(3,\), but 'weights_in' has \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        Evidence(**values)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(RangeError, match="batches of the evidence is 0"):
        Evidence(batches=0)
    with pytest.raises(MismatchError, match="evidence 'mean' was not gathered; gather agf, mean"):
        Evidence(agf=torch.ones(1)).read("mean")
    with pytest.raises(UserError, match="says nothing about units"):
        _ = Evidence(input_norm=torch.ones(3)).shape
    with pytest.raises(UserError, match="no batches to gather evidence from"):
        averaged([])
    with pytest.raises(MismatchError, match="only one of two batches of evidence has mean"):
        merged(Evidence(agf=torch.ones(1)), Evidence(agf=torch.ones(1), mean=torch.ones(1)))
    with pytest.raises(MismatchError, match="different fields"):
        of_runs([Evidence(agf=torch.ones(1)), Evidence(mean=torch.ones(1))])


@pytest.mark.parametrize("alive", [None, torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64)])
def test_batches_average_to_the_whole(alive: torch.Tensor | None) -> None:
    """Single examples, then two halves of different sizes, against all examples at once."""
    network = replace(tiny.make(3), alive=alive)
    parts = [tiny.gather(one) for one in network.examples()]
    whole, total = tiny.gather(network), averaged(parts)
    halves = merged(averaged(parts[:2]), averaged(parts[2:]))
    assert total.batches == halves.batches == 6
    for name, value in whole.given().items():
        if name.startswith("hv"):  # the mean of H g is not H of the mean times the mean of g
            assert not torch.allclose(total.read(name), value, rtol=0.05)
            continue
        torch.testing.assert_close(total.read(name), value, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(halves.read(name), value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_first_ten_batches_are_kept_apart() -> None:
    parts = [Evidence(agf=torch.tensor([float(i)]), agf_first=torch.tensor([float(i)])) for i in range(25)]
    total = averaged(parts)
    assert total.read("agf").item() == pytest.approx(12.0)
    assert total.read("agf_first").item() == pytest.approx(4.5)
    assert averaged(parts[:4]).read("agf_first").item() == pytest.approx(1.5)


def test_weights_are_the_last_ones() -> None:
    first, second = (
        Evidence(weights_in=torch.full((1, 1), value), agf=torch.full((1,), value)) for value in (1.0, 3.0)
    )
    total = merged(first, second)
    assert total.read("weights_in").item() == 3.0 and total.read("agf").item() == 2.0


def test_runs_are_stacked_and_found_again() -> None:
    parts = [tiny.evidence_of(seed) for seed in range(3)]
    stacked = of_runs(parts)
    assert stacked.shape == (3, 5) and stacked.live.all() and stacked.live.shape == (3, 5)
    for index, part in enumerate(parts):
        assert all(torch.equal(value, part.read(name)) for name, value in run_of(stacked, index).given().items())


def test_draws_of_a_seed_do_not_repeat() -> None:
    for source in (torch.arange(2), torch.Generator().manual_seed(1)):
        draws = Draws(source, (2,), torch.device("cpu"))
        first, second, third = draws.uniform(50), draws.uniform(5, 10), draws.signs(400)
        assert first.shape == (2, 50) and second.shape == (2, 5, 10)
        assert len({*first.flatten().tolist(), *second.flatten().tolist()}) > 195
        assert set(third.unique().tolist()) == {-1.0, 1.0} and third.mean().abs() < 0.2
    normal = Draws(torch.arange(2), (2,), torch.device("cpu")).normal(20000)
    assert normal.isfinite().all() and normal.mean().abs() < 0.03 and (normal.std() - 1).abs() < 0.02
    assert (normal.abs() > 3).float().mean().item() == pytest.approx(0.0027, abs=0.001)
